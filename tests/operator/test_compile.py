"""Module and detector compiled, exported, packaged and traced, for any image size."""

import io
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import msda
from detector.config import ModelConfig
from detector.model import build_model
from msda.testing import OPERATOR, call, leaves, make_inputs
from tests.helpers.cases import every_form
from tests.helpers.results import assert_same_bits, compute

pytestmark = pytest.mark.not_on_executor("what is compiled or exported calls torch's operator")

CPP = Path(__file__).with_name("aot_loader")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(autouse=True)
def forget_compiled_code(set_threads):
    set_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class TwoMaps(nn.Module):
    """The module on two feature maps, from which it takes the shapes of its levels."""

    def __init__(self):
        super().__init__()
        self.attention = msda.MSDeformAttn(16, 2, 2, 2)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.1)
        nn.init.normal_(self.attention.attention_weights.weight)

    def forward(self, query, reference, fine, coarse):
        maps = (fine, coarse)
        shapes = [(feature_map.shape[2], feature_map.shape[3]) for feature_map in maps]
        features = torch.cat([feature_map.flatten(2) for feature_map in maps], 2)
        return self.attention(query, reference, features.transpose(1, 2), shapes)


# Batch, queries, and the size of each map. Sizes that are equal in the first call, by chance too,
# are taken by torch.compile to be equal in all.
MAP_SIZES = [(3, 5, (7, 9), (6, 11)), (2, 6, (9, 8), (5, 2)), (4, 4, (11, 3), (7, 3))]


def two_maps(batch, queries, *sizes):
    maps = [torch.randn(batch, 16, *size) for size in sizes]
    return torch.rand(batch, queries, 16), torch.rand(batch, queries, 2, 2), *maps


def make_detector():
    model = build_model(
        ModelConfig(
            backbone="tiny",
            num_classes=3,
            hidden_dim=32,
            num_heads=2,
            num_encoder_layers=1,
            num_decoder_layers=1,
            feedforward_dim=16,
            num_queries=6,
            dropout=0.0,
        )
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


# No level has a side of one pixel: PyTorch makes code of its own for that.
IMAGE_SIZES = [(2, 96, 128), (3, 160, 97), (2, 131, 224)]


def padded_images(batch, height, width):
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[-1, height * 2 // 3 :] = True
    return torch.randn(batch, 3, height, width), mask


def assert_detections_close(actual, expected):
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


# ---- torch.compile -------------------------------------------------------------------------------


def test_one_graph_of_the_detector_trains_on_all_image_sizes():
    model = make_detector()
    # What breaks a graph or compiles it again is found by any backend, and this is the quickest.
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)

    def gradients(model, batch):
        outputs = model(*batch)
        loss = outputs["pred_logits"].square().mean() + outputs["pred_boxes"].square().mean()
        names, parameters = zip(*model.named_parameters(), strict=True)
        return outputs, torch.autograd.grad(loss, parameters), names

    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in IMAGE_SIZES:
            batch = padded_images(*sizes)
            expected, expected_gradients, _ = gradients(model, batch)
            outputs, actual_gradients, names = gradients(fast, batch)
            assert_detections_close(outputs, expected)
            for name, actual, other in zip(
                names, actual_gradients, expected_gradients, strict=True
            ):
                torch.testing.assert_close(actual, other, rtol=1e-3, atol=1e-5, msg=name)
    assert counter.frame_count == 1


def test_one_graph_serves_all_shapes_in_a_tensor():
    module = msda.MSDeformAttn(16, 2, 2, 2)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, queries, *sizes in MAP_SIZES:
            shapes = torch.tensor(sizes)
            num_keys = int(shapes.prod(1).sum())
            query, reference, *_ = two_maps(batch, queries, *sizes)
            features = torch.randn(batch, num_keys, 16)
            expected = module(query, reference, features, shapes)
            torch.testing.assert_close(fast(query, reference, features, shapes), expected)
    assert counter.frame_count == 1


@every_form
def test_the_reference_backend_compiles_to_one_graph(make, monkeypatch):
    monkeypatch.setattr(msda.ops, "BACKEND", "reference")
    monkeypatch.setattr(msda.ops, "BACKEND_REASON", "MSDA_BACKEND=reference")
    counter = CompileCounterWithBackend("eager")
    fast = {
        kind: torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        for kind, function in OPERATOR.items()
    }
    for batch, queries, *shapes in MAP_SIZES:
        inputs = make(shapes, batch=batch, num_queries=queries, num_heads=2, head_dim=8)
        inputs = leaves(inputs)
        torch.testing.assert_close(call(fast, inputs), compute(inputs))
    assert counter.frame_count == 1


def test_the_reference_backend_refuses_wrong_input_while_it_compiles(monkeypatch):
    monkeypatch.setattr(msda.ops, "BACKEND", "reference")
    monkeypatch.setattr(msda.ops, "BACKEND_REASON", "MSDA_BACKEND=reference")
    value, *points = make_inputs([(4, 6)], num_queries=3).tensors()
    fast = torch.compile(msda.ms_deform_attn, fullgraph=True, backend="eager")
    message = r"spatial_shapes must cover the S = 24 keys of value, got 20 pixels: \(4, 5\)"
    with pytest.raises(RuntimeError, match=message):
        fast(value, [(4, 5)], None, *points)


# ---- torch.export --------------------------------------------------------------------------------

both_ways = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def export_two_maps(model, strict=False):
    batch, queries = Dim("batch"), Dim("queries")
    fine, coarse = ({0: batch, 2: Dim(f"{name}_h"), 3: Dim(f"{name}_w")} for name in ("a", "b"))
    per_query = {0: batch, 1: queries}
    return torch.export.export(
        model,
        two_maps(*MAP_SIZES[0]),
        dynamic_shapes=(per_query, per_query, fine, coarse),
        strict=strict,
    )


@both_ways
def test_exported_module_takes_any_batch_and_map_size(strict):
    model = TwoMaps()
    exported = saved_and_loaded(export_two_maps(model, strict))
    for sizes in MAP_SIZES:
        arguments = two_maps(*sizes)
        torch.testing.assert_close(exported(*arguments), model(*arguments))


@both_ways
def test_exported_detector_takes_any_batch_and_image_size(strict):
    model = make_detector()
    images, mask = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}
    program = torch.export.export(
        model, padded_images(*IMAGE_SIZES[0]), dynamic_shapes=(images, mask), strict=strict
    )
    exported = saved_and_loaded(program)
    with torch.no_grad():
        for sizes in IMAGE_SIZES:
            batch = padded_images(*sizes)
            assert_detections_close(exported(*batch), model(*batch))


