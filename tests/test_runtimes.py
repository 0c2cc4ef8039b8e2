"""Our nodes in OpenVINO and ONNX Runtime: the operator's numbers, in models of any size."""

import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from runtimes import onnxruntime_library, openvino_library
from test_detector_model import padded_batch, randomise, small_config
from test_onnx import (
    FORMS,
    SHAPES,
    SIZES,
    SMALL,
    AttentionOverMaps,
    Calls,
    attributes_of,
    export,
    module_arguments,
    operators,
    tensors_of,
)

import msda
import msda.onnx
from conftest import assert_close, compute
from detector.model import build_model
from msda import ops
from msda.testing import make_inputs

NODES = ("MSDeformAttn", "MSDeformAttnFused")


def export_nodes(model, arguments, **options):
    return export(model, arguments, table=msda.onnx.translations(as_node="msda"), **options)


# ---- the runtimes --------------------------------------------------------------------------------


class InOpenVINO:
    """A model in OpenVINO, in float32 as it was exported."""

    def __init__(self, program, path, library, threads=1):
        openvino = pytest.importorskip("openvino")
        import msda.openvino

        core = openvino.Core()
        msda.openvino.register(core, library, num_threads=threads)
        onnx.save(program, path)
        self.model = core.read_model(path)
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        self.compiled = core.compile_model(self.model, "CPU", options)

    def __call__(self, tensors):
        outputs = self.compiled([tensor.numpy() for tensor in tensors])
        return [torch.from_numpy(np.array(outputs[i])) for i in range(len(outputs))]


class InONNXRuntime:
    """A model in ONNX Runtime."""

    def __init__(self, program, path, library, threads=1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(library)
        self.session = onnxruntime.InferenceSession(
            program.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, tensors):
        names = [argument.name for argument in self.session.get_inputs()]
        arrays = [tensor.numpy() for tensor in tensors]
        outputs = self.session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(output) for output in outputs]


RUNTIMES = {
    "openvino": (InOpenVINO, lambda: None),
    "openvino_library": (InOpenVINO, openvino_library),
    "onnxruntime_library": (InONNXRuntime, onnxruntime_library),
}


@pytest.fixture(params=RUNTIMES)
def load(request, tmp_path):
    """Load a program into a runtime that has our nodes."""
    runtime, library = RUNTIMES[request.param]
    if runtime is InOpenVINO:
        pytest.importorskip("openvino")
    path = library()
    return lambda program, **options: runtime(program, tmp_path / "m.onnx", path, **options)


# ---- the nodes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_forms():
    """One graph with a call of each form."""
    arguments = [tensors_of(inputs) for inputs, _ in FORMS.values()]
    program = export_nodes(Calls(list(FORMS.values())), (arguments,))
    return program, [tensor for tensors in arguments for tensor in tensors]


def test_each_call_is_one_node_with_the_attributes_that_it_needs(all_forms):
    program, _ = all_forms
    nodes = [node for node in program.graph.node if node.domain == "msda"]
    assert len(nodes) == len(FORMS)
    assert {node.op_type for node in nodes} == set(NODES)
    assert set(operators(program)) <= {*NODES, "Cast"}  # 16-bit points are made 32 bits
    for node, (form, (inputs, options)) in zip(nodes, FORMS.items(), strict=True):
        expected = {} if inputs.num_points is None else {"num_points": inputs.num_points}
        if options:
            expected["nearest"] = 1
        if isinstance(inputs.num_points, int):
            expected.pop("num_points")
        assert attributes_of(node) == expected, form


def test_other_nodes_and_the_reference_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"^as_node must be None or, .*, got 'other'$"):
        msda.onnx.translations(as_node="other")
    with pytest.raises(ValueError, match=r"^as_node must be None or, for 'onnx', .*, got 'msda'$"):
        msda.onnx.translations("tensorrt", as_node="msda")
    monkeypatch.setattr(ops, "BACKEND", "reference")
    with pytest.raises(ValueError, match=r"^as_node must be None where msda runs its reference"):
        msda.onnx.translations(as_node="msda")


