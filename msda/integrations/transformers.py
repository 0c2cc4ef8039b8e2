"""Run the attention of Hugging Face transformers models by `msda`, and take it back.

What computes the attention there, the core, is given values, locations and weights. It is known by
its parameters and stands in one of three places: it is a method (``forward``, where the core is a
module of its own), a function that a method finds among its globals, or a function that a module
keeps as an attribute. ``use_msda`` gives each module that has a core a subclass of its class, which
calls ours instead; the module itself, its parameters, buffers and hooks stay as they are. Nothing
here imports transformers.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from msda.functional import ms_deform_attn
from msda.modules import MSDeformAttn
from msda.reference import SpatialShapes

Core = Callable[..., Tensor]
Model = TypeVar("Model", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])
_cache = cast(Callable[[Function], Function], functools.cache)  # keeps the signature

# Called with what each core is given: shapes, sampling_locations, attention_weights, num_points.
Observer = Callable[[SpatialShapes, Tensor, Tensor, "Sequence[int] | None"], None]
observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


def use_msda(model: Model) -> Model:
    """Replace the attention core of every layer of a transformers model by `msda`, in place.

    Cores are found by what the modules contain, whatever the model's class. Before anything is
    changed, each is run beside ours on a small problem: one whose output or gradients differ is
    refused. Outputs and gradients of the model stay the same within rounding. Its state dict,
    configuration and ``save_pretrained`` are unchanged; it can be compiled, exported, copied and
    pickled as before (to unpickle it, `msda` must be installed).

    Values keep their dtype, and the attention is computed in float32 (float64 for float64): a
    half-precision model is more accurate than before, apart from what its 16-bit locations lose.
    Under autocast the core's output has the dtype of its values, where the replaced core gave
    float32.

    Call it before anything that wraps the forward of single modules (kernels from the hub, hooks of
    a device map). Calling it again patches what is new in the model.

    Args:
        model: any module, as a whole or in part.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``model`` has no core, or one with other parameters than those known here, or
            one that computes something else. The model is left as it was.

    Example:
        >>> from transformers import DeformableDetrForObjectDetection  # doctest: +SKIP
        >>> model = use_msda(DeformableDetrForObjectDetection(config))  # doctest: +SKIP
    """
    found: dict[nn.Module, _Attributes] = {}
    checked: set[Core] = set()
    for name, module in model.named_modules():
        if isinstance(module, Patched):
            continue
        cores = list(_cores_of(module))
        for core in cores:
            if core.theirs not in checked:  # methods of different modules are different
                _check_same(f"{core.name} of {name or type(module).__name__}", core)
            checked.add(core.theirs)
        if cores and "forward" in vars(module):
            raise ValueError(
                f"{name or 'model'} must run the forward of its class, got one set on the "
                "instance; call use_msda before anything that wraps it"
            )
        if cores:
            found[module] = tuple((core.name, core.ours) for core in cores if core.is_attribute)
    _check_all_found(model, found)
    for module, attributes in found.items():
        module.__class__ = _patched_class(type(module), attributes)
    return model


def undo(model: Model) -> Model:
    """Give a model that :func:`use_msda` patched its own cores back, in place.

    Args:
        model: any module; one that is not patched is left alone.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the class of a module has been replaced again since it was patched.
    """
    patched = [(name, part) for name, part in model.named_modules() if isinstance(part, Patched)]
    for name, module in patched:
        if "msda_replaced" not in vars(type(module)):
            raise ValueError(
                f"{name or 'model'} must have the class that use_msda gave it, "
                f"got {type(module).__name__}"
            )
    for _, module in patched:
        module.__class__ = module.msda_replaced  # type: ignore[assignment]
    return model


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name the layers of a patched model that run a core: the parent where it is its own module."""
    for name, module in model.named_modules():
        is_layer = isinstance(module, Patched) and (module is model or not _is_core(module))
        if is_layer or any(_is_core(child) for child in module.children()):
            yield name, module


# ---- what replaces the cores: one function for each list of parameters ---------------------------


