"""Stand in for the compiled operator that research repositories import and fail to build.

``import msda.drop_in``, before anything that wants the operator, calls :func:`install`; so does
``python -m msda.drop_in script.py ...`` for a program that is not to be edited. Then

- ``import MultiScaleDeformableAttention`` (Deformable DETR, DINO, Mask2Former and their kin),
  ``groundingdino._C``, ``detrex._C`` and ``mmcv._ext`` hold :func:`ms_deform_attn_forward` and
  :func:`ms_deform_attn_backward` where the library's own extension is missing or does not load;
- ``DCNv4.ext`` holds :func:`flash_deform_attn_forward` and :func:`flash_deform_attn_backward`;
- ``multi_scale_deformable_attn_pytorch``, which mmcv, Grounding DINO and detrex run on a CPU, is
  :func:`msda.ms_deform_attn`.

An extension that loads is left alone, unless ``install(overwrite=True)`` is called. No library is
imported for this: a finder in ``sys.meta_path`` waits until the program imports it.
"""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import multiprocessing.spawn
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from msda.functional import ms_deform_attn, split_shapes
from msda.ops import has_kernel
from msda.patching import CallCounter
from msda.reference import SpatialShapes, sum_dtype

__all__ = [
    "Entry",
    "Report",
    "flash_deform_attn_backward",
    "flash_deform_attn_forward",
    "install",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "multi_scale_deformable_attn_pytorch",
    "report",
    "uninstall",
]

# ---- what the libraries call ---------------------------------------------------------------------


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | None,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Compute :func:`msda.ms_deform_attn` as the original extension does, recording no graph.

    Args:
        value: (B, S, M, D), as all that follows in any of the four dtypes, on the CPU or a GPU,
            contiguous or not.
        spatial_shapes: (L, 2) rows (height, width).
        level_start_index: (L,) first row of each level in S; may be None.
        sampling_loc: (B, Q, M, L, P, 2) last axis (x, y), 0..1; its dtype need not be that of
            ``value``, but those libraries that round it to 16 bits lose precision by that.
        attn_weight: (B, Q, M, L, P) after the softmax.
        im2col_step: accepted and ignored: nothing here is im2col, any batch goes in one launch.

    Returns:
        (B, Q, M * D) in the dtype of ``value``.

    Raises:
        RuntimeError: as :func:`msda.ms_deform_attn`, whose names for ``sampling_loc`` and
            ``attn_weight`` are ``sampling_locations`` and ``attention_weights``.
    """
    with torch.no_grad():
        return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | None,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`ms_deform_attn_forward`, as the original extension does.

    Args:
        value: as in :func:`ms_deform_attn_forward`; so are the next four.
        spatial_shapes: (L, 2).
        level_start_index: (L,) or None.
        sampling_loc: (B, Q, M, L, P, 2).
        attn_weight: (B, Q, M, L, P).
        grad_output: (B, Q, M * D) in the dtype of ``value``, contiguous or not.
        im2col_step: accepted and ignored.

    Returns:
        Gradients of ``value``, ``sampling_loc`` and ``attn_weight``, each like its input.

    Raises:
        RuntimeError: as :func:`ms_deform_attn_forward`.
    """
    if not has_kernel(value):
        leaves = [tensor.detach().requires_grad_() for tensor in (value, sampling_loc, attn_weight)]
        with torch.enable_grad():
            output = ms_deform_attn(leaves[0], spatial_shapes, level_start_index, *leaves[1:])
        grad_value, grad_loc, grad_weight = torch.autograd.grad(output, leaves, grad_output)
        return grad_value, grad_loc, grad_weight
    shapes, shapes_tensor = split_shapes(spatial_shapes)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.msda._ms_deform_attn_backward(
        grad_output=grad_output,
        value=value,
        spatial_shapes=shapes,
        spatial_shapes_tensor=shapes_tensor,
        level_start_index=level_start_index,
        sampling_locations=sampling_loc,
        attention_weights=attn_weight,
        num_points=[],
        nearest=False,
        needs_value=True,
        needs_locations=True,
        needs_weights=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return gradients


def multi_scale_deformable_attn_pytorch(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute :func:`msda.ms_deform_attn` instead of the libraries' ``grid_sample`` core.

    The arguments are named and ordered as there; the result is (B, Q, M * D), and differentiable.
    """
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def _mmcv_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """:func:`ms_deform_attn_forward` under mmcv's names."""
    return ms_deform_attn_forward(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    )


def _mmcv_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """:func:`ms_deform_attn_backward` under mmcv's names, into the gradients that it hands over."""
    gradients = ms_deform_attn_backward(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        grad_output,
        im2col_step,
    )
    handed_over = (grad_value, grad_sampling_loc, grad_attn_weight)
    for given, gradient in zip(handed_over, gradients, strict=True):
        given.copy_(gradient)


def flash_deform_attn_forward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | None,
    sampling_loc_attn: Tensor,
    im2col_step: int,
    K: int,  # its name there
    d_stride: int = 8,
    block_thread: int = 0,
) -> Tensor:
    """Compute what DCNv4's FlashDeformAttn does, recording no graph.

    Args:
        value: (B, S, M, D) as in :func:`ms_deform_attn_forward`.
        spatial_shapes: (L, 2) rows (height, width).
        level_start_index: (L,) or None.
        sampling_loc_attn: (B, Q, M, L * K * 3) the locations (x, y), 0..1, of all L * K samples of
            a head, level by level, and after them their L * K logits, before the softmax. Any of
            the four dtypes; the softmax is computed in float32 (float64 for float64 values).
        im2col_step: accepted and ignored, as are ``d_stride`` and ``block_thread``, by which the
            original tunes its launch.
        K: points on each level; any number.
        d_stride: ignored.
        block_thread: ignored.

    Returns:
        (B, Q, M * D) in the dtype of ``value``.

    Raises:
        RuntimeError: as :func:`ms_deform_attn_forward`.
        ValueError: the last axis of ``sampling_loc_attn`` is no L * K * 3.
    """
    with torch.no_grad():
        locations, weights = _unpacked(value, spatial_shapes, sampling_loc_attn, K)
        return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)


