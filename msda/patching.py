"""Run the attention of any model by `msda`, say what was done, and take it back.

The core of a model computes its attention. It stands in one of four places: it is a method
(``forward``, where the core is a module of its own), a function or an ``autograd.Function`` that a
method finds among its globals, or a function that a module has as an attribute. ``use_msda``
gives each module that has a core a subclass of its class, which calls ours instead; the module
itself, its parameters, buffers and hooks stay as they are. Nothing here imports a library of
models. Pickled models name this module and :mod:`msda.forms`.
"""

from __future__ import annotations

import dis
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from msda.forms import (
    Adapted,
    CannotRun,
    Core,
    Refused,
    adapted,
    is_function_class,
    looks_like_core,
)
from msda.modules import MSDeformAttn

Model = TypeVar("Model", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])
_cache = cast(Callable[[Function], Function], functools.cache)  # keeps the signature


def use_msda(model: Model, *, strict: bool = True) -> Model:
    """Replace the attention core of every layer of a model by `msda`, in place.

    Cores are found by what the modules contain, whatever the model's class and library. Before
    anything is changed, each is run beside ours on small problems: one whose output or gradients
    differ is refused. Outputs and gradients of the model stay the same within rounding. Its state
    dict, configuration and ``save_pretrained`` are unchanged; it can be compiled, exported, copied
    and pickled as before (to unpickle it, `msda` must be installed). :func:`report` says what was
    done, :func:`undo` takes it back.

    Values keep their dtype, and the attention is computed in float32 (float64 for float64): a
    half-precision model is more accurate than before, apart from what its 16-bit locations lose.
    Under autocast the core's output has the dtype of its values, where the replaced core gave
    float32.

    Call it before anything that wraps the forward of single modules (kernels from the hub, hooks of
    a device map). Calling it again patches what is new in the model.

    Args:
        model: any module, as a whole or in part.
        strict: refuse the model as a whole where one of its cores is refused; False replaces the
            others, and :func:`report` says why not that one.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module: some libraries keep theirs within another object.
        ValueError: ``model`` has no core, or one with other parameters than those known here, or
            one that computes something else. The model is left as it was.

    Example:
        >>> from transformers import DeformableDetrForObjectDetection  # doctest: +SKIP
        >>> model = use_msda(DeformableDetrForObjectDetection(config))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[nn.Module, tuple[_Chosen, ...]] = {}
    refused: list[tuple[Entry, Refused]] = []
    left: list[Entry] = []
    proved: dict[Any, Adapted | Refused] = {}
    for name, module in model.named_modules():
        if isinstance(module, Patched):
            continue
        chosen: list[_Chosen] = []
        failed: list[tuple[_Found | _Chosen, Refused]] = []
        for core in _cores_of(module):
            try:
                chosen.append(_choose(core, name or type(module).__name__, module, proved))
            except Refused as error:
                failed.append((core, error))
        if chosen and "forward" in vars(module):
            message = (
                f"{name or 'model'} must run the forward of its class, got one set on the "
                "instance; call use_msda before anything that wraps it"
            )
            failed += [(one, Refused(message)) for one in chosen]
            chosen = []
        for one, refusal in failed:
            # A compiled operator that does not run here leaves the module to its other core.
            does_not_run = one.kind == "operator" and isinstance(refusal, CannotRun)
            if chosen and (does_not_run or isinstance(refusal, _Ambiguous)):
                left.append(Entry(name, one.name, "", "left alone", str(refusal)))
            else:
                refused.append((Entry(name, one.name, "", "refused", str(refusal)), refusal))
        if chosen:
            found[module] = tuple(chosen)
    refused += _layers_without(model, found, {entry.module for entry, _ in refused})
    _refused[model] = [*left, *(entry for entry, _ in refused)]
    if refused and (strict or not _has_core(model, found)):
        raise refused[0][1]
    for module, choice in found.items():
        module.__class__ = _patched_class(type(module), choice)
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
        vars(module).pop(_CALLS, None)
    _refused.pop(model, None)
    return model


# ---- saying so -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """The fate of one core.

    Attributes:
        module: the name of its module, as in ``model.named_modules()``.
        core: the name of the method, function or attribute.
        form: the form that its arguments have; see :func:`msda.register_core`. Empty where it is
            not in place.
        status: "in place", "refused", or "left alone", beside a core that is in place: a compiled
            operator that does not run on this machine's CPU (`msda.drop_in` provides it), or a core
            whose name its methods use for something else, too.
        reason: why it is not in place; empty otherwise.
        calls: how often ours ran in its place since, eagerly: compiled and exported code does not
            count. A copy of a module begins at 0.
    """

    module: str
    core: str
    form: str
    status: str
    reason: str = ""
    calls: int = 0


class Report(list[Entry]):
    """One entry for each core that was found; prints as a table for people."""

    def __str__(self) -> str:
        if not self:
            return "no core was replaced"
        rows = [
            (
                entry.module or "(the model)",
                entry.core,
                entry.status,
                entry.reason or f"{entry.form}, used {entry.calls} times",
            )
            for entry in self
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(
                [*(f"{word:{width}}" for word, width in zip(row, widths, strict=False)), row[3]]
            )
            for row in rows
        )

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """Say which cores of a model `msda` replaced, by which form, and how often it ran since.

    Args:
        model: what :func:`use_msda` was called with, whether it succeeded or refused; of any other
            module, the cores that were replaced in it.

    Returns:
        A list with an :class:`Entry` for each core; its ``str`` is a table.

    Example:
        >>> print(report(use_msda(model)))  # doctest: +SKIP
        decoder.layers.0.cross_attn  forward  in place  plain, used 0 times
    """
    entries = Report()
    for name, module in model.named_modules():
        if isinstance(module, Patched):
            counters = vars(module).get(_CALLS, {})
            for one in module.msda_chosen:
                calls = counters[one.name].total() if one.name in counters else 0
                form = one.adapted.form.name
                entries.append(Entry(name, one.name, form, "in place", calls=calls))
    entries += _refused.get(model, [])
    return entries


_refused: WeakKeyDictionary[nn.Module, list[Entry]] = WeakKeyDictionary()
_CALLS = "_msda_calls"  # in the __dict__ of a module, but of no copy: counters by core


class CallCounter:
    """Counts calls from many threads, in a tenth of a microsecond each: a lock takes longer.

    Attributes:
        add: counts one.
    """

    def __init__(self) -> None:
        self.add = itertools.count().__next__
        self._looks = 0  # a look takes a number, too
        self._looking = threading.Lock()

    def total(self) -> int:
        """The number of calls."""
        with self._looking:
            self._looks += 1
            return self.add() + 1 - self._looks


def _count(module: nn.Module, name: str) -> None:
    try:
        vars(module)[_CALLS][name].add()
    except KeyError:
        vars(module).setdefault(_CALLS, {}).setdefault(name, CallCounter()).add()


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name the layers of a patched model that run a core: the parent where it is its own module."""
    for name, module in model.named_modules():
        is_layer = isinstance(module, Patched) and (module is model or not _is_core(module))
        if is_layer or any(_is_core(child) for child in module.children()):
            yield name, module