# ---- packages of AOTInductor ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A model, and a file that AOTInductor made of it."""
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    model = TwoMaps()
    torch._inductor.aoti_compile_and_package(export_two_maps(model), package_path=str(path))
    return model, path


@needs_compiler
def test_package_runs_from_python(package):
    model, path = package
    packaged = torch._inductor.aoti_load_package(str(path))
    with torch.no_grad():
        for sizes in MAP_SIZES:
            arguments = two_maps(*sizes)
            torch.testing.assert_close(packaged(*arguments), model(*arguments))


@needs_compiler
def test_package_runs_from_cpp_without_python(package, tmp_path):
    model, path = package
    build = tmp_path / "a build"
    prefixes = f"{msda.__path__[0]};{torch.utils.cmake_prefix_path}"
    configure = ["cmake", "-S", str(CPP), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_PREFIX_PATH={prefixes}", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (configure, ["cmake", "--build", str(build)]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    program = build / "aot_loader"

    linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True).stdout
    assert "libpython" not in linked
    for sizes in MAP_SIZES:
        arguments = two_maps(*sizes)
        torch.save(list(arguments), tmp_path / "inputs.pt")
        files = [str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
        subprocess.run([str(program), str(path), *files], check=True)
        (output,) = torch.load(tmp_path / "outputs.pt", weights_only=False)
        torch.testing.assert_close(output, model(*arguments).detach())


# ---- torch.jit.trace -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_module_runs_after_saving_and_differentiates(device):
    module = msda.MSDeformAttn(16, 2, 2, 2).to(device)
    nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    shapes = torch.tensor([(4, 6), (2, 3)])

    def arguments(batch, queries):
        tensors = torch.rand(batch, queries, 16), torch.rand(batch, queries, 2, 2)
        features = torch.randn(batch, 30, 16)
        return *(tensor.to(device) for tensor in (*tensors, features)), shapes

    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, arguments(2, 5)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    others = arguments(3, 7)
    assert_same_bits(traced(*others), module(*others))
    traced(*others).square().sum().backward()
    module(*others).square().sum().backward()
    for (name, one), other in zip(traced.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_traced_model_may_take_sizes_from_its_maps(backend, monkeypatch):
    monkeypatch.setattr(msda.ops, "BACKEND", backend)
    monkeypatch.setattr(msda.ops, "BACKEND_REASON", f"MSDA_BACKEND={backend}")
    model = TwoMaps()
    first, *others = (two_maps(*sizes) for sizes in [*MAP_SIZES[:1], *MAP_SIZES])
    traced = torch.jit.trace(model, first, check_trace=False)
    # The reference reads its shapes, so that its trace holds for one size.
    for arguments in others if backend == "native" else others[:1]:
        assert_same_bits(traced(*arguments), model(*arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_is_refused_in_a_sentence():
    message = r"^MSDeformAttn must be traced \(torch\.jit\.trace\), .*, got torch\.jit\.script$"
    for model in (msda.MSDeformAttn(16, 2, 2, 2), TwoMaps()):
        with pytest.raises(NotImplementedError, match=message):
            torch.jit.script(model)
