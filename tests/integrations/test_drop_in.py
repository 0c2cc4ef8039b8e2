"""`import msda.drop_in` gives research code the compiled operator that it imports, and says so."""

import importlib
import re
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch

from msda import ops
from msda.reference import ms_deform_attn_reference
from msda.testing import make_inputs
from tests.helpers.results import assert_close
from tests.integrations.stand_in_packages import LIBRARIES, PACKAGES, REAL, USERS, status

SHAPES = [(5, 7), (3, 2)]


@pytest.fixture
def operator(drop_in):
    """What `import MultiScaleDeformableAttention` gives."""
    drop_in.install()
    return importlib.import_module("MultiScaleDeformableAttention")


@pytest.fixture
def libraries(write):
    return write(PACKAGES)


def problem(dtype=torch.float64, point_dtype=None, device="cpu", **sizes):
    """value, shapes, start index, locations, weights; the floating-point ones are leaves."""
    sizes = dict(batch=7, num_queries=5, num_heads=2, head_dim=4, num_points=3) | sizes
    inputs = make_inputs(SHAPES, dtype=dtype, point_dtype=point_dtype, device=device, **sizes)
    value, locations, weights = (tensor.requires_grad_() for tensor in inputs.tensors())
    shapes = torch.tensor(SHAPES, device=device)
    start = torch.tensor([0, 35], device=device)
    return value, shapes, start, locations, weights


def exact(arguments, grad_output):
    """Output and gradients by the float64 reference on the CPU, from the same rounded numbers."""
    value, shapes, _, locations, weights = arguments
    leaves = [
        tensor.detach().double().cpu().requires_grad_() for tensor in (value, locations, weights)
    ]
    output = ms_deform_attn_reference(leaves[0], shapes, None, *leaves[1:])
    return output, *torch.autograd.grad(output, leaves, grad_output.double().cpu())


def reason(report, module):
    return next(entry.reason for entry in report if entry.module == module)


# ---- the two functions ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", [64, 3])
def test_both_functions_agree_with_the_reference_for_any_batch_and_step(operator, device, step):
    arguments = problem(device=device)
    grad_output = torch.randn(7, 5, 8, dtype=torch.float64, device=device)
    expected = exact(arguments, grad_output)

    output = operator.ms_deform_attn_forward(*arguments, step)
    assert not output.requires_grad
    gradients = operator.ms_deform_attn_backward(*arguments, grad_output, step)
    for ours, reference in zip((output, *gradients), expected, strict=True):
        assert_close(ours, reference)