# ---- finding cores -------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A core of a module: a "method", a "function" or "operator" (Function), or an "attribute"."""

    name: str
    kind: str
    owner: str  # the class whose method it is, or whose method calls it
    theirs: Any
    is_ambiguous: bool = False


class _Ambiguous(Refused):
    """A core whose name its methods use for something else, too."""


class _Chosen(NamedTuple):
    """The replacement of a core."""

    name: str
    kind: str
    owner: str
    adapted: Adapted


def _cores_of(module: nn.Module) -> Iterator[_Found]:
    for owner in _classes(type(module)):
        called: dict[str, Any] = {}
        ambiguous: set[str] = set()
        for name, method in _methods(owner):
            if looks_like_core(method):
                yield _Found(name, "method", _path(owner), MethodType(method, module))
            for core, item, is_ambiguous in _called(method):
                called.setdefault(core, item)
                ambiguous |= {core} if is_ambiguous else set()
        for core, item in called.items():
            kind = "operator" if is_function_class(item) else "function"
            yield _Found(core, kind, _path(owner), item, core in ambiguous)
    for name, item in vars(module).items():
        is_function = isinstance(item, FunctionType | MethodType | functools.partial)
        if is_function and looks_like_core(item):
            yield _Found(name, "attribute", "", item)


def _choose(
    core: _Found, module_name: str, module: nn.Module, proved: dict[Any, Adapted | Refused]
) -> _Chosen:
    """Prove a core; one that several modules share is proved once for each of their settings."""
    if core.is_ambiguous:
        raise _Ambiguous(
            f"{core.name} of {module_name} must have a name that its methods use for nothing else, "
            "got one that is also that of an attribute, or assigned"
        )
    attributes = {key: item for key, item in vars(module).items() if isinstance(item, str)}
    key = (core.theirs, tuple(sorted(attributes.items())))
    if key not in proved:
        try:
            proved[key] = adapted(core.theirs, f"{core.name} of {module_name}", attributes)
        except Refused as refusal:
            proved[key] = refusal
    result = proved[key]
    if isinstance(result, Refused):
        raise result
    return _Chosen(core.name, core.kind, core.owner, result)


