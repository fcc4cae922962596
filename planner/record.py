"""Frozen dataclasses with slots that are quick to define and quick to make.

``dataclasses.dataclass`` writes six methods of every such class as text and compiles them, and its constructor looks attributes
up by name. A command loads a hundred classes before it does anything, and a search makes some ten thousand items. So
:func:`record` writes the constructor alone, and has it fill the slots; the rest are the same few functions for all classes. To
everybody else a record is a dataclass: ``fields``, ``replace`` and ``asdict`` take it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform, overload

__all__ = ["record"]

T = TypeVar("T")


@overload
def record(cls: type[T], /) -> type[T]: ...
@overload
def record(*, eq: bool = True, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: Any = None, /, *, eq: bool = True, kw_only: bool = False) -> Any:
    """Makes a class what ``dataclass(frozen=True, slots=True)`` makes of it.

    Args:
        cls: the class; its bases, if any, are records.
        eq: records with equal fields are equal, and hash alike; else each equals itself alone.
        kw_only: the fields are given by name.

    >>> @record
    ... class Point:
    ...     x: float
    ...     y: float = 0.0
    >>> Point(1.0), Point(1.0) == Point(1.0, 0.0), hash(Point(1.0)) == hash(Point(1.0))
    (Point(x=1.0, y=0.0), True, True)
    >>> Point(1.0).x = 2.0
    Traceback (most recent call last):
    dataclasses.FrozenInstanceError: cannot change 'x' of Point
    """
    if cls is None:
        return lambda cls: _record(cls, eq, kw_only)
    return _record(cls, eq, kw_only)


def _record(cls: Any, eq: bool, kw_only: bool) -> Any:
    made: Any = dataclass(init=False, repr=False, eq=False, slots=True, kw_only=kw_only)(cls)
    every = fields(made)
    methods: dict[str, Any] = {
        "__init__": _constructor(made, every),
        "__repr__": _shown([f.name for f in every if f.repr]),
        "__setattr__": _refuse,
        "__delattr__": _refuse,
        "__setstate__": _restore,
    }
    if eq:
        compared = [f.name for f in every if f.compare]
        methods |= _comparison(attrgetter(*compared) if compared else type)
    for name, method in methods.items():
        if name not in cls.__dict__:
            setattr(made, name, method)
    return made


def _constructor(cls: type[Any], every: tuple[Field[Any], ...]) -> Callable[..., None]:
    """The one method that is written for each class: its parameters are the fields."""
    known: dict[str, Any] = {"MISSING": MISSING}
    by_place, by_name, body = ["self"], ["*"], []
    for one in every:
        name = value = parameter = one.name
        known[f"set_{name}"] = getattr(cls, name).__set__  # of the slot
        if one.default_factory is not MISSING:
            known[f"make_{name}"] = one.default_factory
            parameter = f"{name}=MISSING"
            value = f"make_{name}() if {name} is MISSING else {name}" if one.init else f"make_{name}()"
        elif one.default is not MISSING:
            known[f"default_{name}"] = one.default
            parameter = f"{name}=default_{name}"
            value = name if one.init else f"default_{name}"
        if one.init:
            (by_name if one.kw_only else by_place).append(parameter)
        body.append(f"set_{name}(self, {value})")
    if hasattr(cls, "__post_init__"):
        body.append("self.__post_init__()")
    parameters = by_place + (by_name if len(by_name) > 1 else [])
    exec(f"def __init__({', '.join(parameters)}):\n " + "\n ".join(body or ["pass"]), known)
    constructor: Any = known["__init__"]
    constructor.__qualname__ = f"{cls.__qualname__}.__init__"
    constructor.__annotations__ = {one.name: one.type for one in every if one.init} | {"return": None}
    return constructor  # type: ignore[no-any-return]


def _comparison(values: Callable[[Any], Any]) -> dict[str, Callable[..., Any]]:
    def equal(self: Any, other: Any) -> Any:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    return {"__eq__": equal, "__hash__": lambda self: hash(values(self))}


def _shown(names: list[str]) -> Callable[[Any], str]:
    def shown(self: Any) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    return shown


def _refuse(self: Any, name: str, _: object = None) -> None:
    raise FrozenInstanceError(f"cannot change {name!r} of {type(self).__name__}")


def _restore(self: Any, state: tuple[None, dict[str, Any]]) -> None:
    """Of a copy: the slots of the original."""
    for name, value in state[1].items():
        object.__setattr__(self, name, value)