def test_arguments_can_be_given_by_the_names_of_the_original(operator):
    value, shapes, start, locations, weights = problem()
    arguments = dict(
        value=value,
        spatial_shapes=shapes,
        level_start_index=start,
        sampling_loc=locations,
        attn_weight=weights,
        im2col_step=64,
    )
    grad_output = torch.randn(7, 5, 8, dtype=torch.float64)
    output, *expected = exact((value, shapes, start, locations, weights), grad_output)
    assert_close(operator.ms_deform_attn_forward(**arguments), output)
    gradients = operator.ms_deform_attn_backward(**arguments, grad_output=grad_output)
    assert_close(gradients[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_locations_in_the_16_bits_of_value_are_accepted(operator, device, dtype):
    arguments = problem(dtype, dtype, device)
    grad_output = torch.randn(7, 5, 8, device=device).to(dtype)
    results = (
        operator.ms_deform_attn_forward(*arguments, 64),
        *operator.ms_deform_attn_backward(*arguments, grad_output, 64),
    )
    for ours, reference in zip(results, exact(arguments, grad_output), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, reference)


def test_a_gradient_that_is_not_contiguous_is_read_right(operator):
    arguments = problem()
    grad_output = torch.randn(8, 5, 1, dtype=torch.float64).transpose(0, 2).expand(7, 5, 8)
    assert not grad_output.is_contiguous()
    gradients = operator.ms_deform_attn_backward(*arguments, grad_output, 64)
    for ours, reference in zip(gradients, exact(arguments, grad_output)[1:], strict=True):
        assert_close(ours, reference)


def test_the_pure_pytorch_backend_serves_both_functions(operator, monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "reference")
    monkeypatch.setattr(ops, "BACKEND_REASON", "MSDA_BACKEND=reference")
    arguments = problem()
    grad_output = torch.randn(7, 5, 8, dtype=torch.float64)
    output, *gradients = exact(arguments, grad_output)
    with torch.no_grad():
        ours = operator.ms_deform_attn_backward(*arguments, grad_output, 64)
    torch.testing.assert_close(operator.ms_deform_attn_forward(*arguments, 64), output)
    for gradient, reference in zip(ours, gradients, strict=True):
        assert not gradient.requires_grad
        torch.testing.assert_close(gradient, reference)


def test_wrong_shapes_are_refused_in_a_sentence(operator):
    value, shapes, start, locations, weights = problem()
    grad_output = torch.randn(7, 5, 8, dtype=torch.float64)
    message = r"^sampling_locations must have shape .* = \(7, 5, 2, 2, 3, 2\), got \(7, 5, 1, 2"
    for function, rest in (
        (operator.ms_deform_attn_forward, (64,)),
        (operator.ms_deform_attn_backward, (grad_output, 64)),
    ):
        with pytest.raises(RuntimeError, match=message):
            function(value, shapes, start, locations[:, :, :1], weights, *rest)
        with pytest.raises(RuntimeError, match=r"^spatial_shapes must cover the S = 41 keys"):
            function(value, shapes + 1, start, locations, weights, *rest)
    with pytest.raises(RuntimeError, match=r"^grad_output must have shape"):
        operator.ms_deform_attn_backward(
            value, shapes, start, locations, weights, grad_output[:, :2], 64
        )


# ---- in the libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize("library", USERS)
def test_a_library_without_its_extension_trains_with_ours(drop_in, libraries, library):
    drop_in.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        user = importlib.import_module(USERS[library])
    arguments = problem()
    output = user.Attention.apply(*arguments, 3)
    grad_output = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (arguments[0], arguments[3], arguments[4]), grad_output)
    for ours, reference in zip((output, *gradients), exact(arguments, grad_output), strict=True):
        assert_close(ours, reference)


@pytest.mark.parametrize("library", ["groundingdino", "detrex", "mmcv"])
def test_what_a_library_runs_on_a_cpu_becomes_ours_and_differentiable(drop_in, libraries, library):
    drop_in.install()
    user = importlib.import_module(USERS[library])
    value, shapes, _, locations, weights = arguments = problem()
    output = user.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    grad_output = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (value, locations, weights), grad_output)
    for ours, reference in zip((output, *gradients), exact(arguments, grad_output), strict=True):
        assert_close(ours, reference)
    drop_in.uninstall()
    assert user.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights) == "slow"


def test_a_wrapped_extension_compiles_without_a_graph_break(drop_in, libraries):
    drop_in.install()
    attention = importlib.import_module(USERS["research"]).Attention
    arguments = problem()
    compiled = torch.compile(
        lambda *tensors: attention.apply(*tensors, 64), fullgraph=True, backend="eager"
    )
    output = compiled(*arguments)
    grad_output = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (arguments[0], arguments[3], arguments[4]), grad_output)
    for ours, reference in zip((output, *gradients), exact(arguments, grad_output), strict=True):
        assert_close(ours, reference)


def test_the_rest_of_mmcv_imports_and_names_what_is_missing_when_called(drop_in, libraries):
    drop_in.install()
    mmcv_ops = importlib.import_module("mmcv.ops")
    assert mmcv_ops.info.get_compiler_version() == "not compiled"
    with pytest.raises(NotImplementedError, match=r"^mmcv\._ext\.nms must come from mmcv"):
        mmcv_ops.boxes.nms(torch.rand(3, 4))


def test_the_report_says_what_was_patched_and_imports_nothing(drop_in, libraries):
    report = drop_in.install()
    assert not any(name.partition(".")[0] in LIBRARIES[1:] for name in sys.modules)
    expected = {
        "MultiScaleDeformableAttention": "provided",
        "mmcv._ext": "on import",
        "mmcv.ops.multi_scale_deform_attn": "on import",
        "groundingdino._C": "on import",
        "groundingdino.models.GroundingDINO.ms_deform_attn": "on import",
        "grounding_dino.groundingdino._C": "absent",
        "grounding_dino.groundingdino.models.GroundingDINO.ms_deform_attn": "absent",
        "detrex._C": "on import",
        "detrex.layers.multi_scale_deform_attn": "on import",
        "DCNv4.ext": "on import",
    }
    assert status(report) == expected
    for user in [*USERS.values(), "DCNv4.functions.flash"]:
        importlib.import_module(user)
    patched = drop_in.report()
    assert status(patched) == {
        name: "provided" if before == "on import" else before for name, before in expected.items()
    }
    printed = str(patched).splitlines()
    assert len(printed) == 9
    assert printed[0] == (
        f"{'MultiScaleDeformableAttention':49}  provided    used 0 times; "
        "no MultiScaleDeformableAttention is installed"
    )
    assert printed[-1] == "not installed: grounding_dino"


