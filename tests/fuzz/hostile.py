"""Arguments that nobody should give: each call is refused in a sentence, or computed right.

    python tests/fuzz/hostile.py --first 0 --count 1000

Both functions and the four operators behind them are called with one to three arguments changed. A
refusal reads ``<name> must <rule>, got <value>``; of an operator that is called directly, the error
may also be torch's own, about types that do not fit its schema. What comes back instead is held
against the reference, which must be able to compute it from the same arguments. A crash ends the
process, so run.py starts it as a child; ``--at FILE`` then holds the seed.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import msda
from msda.testing import (
    REFERENCE,
    FusedInputs,
    Inputs,
    gradient_names,
    make_fused_inputs,
    make_inputs,
    random_like_output,
    relative_error,
)

# After msda, which is another one where sanitizers run.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz import seed_runner
from tests.fuzz.seed_runner import Wrong
from tests.helpers.results import compute_gradients

OUR_REFUSAL = re.compile(r"[a-z_]+ must .+, got .+", re.DOTALL)
# What the dispatcher says before it comes to us.
TORCHS_REFUSAL = re.compile(r"msda::\w+\(\)|Could not run 'msda::")
# Bytes of address space, so that what is too large fails at once. Sanitizers need more, and have a
# limit of their own.
MEMORY = 24 << 30
FUNCTIONS = {Inputs: msda.ms_deform_attn, FusedInputs: msda.ms_deform_attn_fused}
Arguments = dict[str, Any]

# ---- calls that are right ------------------------------------------------------------------------


def make_call(random: Random) -> tuple[str, Arguments]:
    """A function or operator by its name, and arguments that fit."""
    ragged = random.random() < 0.3
    sizes = dict(
        spatial_shapes=[(3, 4), (2, 2)],
        batch=random.choice([1, 2]),
        num_queries=random.choice([1, 5]),
        num_heads=3,
        head_dim=random.choice([4, 17]),
        num_points=[2, 1] if ragged else 2,
        dtype=random.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        seed=random.randrange(100),
    )
    fused = random.random() < 0.5
    inputs: Inputs | FusedInputs
    if fused:
        size, padding = random.choice([2, 4]), random.random() < 0.5
        inputs = make_fused_inputs(**sizes, reference_size=size, padding=padding)
    else:
        inputs = make_inputs(**sizes)
    arguments = vars(inputs) | {"level_start_index": random.choice([None, torch.tensor([0, 12])])}
    if not fused:
        arguments["interpolation"] = random.choice(["bilinear", "nearest"])
    target = "ms_deform_attn_fused" if fused else "ms_deform_attn"
    route = random.choice(["function", "operator", "backward"])
    if random.random() < 0.5:
        arguments["spatial_shapes"] = torch.tensor(arguments["spatial_shapes"])
    if route == "function":
        return target, arguments
    if not fused:
        arguments["nearest"] = arguments.pop("interpolation") == "nearest"
    shapes = arguments["spatial_shapes"]
    by_tensor = isinstance(shapes, Tensor)
    arguments["spatial_shapes_tensor"] = shapes if by_tensor else None
    arguments["spatial_shapes"] = [] if by_tensor else [side for pair in shapes for side in pair]
    arguments["num_points"] = arguments["num_points"] or []
    if route == "operator":
        return f"torch.ops.msda.{target}", arguments
    arguments["grad_output"] = random_like_output(inputs)
    names = [name.split("_")[-1] for name in gradient_names(inputs)]
    short = {"points": "reference"} if fused else {}
    for name in names:
        arguments[f"needs_{short.get(name, name)}"] = random.random() < 0.7
    if fused:
        arguments["output"] = torch.randn_like(arguments["grad_output"])
    return f"torch.ops.msda._{target}_backward", arguments


# ---- what is done to them ------------------------------------------------------------------------


class Subclass(Tensor):
    """A subclass of Tensor that changes nothing."""


def cut_storage(tensor: Tensor, keep: float) -> Tensor:
    tensor = tensor.detach().clone()
    storage = tensor.untyped_storage()
    storage.resize_(int(storage.nbytes() * keep))
    return tensor


def narrow(tensor: Tensor, random: Random, length: int) -> Tensor:
    axis = random.randrange(max(1, tensor.dim()))
    return tensor.narrow(axis, 0, min(length, tensor.shape[axis]))


def lengthen(tensor: Tensor, random: Random) -> Tensor:
    axis = random.randrange(tensor.dim())
    return torch.cat([tensor, tensor], axis)


def expand(tensor: Tensor, random: Random) -> Tensor:
    """So large that no machine has the memory; it takes none itself."""
    axis = random.randrange(tensor.dim())
    sizes = list(tensor.shape)
    sizes[axis] = random.choice([2**40, 2**50, 2**62])
    return tensor.narrow(axis, 0, 1).expand(sizes)


OTHER_DTYPES = (
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex32,
    torch.float8_e4m3fn,
    torch.float16,
    torch.float64,
)

# By the names that results are counted under.
TENSOR_CHANGES: dict[str, Callable[[Tensor, Random], Any]] = {
    "None": lambda tensor, random: None,
    "rank": lambda tensor, random: random.choice([tensor[:1].squeeze(0), tensor.unsqueeze(0)]),
    "no dimension": lambda tensor, random: tensor.flatten()[0],
    "length": lambda tensor, random: random.choice(
        [narrow(tensor, random, 1), lengthen(tensor, random)]
    ),
    "length 0": lambda tensor, random: narrow(tensor, random, 0),
    "huge": expand,
    "dtype": lambda tensor, random: tensor.to(random.choice(OTHER_DTYPES)),
    "meta": lambda tensor, random: tensor.to("meta"),
    "freed storage": lambda tensor, random: cut_storage(tensor, 0),
    "storage too small": lambda tensor, random: cut_storage(tensor, random.choice([0.5, 0.9])),
    "sparse": lambda tensor, random: tensor.to_sparse(),
    "MKL-DNN layout": lambda tensor, random: tensor.float().to_mkldnn(),
    "quantized": lambda tensor, random: torch.quantize_per_tensor(
        tensor.float(), 0.1, 0, torch.qint8
    ),
    "nested": lambda tensor, random: torch.nested.nested_tensor(list(tensor)),
    "negative bit": lambda tensor, random: (
        torch._neg_view(tensor) if tensor.is_floating_point() else tensor
    ),
    "subclass": lambda tensor, random: tensor.as_subclass(Subclass),
    "inference tensor": lambda tensor, random: make_in_inference_mode(tensor),
    "stride 0": lambda tensor, random: tensor[:1].expand_as(tensor),
    "list": lambda tensor, random: tensor.tolist(),
    "array": lambda tensor, random: tensor.float().numpy(),
    "no tensor": lambda tensor, random: random.choice([1, 1.5, "x", object(), True, [], {}]),
}


def make_in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


HUGE = (2**24 + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63))


def change_list(numbers: Any, random: Random) -> Any:
    """A list of sizes that is not what it should be: pairs, or a flat list."""
    if isinstance(numbers, Tensor):
        numbers = numbers.clone()
        numbers.view(-1)[random.randrange(numbers.numel())] = random.choice(
            [0, -1, -4, 5, *HUGE[:5]]
        )
        return numbers
    if not isinstance(numbers, list) or not numbers:
        return random.choice([[], [1], [0, 0], [(1,)], [(1, 2, 3)], "ab", 3, [None], [2**63]])
    changed = [list(entry) if isinstance(entry, tuple) else entry for entry in numbers]
    number = random.choice([0, -1, 1, 5, 2.0, 2.5, True, "3", None, *HUGE, float("nan")])
    where = random.randrange(len(changed))
    if isinstance(changed[where], list):
        changed[where][random.randrange(2)] = number
    else:
        changed[where] = number
    if random.random() < 0.2:
        changed = random.choice([changed[:-1], changed * 2, changed[0], [changed], tuple(changed)])
    return changed


def change(arguments: Arguments, name: str, random: Random) -> str:
    """Change one argument in place; returns under which name that counts."""
    given = arguments[name]
    if name in ("spatial_shapes", "spatial_shapes_tensor", "num_points") and random.random() < 0.7:
        arguments[name] = change_list(given, random)
        return "sizes"
    if isinstance(given, Tensor):
        kind = random.choice(list(TENSOR_CHANGES))
        try:
            arguments[name] = TENSOR_CHANGES[kind](given, random)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return "nothing"  # there is no such tensor of this dtype or size
        return kind
    arguments[name] = random.choice(
        [None, "bicubic", 7, -1, 2**70, 1.5, [1, 2], torch.ones(2), object()]
    )
    return "option"


# ---- what comes ----------------------------------------------------------------------------------


def call(target: str, arguments: Arguments) -> Any:
    if target.startswith("torch.ops"):
        return getattr(torch.ops.msda, target.rsplit(".", 1)[1])(**arguments)
    return getattr(msda, target)(**arguments)


def check(seed: int) -> list[str]:
    """Run the case of a seed; returns the kinds of changes and whether it was refused."""
    random = Random(seed)
    target, arguments = make_call(random)
    names = random.sample(list(arguments), random.choice([1, 1, 1, 2, 3]))
    changes = [change(arguments, name, random) for name in names]
    about = f"{target} with {', '.join(changes)}"
    try:
        results = call(target, arguments)
    except Exception as error:
        text = str(error)
        directly = target.startswith("torch.ops")
        if OUR_REFUSAL.match(text):
            return [*changes, "refused"]
        if directly and TORCHS_REFUSAL.match(text):
            return [*changes, "refused by torch"]
        text = " ".join(text.split())[:300]
        message = "must be refused as '<name> must <rule>, got <value>'"
        raise Wrong(f"{about}: {message}, got {type(error).__name__}: {text}") from error
    try:
        require_right(target, arguments, results)
    except Wrong as wrong:
        raise Wrong(f"{about}: {wrong}") from None
    return [*changes, "computed"]


def clean(argument: Any) -> Any:
    """The same numbers in a plain tensor; Wrong where there are none."""
    if not isinstance(argument, Tensor):
        return argument
    tensor = argument.detach().as_subclass(Tensor)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise Wrong(
            f"must be refused, got a result from a tensor of {tensor.layout}, {tensor.device}"
        )
    reach = 0
    if tensor.numel() > 0:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        reach = tensor.storage_offset() + sum((size - 1) * step for size, step in steps) + 1
    if reach * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise Wrong("must be refused, got a result from a tensor without the memory it claims")
    with torch.inference_mode(False):
        return tensor.resolve_neg().clone()


def require_right(target: str, arguments: Arguments, results: Any) -> None:
    """Raise Wrong unless the reference gives the same."""
    tensors = [argument for argument in arguments.values() if isinstance(argument, Tensor)]
    if all(tensor.is_meta for tensor in tensors):
        return  # shapes were asked for
    given = {name: clean(argument) for name, argument in arguments.items()}
    fused = "reference_points" in given
    if "spatial_shapes_tensor" in given:
        flat, by_tensor = given["spatial_shapes"], given["spatial_shapes_tensor"]
        pairs = list(zip(flat[::2], flat[1::2], strict=True)) if by_tensor is None else by_tensor
        given |= {"spatial_shapes": pairs, "num_points": given["num_points"] or None}
    shapes = given["spatial_shapes"]
    given["spatial_shapes"] = shapes.tolist() if isinstance(shapes, Tensor) else shapes
    options = {}
    if not fused:
        nearest = given.get("nearest", False) or given.get("interpolation") == "nearest"
        options["interpolation"] = "nearest" if nearest else "bilinear"
    kind = FusedInputs if fused else Inputs
    try:
        inputs = kind(**{name: given.get(name) for name in kind.__dataclass_fields__})
        exact = {name: getattr(inputs, name).double() for name in gradient_names(inputs)}
        for name, tensor in exact.items():
            setattr(inputs, name, tensor)
        expected = compute_expected(inputs, given, options)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Wrong(
            f"must be refused, got a result where the reference has none: {text}"
        ) from error
    if "output" in given:
        return  # the gradients are those of the output that was given
    results = [results] if isinstance(results, Tensor) else list(results)
    for result, right in zip(results, expected, strict=True):
        if right is None:
            if result.numel() > 0:
                raise Wrong(f"must be empty where no gradient is wanted, got {tuple(result.shape)}")
        elif result.shape != right.shape:
            raise Wrong(f"must have shape {tuple(right.shape)}, got {tuple(result.shape)}")
        elif right.isfinite().all() and not relative_error(result, right) < 0.05:
            raise Wrong(f"must be close to the reference, got {relative_error(result, right):.2g}")


def compute_expected(inputs: Any, given: Arguments, options: Arguments) -> list[Tensor | None]:
    """The output, or the gradients with None for those that are not wanted."""
    from msda.testing import call as call_either

    if "grad_output" not in given:
        return [call_either(REFERENCE, inputs, **options)]
    names = gradient_names(inputs)
    needs = [argument for name, argument in given.items() if name.startswith("needs_")]
    wanted = [name for name, needed in zip(names, needs, strict=True) if needed]
    still = "sampling_locations" if options.get("interpolation") == "nearest" else ""
    moving = [name for name in wanted if name != still]
    gradients = dict.fromkeys(names)
    if moving:
        grad_output = given["grad_output"].double()
        gradients |= compute_gradients(REFERENCE, inputs, grad_output, moving, **options)
    if still in wanted:
        gradients[still] = torch.zeros_like(getattr(inputs, still))
    return [gradients[name] for name in names]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if "ASAN_OPTIONS" not in os.environ:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    sys.exit(seed_runner.main("tests/fuzz/hostile.py", check))
