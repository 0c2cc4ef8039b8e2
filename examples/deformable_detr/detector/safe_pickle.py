"""Reads the pickles in PyTorch's files without running anything that they ask for.

A pickle is a program: it names classes and functions, and calls them. Here a name gives the object
itself only where that is on a short list of what tensors are made of. Any other class becomes an
:class:`Unknown`, which keeps what it is given: a path, somebody's settings or the state of another
program's scheduler are then in nobody's way. Where a file asks for a call of anything else, reading
it ends with :class:`Refused`.

``torch.load(file, pickle_module=detector.safe_pickle, weights_only=False)`` reads by it. What torch
has of its own for ``weights_only=True`` knows neither other classes nor newer forms of pickles.
"""

from __future__ import annotations

import _compat_pickle
import functools
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
import torch._utils


class Refused(pickle.UnpicklingError):
    """The file asks for something that may do anything; nothing of it was run."""


# ---- what is not known ---------------------------------------------------------------------------


class _Class(type):
    """The class of the classes below, which judges their calls."""

    origin: str
    harmless: bool

    def __call__(cls, *arguments: Any, **_: Any) -> Unknown:
        if not cls.harmless:
            raise Refused(f"it asks for a call of {cls.origin}, which may do anything")
        return cls.__new__(cls)


class Unknown(dict, metaclass=_Class):
    """Stands for an object of an unknown class, and keeps its attributes.

    What is like a dictionary keeps its entries, too; what is like a list or a set loses them.
    """

    origin = ""  # module and name of the class
    harmless = True
    attributes: Any = None  # as the class itself would get them: mostly a dictionary

    __hash__ = object.__hash__  # it may be a key, or in a set
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def __setstate__(self, state: Any) -> None:
        self.attributes = state

    def append(self, entry: Any) -> None:
        """Lose an entry."""

    extend = add = append


def entries_of(value: Any) -> dict[str, Any]:
    """The entries of a dictionary of any class, or else the attributes of an object."""
    if isinstance(value, dict) and value:
        return dict(value)
    attributes = getattr(value, "attributes", None)
    return attributes if isinstance(attributes, dict) else {}


# Modules of the standard library whose classes and functions do no more than hold values. Nothing
# of them is called either: the list tells what is usual from what is an attack.
_HARMLESS_MODULES = re.compile(
    "argparse|array|collections|copyreg|dataclasses|datetime|decimal|enum|fractions|functools"
    r"|ipaddress|logging|numbers|pathlib(\._local)?|random|re|string|time|typing|uuid"
    r"|zoneinfo(\._zoneinfo)?"
)
# Elsewhere classes are taken to hold values, by their capital letter; these do as well.
_HARMLESS_NAMES = re.compile(
    r"builtins\.(list|dict|tuple|int|float|bool|str|bytes|bytearray|slice|range|object)"
    r"|numpy\.(_?core\.\w+\._\w+|ndarray|random\.[\w.]+)"
    r"|torch\.(_utils\._rebuild\w+|_tensor\._rebuild\w+|device|serialization\._get_layout)"
    r"|types\.SimpleNamespace"
)


@functools.cache
def _stand_in(module: str, name: str) -> type[Unknown]:
    """What stands for the class or function ``module.name``: the same every time."""
    origin = f"{module}.{name}"
    _, is_nested, last = name.rpartition(".")
    capital = last.lstrip("_")[:1].isupper()
    if module.partition(".")[0] not in sys.stdlib_module_names or module == "builtins":
        harmless = capital
    else:
        is_harmless_module = _HARMLESS_MODULES.fullmatch(module) is not None
        harmless = is_harmless_module and (capital or not is_nested)
    harmless = harmless or _HARMLESS_NAMES.fullmatch(origin) is not None
    return _Class(name, (Unknown,), {"origin": origin, "harmless": harmless})


# ---- what is known -------------------------------------------------------------------------------


class _Call:
    """A known function, made anew for each use: a pickle can set attributes of what it names."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _new(kind: Any, *_: Any) -> Unknown:
    """An instance of an unknown class, as ``copyreg`` makes them."""
    if not isinstance(kind, _Class):
        raise Refused(f"it asks for an instance of {kind!r} by a detour")
    return kind.__new__(kind)


def _nested(owner: Any, name: str) -> type[Unknown]:
    """A class within an unknown class: older pickles ask the outer one for it."""
    if not isinstance(owner, _Class):
        raise Refused(f"it asks for the attribute {name!r} of {owner!r}")
    module, _, outer = owner.origin.rpartition(".")
    return _stand_in(module, f"{outer}.{name}")


def _encode(text: str, encoding: str) -> bytes:
    """How older pickles spell bytes."""
    if encoding != "latin1":
        raise Refused(f"it asks for the encoding {encoding!r}")
    return text.encode(encoding)


def _parameter(data: Any, requires_grad: bool, hooks: Any, *_: Any) -> Any:
    return torch._utils._rebuild_parameter(data, requires_grad, OrderedDict())


def _plain_tensor(rebuild: Callable[..., Any], _: Any, arguments: Any, *__: Any) -> Any:
    """A tensor that has attributes or a class of its own, without them."""
    return rebuild(*arguments)


class _NumpyType:
    """Stands for a dtype of NumPy."""

    def __init__(self, code: str, *_: Any) -> None:
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def number(self, content: Any) -> Any:
        """The number that the bytes ``content`` hold, as one of Python; None: of another type."""
        code = f"{self._order}{self._code}".replace("|", "=")
        if not re.fullmatch(r"[=<>][biufc]\d+", code) or not isinstance(content, bytes):
            return None
        return np.frombuffer(content, code)[0].item()


_KNOWN: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "builtins.getattr": _nested,
    "copyreg.__newobj__": _new,
    "copyreg._reconstructor": _new,
    "numpy._core.multiarray.scalar": _NumpyType.number,
    "numpy.core.multiarray.scalar": _NumpyType.number,
    "numpy.dtype": _NumpyType,
    "torch._tensor._rebuild_from_type_v2": _plain_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
}
# Classes that cannot be changed.
_KNOWN_CLASSES: dict[str, type] = {
    "builtins.complex": complex,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
}


class Unpickler(pickle.Unpickler):
    """See the top of the file; ``torch.load`` adds the reading of what tensors hold."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for ``module.name``."""
        # Pickles of torch.save have the names of Python 2.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        origin = f"{module}.{name}"
        if origin in _KNOWN_CLASSES:
            return _KNOWN_CLASSES[origin]
        if origin in _KNOWN:
            return _Call(_KNOWN[origin])
        if origin == "torch.storage.UntypedStorage":  # torch asks those of types for their dtype
            return SimpleNamespace(dtype=torch.uint8)
        return _stand_in(module, name)


def load(file: BinaryIO, **options: Any) -> Any:
    """Read one pickle, as ``pickle.load``."""
    return Unpickler(file, **options).load()
