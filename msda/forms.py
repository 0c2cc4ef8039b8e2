"""The forms in which libraries call the operator: from their arguments to ours, and the proof.

The core of a library computes its attention. It takes values, locations and weights under names and
in layouts of its own. A form is an adapter, a small function from those arguments to the
arguments of :func:`msda.ms_deform_attn`, with an example of such arguments, on which a core is run
beside ours before it is replaced. :func:`register_core` adds one.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msda.functional import ms_deform_attn
from msda.reference import SpatialShapes

Core = Callable[..., Tensor]
Arguments = dict[str, Any]

# Called with what each core is given: shapes, sampling_locations, attention_weights, num_points.
Observer = Callable[[SpatialShapes, Tensor, Tensor, "Sequence[int] | None"], None]
core_observers: ContextVar[tuple[Observer, ...]] = ContextVar("core_observers", default=())


@dataclass(frozen=True, eq=False)
class Form:
    """One way to call the operator; see :func:`register_core`."""

    name: str
    adapter: Callable[..., Arguments]
    example: Callable[..., Any]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @functools.cached_property
    def _parameters(self) -> dict[str, bool]:
        """Names of the adapter's parameters, and whether each must be there."""
        parameters = inspect.signature(self.adapter).parameters.values()
        return {one.name: one.default is one.empty for one in parameters}

    def takes(self, names: Sequence[str]) -> bool:
        """Whether a core with parameters of these names may be of this form."""
        required = {name for name, must in self._parameters.items() if must}
        return required <= set(names) <= set(self._parameters)

    def __str__(self) -> str:
        parameters = self._parameters.items()
        return f"({', '.join(name if must else f'{name}=' for name, must in parameters)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return form_named, (self.name,)


