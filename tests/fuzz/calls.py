"""Random calls of the operator through PyTorch, against the reference in float64.

    python tests/fuzz/calls.py --first 0 --seconds 60

What kernels_fuzz does not see: strides, dtypes of each tensor, the ways to give sizes, autograd,
the operators called directly, torch's threads. The tolerances are those of msda/testing.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from msda.testing import (
    OPERATOR,
    REFERENCE,
    TOLERANCES,
    FusedInputs,
    Inputs,
    call,
    gradient_names,
    make_fused_inputs,
    make_inputs,
    random_like_output,
)

# After msda, which is another one where sanitizers run.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz import seed_runner
from tests.fuzz.seed_runner import Wrong
from tests.helpers.inputs import in_float64, to_pixels, with_points
from tests.helpers.results import compute_gradients

SPECIALS = (float("nan"), float("inf"), float("-inf"), 0.0)
FAR_OUTSIDE = 6e4  # a point that no map reaches; float16 holds it


@dataclass
class Case:
    """A call and what is to come of it."""

    inputs: Inputs | FusedInputs  # dense tensors
    given: Inputs | FusedInputs  # the same numbers in other layouts
    grad_output: Tensor
    names: list[str]  # of the gradients that are wanted
    interpolation: str
    shapes: object  # as they are given
    start_index: Tensor | None
    threads: int
    directly: bool  # the operators, or the function and autograd
    kinds: list[str]


# ---- layouts -------------------------------------------------------------------------------------


def transposed(tensor: Tensor, random: Random) -> Tensor:
    one, other = random.randrange(tensor.dim()), random.randrange(tensor.dim())
    return tensor.transpose(one, other).contiguous().transpose(one, other)


def sliced(tensor: Tensor, random: Random) -> Tensor:
    """Every second element along one axis of a larger tensor, beside numbers that nobody wants."""
    axis = random.randrange(tensor.dim())
    beside = torch.full_like(tensor, 77)
    both = torch.stack([beside, tensor], axis + 1).flatten(axis, axis + 1)
    index = [slice(None)] * tensor.dim()
    index[axis] = slice(1, None, 2)
    return both[tuple(index)]


def offset(tensor: Tensor, random: Random) -> Tensor:
    """Not the first elements of its storage."""
    skip = random.randrange(1, 9)
    storage = torch.full((skip + tensor.numel() + 3,), 77, dtype=tensor.dtype)
    storage[skip : skip + tensor.numel()] = tensor.flatten()
    return storage[skip : skip + tensor.numel()].view(tensor.shape)


def misaligned(tensor: Tensor, random: Random) -> Tensor:
    """At an address that is no multiple of its elements' size."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    skip = random.randrange(1, 16)
    memory = bytearray(skip + size)
    memory[skip:] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=skip)
    return flat.view(tensor.shape)


LAYOUTS = (lambda tensor, random: tensor, transposed, sliced, offset, misaligned)


def repeated(tensor: Tensor, random: Random) -> tuple[Tensor, Tensor]:
    """A tensor that is the same along one axis, dense and with stride 0."""
    axis = random.randrange(tensor.dim())
    if tensor.shape[axis] == 0:
        return tensor, tensor
    expanded = tensor.narrow(axis, 0, 1).expand_as(tensor)
    return expanded.contiguous(), expanded


# ---- from a seed to a case -----------------------------------------------------------------------


