"""Export to ONNX: same numbers in ONNX Runtime, sizes that stay dynamic, TensorRT's plugin."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

import msda
import msda.onnx
from detector.model import build_model
from msda import ops
from msda.reference import ms_deform_attn_reference
from msda.testing import make_fused_inputs, make_inputs
from tests.detector.small_models import flat, padded_batch, randomise, tiny_config
from tests.helpers.results import assert_close, compute, compute_exactly
from tests.integrations.exported import (
    FORMS,
    LIMIT,
    SHAPES,
    SIZES,
    SMALL,
    AttentionOverMaps,
    Calls,
    attributes_of,
    export,
    module_arguments,
    operators,
    run,
    tensors_of,
)

# ---- the operator --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_forms():
    """One graph with a call of each form, and what ONNX Runtime makes of it."""
    arguments = [tensors_of(inputs) for inputs, _ in FORMS.values()]
    program = export(Calls(list(FORMS.values())), (arguments,))
    outputs = run(program, [tensor for tensors in arguments for tensor in tensors])
    return program, dict(zip(FORMS, outputs, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_operator_and_reference(form, all_forms):
    inputs, options = FORMS[form]
    output = all_forms[1][form]
    assert output.dtype == inputs.value.dtype
    # 16 bits: of the result one rounding, which is that of the operator too.
    limit = {torch.float32: LIMIT, torch.float64: 1e-14, torch.float16: 5e-4}[output.dtype]
    assert_close(output, compute(inputs, **options), limit)
    assert_close(output, compute_exactly(inputs, **options).to(output.dtype), limit)


def test_graph_has_standard_operators_only(all_forms):
    program, _ = all_forms
    assert [(opset.domain, opset.version) for opset in program.opset_import] == [("", 20)]
    assert not program.functions
    assert {node.domain for node in program.graph.node} == {""}


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_give_the_same(opset):
    inputs = make_fused_inputs(SHAPES, reference_size=4, **SIZES)
    tensors = tensors_of(inputs)
    program = export(Calls([(inputs, {})]), ([tensors],), opset_version=opset)
    assert program.opset_import[0].version == opset
    assert_close(run(program, tensors)[0], compute(inputs), LIMIT)


def test_reference_exports_without_a_table(monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "reference")
    monkeypatch.setattr(ops, "BACKEND_REASON", "MSDA_BACKEND=reference")
    assert msda.onnx.translations() == {}
    inputs = make_fused_inputs(SHAPES, padding=True, **SIZES)
    tensors = tensors_of(inputs)
    program = export(Calls([(inputs, {})]), ([tensors],))
    assert_close(run(program, tensors)[0], compute_exactly(inputs), LIMIT)
    with pytest.raises(ValueError, match=r"^target must be 'onnx' where msda runs its reference"):
        msda.onnx.translations("tensorrt")


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"^target must be one of .*, got 'openvino'$"):
        msda.onnx.translations("openvino")


def test_old_exporter_names_the_operator_that_it_does_not_know():
    inputs = make_inputs(SHAPES, **SIZES)
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="msda::ms_deform_attn"),
    ):
        torch.onnx.export(Calls([(inputs, {})]), ([tensors_of(inputs)],), dynamo=False)


def test_importing_msda_does_not_import_onnx():
    script = "import sys, msda; print([name for name in sys.modules if name.startswith('onnx')])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


# ---- module and detector -------------------------------------------------------------------------


@torch.no_grad()
def test_module_takes_any_batch_queries_and_image_size():
    model = randomise(AttentionOverMaps())
    dynamic = {0: "batch", 1: "queries"}
    maps = tuple({0: "batch", 2: f"height{level}", 3: f"width{level}"} for level in range(2))
    program = export(
        model,
        module_arguments(2, 7, (6, 8), (3, 4)),
        dynamic_shapes=(dynamic, dynamic, {0: "batch", 1: "keys"}, maps),
    )
    assert [size.dim_param for size in program.graph.output[0].type.tensor_type.shape.dim[:2]] == [
        "batch",
        "queries",
    ]
    for sizes in [(2, 7, (6, 8), (3, 4)), (3, 4, (5, 9), (11, 2)), (1, 1, (1, 1), (2, 1))]:
        arguments = module_arguments(*sizes)
        assert_close(run(program, arguments)[0], model(*arguments), LIMIT)


def test_sizes_may_come_in_a_tensor():
    class Core(nn.Module):
        def forward(self, value, shapes, locations, weights):
            return msda.ms_deform_attn(value, shapes, None, locations, weights)

    def arguments_for(shapes):
        inputs = make_inputs(shapes, **SIZES)
        value, locations, weights = inputs.tensors()
        return inputs, (value, torch.tensor(shapes, dtype=torch.int32), locations, weights)

    _, arguments = arguments_for([(6, 8), (3, 4)])
    program = export(Core(), arguments, dynamic_shapes=({1: "keys"}, None, None, None))
    inputs, arguments = arguments_for([(5, 7), (9, 2)])
    assert_close(run(program, arguments)[0], compute(inputs), LIMIT)


def assert_detector_agrees(program, model, batch):
    expected = flat(model(*batch))
    outputs = run(program, batch)
    for (name, tensor), output in zip(expected.items(), outputs, strict=True):
        # Logits of padded tokens are infinite. Five layers of float32 in another order of summation
        # leave some 1e-6 of the numbers here, which are of order 1.
        torch.testing.assert_close(output, tensor, rtol=0, atol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "padded", "layers"),
    [("multi_scale", False, 1), ("iter_refine", True, 2)],
    ids=["multi_scale", "iter_refine"],
)
def test_detector_agrees(variant, padded, layers):
    config = tiny_config(variant, num_decoder_layers=layers, **SMALL)
    model = randomise(build_model(config)).eval()
    batch = padded_batch(torch.float32)[: 1 + padded]
    assert_detector_agrees(export(model, batch), model, batch)


@torch.no_grad()
def test_two_stage_detector_takes_any_batch_and_image_size():
    model = randomise(build_model(tiny_config("two_stage", **SMALL))).eval()
    sizes = {0: "batch", 2: "height", 3: "width"}
    program = export(
        model,
        padded_batch(torch.float32),
        dynamic_shapes=(sizes, {0: "batch", 1: "height", 2: "width"}),
    )
    assert operators(program).count("GridSample") == 3 * (1 + 2)  # levels, layers
    for height, width in [(96, 128), (161, 99)]:
        images, mask = padded_batch(torch.float32, height=height, width=width)
        assert_detector_agrees(program, model, (images, mask))
        assert_detector_agrees(program, model, (images[1:], mask[1:]))


# ---- TensorRT ------------------------------------------------------------------------------------


class MultiscaleDeformableAttnPlugin_TRT(OpRun):
    """The plugin as its documentation describes it."""

    op_domain = "trt.plugins"

    def _run(self, value, shapes, starts, locations, weights, **attributes):
        assert shapes.dtype == starts.dtype == np.int32
        assert {array.dtype for array in (value, locations, weights)} == {np.dtype("float32")}
        ends = np.cumsum(shapes.prod(1))
        assert starts.tolist() == [0, *ends[:-1]]
        value, locations, weights = map(torch.from_numpy, (value, locations, weights))
        output = ms_deform_attn_reference(value, shapes.tolist(), None, locations, weights)
        return (output.unflatten(2, value.shape[2:]).numpy(),)  # (B, Q, M, D)


@pytest.fixture(scope="module")
def plugin_forms():
    names = ["plain", "points", "boxes", "float16"]
    forms = [FORMS[name] for name in names]
    arguments = [tensors_of(inputs) for inputs, _ in forms]
    return export(Calls(forms), (arguments,), "tensorrt"), forms, arguments


def test_tensorrt_gets_one_plugin_for_each_call(plugin_forms):
    program, forms, _ = plugin_forms
    nodes = [node for node in program.graph.node if node.domain]
    assert [node.op_type for node in nodes] == ["MultiscaleDeformableAttnPlugin_TRT"] * len(forms)
    assert {(opset.domain, opset.version) for opset in program.opset_import} == {
        ("", 20),
        ("trt.plugins", 1),
    }
    assert "GridSample" not in operators(program)
    assert operators(program).count("Softmax") == len(forms) - 1
    for node in nodes:
        assert attributes_of(node) == dict(plugin_version=b"1", plugin_namespace=b"")


def test_inputs_of_the_plugin_have_its_ranks_and_types(plugin_forms):
    program, _, _ = plugin_forms
    known = {entry.name: entry.type.tensor_type for entry in program.graph.value_info}
    known |= {entry.name: entry.type.tensor_type for entry in program.graph.input}
    constants = {entry.name: entry for entry in program.graph.initializer}

    def described(name):
        if name in constants:
            return constants[name].data_type, tuple(constants[name].dims)
        return known[name].elem_type, tuple(size.dim_value for size in known[name].shape.dim)

    real, integer = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    for node in program.graph.node:
        if node.domain:
            assert [described(name) for name in (*node.input, *node.output)] == [
                (real, (2, 60, 3, 5)),  # value (B, S, M, D)
                (integer, (2, 2)),  # spatial_shapes (L, 2)
                (integer, (2,)),  # level_start_index (L,)
                (real, (2, 7, 3, 2, 2, 2)),  # sampling_locations (B, Q, M, L, P, 2)
                (real, (2, 7, 3, 2, 2)),  # attention_weights (B, Q, M, L, P)
                (real, (2, 7, 3, 5)),  # output (B, Q, M, D)
            ]


def test_graph_around_the_plugin_computes_the_operator(plugin_forms):
    program, forms, arguments = plugin_forms
    names = [entry.name for entry in program.graph.input]
    arrays = [tensor.numpy() for tensors in arguments for tensor in tensors]
    evaluator = ReferenceEvaluator(program, new_ops=[MultiscaleDeformableAttnPlugin_TRT])
    outputs = evaluator.run(None, dict(zip(names, arrays, strict=True)))
    for (inputs, _), output in zip(forms, outputs, strict=True):
        expected = compute(inputs)
        limit = LIMIT if expected.dtype == torch.float32 else 5e-4
        assert_close(torch.from_numpy(output), expected, limit)


@torch.no_grad()
def test_plugin_takes_any_batch_and_image_size():
    model = randomise(AttentionOverMaps())
    maps = tuple({0: "batch", 2: f"height{level}", 3: f"width{level}"} for level in range(2))
    program = export(
        model,
        module_arguments(2, 7, (6, 8), (3, 4)),
        table=msda.onnx.translations("tensorrt", plugin_version="2"),
        dynamic_shapes=({0: "batch"}, {0: "batch"}, {0: "batch", 1: "keys"}, maps),
    )
    (node,) = [node for node in program.graph.node if node.domain]
    assert attributes_of(node)["plugin_version"] == b"2"
    arguments = module_arguments(3, 7, (5, 9), (11, 2))
    evaluator = ReferenceEvaluator(program, new_ops=[MultiscaleDeformableAttnPlugin_TRT])
    names = [entry.name for entry in program.graph.input]
    feeds = dict(zip(names, [tensor.numpy() for tensor in arguments], strict=True))
    assert_close(torch.from_numpy(evaluator.run(None, feeds)[0]), model(*arguments), LIMIT)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("nearest", "interpolation must be 'bilinear' for MultiscaleDef.*, got 'nearest'"),
        ("ragged", r"num_points must be the same in every level for .*, got \[3, 0, 2\]"),
        ("float64", "value must be float32, float16 or bfloat16 for .*, got DOUBLE"),
    ],
    ids=["nearest", "ragged", "float64"],
)
def test_what_the_plugin_cannot_do_is_refused_at_export(form, message):
    inputs, options = FORMS[form]
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        export(Calls([(inputs, options)]), ([tensors_of(inputs)],), "tensorrt")
    reason = caught.value
    while reason.__cause__ is not None:
        reason = reason.__cause__
    assert isinstance(reason, ValueError)
    with pytest.raises(ValueError, match=f"^{message}"):
        raise reason
