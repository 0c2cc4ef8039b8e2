"""The four operators called by the names of their schema, and what they refuse with."""

import functools
import warnings

import torch

from msda.testing import (
    FusedInputs,
    gradient_names,
    make_fused_inputs,
    make_inputs,
    random_like_output,
)
from tests.helpers.results import compute

SHAPES = [(3, 4), (2, 2)]
SIZES = dict(batch=2, num_queries=5, num_heads=3, head_dim=4)

OPERATORS = [
    "ms_deform_attn",
    "_ms_deform_attn_backward",
    "ms_deform_attn_fused",
    "_ms_deform_attn_fused_backward",
]


def good_arguments(name, ragged=False, device="cpu"):
    """By the names of the operator's schema, in their order."""
    fused, backward = "fused" in name, "backward" in name
    make = functools.partial(make_fused_inputs, padding=True) if fused else make_inputs
    inputs = make(SHAPES, **SIZES, num_points=[1, 2] if ragged else 2)
    output = random_like_output(inputs)
    given = vars(inputs) | dict(
        spatial_shapes=None,
        spatial_shapes_tensor=torch.tensor(SHAPES),
        level_start_index=torch.tensor([0, 12]),
        num_points=inputs.num_points or [],
        nearest=False,
    )
    if backward:
        given |= dict(grad_output=output, output=output.clone(), deterministic=False)
    schema = getattr(torch.ops.msda, name).default._schema
    arguments = {one.name: given.get(one.name, True) for one in schema.arguments}
    return {
        key: argument.to(device) if isinstance(argument, torch.Tensor) else argument
        for key, argument in arguments.items()
    }


def call_operator(name, arguments):
    with torch.no_grad():
        return getattr(torch.ops.msda, name)(*arguments.values())


def refusal(function, *arguments):
    """What it is refused with; None where it is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            return str(error)
    return None


def call_backward(inputs, grad_output, wanted):
    """The backward operator itself: gradients by the arguments called ``wanted``, maybe none."""
    value, *others = inputs.tensors()
    shapes = [side for shape in inputs.spatial_shapes for side in shape]
    arguments = [value, shapes, None, None, *others, inputs.num_points or []]
    needs = [name in wanted for name in gradient_names(inputs)]
    if isinstance(inputs, FusedInputs):
        output = compute(inputs)
        gradients = torch.ops.msda._ms_deform_attn_fused_backward(
            grad_output, output, *arguments, inputs.padding_mask, *needs, True
        )
    else:
        gradients = torch.ops.msda._ms_deform_attn_backward(
            grad_output, *arguments, False, *needs, True
        )
    return dict(zip(gradient_names(inputs), gradients, strict=True))