@pytest.mark.parametrize("threads", [1, 2])
def test_every_form_has_the_numbers_of_the_operator(all_forms, load, threads):
    program, tensors = all_forms
    outputs = load(program, threads=threads)(tensors)
    for output, (inputs, options) in zip(outputs, FORMS.values(), strict=True):
        expected = compute(inputs, **options)
        assert output.dtype == expected.dtype
        # OpenVINO's plugin for CPUs computes float64 in float32.
        limit = 1e-6 if output.dtype == torch.float64 else 0
        assert_close(output, expected, limit)


@torch.no_grad()
def test_a_module_takes_any_batch_queries_and_image_size(load):
    model = randomise(AttentionOverMaps())
    dynamic = {0: "batch", 1: "queries"}
    maps = tuple({0: "batch", 2: f"height{level}", 3: f"width{level}"} for level in range(2))
    program = export_nodes(
        model,
        module_arguments(2, 7, (6, 8), (3, 4)),
        dynamic_shapes=(dynamic, dynamic, {0: "batch", 1: "keys"}, maps),
    )
    run = load(program)
    for sizes in [(2, 7, (6, 8), (3, 4)), (3, 4, (5, 9), (11, 2)), (1, 1, (1, 1), (2, 1))]:
        arguments = module_arguments(*sizes)
        assert_close(run(arguments)[0], model(*arguments), 1e-5)


@pytest.fixture(scope="module")
def detector():
    """A two-stage detector and its program, for images of any number and size."""
    model = randomise(build_model(small_config("two_stage", **SMALL))).eval()
    sizes = {0: "batch", 2: "height", 3: "width"}
    program = export_nodes(
        model,
        padded_batch(torch.float32),
        dynamic_shapes=(sizes, {0: "batch", 1: "height", 2: "width"}),
    )
    return model, program


@torch.no_grad()
def test_a_detector_takes_any_batch_and_image_size(detector, load):
    model, program = detector
    assert operators(program).count("MSDeformAttnFused") == 1 + 2  # layers
    assert "GridSample" not in operators(program)
    run = load(program)
    for height, width in [(96, 128), (161, 99)]:
        images, mask = padded_batch(torch.float32, height=height, width=width)
        for batch in ((images, mask), (images[1:], mask[1:])):
            logits, boxes = run(batch)[:2]
            expected = model(*batch)
            assert logits.shape == expected["pred_logits"].shape
            torch.testing.assert_close(logits, expected["pred_logits"], rtol=0, atol=1e-4)
            torch.testing.assert_close(boxes, expected["pred_boxes"], rtol=0, atol=1e-4)


class Core(torch.nn.Module):
    def forward(self, value, shapes, locations, weights):
        return msda.ms_deform_attn(value, shapes, None, locations, weights)


def test_a_node_refuses_in_the_words_of_the_operator(load):
    value, locations, weights = make_inputs(SHAPES, **SIZES).tensors()
    arguments = (value, torch.tensor(SHAPES), locations, weights)
    program = export_nodes(Core(), arguments, dynamic_shapes=({1: "keys"}, None, None, None))
    run = load(program, threads=2)
    expected = msda.ms_deform_attn(value, SHAPES, None, locations, weights)
    assert_close(run(arguments)[0], expected, 0)
    with pytest.raises(Exception, match="spatial_shapes must cover the S = 59 keys of value, got"):
        run((value[:, 1:], *arguments[1:]))
    assert_close(run(arguments)[0], expected, 0)


