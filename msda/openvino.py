"""The operator in OpenVINO: nodes that ``msda.onnx`` writes with ``as_node="msda"``, on a CPU.

Nodes are computed by :mod:`msda.numpy` on the memory that OpenVINO hands over: no build, no copy
and no torch is needed. ``csrc/runtimes`` builds the same nodes as a library, which runs on
OpenVINO's own threads, without Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
from openvino import Op, PartialShape, Type
from openvino.frontend.onnx import ConversionExtension

from msda.numpy import Array, ms_deform_attn, ms_deform_attn_fused

DOMAIN = "msda"


class _Attention(Op):  # type: ignore[misc]
    """The parts that both forms share."""

    name: str
    samples: int  # the input that has the axes (B, Q, ...)

    def __init__(
        self,
        inputs: Sequence[Any] | None = None,
        num_points: Sequence[int] = (),
        nearest: int = 0,
    ) -> None:
        super().__init__(self)
        self.attributes: dict[str, Any] = {"num_points": list(num_points), "nearest": int(nearest)}
        if inputs is not None:
            self.set_arguments(list(inputs))
            self.constructor_validate_and_infer_types()

    def get_type_info(self) -> openvino.DiscreteTypeInfo:
        return openvino.DiscreteTypeInfo(self.name, DOMAIN)

    def validate_and_infer_types(self) -> None:
        value, samples = (self.get_input_partial_shape(i) for i in (0, self.samples))
        output = PartialShape.dynamic(3)
        if value.rank.is_static:
            output[0] = value[0]
            if value[2].is_static and value[3].is_static:
                output[2] = value[2].get_length() * value[3].get_length()
        if samples.rank.is_static:
            output[1] = samples[1]
        self.set_output_type(0, self.get_input_element_type(0), output)

    def clone_with_new_inputs(self, inputs: Sequence[Any]) -> _Attention:
        return type(self)(inputs, **self.attributes)

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes(self.attributes)
        return True

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        value, samples = inputs[0].shape, inputs[self.samples].shape
        outputs[0].shape = [value[0], samples[1], value[2] * value[3]]
        output = _array(outputs[0])
        try:
            self.compute([_array(tensor) for tensor in inputs], output)
        except BaseException:
            # With one thread, OpenVINO 2026.4 drops what a synchronous inference raises: let
            # nothing pass for a result then. All bits set are a NaN of every type.
            output.view(np.uint8).fill(0xFF)
            raise
        return True

    def compute(self, inputs: list[Array], output: Array) -> None:
        raise NotImplementedError

    @property
    def counts(self) -> list[int] | None:
        return list(self.attributes["num_points"]) or None


class MSDeformAttn(_Attention):
    """Inputs value, spatial_shapes, sampling_locations, attention_weights; output (B, Q, M * D).

    Shapes and dtypes are those of ``msda.ms_deform_attn``.

    Args:
        inputs: the four, nodes or their outputs.
        num_points: one count for each level, or () where all have the same.
        nearest: 1 for ``interpolation="nearest"``.
    """

    name, samples = "MSDeformAttn", 2

    def compute(self, inputs: list[Array], output: Array) -> None:
        """Write the result to ``output``."""
        value, shapes, locations, weights = inputs
        interpolation = "nearest" if self.attributes["nearest"] else "bilinear"
        ms_deform_attn(
            value,
            shapes,
            None,
            locations,
            weights,
            num_points=self.counts,
            interpolation=interpolation,
            num_threads=_num_threads,
            output=output,
        )


class MSDeformAttnFused(_Attention):
    """Inputs value, spatial_shapes, reference_points, sampling_offsets, attention_logits, and
    padding_mask where there is one; output (B, Q, M * D).

    Shapes and dtypes are those of ``msda.ms_deform_attn_fused``.

    Args:
        inputs: the five or six, nodes or their outputs.
        num_points: one count for each level, or () where all have the same.
        nearest: 0.
    """

    name, samples = "MSDeformAttnFused", 3

    def compute(self, inputs: list[Array], output: Array) -> None:
        """Write the result to ``output``."""
        value, shapes, reference, offsets, logits, *masks = inputs
        ms_deform_attn_fused(
            value,
            shapes,
            None,
            reference,
            offsets,
            logits,
            num_points=self.counts,
            padding_mask=masks[0].view(np.bool_) if masks else None,
            num_threads=_num_threads,
            output=output,
        )


_num_threads = 0


def register(core: openvino.Core, library: str | None = None, *, num_threads: int = 0) -> None:
    """Teach a Core the nodes of ``msda.onnx.translations(as_node="msda")``.

    Before ``core.read_model`` of a model that has them. OpenVINO's plugin for CPUs computes in
    bfloat16 where the processor has instructions for it: ``INFERENCE_PRECISION_HINT`` of ``"f32"``,
    given to ``compile_model``, keeps float32.

    Args:
        core: knows the nodes afterwards.
        library: path of libmsda_openvino as ``csrc/runtimes`` builds it, whose nodes are then used;
            ``core.add_extension(path)`` is all that this does. None: those of this module.
        num_threads: at most so many threads in a node of this module, of this process; 0 takes
            OMP_NUM_THREADS, or all processors. A library asks OpenVINO.

    The nodes of this module make threads of their own, which would share the one processor that
    OpenVINO pins the calling thread to: the core's ``ENABLE_CPU_PINNING`` becomes False. A library
    leaves it as it is.

    Example:
        >>> core = openvino.Core()
        >>> msda.openvino.register(core)
        >>> model = core.compile_model("attention.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    """
    if library is not None:
        core.add_extension(str(library))
        return
    global _num_threads
    _num_threads = num_threads
    core.set_property("CPU", {"ENABLE_CPU_PINNING": False})
    for node in (MSDeformAttn, MSDeformAttnFused):
        core.add_extension(node)
        core.add_extension(ConversionExtension(node.name, DOMAIN, _from_onnx(node)))


def _from_onnx(node: type[_Attention]) -> Any:
    def convert(context: Any) -> list[Any]:
        inputs = [context.get_input(i) for i in range(context.get_input_size())]
        made = node(
            inputs,
            context.get_attribute("num_points", []),
            context.get_attribute("nearest", 0),
        )
        return made.outputs()

    return convert


def _array(tensor: Any) -> Array:
    """The memory of a tensor, which stays OpenVINO's."""
    if tensor.element_type == Type.bf16:
        import ml_dtypes  # the package that NumPy has the type from

        return tensor.data.view(ml_dtypes.bfloat16)
    return tensor.data
