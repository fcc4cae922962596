"""Records are what the standard library's frozen dataclasses with slots are."""

import copy
import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, is_dataclass, replace
from inspect import signature

import pytest

from planner.record import record


@record(kw_only=True)
class Item:
    name: str
    tags: list[str] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)


@record(kw_only=True)
class Sized(Item):
    size: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", float(self.size))


@record(eq=False)
class Identity:
    value: int


@record
class Pair:
    x: int
    y: int = 2


@dataclass(frozen=True, slots=True)
class _Pair:
    x: int
    y: int = 2


_Pair.__qualname__ = "Pair"


@pytest.mark.parametrize("arguments", [(1,), (1, 2), (3, 4)])
def test_a_record_is_what_a_frozen_dataclass_is(arguments):
    ours, theirs = Pair(*arguments), _Pair(*arguments)
    assert (repr(ours), asdict(ours), hash(ours)) == (repr(theirs), asdict(theirs), hash(theirs))
    assert (ours == Pair(1)) is (theirs == _Pair(1))
    assert ours != theirs
    assert is_dataclass(ours)
    assert [f.name for f in fields(ours)] == ["x", "y"]
    assert Pair.__match_args__ == _Pair.__match_args__
    assert signature(Pair) == signature(_Pair)
    assert replace(ours, x=9) == Pair(9, ours.y)
    assert not hasattr(ours, "__dict__")


def test_defaults_are_made_anew_and_what_is_no_argument_is_set():
    one, other = Sized(name="a", size=2), Sized(name="a")
    assert (one.size, other.size, one.tags is other.tags, one.known) == (2.0, 1.0, False, {})
    one.known["seen"] = 1
    assert one == Sized(name="a", size=2)
    assert "known" not in repr(one)
    with pytest.raises(TypeError):
        Sized("a")
    with pytest.raises(TypeError):
        Sized(name="a", known={})


def test_nothing_can_be_assigned_or_deleted():
    for change in (lambda p: setattr(p, "x", 2), lambda p: setattr(p, "z", 2), lambda p: delattr(p, "x")):
        with pytest.raises(FrozenInstanceError, match="of Pair"):
            change(Pair(1))


def test_without_equality_each_equals_itself_alone():
    one = Identity(1)
    assert one == one
    assert one != Identity(1)
    assert hash(one) != hash(Identity(1))


@pytest.mark.parametrize("value", [Pair(1), Sized(name="a", tags=["b"], size=3)])
def test_copies_and_pickles_are_equal(value):
    assert copy.copy(value) == copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value