def test_installing_twice_changes_nothing_and_uninstalling_undoes_it(drop_in, libraries):
    before = list(sys.meta_path)
    first = drop_in.install()
    finders, module = list(sys.meta_path), sys.modules["MultiScaleDeformableAttention"]
    assert drop_in.install() == first
    assert sys.meta_path == finders
    assert sys.modules["MultiScaleDeformableAttention"] is module

    importlib.import_module(USERS["groundingdino"])
    package = sys.modules["groundingdino"]
    assert hasattr(package, "_C")
    drop_in.uninstall()
    assert sys.meta_path == before
    assert not hasattr(package, "_C")
    for name in ("MultiScaleDeformableAttention", "groundingdino._C"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    assert callable(module.ms_deform_attn_forward)  # for who holds it


def test_a_library_imported_before_is_patched_and_the_report_names_what_it_misses(
    drop_in, libraries
):
    with pytest.warns(UserWarning, match="no compiled operator"):
        user = importlib.import_module(USERS["groundingdino"])
    report = drop_in.install()
    ours = user.multi_scale_deformable_attn_pytorch.__wrapped__
    assert ours is drop_in.multi_scale_deformable_attn_pytorch
    assert "has no _C, because it was imported before" in reason(report, user.__name__)


def test_an_import_error_of_a_library_itself_is_its_own(drop_in, write):
    write({"detrex/layers/multi_scale_deform_attn.py": "import no_such_module"})
    drop_in.install()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module(USERS["detrex"])


# ---- how often they are used ---------------------------------------------------------------------


@pytest.mark.parametrize("library", USERS)
def test_the_report_counts_what_was_used(drop_in, libraries, library):
    drop_in.install()
    user = importlib.import_module(USERS[library])
    arguments = problem()
    Attention = user.Attention
    Attention.apply(*arguments, 64).sum().backward()
    Attention.apply(*arguments, 64)
    counts = {entry.module: entry.calls for entry in drop_in.report() if entry.calls}
    extension = {
        "research": "MultiScaleDeformableAttention",
        "groundingdino": "groundingdino._C",
        "detrex": "detrex._C",
        "mmcv": "mmcv._ext",
    }[library]
    assert counts == {extension: 3}  # a backward is one, too
    assert "used 3 times; no " in str(drop_in.report())
    # What a bare `except` of the library would hide does not count.
    with pytest.raises(RuntimeError):
        Attention.apply(arguments[0][:, :-1], *arguments[1:], 64)
    assert {entry.module: entry.calls for entry in drop_in.report() if entry.calls} == counts
    drop_in.uninstall()
    assert not any(entry.calls for entry in drop_in.report())


# ---- DCNv4 ---------------------------------------------------------------------------------------


def flash_definition(value, shapes, packed, num_points):
    """Of each head's axis, two thirds are locations and one third logits, level by level."""
    num_samples = len(shapes) * num_points
    locations = packed[..., : 2 * num_samples].unflatten(-1, (len(shapes), num_points, 2))
    weights = packed[..., 2 * num_samples :].softmax(-1).unflatten(-1, (len(shapes), num_points))
    return ms_deform_attn_reference(value, shapes, None, locations, weights)


@pytest.mark.parametrize("num_points", [1, 3, 8])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_dcnv4s_attention_agrees_with_its_definition(drop_in, libraries, device, dtype, num_points):
    drop_in.install()
    attention = importlib.import_module("DCNv4.functions.flash").Attention
    value, shapes, start, locations, _ = problem(
        dtype, dtype, device, batch=3, num_points=num_points
    )
    logits = 2 * torch.randn(3, 5, 2, 2 * num_points, device=device)
    packed = torch.cat([locations.detach().flatten(3), logits.to(dtype)], -1).requires_grad_()
    output = attention.apply(value, shapes, start, packed, 64, num_points)
    grad_output = torch.randn(3, 5, 8, device=device).to(dtype)
    gradients = torch.autograd.grad(output, (value, packed), grad_output)

    leaves = [tensor.detach().double().cpu().requires_grad_() for tensor in (value, packed)]
    expected = flash_definition(leaves[0], SHAPES, leaves[1], num_points)
    exact = torch.autograd.grad(expected, leaves, grad_output.double().cpu())
    split = [4 * num_points, 2 * num_points]
    # The gradients of locations and of logits are of different sizes: each by itself.
    ours = (output, gradients[0], *gradients[1].split(split, -1))
    theirs = (expected, exact[0], *exact[1].split(split, -1))
    for result, reference in zip(ours, theirs, strict=True):
        assert result.dtype == dtype
        assert_close(result, reference)


def test_dcnv4s_packed_axis_is_checked_and_its_convolution_is_named(drop_in, libraries):
    drop_in.install()
    extension = importlib.import_module("DCNv4.functions.flash").ext
    value, shapes, start, _, _ = problem()
    message = r"^sampling_loc_attn must have shape .* L \* K \* 3 = 18, got \(7, 5, 2, 17\)"
    for function, more in (("forward", ()), ("backward", (torch.rand(7, 5, 8),))):
        with pytest.raises(ValueError, match=message):
            getattr(extension, f"flash_deform_attn_{function}")(
                value, shapes, start, torch.rand(7, 5, 2, 17), *more, 64, 3, 8, 512
            )
    with pytest.raises(NotImplementedError, match=r"^DCNv4\.ext\.dcnv4_forward must come from"):
        extension.dcnv4_forward(value)


# ---- extensions that are there -------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True], ids=["found", "loaded"])
@pytest.mark.parametrize("name", ["MultiScaleDeformableAttention", "groundingdino._C"])
def test_a_real_extension_is_replaced_only_when_asked(drop_in, write, name, loaded):
    path = write({name.replace(".", "/") + ".py": REAL}) / (name.replace(".", "/") + ".py")
    if loaded:
        importlib.import_module(name)
    report = drop_in.install()
    assert status(report)[name] == "left alone"
    assert str(path) in reason(report, name)
    assert (name in sys.modules) == loaded
    module = importlib.import_module(name)
    assert module.ms_deform_attn_forward() == "real"
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__module__ != "msda.drop_in"

    report = drop_in.install(overwrite=True)
    assert status(report)[name] == "provided"
    assert str(path) in reason(report, name)
    assert module.ms_deform_attn_forward.__wrapped__ is drop_in.ms_deform_attn_forward
    assert module.ms_deform_attn_backward.__wrapped__ is drop_in.ms_deform_attn_backward
    assert module.something_else() == "kept"

    drop_in.uninstall()
    assert module.ms_deform_attn_forward() == module.ms_deform_attn_backward() == "real"
    assert sys.modules[name] is module


def test_a_real_extension_is_replaced_on_import_when_asked_before(drop_in, write):
    write({"detrex/_C.py": REAL})
    assert status(drop_in.install(overwrite=True))["detrex._C"] == "on import"
    module = importlib.import_module("detrex._C")
    assert module.ms_deform_attn_forward.__wrapped__ is drop_in.ms_deform_attn_forward
    assert module.something_else() == "kept"


@pytest.mark.parametrize("name", ["MultiScaleDeformableAttention", "groundingdino._C"])
@pytest.mark.parametrize(
    ("suffix", "content", "error"),
    [
        (EXTENSION_SUFFIXES[0], b"a library of another torch", "file too short|invalid ELF|magic"),
        (".py", b"import a_module_of_another_python", "No module named 'a_module_of_another"),
    ],
    ids=["library", "script"],
)
def test_an_extension_that_does_not_load_is_replaced_and_the_report_says_why(
    drop_in, write, name, suffix, content, error
):
    file = name.replace(".", "/") + suffix
    path = write({file: content * 100 if suffix != ".py" else content}) / file
    assert status(drop_in.install())[name] == "left alone"
    module = importlib.import_module(name)
    assert module.ms_deform_attn_forward.__wrapped__ is drop_in.ms_deform_attn_forward
    report = drop_in.report()
    assert status(report)[name] == "provided"
    assert module.__spec__.origin == "msda.drop_in"
    text = reason(report, name)
    assert text.startswith(f"importing {path} failed: ")
    assert re.search(error, text)