def make_case(seed: int) -> Case:
    random = Random(seed)
    kinds = []
    large = random.random() < 0.01  # enough work for several threads
    num_levels = random.randint(1, 4)
    ragged = random.random() < 0.3
    num_points = [random.randint(0, 5) for _ in range(num_levels)]
    side = 30 if large else 7
    sizes = dict(
        spatial_shapes=[
            (random.randint(1, side), random.randint(1, side)) for _ in range(num_levels)
        ],
        batch=random.choice([0, 1, 1, 2, 3]),
        num_queries=300 if large else random.choice([0, 1, 2, 5, 9, 20]),
        num_heads=random.randint(1, 5),
        head_dim=random.choice([1, 2, 3, 7, 8, 15, 16, 17, 30, 32, 33, 64, 71, 130]),
        num_points=num_points if ragged else random.randint(1, 6),
        dtype=random.choice(list(TOLERANCES)),
        seed=seed,
    )
    form = random.choice(["plain", "nearest", "points", "boxes", "shared point", "shared box"])
    inputs: Inputs | FusedInputs
    if form in ("plain", "nearest"):
        inputs = make_inputs(**sizes)
    else:
        inputs = make_fused_inputs(
            **sizes,
            reference_size=2 if "point" in form else 4,
            shared_reference="shared" in form,
            padding=random.random() < 0.5,
        )
    kinds += [form, f"value {str(sizes['dtype']).removeprefix('torch.')}"]
    names = gradient_names(inputs)
    if random.random() < 0.4:
        kinds.append("mixed dtypes")
        others = {name: random.choice(list(TOLERANCES)) for name in names if name != "value"}
        inputs = replace(
            inputs, **{name: getattr(inputs, name).to(d) for name, d in others.items()}
        )
    grad_output = random_like_output(inputs, seed)

    given = {}
    every_name = [
        name for name in (*names, "padding_mask") if getattr(inputs, name, None) is not None
    ]
    for name in every_name:
        if random.random() < 0.1:
            kinds.append("expanded")
            dense, given[name] = repeated(getattr(inputs, name), random)
            inputs = replace(inputs, **{name: dense})
    moved = without_edges(inputs)
    for name in names:
        if name in given and not torch.equal(getattr(moved, name), getattr(inputs, name)):
            del given[name]
    inputs = moved
    if random.random() < 0.2:
        kinds.append("NaN and infinity")
        for name in names:
            if name not in given and random.random() < 0.5:
                inputs = replace(inputs, **{name: sprinkle(getattr(inputs, name), random)})
        if random.random() < 0.3:
            grad_output = sprinkle(grad_output, random)
    for name in every_name:
        if name not in given:
            layout = random.choice(LAYOUTS)
            given[name] = layout(getattr(inputs, name), random)
            if layout is misaligned:
                kinds.append("misaligned")
    wanted = [name for name in names if random.random() < 0.6]
    kinds += [] if wanted else ["no gradient wanted"]
    directly = random.random() < 0.5
    kinds += ["operators"] if directly else ["functions"]
    shapes: object = inputs.spatial_shapes
    if random.random() < 0.5:
        shapes = random.choice(LAYOUTS)(torch.tensor(shapes), random)
        shapes = shapes.int() if random.random() < 0.5 else shapes
    start_index = None
    if random.random() < 0.5:
        areas = torch.tensor([height * width for height, width in inputs.spatial_shapes])
        start_index = random.choice(LAYOUTS)(areas.cumsum(0) - areas, random)
    return Case(
        inputs=inputs,
        given=replace(inputs, **given),
        grad_output=grad_output,
        names=wanted,
        interpolation="nearest" if form == "nearest" else "bilinear",
        shapes=shapes,
        start_index=start_index,
        threads=random.choice([1, 1, 2, 3]),
        directly=directly,
        kinds=kinds,
    )


def sprinkle(tensor: Tensor, random: Random) -> Tensor:
    """A copy with a few special numbers."""
    flat = tensor.flatten().clone()
    for _ in range(min(len(flat), random.choice([1, 1, 2, 10]))):
        flat[random.randrange(len(flat))] = random.choice(SPECIALS)
    return flat.view(tensor.shape)


def without_edges(inputs: Inputs | FusedInputs) -> Inputs | FusedInputs:
    """Move out of the map what is at the edge of a cell: two right answers differ by far there."""
    points, origin, step = to_pixels(inputs)
    pixel = origin + step * points
    margin = 1e-8 if inputs.value.dtype == torch.float64 else 1e-3
    at_edge = ((pixel - pixel.round()).abs() < margin).any(-1, keepdim=True)
    return with_points(inputs, torch.where(at_edge, FAR_OUTSIDE, points))


# ---- what comes ----------------------------------------------------------------------------------