def flash_deform_attn_backward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | None,
    sampling_loc_attn: Tensor,
    grad_output: Tensor,
    im2col_step: int,
    K: int,
    d_stride: int = 2,
    block_thread: int = 0,
) -> list[Tensor]:
    """Compute the gradients of :func:`flash_deform_attn_forward`.

    Args:
        value: as in :func:`flash_deform_attn_forward`; so are those not named here.
        spatial_shapes: (L, 2).
        level_start_index: (L,) or None.
        sampling_loc_attn: (B, Q, M, L * K * 3).
        grad_output: (B, Q, M * D) in the dtype of ``value``, contiguous or not.
        im2col_step: accepted and ignored.
        K: points on each level.
        d_stride: ignored.
        block_thread: ignored.

    Returns:
        Gradients of ``value`` and ``sampling_loc_attn``, each like its input.

    Raises:
        RuntimeError, ValueError: as :func:`flash_deform_attn_forward`.
    """
    with torch.no_grad():
        locations, weights = _unpacked(value, spatial_shapes, sampling_loc_attn, K)
        grad_value, grad_locations, grad_weights = ms_deform_attn_backward(
            value, spatial_shapes, level_start_index, locations, weights, grad_output, im2col_step
        )
        # Through the softmax over all samples of a head.
        products = weights * grad_weights
        grad_logits = products - weights * products.sum((3, 4), keepdim=True)
        grad_packed = torch.cat([grad_locations.flatten(3), grad_logits.flatten(3)], -1)
    return [grad_value, grad_packed.to(sampling_loc_attn.dtype)]