@pytest.fixture
def watched_openvino(monkeypatch, tmp_path):
    """What a node in Python was called with: its processors, and where its arrays lie."""
    pytest.importorskip("openvino")
    import msda.openvino

    calls = []
    compute = msda.openvino.MSDeformAttn.compute

    def watched(node, inputs, output):
        arrays = [array.ctypes.data for array in (*inputs, output)]
        calls.append((os.sched_getaffinity(0), set(arrays)))
        compute(node, inputs, output)

    monkeypatch.setattr(msda.openvino.MSDeformAttn, "compute", watched)
    inputs = make_inputs(SHAPES, **SIZES)
    program = export_nodes(Calls([(inputs, {})]), ([tensors_of(inputs)],))
    run = InOpenVINO(program, tmp_path / "m.onnx", None, threads=2)
    arrays = [tensor.numpy() for tensor in tensors_of(inputs)]
    outputs = run.compiled(arrays, share_inputs=True, share_outputs=True)
    ((processors, addresses),) = calls
    return processors, addresses, [*arrays, outputs[0]]


def test_threads_of_nodes_in_python_are_not_pinned_to_one_processor(watched_openvino):
    processors, _, _ = watched_openvino
    assert processors == os.sched_getaffinity(0)


def test_openvino_hands_over_memory_without_a_copy(watched_openvino):
    _, addresses, arrays = watched_openvino
    assert {array.ctypes.data for array in arrays} <= addresses


@pytest.mark.parametrize("runtime", ["openvino", "openvino_library"])
def test_nothing_passes_for_a_result_where_openvino_drops_the_refusal(runtime, tmp_path):
    pytest.importorskip("openvino")
    library = RUNTIMES[runtime][1]()
    value, locations, weights = make_inputs(SHAPES, **SIZES).tensors()
    arguments = (value, torch.tensor(SHAPES), locations, weights)
    program = export_nodes(Core(), arguments, dynamic_shapes=({1: "keys"}, None, None, None))
    run = InOpenVINO(program, tmp_path / "m.onnx", library, threads=1)
    try:
        output = run((value[:, 1:], *arguments[1:]))[0]
    except RuntimeError as error:  # another version may hand it through
        assert "spatial_shapes must cover the S = 59 keys" in str(error)
    else:
        assert output.isnan().all()


def test_bfloat16_has_the_numbers_of_the_operator_in_onnxruntime(tmp_path):
    inputs = make_inputs(SHAPES, dtype=torch.bfloat16, **SIZES)

    class Rounded(torch.nn.Module):  # NumPy knows no bfloat16
        def forward(self, value, locations, weights):
            output = msda.ms_deform_attn(value.bfloat16(), SHAPES, None, locations, weights)
            return output.float()

    value, *others = [tensor.float() for tensor in inputs.tensors()]
    program = export_nodes(Rounded(), (value, *others))
    output = InONNXRuntime(program, None, onnxruntime_library())((value, *others))[0]
    expected = msda.ms_deform_attn(value.bfloat16(), SHAPES, None, *others)
    assert_close(output, expected.float(), 0)


def test_openvino_may_compute_in_bfloat16(tmp_path):
    """What its plugin for CPUs does unasked where the processor has instructions for it."""
    openvino = pytest.importorskip("openvino")
    import msda.openvino

    inputs = make_inputs(SHAPES, **SIZES)
    path = tmp_path / "m.onnx"
    onnx.save(export_nodes(Calls([(inputs, {})]), ([tensors_of(inputs)],)), path)
    core = openvino.Core()
    msda.openvino.register(core)
    model = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    output = model([tensor.numpy() for tensor in tensors_of(inputs)])[0]
    assert_close(torch.from_numpy(output).float(), compute(inputs), 0.02)


def test_a_model_with_our_nodes_is_saved_and_read_by_openvino(tmp_path):
    openvino = pytest.importorskip("openvino")
    import msda.openvino

    form = FORMS["boxes_ragged"]
    tensors = tensors_of(form[0])
    onnx.save(export_nodes(Calls([form]), ([tensors],)), tmp_path / "m.onnx")
    core = openvino.Core()
    library = openvino_library()
    msda.openvino.register(core, library)
    openvino.save_model(core.read_model(tmp_path / "m.onnx"), tmp_path / "m.xml", False)
    again = openvino.Core()
    again.add_extension(library)
    model = again.compile_model(tmp_path / "m.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    output = model([tensor.numpy() for tensor in tensors])[0]
    assert_close(torch.from_numpy(output), compute(form[0]), 0)
