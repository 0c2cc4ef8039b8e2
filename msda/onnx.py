"""Translations of the operator for ``torch.onnx.export``: standard ONNX, our node, or TensorRT's.

In standard ONNX each level is one GridSample (bilinear) or one GatherElements (nearest), whose
samples are weighted and summed. This is the definition in :mod:`msda.reference`, apart from
NaN and infinite locations, which are not looked for. Batch, queries and the sizes of the maps may
be dynamic; the numbers of levels, points, heads and channels are those of the model.

In comments N is B * M, K is the number of samples of one query and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import defs
from onnxscript import opset18
from onnxscript.values import Op, Opset

from msda import dtypes, ops

TARGETS = ("onnx", "tensorrt")
PLUGIN_NAME = "MultiscaleDeformableAttnPlugin_TRT"
# The domain in which ONNX Runtime looks for plugins. TensorRT's own parser goes by the name alone.
PLUGIN_DOMAIN = "trt.plugins"
# Our own nodes: csrc/runtimes and msda.openvino bring them to runtimes.
NODES = ("msda",)
NODE_DOMAIN, NODE_VERSION = "msda", 1
PLAIN_NODE, FUSED_NODE = "MSDeformAttn", "MSDeformAttnFused"

op: Any = opset18  # the exporter's own operators are written in it, and converted where need be


def translations(
    target: str = "onnx", *, as_node: str | None = None, plugin_version: str = "1"
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Make the ``custom_translation_table`` of ``torch.onnx.export`` for models that use msda.

    Args:
        target: "onnx": standard operators, of opset 18 or newer. "tensorrt": each call of the
            operator becomes one node MultiscaleDeformableAttnPlugin_TRT, which TensorRT brings
            along; it takes neither levels with different numbers of points nor "nearest".
        as_node: with target "onnx": "msda" makes each call of the operator one node, MSDeformAttn
            or MSDeformAttnFused of the domain "msda", for runtimes that have been given our
            kernels (see docs/runtimes.md); None, the default, standard operators.
        plugin_version: with "tensorrt", version of the plugin: "1" exists since TensorRT 8.4.1,
            "2" since 10.11.

    Returns:
        A translation for each operator of msda. There is none where msda runs its PyTorch
        reference, whose operators the exporter knows.

    Raises:
        ValueError: target or as_node is unknown; they do not go together; or a node is asked for
            where msda runs its reference.

    Example:
        >>> attention = msda.MSDeformAttn(n_levels=1).eval()
        >>> inputs = torch.rand(1, 5, 256), torch.rand(1, 5, 1, 2), torch.rand(1, 24, 256), [(4, 6)]
        >>> table = msda.onnx.translations()
        >>> program = torch.onnx.export(attention, inputs, custom_translation_table=table)
        >>> program.save("attention.onnx")
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}, got {target!r}")
    if as_node is not None and (as_node not in NODES or target != "onnx"):
        raise ValueError(f"as_node must be None or, for 'onnx', one of {NODES}, got {as_node!r}")
    if ops.BACKEND != "native":
        if as_node is not None:
            raise ValueError(
                f"as_node must be None where msda runs its reference ({ops.BACKEND_REASON}), "
                f"got {as_node!r}"
            )
        if target == "tensorrt":
            raise ValueError(
                f"target must be 'onnx' where msda runs its reference ({ops.BACKEND_REASON}), "
                f"got {target!r}"
            )
        return {}

    def attend(call: _Call) -> Any:
        return _plugin(call, plugin_version) if target == "tensorrt" else _standard(call)

    # The exporter calls these with the arguments of the operators' schemas (csrc/ops.cpp): ir.Value
    # for tensors and for dynamic sizes, numbers as they are.

    def plain(
        value: Any,
        spatial_shapes: Any,
        spatial_shapes_tensor: Any,
        level_start_index: Any,
        sampling_locations: Any,
        attention_weights: Any,
        num_points: Any,
        nearest: Any,
    ) -> Any:
        dtype = _sum_dtype(value)
        counts = _points_per_level(sampling_locations, num_points)
        if as_node is not None:
            return _node(
                PLAIN_NODE,
                value,
                _shapes(spatial_shapes, spatial_shapes_tensor),
                _cast(sampling_locations, dtype),
                _cast(attention_weights, dtype),
                num_points=num_points,
                nearest=nearest,
            )
        return attend(
            _Call(
                given_value=value,
                num_queries=sampling_locations.shape[1],
                value=_cast(value, dtype),
                shapes=_shapes(spatial_shapes, spatial_shapes_tensor),
                counts=counts,
                locations=_flatten_samples(_cast(sampling_locations, dtype), counts, 2),
                weights=_flatten_samples(_cast(attention_weights, dtype), counts),
                nearest=nearest,
            )
        )

    def fused(
        value: Any,
        spatial_shapes: Any,
        spatial_shapes_tensor: Any,
        level_start_index: Any,
        reference_points: Any,
        sampling_offsets: Any,
        attention_logits: Any,
        num_points: Any,
        padding_mask: Any,
    ) -> Any:
        dtype = _sum_dtype(value)
        counts = _points_per_level(sampling_offsets, num_points)
        shapes = _shapes(spatial_shapes, spatial_shapes_tensor)
        if as_node is not None:
            floats = reference_points, sampling_offsets, attention_logits
            masks = [] if padding_mask is None else [padding_mask]
            return _node(
                FUSED_NODE,
                value,
                shapes,
                *[_cast(tensor, dtype) for tensor in floats],
                *masks,
                num_points=num_points,
            )
        values = _cast(value, dtype)
        if padding_mask is not None:
            mask = op.Unsqueeze(padding_mask, [2, 3])  # (B, S, 1, 1)
            values = op.Where(mask, _constant(0, dtype), values)
        offsets = _flatten_samples(_cast(sampling_offsets, dtype), counts, 2)
        logits = _flatten_samples(_cast(attention_logits, dtype), counts)
        return attend(
            _Call(
                given_value=value,
                num_queries=sampling_offsets.shape[1],
                value=values,
                shapes=shapes,
                counts=counts,
                locations=_locations(reference_points, offsets, shapes, counts, dtype),
                weights=op.Softmax(logits, axis=-1),
                nearest=False,
            )
        )

    return {
        torch.ops.msda.ms_deform_attn.default: plain,
        torch.ops.msda.ms_deform_attn_fused.default: fused,
    }


# ---- parts of both targets --------- -------------------------------------------------------------


@dataclass
class _Call:
    """A call of the plain operator, for any number of points in each level."""

    given_value: Any  # (B, S, M, D) of the dtype that the output gets
    num_queries: Any  # int, or ir.SymbolicDim where dynamic
    value: Any  # given_value after the padding mask, in the dtype of sums; so are the other tensors
    shapes: Any  # (L, 2) int64 rows (height, width)
    counts: list[int]  # points of each level, K is their sum
    locations: Any  # (B, Q, M, K, 2)
    weights: Any  # (B, Q, M, K)
    nearest: bool


def _sum_dtype(value: Any) -> ir.DataType:
    return ir.DataType.DOUBLE if value.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def _cast(tensor: Any, dtype: ir.DataType) -> Any:
    return tensor if tensor.dtype == dtype else op.Cast(tensor, to=dtype)


def _constant(numbers: Any, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(np.array(numbers, dtype.numpy())))


def _slice(tensor: Any, axis: int, start: Any, end: Any) -> Any:
    return op.Slice(tensor, *([n] if isinstance(n, int) else n for n in (start, end)), [axis])


def _points_per_level(points: Any, num_points: list[int]) -> list[int]:
    """The counts that are given, or those of (B, Q, M, L, P, 2)."""
    return list(num_points) or [points.shape[4]] * points.shape[3]


def _flatten_samples(tensor: Any, counts: list[int], *last: int) -> Any:
    """(B, Q, M, L, P, ...) or (B, Q, M, K, ...) to (B, Q, M, K, ...)."""
    return op.Reshape(tensor, [0, 0, 0, sum(counts), *last])


def _shapes(sizes: list[Any], tensor: Any) -> Any:
    """The operator's [H0, W0, H1, ...], or its tensor, as int64 rows (height, width): (L, 2)."""
    return op.Reshape(sizes, [-1, 2]) if tensor is None else _cast(tensor, ir.DataType.INT64)


