"""The detector as it is deployed: traced, quantized, in 16 bits, exported and compiled."""

import copy

import pytest
import torch

from detector.config import ModelConfig
from detector.model import build_model
from msda.testing import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, for trace and quantize
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning:torch"),
]

HEIGHT, WIDTH = 96, 128
NUM_TOKENS = 12 * 16 + 6 * 8 + 3 * 4
VARIANTS = {
    "multi_scale": dict(),
    "refine": dict(box_refine=True),
    # Every token is a query: rounding changes which ones are best, and their order.
    "two_stage": dict(box_refine=True, two_stage=True, num_queries=NUM_TOKENS),
    "dense": dict(attention="dense"),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
padded_or_not = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])

# Relative errors (Euclidean norm) of rounded models: five times the format's step, as each of some
# thirty layers in a row adds roundings of its own. One step (1.1 for int8) is what is seen.
LIMITS = {torch.float16: 2**-11 * 5, torch.bfloat16: 2**-8 * 5, torch.qint8: 2**-7 * 5}


def make_model(variant, **changes):
    """A small detector in which every parameter matters, for inference."""
    torch.manual_seed(1)
    sizes = dict(
        backbone="tiny", num_classes=5, num_feature_levels=3, hidden_dim=64, num_heads=4,
        num_encoder_layers=2, num_decoder_layers=2, feedforward_dim=96, num_queries=20,
    )  # fmt: skip
    model = build_model(ModelConfig(**sizes | VARIANTS[variant] | changes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.requires_grad_(False)


def batch(padded=False, height=HEIGHT, width=WIDTH):
    """Two images, the second one padded, and their mask."""
    images = torch.randn(2, 3, height, width)
    if not padded:
        return (images,)
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[1, height // 2 :] = mask[1, :, width * 3 // 4 :] = True
    return images.masked_fill(mask[:, None], 0), mask


def vectors(outputs):
    """(B, Q, 5 + 4): logits and boxes of each query."""
    return torch.cat([outputs["pred_logits"], outputs["pred_boxes"]], -1)


def assert_same(outputs, expected):
    """But for the order of sums."""
    assert outputs.keys() <= expected.keys()
    torch.testing.assert_close(vectors(outputs), vectors(expected), rtol=1e-4, atol=1e-5)


def assert_near(outputs, expected, limit):
    """Every query is near one of those expected, and really was rounded."""
    actual, exact = vectors(outputs), vectors(expected)
    assert actual.dtype == torch.float32
    nearest = torch.cdist(actual, exact).argmin(-1)  # (B, Q)
    matched = exact.take_along_dim(nearest[..., None], 1)
    assert 1e-5 < relative_error(actual, matched) < limit
    # Each has its own, apart from queries that are the same, as those of the padding are.
    for one, other in zip(nearest, torch.cdist(exact, exact).argmin(-1), strict=True):
        assert one.unique().numel() > 0.9 * other.unique().numel()


def saved_and_loaded(traced, path):
    torch.jit.save(traced, path)
    return torch.jit.load(path)


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@every_variant
@padded_or_not
def test_traced_model_is_the_same_at_any_size(variant, padded, tmp_path):
    model, inputs = make_model(variant), batch(padded)
    traced = saved_and_loaded(torch.jit.trace(model, inputs, strict=False), tmp_path / "model.pt")
    assert traced(*inputs).keys() == {"pred_logits", "pred_boxes"}
    for size in ((HEIGHT, WIDTH), (HEIGHT + 40, WIDTH), (160, 100)):
        if variant == "dense" and size != (HEIGHT, WIDTH):
            continue
        inputs = batch(padded, *size)
        assert_same(traced(*inputs), model(*inputs))


@every_variant
@padded_or_not
def test_quantized_model_is_near_the_exact_one(variant, padded):
    model, inputs = make_model(variant), batch(padded)
    expected = model(*inputs)
    small = quantized(model)
    assert_near(small(*inputs), expected, LIMITS[torch.qint8])
    kinds = {type(module) for module in small.modules()}
    assert torch.ao.nn.quantized.dynamic.Linear in kinds
    assert_same(model(*inputs), expected)  # the original is as it was


def test_quantized_model_is_traced_and_saved(tmp_path):
    small, inputs = quantized(make_model("refine")), batch()
    traced = saved_and_loaded(torch.jit.trace(small, inputs, strict=False), tmp_path / "model.pt")
    assert_same(traced(*inputs), small(*inputs))


@every_variant
@padded_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_model_of_16_bits_is_near_the_exact_one(variant, padded, dtype):
    model, (images, *mask) = make_model(variant), batch(padded)
    expected = model(images, *mask)
    small = copy.deepcopy(model).to(dtype)
    assert {
        tensor.dtype for tensor in small.state_dict().values() if tensor.is_floating_point()
    } == {dtype}
    assert_near(small(images.to(dtype), *mask), expected, LIMITS[dtype])


@every_variant
@padded_or_not
def test_model_under_autocast_is_near_the_exact_one(variant, padded):
    model, inputs = make_model(variant), batch(padded)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(*inputs)
    assert_near(outputs, model(*inputs), LIMITS[torch.bfloat16])


def test_traced_model_of_16_bits_is_the_same(tmp_path):
    model, (images,) = make_model("refine").bfloat16(), batch()
    inputs = (images.bfloat16(),)
    traced = saved_and_loaded(torch.jit.trace(model, inputs, strict=False), tmp_path / "model.pt")
    assert_same(traced(*inputs), model(*inputs))


@pytest.mark.parametrize("variant", ["two_stage", "dense"])
def test_exported_model_is_the_same_once_saved(variant, tmp_path):
    model, inputs = make_model(variant), batch(padded=True)
    torch.export.save(torch.export.export(model, inputs), tmp_path / "model.pt2")
    assert_same(torch.export.load(tmp_path / "model.pt2").module()(*inputs), model(*inputs))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_model_is_the_same(backend):
    torch.compiler.reset()
    amp = backend == "aot_eager"  # the other one takes long for little else
    model, inputs = make_model("refine", num_encoder_layers=1), batch(padded=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        outputs = torch.compile(model, fullgraph=True, backend=backend)(*inputs)
    if amp:
        assert_near(outputs, model(*inputs), LIMITS[torch.bfloat16])
    else:
        assert_same(outputs, model(*inputs))
