"""The additive side of a recipe: states (what is sharded, where the optimizer lives), recompute, and swaps.

A *state* is a combination of ``zero_stage`` and ``zero_group``; any of them may win on any row. Recompute and swaps only add work
to a state (host memory and the link to it are slower than device memory), so a combination is dominated by one that does less
of both and fits. A swap that hides the update behind the backward may save what the update took, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.solve.space import Choice, Rows, Space
from planner.technique import ADDITIVE_SLOTS

__all__ = ["Activity", "Branches", "Faults"]

Mask = NDArray[np.bool_]
_SWAP = ("optimizer_offload", "activation_offload", "parameter_offload")
_OF_ACTIVATIONS = ("activation_offload",)
_STATE = tuple(s for s in ADDITIVE_SLOTS if s not in (*_SWAP, "recompute", "schedule"))
_BY_LAYERS = "block"  # the recompute choice that also chooses how many layers


class Activity(NamedTuple):
    """Which states and which recompute choices say something of their own on each row: (choices, rows).

    And how many: states, recompute choices of whole devices, and those by layers, (rows).
    """

    states: Mask
    recomputes: Mask
    counts: NDArray[np.int64]
    whole: NDArray[np.int64]
    by_layers: NDArray[np.int64]

    def take(self, index: NDArray[np.intp]) -> Activity:
        """The same of some of the rows."""
        return Activity(
            self.states[:, index], self.recomputes[:, index], self.counts[index], self.whole[index],
            self.by_layers[index],
        )  # fmt: skip


class Branches:
    """All additive choices of a space."""

    def __init__(self, space: Space) -> None:
        choices = space.choices
        self.space = space
        cluster = space.problem.cluster
        assert max(cluster.host_memory_bytes_per_s, cluster.host_link_bytes_per_s) <= float(
            cluster.device.memory_bytes_per_s
        ), "swaps only add work where host memory is slower than device memory"
        self.states = [dict(zip(_STATE, c, strict=True)) for c in product(*(choices[s] for s in _STATE))]
        self.recomputes = sorted(choices["recompute"], key=lambda choice: choice.value == _BY_LAYERS)
        swaps = (dict(zip(_SWAP, c, strict=True)) for c in product(*(choices[s] for s in _SWAP)))
        self.swaps = sorted(
            (swap for swap in swaps if self._possible(swap)),
            key=_parts,
        )
        self.levels = [
            [number for number, swap in enumerate(self.swaps) if _parts(swap) == parts]
            for parts in distinct(np.array([*map(_parts, self.swaps)])).tolist()
        ]
        """Swaps by how many parts they have: none does less than another of its level."""
        self.moved = {
            pool for swap in self.swaps for c in swap.values() if c.technique for pool in c.technique.moves
        }
        """Pools that some swap takes off the device."""
        some = [i for i, c in enumerate(self.recomputes) if c.technique is not None and not self.by_layers(c)]
        none = [i for i, c in enumerate(self.recomputes) if c.technique is None]
        layers = [i for i, c in enumerate(self.recomputes) if self.by_layers(c)]
        self.waves = [wave for wave in (none, some, layers) if wave]
        """Recompute choices that are tried together: none does less than another of its wave."""
        self._recompute_units = [{"recompute": choice} for choice in self.recomputes]
        self._divided = [
            tuple(
                {s: c for s, c in swap.items() if (s in _OF_ACTIVATIONS) == moved} for moved in (False, True)
            )
            for swap in self.swaps
        ]
        self._saves = [
            any(c.technique is not None and c.technique.saves for c in swap.values()) for swap in self.swaps
        ]
        self.any_saves = any(self._saves)
        self._less: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}

    def _possible(self, swap: Mapping[str, Choice]) -> bool:
        """Whether a swap's rules about the machine and the job hold; those about rows are for later."""
        ctx = self.space.rows.take(np.arange(1)).context(
            self.space.problem, self.space.knobs({**self._job(), **swap})
        )
        techniques = [c.technique for c in swap.values() if c.technique is not None]
        checks = [check for t in techniques for check in t.valid(ctx) if check.of_machine or not t.by_row]
        return all(np.all(check.ok) for check in checks)

    def _job(self) -> dict[str, Choice]:
        """The first choice of every slot."""
        return {slot: choices[0] for slot, choices in self.space.choices.items()}

    def activity(self, rows: Rows, knobs: Mapping[str, Any]) -> Activity:
        """Where each state and recompute choice keeps its rules, and is not a repetition of another."""
        states = np.array([self._acts(rows, knobs, state) for state in self.states])
        recomputes = np.array([self._acts(rows, knobs, {"recompute": choice}) for choice in self.recomputes])
        by_layers = np.array([self.by_layers(choice) for choice in self.recomputes])
        kinds = (recomputes[~by_layers].sum(axis=0), recomputes[by_layers].sum(axis=0))
        return Activity(states, recomputes, states.sum(axis=0), *kinds)

    def no_activity(self) -> Activity:
        """That of no rows."""
        states, recomputes = (np.zeros((len(each), 0), dtype=bool) for each in (self.states, self.recomputes))
        return Activity(states, recomputes, *np.zeros((3, 0), dtype=np.int64))

    def _acts(self, rows: Rows, knobs: Mapping[str, Any], choices: Mapping[str, Choice]) -> Mask:
        acts = np.ones(len(rows), dtype=bool)
        ctx = rows.context(
            self.space.problem, {**knobs, **{slot: choice.value for slot, choice in choices.items()}}
        )
        for slot, choice in choices.items():
            if choice.technique is None:
                continue
            for check in choice.technique.valid(ctx):
                acts &= check.ok
            if choice.technique.active is not None and slot not in self.space.fixed:
                acts &= choice.technique.active(ctx)
        return acts

    def variants(
        self, activity: Activity, rows: NDArray[np.intp], layers: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Candidates of each pair of a row and a layout whose devices hold at most that many layers."""
        each = self.widths(self.recomputes[-1], layers)  # choices by layers come last
        widths: NDArray[np.int64] = activity.whole[rows] + each * activity.by_layers[rows]
        return activity.counts[rows] * widths * len(self.swaps)

    def widths(self, recompute: Choice, layers: NDArray[Any] | int) -> NDArray[np.int64]:
        """Candidates behind one recompute choice: recomputing 1 … layers−1 of a device's layers is one each."""
        if not self.by_layers(recompute) or "recompute_layers" in self.space.fixed:
            return np.ones(np.shape(layers), dtype=np.int64)
        return np.asarray(np.maximum(layers - 1, 0), dtype=np.int64)

    def by_layers(self, recompute: Choice) -> bool:
        """Whether the choice recomputes some of a device's layers."""
        return recompute.value == _BY_LAYERS

    def recipe(self, state: int, recompute: int, swap: int) -> dict[str, Choice]:
        """The choices of one branch."""
        return {**self.states[state], "recompute": self.recomputes[recompute], **self.swaps[swap]}

    def units(self, state: int, recompute: int, swap: int) -> list[dict[str, Choice]]:
        """The same in parts whose passes do not look at each other's items: weights, recompute, activations; always the same
        objects."""
        weights, activations = self._divided[swap]
        return [self.states[state], weights, self._recompute_units[recompute], activations]

    def no_more(self, recompute: int, swap: int, schedule: Choice) -> list[tuple[int, int]]:
        """Branches of the same state that do strictly less than this one: no recompute or the same, no further swaps."""
        key = recompute, swap, self._parks(schedule)
        if key in self._less:
            return self._less[key]
        less = self._less[key] = []
        for r, choice in enumerate(self.recomputes):
            for s, other in enumerate(self.swaps):
                subset = all(o.technique is None or o is self.swaps[swap][slot] for slot, o in other.items())
                if self.saves(s) != self.saves(swap):
                    continue  # an update beside the backward may take less than the one that it replaces
                # As much recompute, unless it is of as many layers as it takes: a further swap may do with fewer.
                same = r == recompute and not self.by_layers(choice)
                fewer = same or (choice.technique is None and not self.moves_activations(s, schedule))
                if subset and fewer and (r, s) != (recompute, swap):
                    less.append((r, s))
        return less

    def moves_activations(self, swap: int, schedule: Choice) -> bool:
        """Whether a swap or the schedule moves activations: recompute leaves it less to move, and so may save time."""
        return self._parks(schedule) or any(
            self.swaps[swap][slot].technique is not None for slot in _OF_ACTIVATIONS
        )

    def _parks(self, schedule: Choice) -> bool:
        """Whether a schedule moves activations."""
        return schedule.technique is not None and "activations" in schedule.technique.moves

    def saves(self, swap: int) -> bool:
        """Whether a swap may take the update's time off a row."""
        return self._saves[swap]

    def ruled(self, swap: int) -> bool:
        """Whether some of a swap's rules are about rows, or about choices before it."""
        return any(c.technique is not None and c.technique.by_row for c in self.swaps[swap].values())

    def idle(self, recompute: int, swap: int) -> bool:
        """Whether a branch is its state and nothing more."""
        choices = (self.recomputes[recompute], *self.swaps[swap].values())
        return all(choice.technique is None for choice in choices)


def _parts(swap: Mapping[str, Choice]) -> int:
    """How many choices of a swap do something."""
    return sum(choice.technique is not None for choice in swap.values())


class Faults:
    """Every row's first broken rule."""

    def __init__(self, rows: int) -> None:
        self.reasons: list[str] = []
        self.first = np.full(rows, -1)

    def check(self, reason: str, ok: Mask | bool) -> None:
        """Notes ``reason`` on the rows that are not ``ok`` and had no fault yet."""
        if np.all(ok):
            return
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.first[~np.broadcast_to(ok, self.first.shape) & (self.first < 0)] = self.reasons.index(reason)
