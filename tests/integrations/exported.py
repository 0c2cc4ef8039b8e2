"""Forms of the operator, modules and detectors to export to ONNX, and how they are exported."""

import logging

import onnx
import onnxruntime
import torch
from torch import nn

import msda
import msda.onnx
from msda.testing import OPERATOR, call, make_fused_inputs, make_inputs
from tests.helpers.inputs import off_edges

# GridSample takes coordinates from -1 to 1. In float32 that moves a sample by up to some 2^-23 of
# the map's width, 2e-5 pixels on a map 167 wide, and a random map is as steep as it is large.
LIMIT = 1e-5

SHAPES = [(6, 8), (3, 4)]
THREE = [*SHAPES, (1, 2)]
SIZES = dict(batch=2, num_queries=7, num_heads=3, head_dim=5, num_points=2)
RAGGED = SIZES | dict(num_points=[3, 0, 2])
EQUAL = [(4, 6), (6, 4)]  # two slices of half a tensor: exporters have joined such the wrong way


def scaled_beyond_edges(inputs):
    """Locations half a map beyond each edge: many samples lie partly or wholly outside."""
    inputs.sampling_locations = inputs.sampling_locations * 2 - 0.5
    return inputs


FORMS = {
    "plain": (scaled_beyond_edges(make_inputs(SHAPES, **SIZES)), {}),
    "equal_levels": (make_inputs(EQUAL, **SIZES), {}),
    "paper_level": (make_inputs([(100, 167)], **SIZES), {}),
    "ragged": (make_inputs(THREE, **RAGGED), {}),
    "nearest": (
        off_edges(scaled_beyond_edges(make_inputs(EQUAL, **SIZES))),
        dict(interpolation="nearest"),
    ),
    "nearest_ragged": (off_edges(make_inputs(THREE, **RAGGED)), dict(interpolation="nearest")),
    "points": (make_fused_inputs(SHAPES, padding=True, **SIZES), {}),
    "points_ragged": (make_fused_inputs(THREE, **RAGGED), {}),
    "boxes": (make_fused_inputs(SHAPES, reference_size=4, **SIZES), {}),
    "boxes_ragged": (make_fused_inputs(THREE, reference_size=4, padding=True, **RAGGED), {}),
    "shared_point": (make_fused_inputs(SHAPES, shared_reference=True, **SIZES), {}),
    "shared_box": (
        make_fused_inputs(SHAPES, shared_reference=True, reference_size=4, **SIZES),
        {},
    ),
    "float64": (make_fused_inputs(SHAPES, dtype=torch.float64, **SIZES), {}),
    "float16": (make_fused_inputs(SHAPES, dtype=torch.float16, **SIZES), {}),
}


class Calls(nn.Module):
    """The operator once for each of several inputs, whose tensors are the arguments."""

    def __init__(self, forms):
        super().__init__()
        self.forms = forms

    def forward(self, tensors):
        outputs = []
        for (inputs, options), given in zip(self.forms, tensors, strict=True):
            names = [
                name for name in vars(inputs) if isinstance(getattr(inputs, name), torch.Tensor)
            ]
            inputs = type(inputs)(**vars(inputs) | dict(zip(names, given, strict=True)))
            outputs.append(call(OPERATOR, inputs, **options))
        return outputs


def tensors_of(inputs):
    return [entry for entry in vars(inputs).values() if isinstance(entry, torch.Tensor)]


def export(model, arguments, target="onnx", **options):
    """The exported program, checked as a file would be; by the default options unless given."""
    # Says once for each operator of torchvision that it is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    table = options.pop("table", None)
    program = torch.onnx.export(
        model.eval(),
        arguments,
        dynamo=True,
        custom_translation_table=msda.onnx.translations(target) if table is None else table,
        verbose=False,
        **options,
    ).model_proto
    onnx.checker.check_model(program, full_check=True)
    return program


def run(program, tensors):
    """The outputs in ONNX Runtime, on the CPU."""
    session = onnxruntime.InferenceSession(
        program.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [argument.name for argument in session.get_inputs()]
    arrays = [tensor.numpy() for tensor in tensors]
    outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    return [torch.from_numpy(output) for output in outputs]


def operators(program):
    return [node.op_type for node in program.graph.node]


def attributes_of(node):
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


# ---- module and detector -------------------------------------------------------------------------


class AttentionOverMaps(nn.Module):
    """The module on two feature maps of any size."""

    def __init__(self):
        super().__init__()
        self.attention = msda.MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)

    def forward(self, query, reference_points, padding_mask, *maps):
        tokens = torch.cat([one.flatten(2) for one in maps], 2).transpose(1, 2)
        shapes = [(one.shape[2], one.shape[3]) for one in maps]
        return self.attention(query, reference_points, tokens, shapes, None, padding_mask)


def module_arguments(batch, queries, *shapes):
    num_keys = sum(height * width for height, width in shapes)
    return (
        torch.randn(batch, queries, 32),
        torch.rand(batch, queries, 2, 4),
        torch.rand(batch, num_keys) < 0.3,
        *[torch.randn(batch, 32, height, width) for height, width in shapes],
    )


SMALL = dict(num_encoder_layers=1, num_feature_levels=3)