def _widths_heights(shapes: Any, dtype: ir.DataType) -> Any:
    """Sizes as floating-point numbers in the order of locations: (L, 2)."""
    return op.Cast(op.Gather(shapes, _constant([1, 0], ir.DataType.INT64), axis=1), to=dtype)


def _bounds(shapes: Any) -> tuple[Any, Any]:
    """First key of each level, and the one after its last: (L,) each."""
    num_keys = op.ReduceProd(shapes, [1], keepdims=0)
    ends = op.CumSum(num_keys, _constant(0, ir.DataType.INT64))
    return op.Sub(ends, num_keys), ends


def _locations(
    reference_points: Any, offsets: Any, shapes: Any, counts: list[int], dtype: ir.DataType
) -> Any:
    """The sampling locations of the fused operator: (B, Q, M, K, 2)."""
    levels = [level for level, count in enumerate(counts) for _ in range(count)]
    levels_of_samples = _constant(levels, ir.DataType.INT64)
    reference = _cast(reference_points, dtype)
    if reference_points.shape[2] > 1:
        reference = op.Gather(reference, levels_of_samples, axis=2)
    reference = op.Unsqueeze(reference, [2])  # (B, Q, 1, K or 1, 2 or 4)
    if reference_points.shape[3] == 4:
        half_over_points = _constant([[0.5 / counts[level]] for level in levels], dtype)
        reference, extent = op.Split(reference, axis=4, num_outputs=2)
        unit = op.Mul(extent, half_over_points)  # (B, Q, 1, K, 2)
    else:
        unit = op.Reciprocal(op.Gather(_widths_heights(shapes, dtype), levels_of_samples))  # (K, 2)
    return op.Add(reference, op.Mul(offsets, unit))