def register_core(
    name: str,
    adapter: Callable[..., Arguments],
    example: Callable[..., Arguments | list[Arguments]],
    *,
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Teach :func:`msda.use_msda` another form of the attention core.

    Args:
        name: of the form, for reports; registering it again replaces it.
        adapter: takes the arguments of their core under their names (those with a default need not
            be there) and returns arguments of :func:`msda.ms_deform_attn` by name: ``value``,
            ``spatial_shapes``, ``sampling_locations``, ``attention_weights`` and, where needed,
            ``num_points`` and ``interpolation``.
        example: the other way round: ``example(value, spatial_shapes, sampling_locations,
            attention_weights)`` takes a small problem in our layout, shapes as pairs of ints with
            two points on each of two levels, and returns arguments of their core by name, or a list
            of such. Cores are compared with ours on them, output and gradients, before they are
            replaced.
        choices: values of further arguments of theirs that change what they compute, by name, such
            as ``{"method": ("default", "discrete")}``. A core is compared for that which it is
            bound to or which its module has as an attribute of that name, else for each. They are
            given to ``example`` by keyword.

    Raises:
        TypeError: ``adapter`` or ``example`` is not callable.

    Example:
        >>> def adapter(feats, sizes, points, probs):  # their names and layouts
        ...     return dict(
        ...         value=feats.flatten(2, 3).permute(0, 2, 1).unflatten(2, (probs.shape[2], -1)),
        ...         spatial_shapes=sizes,
        ...         sampling_locations=points,
        ...         attention_weights=probs,
        ...     )
        >>> def example(value, spatial_shapes, sampling_locations, attention_weights):
        ...     feats = value.flatten(2).permute(0, 2, 1).unsqueeze(-1)
        ...     return dict(
        ...         feats=feats, sizes=spatial_shapes,
        ...         points=sampling_locations, probs=attention_weights,
        ...     )
        >>> register_core("theirs", adapter, example)
    """
    for role, function in (("adapter", adapter), ("example", example)):
        if not callable(function):
            raise TypeError(f"{role} must be callable, got {type(function).__name__}")
    fixed = {key: tuple(values) for key, values in (choices or {}).items()}
    _FORMS[name] = Form(name, adapter, example, fixed)


def form_named(name: str) -> Form:
    """The form of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _FORMS:
        raise ValueError(
            f"name must be that of a form ({', '.join(_FORMS)}), got {name!r}; forms of others "
            "must be given to msda.register_core before a model that uses them is unpickled"
        )
    return _FORMS[name]


# ---- running ours instead of theirs --------------------------------------------------------------


@dataclass(frozen=True)
class Adapted:
    """The replacement of one core.

    Attributes:
        form: how its arguments become ours.
        names: of its parameters, in order.
        defaults: its own, and what it is bound to.
        settings: for which of the form's choices it was compared.
    """

    form: Form
    names: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    settings: tuple[tuple[str, tuple[Any, ...]], ...]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Compute the attention from the arguments that the core would have got."""
        if len(args) > len(self.names):
            names = ", ".join(self.names)
            raise TypeError(f"arguments must be at most ({names}), got {len(args)} of them")
        arguments = {**dict(self.defaults), **dict(zip(self.names, args, strict=False)), **kwargs}
        for name, compared in self.settings:
            if name in arguments and arguments[name] not in compared:
                raise ValueError(
                    f"{name} must be one of {compared}, for which use_msda compared this core "
                    f"with its own, got {arguments[name]!r}"
                )
        return attend(self.form, arguments)


def attend(form: Form, arguments: Arguments) -> Tensor:
    """Compute what a core of a form computes, by ours."""
    ours = form.adapter(**arguments)
    shapes, num_points = ours["spatial_shapes"], ours.get("num_points")
    locations, weights = ours["sampling_locations"], ours["attention_weights"]
    if not torch.compiler.is_compiling():
        for observe in core_observers.get():
            observe(shapes, locations, weights, num_points)
    return ms_deform_attn(
        ours["value"],
        shapes,
        None,
        locations,
        weights,
        num_points=num_points,
        interpolation=ours.get("interpolation", "bilinear"),
    )


# ---- which form a core has -----------------------------------------------------------------------

_MARKS = {"value", "sampling_locations", "attention_weights"}  # a core has these parameters
_TOLERANCE = 1e-9  # relative norm in float64, where rounding leaves 1e-15 on so few samples


class Refused(ValueError):
    """A core that is not replaced."""


class CannotRun(Refused):
    """One that failed on its own on the examples: there is nothing to compare with."""


def is_function_class(item: Any) -> bool:
    """Whether it is an ``autograd.Function``."""
    return isinstance(item, type) and issubclass(item, torch.autograd.Function)


def parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    """Parameters of a core by name; none if it has no signature."""
    if is_function_class(function):
        has_ctx = function.setup_context is torch.autograd.Function.setup_context
        function = functools.partial(function.forward, None) if has_ctx else function.forward
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}
    parameters.pop("self", None)
    return parameters


def looks_like_core(function: Any) -> bool:
    """Whether a function's parameters are those of a core."""
    names = tuple(parameters_of(function))
    return _MARKS.issubset(names) or any(form.takes(names) for form in _FORMS.values())


def adapted(core: Any, name: str, attributes: Mapping[str, Any]) -> Adapted:
    """Find the form of a core, and prove it.

    Args:
        core: a function, or an ``autograd.Function``.
        name: in errors.
        attributes: of the module that calls it, for its settings.

    Raises:
        Refused: it has none of the forms, or computes something else.
    """
    parameters = parameters_of(core)
    names = tuple(parameters)
    forms = [form for form in _FORMS.values() if form.takes(names)]
    if not forms:
        known = " or ".join(dict.fromkeys(str(form) for form in _FORMS.values()))
        raise Refused(f"{name} must take {known}, got ({', '.join(names)})")
    keyword_only = inspect.Parameter.KEYWORD_ONLY  # so are those after what partial binds
    positional = tuple(key for key, one in parameters.items() if one.kind is not keyword_only)
    defaults = tuple(
        (key, _frozen(one.default))
        for key, one in parameters.items()
        if one.default is not one.empty
    )
    bound = dict(core.keywords) if isinstance(core, functools.partial) else {}
    theirs = core.apply if is_function_class(core) else core
    refusals = []
    for form in forms:
        try:
            settings = _settings(form, names, bound, attributes)
            for chosen in _combinations(settings):
                _compare(name, theirs, form, names, {**dict(defaults), **chosen}, chosen)
            return Adapted(form, positional, defaults, tuple(settings.items()))
        except Refused as refusal:
            refusals.append(refusal)
    # The most telling one: of a core that ran and differs, not that took no such layout.
    raise next((one for one in refusals if not isinstance(one, CannotRun)), refusals[0])


def _frozen(default: Any) -> Any:
    return tuple(map(_frozen, default)) if isinstance(default, list) else default


def _settings(
    form: Form, names: Sequence[str], bound: Mapping[str, Any], attributes: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """The values of each choice for which a core is compared."""
    settings = {}
    for key, known in form.choices.items():
        if key not in names:
            continue
        value = bound.get(key, attributes.get(key))
        if isinstance(value, str) and value not in known:
            raise Refused(f"{key} must be one of {known}, got {value!r}")
        settings[key] = (value,) if isinstance(value, str) else known
    return settings


def _combinations(settings: Mapping[str, tuple[Any, ...]]) -> Iterator[Arguments]:
    for values in itertools.product(*settings.values()):
        yield dict(zip(settings, values, strict=True))


def _compare(
    name: str,
    theirs: Core,
    form: Form,
    names: Sequence[str],
    settings: Arguments,
    chosen: Arguments,
) -> None:
    """Refuse a core whose output or gradients differ from ours on a few samples."""
    where = "".join(f" with {key}={value!r}" for key, value in chosen.items())
    inputs = _small_inputs()

    def arguments(leaves: Mapping[str, Tensor], as_tensor: bool) -> list[Arguments]:
        shapes = torch.tensor(_SHAPES, device="cpu") if as_tensor else list(_SHAPES)
        given = form.example(**leaves, spatial_shapes=shapes, **chosen)
        return [
            {key: value for key, value in {**one, **chosen}.items() if key in names}
            for one in (given if isinstance(given, list) else [given])
        ]

    for as_tensor in (False, True):  # some take sizes in one form only
        try:
            wanted = _results(
                lambda x: [_call(theirs, names, one) for one in arguments(x, as_tensor)],  # noqa: B023
                inputs,
            )
            break
        except Exception as error:
            failure = error
    else:
        raise CannotRun(
            f"{name} must compute multi-scale deformable attention{where}, "
            f"got {type(failure).__name__}: {failure}"
        ) from failure
    ours = _results(
        lambda x: [attend(form, {**settings, **one}) for one in arguments(x, as_tensor)], inputs
    )
    for result, exact in wanted.items():
        same_shape = ours[result].shape == exact.shape
        distance = (ours[result] - exact).norm().item() if same_shape else math.inf
        if not distance <= _TOLERANCE * exact.norm():
            raise Refused(
                f"{name} must compute what msda.ms_deform_attn does{where}, "
                f"got a different {result} (norm of the difference: {distance:.1e})"
            )


def _call(core: Core, names: Sequence[str], arguments: Arguments) -> Tensor:
    if getattr(core, "__name__", "") == "apply":  # of an autograd.Function: by position only
        return core(*(arguments[name] for name in names))
    return core(**arguments)


_SHAPES = ((3, 5), (2, 4))


def _small_inputs() -> dict[str, Tensor]:
    """A few samples in our layout, some outside the maps."""
    random = torch.Generator("cpu").manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64, device="cpu")

    return {
        "value": rand(2, 23, 2, 3),
        "sampling_locations": rand(2, 4, 2, 2, 2, 2) * 1.4 - 0.2,
        "attention_weights": rand(2, 4, 2, 2, 2),
    }


def _results(
    run: Callable[[Mapping[str, Tensor]], list[Tensor]], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Output and gradients, under any settings of autograd and autocast."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        output = torch.stack(run(leaves))
        gradients = torch.autograd.grad(
            output.square().sum(), list(leaves.values()), materialize_grads=True
        )
    named = zip((f"gradient of {name}" for name in leaves), gradients, strict=True)
    return {"output": output.detach(), **dict(named)}


# ---- the forms -----------------------------------------------------------------------------------
# Adapters carry the names of the libraries' parameters, examples ours.


def _adapt_plain(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Arguments:
    return dict(
        value=value,
        spatial_shapes=value_spatial_shapes,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )


def _plain(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Arguments:
    return dict(
        value=value,
        value_spatial_shapes=spatial_shapes,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )


def _adapt_module(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[tuple[int, int]],
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Arguments:
    return _adapt_plain(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _module(**inputs: Any) -> Arguments:
    return _plain(**inputs) | dict(
        value_spatial_shapes=torch.tensor(_SHAPES, device="cpu"),
        value_spatial_shapes_list=list(_SHAPES),
        level_start_index=torch.tensor([0, 15], device="cpu"),
        im2col_step=64,
    )


def _adapt_operator(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Arguments:
    return _adapt_plain(value, value_spatial_shapes, sampling_locations, attention_weights)


def _operator(**inputs: Any) -> Arguments:
    return _plain(**inputs) | dict(
        value_spatial_shapes=torch.tensor(_SHAPES, device="cpu"),
        value_level_start_index=torch.tensor([0, 15], device="cpu"),
        im2col_step=64,
    )


def _adapt_flat(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,  # (B, Q, M, L * P, 2)
    attention_weights: Tensor,  # (B, Q, M, L * P)
) -> Arguments:
    split = (len(value_spatial_shapes), -1)
    locations = sampling_locations.unflatten(3, split)
    return _adapt_plain(
        value, value_spatial_shapes, locations, attention_weights.unflatten(3, split)
    )


def _flat(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Arguments:
    return _plain(
        value, spatial_shapes, sampling_locations.flatten(3, 4), attention_weights.flatten(3)
    )


def _adapt_channels_first(
    value: Tensor,  # (B, M, D, S)
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,  # (B, Q, M, L * P)
    value_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
) -> Arguments:
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    value = value.permute(0, 3, 1, 2)
    if sampling_locations.dim() == 5:  # once exported
        return _adapt_flat(value, shapes, sampling_locations, attention_weights)
    weights = attention_weights.reshape(sampling_locations.shape[:-1])
    return _adapt_plain(value, shapes, sampling_locations, weights)


def _channels_first(value: Tensor, attention_weights: Tensor, **inputs: Any) -> Arguments:
    return _plain(
        value.permute(0, 2, 3, 1).contiguous(),
        attention_weights=attention_weights.flatten(3),
        **inputs,
    )


def _exported(**inputs: Any) -> list[Arguments]:
    given = _channels_first(**inputs)
    locations = given["sampling_locations"].flatten(3, 4)
    sizes = dict(value_spatial_shapes_hw=list(_SHAPES))
    return [given, given | sizes | dict(sampling_locations=locations)]


def _adapt_ragged(
    value: Tensor | Sequence[Tensor],  # (B, S, M, D), or (B, M, D, H * W) for each level
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,  # (B, Q, M, K, 2)
    attention_weights: Tensor,  # (B, Q, M, K)
    num_points_list: Sequence[int],
    method: str = "default",
    value_shape: str = "default",
) -> Arguments:
    if not isinstance(value, Tensor):
        value = torch.cat([level.permute(0, 3, 1, 2) for level in value], 1)
    if method == "discrete":
        sampling_locations = sampling_locations.detach()  # theirs gives them none, not zeros
    return dict(
        value=value,
        spatial_shapes=value_spatial_shapes,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
        num_points=num_points_list,
        interpolation="nearest" if method == "discrete" else "bilinear",
    )


def _adapt_ragged_clamped_by_height(
    value: Tensor | Sequence[Tensor],
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
    value_shape: str = "default",
) -> Arguments:
    """'discrete' reads no column at or beyond the height: on a wide map, nothing further right."""
    if method == "discrete":
        x, y = sampling_locations.detach().unbind(-1)
        parts = [
            # The pixel is trunc(x * W + 1/2): at (H - 1) / W that is H - 1.
            part.clamp(max=(height - 1) / width) if width > height else part
            for part, (height, width) in zip(
                x.split(list(num_points_list), -1),
                ((int(height), int(width)) for height, width in value_spatial_shapes),
                strict=True,
            )
        ]
        sampling_locations = torch.stack([torch.cat(parts, -1), y], -1)
    return _adapt_ragged(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points_list,
        method,
    )


def _ragged(method: str = "default", **inputs: Any) -> Arguments:
    return _flat(**inputs) | dict(num_points_list=[1, 3])


def _levels(value_shape: str = "default", method: str = "default", **inputs: Any) -> Arguments:
    given = _ragged(**inputs)
    if value_shape == "default":  # "reshape": as one tensor
        sizes = [height * width for height, width in _SHAPES]
        given["value"] = given["value"].permute(0, 2, 3, 1).split(sizes, -1)
    return given


_METHODS = {"method": ("default", "discrete")}
_METHODS_AND_SHAPES = _METHODS | {"value_shape": ("default", "reshape")}

# Several forms have the same parameters; the first whose example runs, and agrees, is the one.
_FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("plain", _adapt_plain, _plain),
        Form("module", _adapt_module, _module),
        Form("operator", _adapt_operator, _operator),
        Form("flat points", _adapt_flat, _flat),
        Form("channels first, exported", _adapt_channels_first, _exported),
        Form("channels first", _adapt_channels_first, _channels_first),
        Form("ragged", _adapt_ragged, _ragged, _METHODS),
        Form("ragged, clamped by height", _adapt_ragged_clamped_by_height, _ragged, _METHODS),
        Form("levels", _adapt_ragged, _levels, _METHODS_AND_SHAPES),
        Form(
            "levels, clamped by height",
            _adapt_ragged_clamped_by_height,
            _levels,
            _METHODS_AND_SHAPES,
        ),
    )
}