def _classes(cls: type[nn.Module]) -> Iterator[type]:
    """A class and its bases, up to nn.Module."""
    for owner in cls.__mro__:
        if owner in nn.Module.__mro__:
            return
        yield owner


def _methods(owner: type) -> Iterator[tuple[str, FunctionType]]:
    for name, method in vars(owner).items():
        # A constructor calls no cores: it sets them as attributes, where they are found.
        if isinstance(method, FunctionType) and name != "__init__":
            yield name, method


def _path(owner: type) -> str:
    return f"{owner.__module__}:{owner.__qualname__}"


def _called(method: FunctionType) -> Iterator[tuple[str, Any, bool]]:
    """The cores that a method, or what it decorates, finds among its globals.

    With each, whether that code uses the name for something else, too: :func:`_renamed` could not
    rename the core alone.
    """
    yield from _own_cores(method)
    for _, decorated in _decorated(method):
        yield from _called(decorated)


def _own_cores(function: FunctionType) -> Iterator[tuple[str, Any, bool]]:
    for code in _codes(function.__code__):
        for name in code.co_names:
            item = function.__globals__.get(name)
            is_callable = is_function_class(item) or isinstance(item, FunctionType)
            if is_callable and looks_like_core(item):
                uses = _uses(code, name)
                if "LOAD_GLOBAL" in uses:
                    yield name, item, len(uses) > 1


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _uses(code: CodeType, name: str) -> set[str]:
    """The instructions by which code uses a name, such as LOAD_GLOBAL or LOAD_ATTR."""
    return {
        instruction.opname
        for instruction in dis.get_instructions(code)
        if instruction.opcode in dis.hasname and instruction.argval == name
    }


def _decorated(method: FunctionType) -> Iterator[tuple[int, FunctionType]]:
    """The function that a method written with functools.wraps closes over, and its cell."""
    wrapped = getattr(method, "__wrapped__", None)
    for number, cell in enumerate(method.__closure__ or ()):
        try:
            content = cell.cell_contents
        except ValueError:  # not filled
            continue
        if content is wrapped and isinstance(content, FunctionType):
            yield number, content


def _is_core(module: nn.Module) -> bool:
    """Whether a patched module is nothing but a core."""
    return isinstance(module, Patched) and any(
        one.kind == "method" and one.name == "forward" for one in module.msda_chosen
    )


def _has_core(model: nn.Module, found: Mapping[nn.Module, Any]) -> bool:
    return any(part in found or isinstance(part, Patched) for part in model.modules())


def _layers_without(
    model: nn.Module, found: Mapping[nn.Module, Any], refused: set[str]
) -> list[tuple[Entry, Refused]]:
    """Refusals of a model without a core, and of layers in which none was found."""
    without = []
    for name, module in model.named_modules():
        layers = {"sampling_offsets", "attention_weights"}  # of every such attention
        if not layers <= set(module._modules) or isinstance(module, MSDeformAttn):
            continue
        inside = (
            f"{name}.{part}" if name and part else name or part
            for part, _ in module.named_modules()
        )
        if not _has_core(module, found) and refused.isdisjoint(inside):
            refusal = Refused(
                f"{name or 'model'} must contain a multi-scale deformable attention core, "
                f"got a {type(module).__name__} in which none was found"
            )
            without.append((Entry(name, "", "", "refused", str(refusal)), refusal))
    if not without and not refused and not _has_core(model, found):
        refusal = Refused(
            "model must contain a multi-scale deformable attention core, "
            f"got a {type(model).__name__} without one"
        )
        without.append((Entry("", "", "", "refused", str(refusal)), refusal))
    return without


# ---- classes of patched modules ------------------------------------------------------------------


class Patched(nn.Module):
    """Marks the class of a patched module, which is pickled as the class that it replaces.

    Attributes:
        msda_replaced: the class that the module had.
        msda_chosen: its cores, and what replaces each.
    """

    msda_replaced: type[nn.Module]
    msda_chosen: tuple[_Chosen, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)  # (how to make one, its arguments, state, ...)
        state, *rest = reduced[2:]
        if isinstance(state, dict):
            state = {key: item for key, item in state.items() if key != _CALLS}
        return (_new, (self.msda_replaced, self.msda_chosen), state, *rest)