def _unpacked(
    value: Tensor, spatial_shapes: SpatialShapes, packed: Tensor, num_points: int
) -> tuple[Tensor, Tensor]:
    """Locations (B, Q, M, L, P, 2) and weights (B, Q, M, L, P), in float32 or float64."""
    num_levels = len(spatial_shapes)
    num_samples = num_levels * num_points
    if packed.dim() != 4 or packed.shape[3] != 3 * num_samples:
        raise ValueError(
            "sampling_loc_attn must have shape (B, Q, M, L * K * 3) with "
            f"L * K * 3 = {3 * num_samples}, got {tuple(packed.shape)}"
        )
    locations, logits = packed.to(sum_dtype(value.dtype)).split([2 * num_samples, num_samples], -1)
    weights = logits.softmax(-1).unflatten(-1, (num_levels, num_points))
    return locations.unflatten(-1, (num_levels, num_points, 2)), weights


def _other_function_of(module: str, name: str) -> Callable[..., Any]:
    """The attributes of a stand-in for a library's extension under all other names.

    ``mmcv.ops`` looks up all its functions when it is imported, and calls these two when a program
    prints its environment.
    """
    if name.startswith("__"):
        raise AttributeError(name)

    def answer(*args: Any, **kwargs: Any) -> str:
        if name in ("get_compiler_version", "get_compiling_cuda_version"):
            return "not compiled"
        raise NotImplementedError(
            f"{module}.{name} must come from {module.partition('.')[0]}'s compiled extension, "
            "which is not installed: msda.drop_in provides the functions of multi-scale "
            "deformable attention alone"
        )

    return answer


# ---- where they look for it ----------------------------------------------------------------------


_Functions = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class _Place:
    """A module into which functions of this one go."""

    module: str
    functions: _Functions
    # For the Python module of a library: the name under which it holds its extension.
    extension: str | None = None

    @property
    def compiled(self) -> bool:
        """Whether it is an extension module, which may be missing."""
        return self.extension is None


_ORIGINAL: _Functions = {
    "ms_deform_attn_forward": ms_deform_attn_forward,
    "ms_deform_attn_backward": ms_deform_attn_backward,
}
_MMCV: _Functions = {
    "ms_deform_attn_forward": _mmcv_forward,
    "ms_deform_attn_backward": _mmcv_backward,
}
_CORE: _Functions = {"multi_scale_deformable_attn_pytorch": multi_scale_deformable_attn_pytorch}

_FLASH: _Functions = {
    "flash_deform_attn_forward": flash_deform_attn_forward,
    "flash_deform_attn_backward": flash_deform_attn_backward,
}

_calls: dict[str, CallCounter] = {}  # of functions, by the module that holds them


def _counted(place: _Place) -> _Place:
    """The same place with functions of its own, which count their calls."""

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            output = function(*args, **kwargs)
            if not torch.compiler.is_compiling():
                if place.module not in _calls:
                    _calls.setdefault(place.module, CallCounter())
                _calls[place.module].add()
            return output

        return counted

    functions = {name: count(function) for name, function in place.functions.items()}
    return dataclasses.replace(place, functions=functions)


_PLACES = {
    place.module: _counted(place)
    for place in (
        _Place("MultiScaleDeformableAttention", _ORIGINAL),
        _Place("mmcv._ext", _MMCV),
        _Place("mmcv.ops.multi_scale_deform_attn", _CORE, "ext_module"),
        _Place("groundingdino._C", _ORIGINAL),
        _Place("groundingdino.models.GroundingDINO.ms_deform_attn", _CORE, "_C"),
        # As Grounded SAM 2 imports it from its own folder.
        _Place("grounding_dino.groundingdino._C", _ORIGINAL),
        _Place("grounding_dino.groundingdino.models.GroundingDINO.ms_deform_attn", _CORE, "_C"),
        _Place("detrex._C", _ORIGINAL),
        _Place("detrex.layers.multi_scale_deform_attn", _CORE, "_C"),
        _Place("DCNv4.ext", _FLASH),
    )
}


# Extensions from which libraries take more than this operator.
_WITH_OTHER_FUNCTIONS = ("mmcv._ext", "DCNv4.ext")

# ---- putting it there ----------------------------------------------------------------------------