# ---- standard ONNX -------------------------------------------------------------------------------


def _standard(call: _Call) -> Any:
    """Add the weighted samples of one level after the other: (B, Q, M * D)."""
    num_heads, head_dim = call.given_value.shape[2:]
    num_queries = op.Shape(call.locations, start=1, end=2)
    num_samples = sum(call.counts)
    if num_samples == 0:
        raise ValueError(f"num_points must hold a count above 0 in ONNX, got {call.counts}")

    locations = op.Transpose(call.locations, perm=[0, 2, 3, 1, 4])
    locations = op.Reshape(locations, [-1, num_samples, num_queries, 2])  # (N, K, Q, 2)
    weights = op.Transpose(call.weights, perm=[0, 2, 3, 1])
    weights = op.Reshape(weights, [-1, 1, num_samples, num_queries])  # (N, 1, K, Q)

    starts, ends = _bounds(call.shapes)
    read = _read_nearest if call.nearest else _read_bilinear
    output, sample = None, 0
    for level, count in enumerate(call.counts):
        if count == 0:
            continue
        size, start, end = (
            _slice(rows, 0, level, level + 1) for rows in (call.shapes, starts, ends)
        )
        keys = op.Transpose(_slice(call.value, 1, start, end), perm=[0, 2, 3, 1])
        keys = op.Reshape(keys, [-1, head_dim, op.Sub(end, start)])  # (N, D, H * W)
        location = _slice(locations, 1, sample, sample + count)  # (N, P, Q, 2)
        weight = _slice(weights, 2, sample, sample + count)  # (N, 1, P, Q)
        sampled = read(keys, size, location, head_dim, _sum_dtype(call.given_value))
        term = op.ReduceSum(op.Mul(sampled, weight), [2], keepdims=0)  # (N, D, Q)
        output = term if output is None else op.Add(output, term)
        sample += count
    output = op.Reshape(output, [-1, num_heads * head_dim, num_queries])
    return _as_given(call, op.Transpose(output, perm=[0, 2, 1]))


def _as_given(call: _Call, output: Any) -> Any:
    dtype = call.given_value.dtype
    return output if dtype == _sum_dtype(call.given_value) else op.Cast(output, to=dtype)


def _read_bilinear(keys: Any, size: Any, location: Any, head_dim: int, dtype: ir.DataType) -> Any:
    """Sample a level (N, D, H * W), its size (1, 2), at (N, P, Q, 2): (N, D, P, Q)."""
    maps = op.Reshape(keys, [-1, head_dim, size])  # (N, D, H, W)
    grid = op.Sub(op.Mul(location, _constant(2, dtype)), _constant(1, dtype))
    return op.GridSample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=0)


def _read_nearest(keys: Any, size: Any, location: Any, head_dim: int, dtype: ir.DataType) -> Any:
    """Like :func:`_read_bilinear`, by RT-DETRv2's 'discrete' rule: one pixel, clamped."""
    zero, half, one = (_constant(number, dtype) for number in (0, 0.5, 1))
    sides = _widths_heights(size, dtype)  # (1, 2)
    pixel = op.Add(op.Mul(location, sides), half)
    pixel = op.Min(op.Max(pixel, zero), op.Sub(sides, one))
    x, y = op.Split(op.Cast(pixel, to=ir.DataType.INT64), axis=3, num_outputs=2)  # (N, P, Q, 1)
    key = op.Add(op.Mul(y, _slice(size, 1, 1, 2)), x)
    key = op.Expand(op.Reshape(key, [0, 1, -1]), [1, head_dim, 1])  # (N, D, P * Q)
    sampled = op.GatherElements(keys, key, axis=2)
    return op.Reshape(sampled, [0, 0, op.Shape(location, start=1, end=2), -1])


# ---- our own nodes -------------------------------------------------------------------------------


