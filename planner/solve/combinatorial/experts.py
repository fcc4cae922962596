"""Which device holds which expert: balanced loads within a layer, and tokens that stay where they are between layers.

- :func:`balance` deals one layer's experts to devices so that the busiest device has the least load (SmartMoE's
  placement): an integer program, behind a longest-first start that is improved by exchanges.
- :func:`align` places the experts of all layers so that most tokens find their next expert on the device where they are
  (ExFlow): the best path through all balanced placements of every layer where these can be listed, else every layer in
  turn as an assignment problem between its neighbours, with a bound.

Sources: M. Zhai et al. 2023 (SmartMoE, USENIX ATC 2023) §5; J. Yao et al. 2024 (ExFlow, arXiv:2401.08383) §IV. Bounds of
machine loads: R. L. Graham, SIAM Journal on Applied Mathematics 17(2), 1969.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.errors import Problem, SpecError
from planner.solve.combinatorial.certificate import Certificate, Clock, certify
from planner.solve.combinatorial.milp import Program, solve

__all__ = ["Alignment", "Balance", "align", "balance", "in_order", "longest_first", "moved"]

Floats: TypeAlias = NDArray[np.float64]
Index: TypeAlias = NDArray[np.intp]

_MOST_PLACEMENTS = (
    6_000  # balanced placements of one layer that are listed: their products are matrices of this side
)
_ROUNDS = 50


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """The device of every expert, every device's load, and what is proved of the largest."""

    device: tuple[int, ...]
    loads: tuple[float, ...]
    certificate: Certificate


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Per layer the device of every expert, the tokens that move between layers, and what is proved of them."""

    device: tuple[tuple[int, ...], ...]
    moved: float
    total: float
    certificate: Certificate


def balance(
    load: Sequence[float],
    devices: int,
    *,
    slots: int | None = None,
    backend: str = "scipy",
    time_limit_s: float | None = None,
) -> Balance:
    """The placement of one layer's experts whose busiest device has the least load.

    Args:
        load: tokens (or seconds) of every expert.
        devices: how many there are.
        slots: experts that a device can hold; None: as many as an even deal needs.
        backend: of the integer program.
        time_limit_s: after which the best placement so far is returned with its gap.

    Raises:
        SpecError: there are more experts than slots.
    """
    clock = Clock(time_limit_s)
    room = -(-len(load) // devices) if slots is None else slots
    if room * devices < len(load):
        raise SpecError(
            Problem("slots", f"{room} on each of {devices} devices", f"room for all {len(load)} experts")
        )
    weights = np.asarray(load, dtype=np.float64)
    best = _exchanged(weights, longest_first(load, devices, room), devices)
    bound = max(float(weights.sum()) / devices, float(weights.max()), _pairs_bound(weights, devices))
    solver, notes = "longest first, exchanges", {"experts": len(load)}
    if _busiest(weights, best, devices) - bound > 1e-12 * bound:
        program = Program()
        longest = program.variables([1.0], upper=np.inf)
        at = program.variables(np.zeros((len(load), devices)), integer=True)
        program.constrain(at, 1.0, low=1.0, high=1.0)
        program.constrain(at.T, 1.0, high=float(room))
        lines = np.column_stack([at.T, np.repeat(longest, devices)])
        program.constrain(lines, np.append(weights, -1.0), high=0.0)
        program.constrain([longest], 1.0, low=bound)
        for expert in range(
            min(devices - 1, len(load))
        ):  # devices are alike: expert i is on one of the first i + 1
            program.constrain(at[expert, expert + 1 :][:, None], 1.0, high=0.0)
        answer = solve(program, backend=backend, time_limit_s=clock.left_s)
        bound = max(bound, answer.bound)
        if answer.found:
            found = answer.values[at].argmax(axis=1)
            if _busiest(weights, found, devices) < _busiest(weights, best, devices):
                best = found
        solver = answer.solver
    value = _busiest(weights, best, devices)
    loads = np.bincount(best, weights=weights, minlength=devices)
    certificate = certify(value, min(bound, value), solver, clock, notes)
    return Balance(tuple(int(d) for d in best), tuple(float(x) for x in loads), certificate)


def longest_first(load: Sequence[float], devices: int, slots: int) -> Index:
    """Every expert, the heaviest first, to the device with the least load so far that has a slot."""
    held, loads = np.zeros(devices, dtype=int), np.zeros(devices)
    device = np.zeros(len(load), dtype=np.intp)
    for expert in np.argsort(-np.asarray(load), kind="stable"):
        device[expert] = int(np.argmin(np.where(held < slots, loads, np.inf)))
        held[device[expert]] += 1
        loads[device[expert]] += load[expert]
    return device


def align(transitions: Sequence[Floats], devices: int, *, time_limit_s: float | None = None) -> Alignment:
    """Placements of all layers with the fewest tokens that change devices between layers.

    Args:
        transitions: per pair of neighbouring layers, tokens from every expert of the first to every one of the second.
        devices: how many there are; every layer puts equally many experts on each.
        time_limit_s: after which the best placement so far is returned with its gap.

    Raises:
        SpecError: the experts cannot be dealt evenly.
    """
    clock = Clock(time_limit_s)
    experts = len(transitions[0])
    if experts % devices:
        raise SpecError(Problem("devices", f"{devices} for {experts} experts", "a divisor of the experts"))
    each = experts // devices
    total = float(sum(table.sum() for table in transitions))
    count = 1
    for left in range(experts, 0, -each):
        count *= comb(left, each)
        if count > _MOST_PLACEMENTS:
            break
    if count <= _MOST_PLACEMENTS:
        device = _best_path(transitions, experts, devices)
        away = moved(transitions, device)
        return Alignment(
            _plain(device),
            away,
            total,
            certify(away, away, "best path over placements", clock, {"placements": count}),
        )
    stay_most = sum(_most_stay(table, each) for table in transitions)
    device = _in_turn(transitions, in_order(len(transitions) + 1, experts, devices), devices, clock)
    away = moved(transitions, device)
    bound = min(max(total - stay_most, 0.0), away)
    return Alignment(
        _plain(device),
        away,
        total,
        certify(away, bound, "assignments in turn, row and column bound", clock),
    )


def in_order(layers: int, experts: int, devices: int) -> Index:
    """Every layer's experts in the order of their numbers: what a launcher does that knows no affinity."""
    return np.tile(np.repeat(np.arange(devices), experts // devices), (layers, 1))


def moved(transitions: Sequence[Floats], device: Index) -> float:
    """Tokens that change devices between layers under a placement: (layers, experts)."""
    return float(sum(table.sum() for table in transitions)) - _stayed(transitions, device)


# -- loads -----------------------------------------------------------------------------------------------------------------


def _busiest(load: Floats, device: Index, devices: int) -> float:
    return float(np.bincount(device, weights=load, minlength=devices).max())


def _pairs_bound(load: Floats, devices: int) -> float:
    """Of the devices + 1 heaviest experts two share a device: at least the two lightest of them do."""
    heavy = np.sort(load)[::-1]
    return float(heavy[devices] + heavy[devices - 1]) if len(load) > devices else 0.0


def _exchanged(load: Floats, device: Index, devices: int) -> Index:
    """Exchanges of two experts of the busiest device and another one, while the busier of both gets less to do."""
    device = device.copy()
    for _ in range(_ROUNDS):
        loads = np.bincount(device, weights=load, minlength=devices)
        busiest = int(loads.argmax())
        mine, others = np.flatnonzero(device == busiest), np.flatnonzero(device != busiest)
        if not len(others):
            break
        gain = load[mine][:, None] - load[others][None, :]
        after = np.maximum(loads[busiest] - gain, loads[device[others]][None, :] + gain)
        i, j = np.unravel_index(int(after.argmin()), after.shape)
        if after[i, j] >= loads[busiest] * (1.0 - 1e-12):
            break
        device[mine[i]], device[others[j]] = device[others[j]], busiest
    return device


# -- transitions -------------------------------------------------------------------------------------------------------------


def _stayed(transitions: Sequence[Floats], device: Index) -> float:
    return float(
        sum(
            table[a[:, None] == b[None, :]].sum()
            for table, a, b in zip(transitions, device, device[1:], strict=False)
        )
    )


def _best_path(transitions: Sequence[Floats], experts: int, devices: int) -> Index:
    """Layer after layer, the most that can have stayed for every placement of it."""
    listed = np.array(list(_placements(experts, devices)))
    marks = (listed[:, :, None] == np.arange(devices)).astype(float)  # placement, expert, device
    flat = marks.reshape(len(listed), -1)
    # The first layer's devices are interchangeable: one placement stands for all renamings of it.
    stayed = np.where((listed == _first_names(listed)).all(axis=1), 0.0, -np.inf)
    origin: list[Index] = []
    for table in transitions:
        pushed = np.einsum("pid,ij->pjd", marks, table).reshape(len(listed), -1)
        score = stayed[:, None] + pushed @ flat.T
        origin.append(score.argmax(axis=0))
        stayed = score.max(axis=0)
    path = [int(stayed.argmax())]
    for back in reversed(origin):
        path.append(int(back[path[-1]]))
    return listed[path[::-1]]


def _placements(experts: int, devices: int) -> Iterator[list[int]]:
    """Every even deal of experts to devices."""
    room = [experts // devices] * devices
    dealt: list[int] = []

    def deal() -> Iterator[list[int]]:
        if len(dealt) == experts:
            yield list(dealt)
            return
        for device in range(devices):
            if room[device]:
                room[device] -= 1
                dealt.append(device)
                yield from deal()
                dealt.pop()
                room[device] += 1

    yield from deal()


def _first_names(listed: Index) -> Index:
    """The same placements with devices numbered in the order of their first expert."""
    found = np.empty_like(listed)
    for row, placement in enumerate(listed):
        names: dict[int, int] = {}
        found[row] = [names.setdefault(int(device), len(names)) for device in placement]
    return found


def _most_stay(table: Floats, each: int) -> float:
    """Tokens that can stay between two layers at most: an expert shares its device with so many experts of the next layer."""
    rows = np.sort(table, axis=1)[:, ::-1][:, :each].sum()
    columns = np.sort(table, axis=0)[::-1][:each].sum()
    return float(min(rows, columns))


def _in_turn(transitions: Sequence[Floats], device: Index, devices: int, clock: Clock) -> Index:
    """One layer at a time, as an assignment problem of its experts to slots, until no layer gains."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    layers, experts = device.shape
    slots = np.repeat(np.arange(devices), experts // devices)
    device = device.copy()
    best = _stayed(transitions, device)
    for _ in range(_ROUNDS):
        for layer in range(layers):
            if clock.over:
                return device
            gain = np.zeros((experts, devices))
            if layer:
                gain += transitions[layer - 1].T @ (device[layer - 1][:, None] == np.arange(devices))
            if layer + 1 < layers:
                gain += transitions[layer] @ (device[layer + 1][:, None] == np.arange(devices))
            rows, columns = linear_sum_assignment(gain[:, slots], maximize=True)
            device[layer, rows] = slots[columns]
        now = _stayed(transitions, device)
        if now <= best * (1.0 + 1e-12):
            break
        best = now
    return device


def _plain(device: Index) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(d) for d in row) for row in device)