_overwrite = False  # whether functions of extensions that load are replaced
_stand_ins: dict[str, ModuleType] = {}
_import_errors: dict[str, str] = {}  # why an extension that is installed was replaced
_undo: list[Callable[[], None]] = []


class _Finder(MetaPathFinder):
    """Comes first in ``sys.meta_path``; sees to the modules of ``_PLACES`` as they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        place = _PLACES.get(fullname)
        if place is None:
            return None
        spec = _find_by_others(fullname, path)
        if spec is None or spec.loader is None:  # without a loader: a folder that is no package
            if not place.compiled:
                return spec
            return ModuleSpec(fullname, _Loader(place, None), origin=__name__)
        spec.loader = _Loader(place, spec.loader)
        return spec


_FINDER = _Finder()


def _find_by_others(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if finder is not _FINDER and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path)
            if spec is not None:
                return spec
    return None


def _find(name: str) -> ModuleSpec | None:
    """The spec of the real module, or None; no package is imported for it."""
    spec, path = None, None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        try:
            spec = _find_by_others(".".join(parts[:end]), path)
        except KeyError:  # a folder without __init__.py in a package that is not imported yet
            return None
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return None if spec is None or spec.loader is None else spec


class _Loader(Loader):
    """Loads the real module if there is one that loads, and puts this module's functions there."""

    def __init__(self, place: _Place, real: Loader | None) -> None:
        self.place = place
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if self.real is None:
            return None
        try:
            return self.real.create_module(spec)
        except ImportError as error:
            self._give_up(spec, error)
            return None

    def exec_module(self, module: ModuleType) -> None:
        if self.real is not None:
            spec = module.__spec__
            assert spec is not None
            spec.loader = module.__loader__ = self.real
            try:
                self.real.exec_module(module)
            except ImportError as error:
                self._give_up(spec, error)
            # A module that loads a compiled library by hand may have put another module there.
            module = sys.modules.get(module.__name__, module)
        if self.real is None:
            _make_stand_in(module, self.place)
        else:
            _put(module, self.place)

    def _give_up(self, spec: ModuleSpec, error: ImportError) -> None:
        """Let the stand-in take the place of an extension that does not load."""
        if not self.place.compiled:
            raise error
        _import_errors[spec.name] = f"importing {spec.origin} failed: {_in_a_line(error)}"
        self.real = None
        spec.loader, spec.origin, spec.has_location = self, __name__, False


def _make_stand_in(module: ModuleType, place: _Place) -> None:
    module.__doc__ = "Multi-scale deformable attention, by msda.drop_in."
    vars(module).update(place.functions)
    if place.module in _WITH_OTHER_FUNCTIONS:
        vars(module)["__getattr__"] = functools.partial(_other_function_of, place.module)
    _stand_ins[place.module] = module
    _undo.append(functools.partial(_remove, module, place))


def _remove(module: ModuleType, place: _Place) -> None:
    """Take a stand-in out of ``sys.modules`` and out of the package that holds it."""
    del _stand_ins[place.module]
    _import_errors.pop(place.module, None)
    if sys.modules.get(place.module) is module:
        del sys.modules[place.module]
    parent, _, name = place.module.rpartition(".")
    if vars(sys.modules.get(parent, module)).get(name) is module:
        delattr(sys.modules[parent], name)


def _put(module: ModuleType, place: _Place) -> None:
    """Put functions into a real module; those of an extension only if missing, or if asked to."""
    for name, function in place.functions.items():
        before = getattr(module, name, None)
        if before is function or (before is not None and place.compiled and not _overwrite):
            continue
        setattr(module, name, function)
        if before is None:
            _undo.append(functools.partial(delattr, module, name))
        else:
            _undo.append(functools.partial(setattr, module, name, before))