# Of the dtypes whose name in ONNX is not torch's.
_NAMES_IN_ONNX = {"float32": "float", "float64": "double"}


def _node_op(name: str) -> Op:
    """A node as the exporter has to know an operator: T is the type of value, R that of sums."""
    parameter = defs.OpSchema.FormalParameter
    reals = {
        PLAIN_NODE: ("sampling_locations", "attention_weights"),
        FUSED_NODE: ("reference_points", "sampling_offsets", "attention_logits"),
    }[name]
    inputs = [parameter("value", "T"), parameter("spatial_shapes", "tensor(int64)")]
    inputs += [parameter(real, "R") for real in reals]
    attributes = [
        defs.OpSchema.Attribute("num_points", defs.OpSchema.AttrType.INTS, required=False)
    ]
    if name == FUSED_NODE:
        option = defs.OpSchema.FormalParameterOption.Optional
        inputs.append(parameter("padding_mask", "tensor(bool)", param_option=option))
    else:
        attributes.append(
            defs.OpSchema.Attribute("nearest", defs.OpSchema.AttrType.INT, required=False)
        )
    floats = [f"tensor({_NAMES_IN_ONNX.get(name, name)})" for name in dtypes.FLOATS]
    sums = ["tensor(float)", "tensor(double)"]
    schema = defs.OpSchema(
        name,
        NODE_DOMAIN,
        NODE_VERSION,
        inputs=inputs,
        outputs=[parameter("output", "T")],
        type_constraints=[("T", floats, ""), ("R", sums, "")],
        attributes=attributes,
    )
    return Op(Opset(NODE_DOMAIN, NODE_VERSION), name, schema)


def _node(
    name: str, value: Any, *others: Any, num_points: list[int], nearest: bool | None = None
) -> Any:
    """One node for a call: (B, Q, M * D). Attributes that say nothing new are left out."""
    attributes: dict[str, Any] = {}
    if num_points:
        attributes["num_points"] = list(num_points)
    if nearest:
        attributes["nearest"] = 1
    output = _node_op(name)(value, *others, **attributes)
    # No shape inference knows the node.
    batch, _, num_heads, head_dim = value.shape
    num_queries = others[2 if name == FUSED_NODE else 1].shape[1]
    output.shape = ir.Shape([batch, num_queries, num_heads * head_dim])
    output.dtype = value.dtype
    return output


# ---- TensorRT ------------------------------------------------------------------------------------


def _plugin_op() -> Op:
    """The plugin as the exporter has to know an operator; every tensor but two has the type T."""

    def parameter(name: str, dtype: str = "T") -> defs.OpSchema.FormalParameter:
        return defs.OpSchema.FormalParameter(name, dtype)

    schema = defs.OpSchema(
        PLUGIN_NAME,
        PLUGIN_DOMAIN,
        1,
        inputs=[
            parameter("value"),
            parameter("spatial_shapes", "tensor(int32)"),
            parameter("level_start_index", "tensor(int32)"),
            parameter("sampling_locations"),
            parameter("attention_weights"),
        ],
        outputs=[parameter("output")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.STRING)
            for name in ("plugin_version", "plugin_namespace")
        ],
    )
    return Op(Opset(PLUGIN_DOMAIN, 1), PLUGIN_NAME, schema)


def _plugin(call: _Call, version: str) -> Any:
    """The plugin's node, its result brought to (B, Q, M * D)."""
    points = set(call.counts)
    if call.nearest:
        raise ValueError(f"interpolation must be 'bilinear' for {PLUGIN_NAME}, got 'nearest'")
    if len(points) != 1:
        raise ValueError(
            f"num_points must be the same in every level for {PLUGIN_NAME}, got {call.counts}"
        )
    if call.given_value.dtype == ir.DataType.DOUBLE:
        raise ValueError(
            f"value must be float32, float16 or bfloat16 for {PLUGIN_NAME}, "
            f"got {call.given_value.dtype.name}"
        )
    starts, _ = _bounds(call.shapes)
    per_head = (len(call.counts), *points)
    output = _plugin_op()(
        call.value,
        op.Cast(call.shapes, to=ir.DataType.INT32),
        op.Cast(starts, to=ir.DataType.INT32),
        op.Reshape(call.locations, [0, 0, 0, *per_head, 2]),
        op.Reshape(call.weights, [0, 0, 0, *per_head]),
        plugin_version=version,
        plugin_namespace="",
    )
    # No shape inference knows the plugin.
    batch, _, num_heads, head_dim = call.given_value.shape
    output.shape = ir.Shape([batch, call.num_queries, num_heads, head_dim])
    output.dtype = ir.DataType.FLOAT
    return _as_given(call, op.Reshape(output, [0, 0, -1]))