def _attend_module(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[tuple[int, int]],
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Deformable DETR's and that of most others: a module without parameters."""
    return _attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _attend_function(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Mask2Former's and OneFormer's."""
    return _attend(value, value_spatial_shapes, sampling_locations, attention_weights)


def _attend_ragged(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """RT-DETRv2's, D-FINE's and DEIMv2's: levels share one axis of points, (B, Q, M, K, 2)."""
    if method not in _INTERPOLATIONS:
        raise ValueError(f"method must be one of {tuple(_INTERPOLATIONS)}, got {method!r}")
    if method == "discrete":
        sampling_locations = sampling_locations.detach()  # theirs gives them none, not zeros
    return _attend(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points_list,
        _INTERPOLATIONS[method],
    )


def _attend(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
) -> Tensor:
    if not torch.compiler.is_compiling():
        for observe in observers.get():
            observe(spatial_shapes, sampling_locations, attention_weights, num_points)
    return ms_deform_attn(
        value,
        spatial_shapes,
        None,
        sampling_locations,
        attention_weights,
        num_points=num_points,
        interpolation=interpolation,
    )


def _parameters(function: Core) -> tuple[str, ...]:
    """Names of a function's parameters; none of one that does not tell."""
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()
    return names[1:] if names[:1] == ("self",) else names


_INTERPOLATIONS = {"default": "bilinear", "discrete": "nearest"}
_MARKS = {"value", "sampling_locations", "attention_weights"}  # by which a core is known
_OURS = {_parameters(ours): ours for ours in (_attend_module, _attend_function, _attend_ragged)}


# ---- finding cores -------------------------------------------------------------------------------


class _Core(NamedTuple):
    """A function that computes the attention of a module."""

    name: str
    theirs: Core
    ours: Core
    is_attribute: bool = False


def _cores_of(module: nn.Module) -> Iterator[_Core]:
    for owner, methods in _methods_with_cores(type(module)).items():
        for name, called in methods.items():
            method = vars(owner)[name]
            if ours := _replacement(method):
                yield _Core(name, MethodType(method, module), ours)
            for function in called:
                yield _Core(function, method.__globals__[function], called[function])
    for name, item in vars(module).items():
        is_function = isinstance(item, FunctionType | MethodType | functools.partial)
        if is_function and (ours := _replacement(item)):
            yield _Core(name, item, ours, is_attribute=True)


def _is_core(module: nn.Module) -> bool:
    """Whether a patched module is nothing but a core."""
    return isinstance(module, Patched) and _parameters(module.msda_replaced.forward) in _OURS


@_cache
def _methods_with_cores(cls: type[nn.Module]) -> dict[type, dict[str, dict[str, Core]]]:
    """Methods that are a core or call one, by class and name, with ours for each global called."""
    found: dict[type, dict[str, dict[str, Core]]] = {}
    for owner in cls.__mro__:
        if owner in nn.Module.__mro__:
            break
        for name, method in vars(owner).items():
            if not isinstance(method, FunctionType):
                continue
            called = {}
            for global_name in _names(method.__code__):
                function = method.__globals__.get(global_name)
                if isinstance(function, FunctionType) and (ours := _replacement(function)):
                    called[global_name] = ours
            if called or _replacement(method):
                found.setdefault(owner, {})[name] = called
    return found


def _names(code: CodeType) -> Iterator[str]:
    """Names of globals and attributes in a function and in those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@_cache
def _replacement(function: Core) -> Core | None:
    """Our function of the same parameters, or None where the function is no core."""
    names = _parameters(function)
    if not _MARKS.issubset(names):
        return None
    if names not in _OURS:
        known = " or ".join(f"({', '.join(parameters)})" for parameters in _OURS)
        raise ValueError(
            f"{getattr(function, '__qualname__', function)} must take {known}, "
            f"got ({', '.join(names)})"
        )
    return _OURS[names]


def _check_all_found(model: nn.Module, found: Mapping[nn.Module, Any]) -> None:
    """Refuse a model without a core, and one with a layer whose core was not found."""

    def has_core(module: nn.Module) -> bool:
        return any(part in found or isinstance(part, Patched) for part in module.modules())

    if not has_core(model):
        raise ValueError(
            "model must contain a multi-scale deformable attention core, "
            f"got a {type(model).__name__} without one"
        )
    for name, module in model.named_modules():
        layers = {"sampling_offsets", "attention_weights"}  # of every such attention
        if not layers <= set(module._modules) or isinstance(module, MSDeformAttn):
            continue
        if not has_core(module):
            raise ValueError(
                f"{name} must contain a multi-scale deformable attention core, "
                f"got a {type(module).__name__} in which none was found"
            )


# ---- comparing theirs and ours -------------------------------------------------------------------

_TOLERANCE = 1e-9  # relative norm in float64, where rounding leaves 1e-15 on so few samples


def _check_same(name: str, core: _Core) -> None:
    """Refuse a core whose output or gradients differ from ours on problems of a few samples."""
    for arguments in _problems(core.ours):
        try:
            theirs = _results(core.theirs, arguments)
        except Exception as error:
            raise ValueError(
                f"{name} must compute multi-scale deformable attention, "
                f"got {type(error).__name__}: {error}"
            ) from error
        ours = _results(core.ours, arguments)
        for result, wanted in theirs.items():
            same_shape = ours[result].shape == wanted.shape
            distance = (ours[result] - wanted).norm().item() if same_shape else math.inf
            if not distance <= _TOLERANCE * wanted.norm():
                raise ValueError(
                    f"{name} must compute what msda.ms_deform_attn does, "
                    f"got a different {result} (norm of the difference: {distance:.1e})"
                )


def _problems(core: Core) -> Iterator[dict[str, Any]]:
    """Arguments for a core, some samples outside the maps: one set for each way to call it."""
    random = torch.Generator("cpu").manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64, device="cpu")

    parameters = _parameters(core)
    samples = (4,) if "num_points_list" in parameters else (2, 2)
    shapes = [(3, 5), (2, 4)]
    has_list = "value_spatial_shapes_list" in parameters
    possible = {
        "value": rand(2, 23, 2, 3),
        "value_spatial_shapes": torch.tensor(shapes, device="cpu") if has_list else shapes,
        "value_spatial_shapes_list": shapes,
        "level_start_index": torch.tensor([0, 15], device="cpu"),
        "sampling_locations": rand(2, 4, 2, *samples, 2) * 1.4 - 0.2,
        "attention_weights": rand(2, 4, 2, *samples),
        "im2col_step": 64,
        "num_points_list": [1, 3],
    }
    arguments = {name: possible[name] for name in parameters if name in possible}
    yield arguments
    if "method" in parameters:
        yield from (arguments | {"method": method} for method in _INTERPOLATIONS)


def _results(core: Core, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Output and gradients, whatever the caller's settings of autograd and autocast."""
    names = ("value", "sampling_locations", "attention_weights")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaves = {name: arguments[name].clone().requires_grad_() for name in names}
        output = core(**{**arguments, **leaves})
        gradients = torch.autograd.grad(
            output.square().sum(), list(leaves.values()), materialize_grads=True
        )
    named = zip((f"gradient of {name}" for name in names), gradients, strict=True)
    return {"output": output.detach(), **dict(named)}


# ---- classes of patched modules ------------------------------------------------------------------

_Attributes = tuple[tuple[str, Core], ...]  # what a module's own attributes are replaced with


class Patched(nn.Module):
    """Marks the class of a patched module, which is pickled as the class that it replaces.

    Attributes:
        msda_replaced: the class that the module had.
        msda_attributes: names of functions kept as attributes, and ours.
    """

    msda_replaced: type[nn.Module]
    msda_attributes: _Attributes

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)  # (how to make one, its arguments, state, ...)
        return (_new, (self.msda_replaced, self.msda_attributes), *reduced[2:])


def _new(cls: type[nn.Module], attributes: _Attributes) -> nn.Module:
    """A patched module without its state, as copies and unpickled modules begin."""
    patched = _patched_class(cls, attributes)
    return patched.__new__(patched)


@_cache
def _patched_class(cls: type[nn.Module], attributes: _Attributes) -> type[nn.Module]:
    """A subclass that calls our cores instead of those of the class and its modules' attributes.

    Each class with such methods gets a subclass that overrides them, which stands right before it
    in the order of resolution: calls by ``super()`` reach it too.
    """
    bases: list[type] = []
    for owner, methods in _methods_with_cores(cls).items():
        overridden = {}
        for name, called in methods.items():
            method = vars(owner)[name]
            ours = _replacement(method)
            overridden[name] = _as_method(ours, method) if ours else _redirected(method, called)
        bases.append(type(owner.__name__, (owner,), overridden))
    if not any(cls in base.__bases__ for base in bases):
        bases.insert(0, cls)
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "msda_replaced": cls,
        "msda_attributes": attributes,
    }
    # A property goes before what the module holds under that name, and so leaves it there.
    members |= {name: _constant(ours) for name, ours in attributes}
    return type(cls.__name__, (Patched, *bases), members)


def _constant(ours: Core) -> property:
    return property(lambda _: ours)


def _as_method(ours: Core, theirs: FunctionType) -> Core:
    @functools.wraps(theirs)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return ours(*args, **kwargs)

    return method


def _redirected(method: FunctionType, called: Mapping[str, Core]) -> FunctionType:
    """A copy of a method that finds our functions where it looks for cores among its globals.

    The copy has the same globals, but looks for the cores under other names, which ours are given
    there. So nothing changes for other users of that module, and the copy sees what is changed in
    it later.
    """
    aliases = {name: f"_msda_{name}" for name in called}
    method.__globals__.update({aliases[name]: ours for name, ours in called.items()})
    copy = FunctionType(
        _renamed(method.__code__, aliases),
        method.__globals__,
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    functools.update_wrapper(copy, method)
    del copy.__wrapped__  # type: ignore[attr-defined]  # it wraps nothing
    return copy


def _renamed(code: CodeType, aliases: Mapping[str, str]) -> CodeType:
    constants = (
        _renamed(constant, aliases) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
    )
    names = tuple(aliases.get(name, name) for name in code.co_names)
    return code.replace(co_consts=tuple(constants), co_names=names)