def install(*, overwrite: bool = False) -> Report:
    """Provide the operator wherever a known library looks for it, now or when it is imported.

    Another call changes nothing, except with ``overwrite=True`` after a call without.

    Args:
        overwrite: replace the operator's functions in extensions that load, too; the rest of an
            extension stays.

    Returns:
        The :func:`report` after it.

    Example:
        >>> import msda.drop_in  # calls it
        >>> import MultiScaleDeformableAttention as MSDA
        >>> value, shapes = torch.rand(1, 6, 2, 4), torch.tensor([[2, 3]])
        >>> locations, weights = torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3)
        >>> start = torch.zeros(1, dtype=torch.long)
        >>> MSDA.ms_deform_attn_forward(value, shapes, start, locations, weights, 64).shape
        torch.Size([1, 5, 8])
    """
    global _overwrite
    _overwrite = _overwrite or overwrite
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for place in _PLACES.values():
        module = sys.modules.get(place.module)
        if module is not None:
            _put(module, place)
        elif "." not in place.module and _find(place.module) is None:
            importlib.import_module(place.module)
    return report()


def uninstall() -> None:
    """Undo what :func:`install` did; modules that imported a function by name keep it."""
    global _overwrite
    _overwrite = False
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    while _undo:
        _undo.pop()()
    _calls.clear()