def _new(cls: type[nn.Module], chosen: tuple[_Chosen, ...]) -> nn.Module:
    """A patched module without its state, as copies and unpickled modules begin."""
    patched = _patched_class(cls, chosen)
    return patched.__new__(patched)


@_cache
def _patched_class(cls: type[nn.Module], chosen: tuple[_Chosen, ...]) -> type[nn.Module]:
    """A subclass that calls our cores instead of those of the class and its modules' attributes.

    Each class with such methods gets a subclass that overrides them, which stands right before it
    in the order of resolution: calls by ``super()`` reach it too.
    """
    bases: list[type] = []
    for owner in _classes(cls):
        ours = {one.name: one for one in chosen if one.owner == _path(owner)}
        overridden: dict[str, Callable[..., Any]] = {}
        for name, method in _methods(owner):
            if name in ours and ours[name].kind == "method":
                overridden[name] = functools.wraps(method)(_runner(ours[name]))
                continue
            called = {one for one, *_ in _called(method)} & set(ours)
            if called:
                overridden[name] = _redirected(method, {one: ours[one] for one in called})
        if overridden:
            bases.append(type(owner.__name__, (owner,), overridden))
    if not any(cls in base.__bases__ for base in bases):
        bases.insert(0, cls)
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "msda_replaced": cls,
        "msda_chosen": chosen,
    }
    # A property goes before the module's own attribute of that name, and leaves it there.
    members |= {one.name: _as_property(one) for one in chosen if one.kind == "attribute"}
    return type(cls.__name__, (Patched, *bases), members)


def _as_property(one: _Chosen) -> property:
    run, uncounted = _runner(one), _as_function(one)

    def get(module: nn.Module) -> Core:
        return uncounted if torch.compiler.is_compiling() else MethodType(run, module)

    return property(get)


def _runner(one: _Chosen) -> Callable[..., Tensor]:
    """A method that runs ours and counts it, for its module."""
    replacement, name = one.adapted, one.name

    def run(module: nn.Module | None, /, *args: Any, **kwargs: Any) -> Tensor:
        output = replacement(args, kwargs)
        if module is not None and not torch.compiler.is_compiling():
            _count(module, name)
        return output

    return run


def _as_function(one: _Chosen) -> Core:
    """The same for the module whose method is running: see :func:`_redirected`."""
    run = _runner(one)

    def core(*args: Any, **kwargs: Any) -> Tensor:
        module = None if torch.compiler.is_compiling() else _running.get()
        return run(module, *args, **kwargs)

    return core


class _Operator:
    """Stands for an ``autograd.Function``, as far as its callers go."""

    def __init__(self, apply: Core) -> None:
        self.apply = apply


def _redirected(method: FunctionType, called: Mapping[str, _Chosen]) -> Core:
    """A copy of a method that finds our functions where it looks for cores among its globals.

    The copy has the same globals, but looks for the cores under other names, which ours are given
    there. So nothing changes for other users of that module, and the copy sees later changes of it.
    """
    copy = _copied(method, called)

    @functools.wraps(method)
    def redirected(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return copy(self, *args, **kwargs)
        token = _running.set(self)
        try:
            return copy(self, *args, **kwargs)
        finally:
            _running.reset(token)

    return redirected


_running: ContextVar[nn.Module | None] = ContextVar("running", default=None)


def _copied(function: FunctionType, called: Mapping[str, _Chosen]) -> FunctionType:
    own = {name for name, *_ in _own_cores(function)} & set(called)
    aliases = {name: _alias(function.__globals__, called[name]) for name in own}
    cells = list(function.__closure__ or ())
    for number, decorated in _decorated(function):
        cells[number] = CellType(_copied(decorated, called))
    copy = FunctionType(
        _renamed(function.__code__, aliases),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_aliases: dict[_Chosen, int] = {}


def _alias(namespace: dict[str, Any], one: _Chosen) -> str:
    """The name under which ours stands among the globals of theirs."""
    alias = f"_msda_{one.name}_{_aliases.setdefault(one, len(_aliases))}"
    if alias not in namespace:
        ours = _as_function(one)
        namespace[alias] = _Operator(ours) if one.kind == "operator" else ours
    return alias


def _renamed(code: CodeType, aliases: Mapping[str, str]) -> CodeType:
    constants = (
        _renamed(constant, aliases) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
    )
    names = tuple(
        aliases[name] if name in aliases and _uses(code, name) == {"LOAD_GLOBAL"} else name
        for name in code.co_names
    )
    return code.replace(co_consts=tuple(constants), co_names=names)