def call_functions(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    tracked = {name: getattr(case.given, name).detach() for name in gradient_names(case.given)}
    for name in case.names:
        tracked[name].requires_grad_()
    inputs = replace(case.given, **tracked, spatial_shapes=case.shapes)
    options = {} if isinstance(inputs, FusedInputs) else {"interpolation": case.interpolation}
    output = call(OPERATOR, inputs, start_index=case.start_index, **options)
    if case.names:
        output.backward(case.grad_output)
    gradients = {name: tracked[name].grad for name in case.names}
    if any(gradient is None for gradient in gradients.values()):
        raise Wrong(f"{case.names} must all get a gradient, got {gradients}")
    return output.detach(), gradients


def call_operators(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward by torch.ops, which take sizes as a list or as a tensor."""
    given, names = case.given, gradient_names(case.given)
    fused = isinstance(given, FusedInputs)
    tensor = case.shapes if isinstance(case.shapes, Tensor) else None
    shapes = [] if tensor is not None else [side for pair in case.shapes for side in pair]
    others = [getattr(given, name) for name in names if name != "value"]
    last = given.padding_mask if fused else case.interpolation == "nearest"
    arguments = [given.value, shapes, tensor, case.start_index, *others]
    arguments += [given.num_points or [], last]
    ops = torch.ops.msda
    forward = ops.ms_deform_attn_fused if fused else ops.ms_deform_attn
    output = forward(*arguments)
    needs = [name in case.names for name in names]
    if fused:
        gradients = ops._ms_deform_attn_fused_backward(case.grad_output, output, *arguments, *needs)
    else:
        gradients = ops._ms_deform_attn_backward(case.grad_output, *arguments, *needs)
    found = dict(zip(names, gradients, strict=True))
    for name in names:
        if name not in case.names and found[name].numel() > 0:
            raise Wrong(f"grad_{name} must be empty where nobody wants it, got {found[name].shape}")
    return output, {name: found[name] for name in case.names}


def check(seed: int) -> list[str]:
    """Run the case of a seed; returns its kinds."""
    case = make_case(seed)
    about = f"{', '.join(case.kinds)}, shapes {case.inputs.spatial_shapes}"
    torch.set_num_threads(case.threads)
    try:
        output, gradients = (call_operators if case.directly else call_functions)(case)
    except RuntimeError as error:
        raise Wrong(f"{about}: a valid call must not be refused, got {error}") from error
    exact = in_float64(case.inputs)
    options = {} if isinstance(exact, FusedInputs) else {"interpolation": case.interpolation}
    try:
        compare("output", output, call(REFERENCE, exact, **options), case)
        names = case.names
        if case.interpolation == "nearest" and "sampling_locations" in names:
            names = [name for name in names if name != "sampling_locations"]
            if gradients["sampling_locations"].ne(0).any():
                raise Wrong("sampling_locations must get a gradient of 0, got another")
        if names:
            expected = compute_gradients(
                REFERENCE, exact, case.grad_output.double(), names, **options
            )
            for name in names:
                compare(name, gradients[name], expected[name], case)
    except Wrong as wrong:
        raise Wrong(f"{about}: {wrong}") from None
    return case.kinds


def compare(name: str, actual: Tensor, expected: Tensor, case: Case) -> None:
    """Raise Wrong unless the numbers are close in the Euclidean norm, and finite where they are."""
    like = case.inputs.value if name == "output" else getattr(case.inputs, name)
    if actual.shape != expected.shape or actual.dtype != like.dtype:
        raise Wrong(
            f"{name} must be {like.dtype} of shape {tuple(expected.shape)}, "
            f"got {actual.dtype} of shape {tuple(actual.shape)}"
        )
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        where = (actual.isfinite() != finite).nonzero()[0].tolist()
        raise Wrong(
            f"{name}{where} must be {expected[tuple(where)].item()}, "
            f"got {actual[tuple(where)].item()}"
        )
    # Sums are of the precision of value, though a gradient may be wider; a gradient of logits may
    # be computed from the output as it was rounded.
    dtypes = [actual.dtype, torch.promote_types(case.inputs.value.dtype, torch.float32)]
    if name == "attention_logits":
        dtypes.append(case.inputs.value.dtype)
    tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    difference = (actual.double() - expected)[finite].norm().item()
    # Of few numbers one rounding may count for more than in the mean, and they may cancel.
    limit = 2 * tolerance * (expected[finite].norm().item() + typical_norm(name, expected, case))
    if not difference <= limit:
        raise Wrong(f"{name} must be within {limit:.3g} of the reference, got {difference:.3g}")


def typical_norm(name: str, expected: Tensor, case: Case) -> float:
    """The norm of a result whose terms do not cancel."""
    inputs = case.inputs
    fused = isinstance(inputs, FusedInputs)

    def size(tensor: Tensor) -> float:
        numbers = tensor.double()[tensor.isfinite()]
        return numbers.square().mean().sqrt().item() if numbers.numel() > 0 else 0.0

    value, g = size(inputs.value), size(case.grad_output)
    channels = inputs.value.shape[3] ** 0.5
    weight = 1.0 if fused else size(inputs.attention_weights)
    side = max(max(pair) for pair in inputs.spatial_shapes)
    each = {
        "output": weight * value,
        "value": weight * g,
        "attention_weights": g * value * channels,
        "attention_logits": g * value * channels,
        "sampling_locations": weight * g * value * channels * side,
        "sampling_offsets": weight * g * value * channels * side,
        "reference_points": weight * g * value * channels * side,
    }[name]
    return each * expected.numel() ** 0.5


if __name__ == "__main__":
    sys.exit(seed_runner.main("tests/fuzz/calls.py", check))