# ---- saying so -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """The fate of one module.

    Attributes:
        module: its full name.
        functions: the names of the functions in question.
        status: "provided": they are msda's; "on import": they will be, once the program imports
            the module; "left alone": they are the library's own; "absent": there is no such
            library.
        reason: why, in a few words.
        calls: how often they ran since :func:`install`, forward and backward each for one; compiled
            code does not count. Functions that are provided and never used: the library runs
            something else.
    """

    module: str
    functions: tuple[str, ...]
    status: str
    reason: str
    calls: int = 0

    @property
    def library(self) -> str:
        """The top-level package."""
        return self.module.partition(".")[0]


class Report(list[Entry]):
    """One entry for each module that is known here; prints as a table for people."""

    def __str__(self) -> str:
        present = [entry for entry in self if entry.status != "absent"]
        width = max((len(entry.module) for entry in present), default=0)
        lines = [
            f"{entry.module:{width}}  {entry.status:10}  "
            + f"used {entry.calls} times; " * (entry.status == "provided")
            + entry.reason
            for entry in present
        ]
        libraries = {entry.library for entry in present}
        absent = dict.fromkeys(e.library for e in self if e.library not in libraries)
        return "\n".join([*lines, f"not installed: {', '.join(absent)}"] if absent else lines)

    __repr__ = __str__


def report() -> Report:
    """Say where msda's functions are, where they will be, and why not elsewhere.

    Nothing is imported for it: whether an extension loads is known once the program imported it.
    """
    return Report(
        Entry(
            place.module,
            tuple(place.functions),
            *_status(place),
            calls=_calls[place.module].total() if place.module in _calls else 0,
        )
        for place in _PLACES.values()
    )


def _status(place: _Place) -> tuple[str, str]:
    """The status of a place, and the reason."""
    library = place.module.partition(".")[0]
    module = sys.modules.get(place.module)
    if module is not None:
        return _status_of_loaded(place, module)
    if _find_by_others(library, None) is None and "." in place.module:
        return "absent", f"{library} is not installed"
    if _FINDER not in sys.meta_path:
        return "left alone", "msda.drop_in was uninstalled"
    spec = _find(place.module)
    if spec is None:
        if place.compiled:
            return "on import", f"no {place.module} is installed"
        return "absent", f"{library} has no such module"
    if not place.compiled:
        return "on import", _names(place)
    if _overwrite:
        return "on import", f"into {spec.origin}"
    if place.module in _import_errors:
        return "left alone", _import_errors[place.module]
    return "left alone", f"{spec.origin} is installed; replaced if importing it fails"


def _status_of_loaded(place: _Place, module: ModuleType) -> tuple[str, str]:
    if place.module in _stand_ins:
        return "provided", _import_errors.get(place.module, f"no {place.module} is installed")
    origin = getattr(module, "__file__", None) or "what the program put there"
    if any(getattr(module, name, None) is not ours for name, ours in place.functions.items()):
        return "left alone", f"{origin} is loaded"
    if place.compiled:
        return "provided", f"in {origin}"
    if not hasattr(module, str(place.extension)):
        return "provided", (
            f"{_names(place)}; the module has no {place.extension}, because it was imported before "
            "msda.drop_in"
        )
    return "provided", _names(place)


def _names(place: _Place) -> str:
    return ", ".join(place.functions)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- running a program ---------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program with the drop-in installed, or print the report; see ``--help``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Words after the program's name are the program's.
    end = next(
        (i for i, word in enumerate(given) if word == "-m" or not word.startswith("-")), len(given)
    )
    parser = argparse.ArgumentParser(
        prog="python -m msda.drop_in",
        usage="%(prog)s [--overwrite] [--report] [script.py | -m package.module] [argument ...]",
        description="Run a program in which msda stands in for the compiled operator of "
        "multi-scale deformable attention. Without a program: load the extensions that are "
        "installed, and report.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the operator in extensions that load, too"
    )
    parser.add_argument(
        "--report", action="store_true", help="print the report to stderr when the program ends"
    )
    options, program = parser.parse_args(given[:end]), given[end:]
    if program == ["-m"]:
        parser.error("-m must be followed by the name of a module")
    if program and program[0] != "-m" and not os.path.isfile(program[0]):
        parser.error(f"the program must be a Python file, got {program[0]!r}")

    install(overwrite=options.overwrite)
    if not program:
        _try_extensions()
        print(report())
        return 0
    _install_in_spawned_processes(options.overwrite)
    try:
        if program[0] == "-m":
            _run_module(program[1:])
        else:
            _run_script(program)
    finally:
        if options.report:
            print(report(), file=sys.stderr)
    return 0


def _try_extensions() -> None:
    """Import the extensions that are installed, to see which load."""
    for place in _PLACES.values():
        if place.compiled and place.module not in sys.modules and _find(place.module) is not None:
            try:
                importlib.import_module(place.module)
            except Exception as error:  # a stranger's package may raise anything
                _import_errors[place.module] = f"importing it failed: {_in_a_line(error)}"


def _run_script(program: list[str]) -> None:
    """Run a file, as ``python script.py ...`` does."""
    path = os.path.abspath(program[0])
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    code = loader.source_to_code(loader.get_data(path), path)
    _run_as_main(code, program, __file__=path, __loader__=loader)


def _run_module(program: list[str]) -> None:
    """Run a module or the ``__main__`` of a package, as ``python -m name ...`` does."""
    name, *arguments = program
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    if spec is None or not isinstance(spec.loader, InspectLoader):
        raise ModuleNotFoundError(f"no module or package with a __main__ is named {name!r}")
    _run_as_main(
        spec.loader.get_code(spec.name),
        [spec.origin or name, *arguments],
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )


def _run_as_main(code: Any, argv: list[str], **attributes: Any) -> None:
    # runpy would take the module away again before threads and exit handlers end, and would leave
    # the name under which multiprocessing knows it to this program.
    module = ModuleType("__main__")
    vars(module).update(__builtins__=builtins, **attributes)
    sys.argv[:] = argv
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    exec(code, vars(module))


class _Installation:
    """Installs where it is unpickled."""

    def __init__(self, overwrite: bool) -> None:
        self.overwrite = overwrite

    def __reduce__(self) -> tuple[Callable[[], Report], tuple[()]]:
        return functools.partial(install, overwrite=self.overwrite), ()


def _install_in_spawned_processes(overwrite: bool) -> None:
    """Install in processes that multiprocessing spawns before they import the program again."""
    prepare = multiprocessing.spawn.get_preparation_data

    @functools.wraps(prepare)
    def get_preparation_data(name: str) -> dict[str, Any]:
        # The new process unpickles this first of all, and passes over keys that it does not know.
        return {__name__: _Installation(overwrite), **prepare(name)}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


if __name__ == "__main__":
    from msda import drop_in  # what programs import; this copy of it stays without effect

    sys.exit(drop_in.main())
install()
