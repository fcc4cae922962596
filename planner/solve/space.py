"""The uniform space: recipes (categories, in loops) times rows (mesh degrees and micro-batch sizes, in arrays).

A recipe is one choice per slot. Slots before ``zero_stage`` form a *prefix*, which fixes what a block computes and how its
work is cut; the additive slots after it form a *branch*. Rows are every factorisation of the world size with every
micro-batch size; a layout deals layers to virtual stages. A candidate is (prefix, row, layout, branch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.errors import Problem as Fault
from planner.errors import SpecError, did_you_mean
from planner.ledger import Array
from planner.mesh import Mesh
from planner.operators.baseline import block_order
from planner.pipeline.layout import LAYOUT_NAMES, stages_named
from planner.schedule.order import Generator, generator_of
from planner.specs.formats import FORMATS
from planner.specs.problem import PERMISSIONS, Problem
from planner.technique import ADDITIVE_SLOTS, SLOTS, Context, Detail, Technique, details, discover, off
from planner.units import counted

__all__ = ["DEGREES", "NOT_DEALT", "Choice", "Named", "Rows", "Space", "named", "order_of"]

NOT_DEALT = "layers cannot be dealt to the stages"
DEGREES = ("tp", "cp", "pp", "dp", "ep", "etp", "micro_batch_size")
_LAYOUT_KNOBS = ("virtual_stages", "pipeline_layout", "recompute_layers")
_VALUE_KNOBS = ("gradient_dtype",)


class Choice(NamedTuple):
    """One value of a slot, and the technique that serves it (None: the slot is off)."""

    value: str
    technique: Technique | None


Named: TypeAlias = tuple[str, ...]


def named(recipe: Mapping[str, Choice]) -> Named:
    """A recipe by the values of its choices."""
    return tuple(choice.value for choice in recipe.values())


def order_of(schedule: Choice) -> Generator:
    """The order that a schedule's choice brings."""
    assert schedule.technique is not None
    return generator_of(schedule.technique.order)


class Rows:
    """Mesh degrees and micro-batch sizes: one array per degree, all of one length."""

    def __init__(self, values: Mapping[str, Array]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values["tp"])

    def take(self, index: NDArray[Any]) -> Rows:
        """The rows at ``index``."""
        return Rows({name: value[index] for name, value in self.values.items()})

    def context(self, problem: Problem, knobs: Mapping[str, Any]) -> Context:
        """What the passes of a recipe see for these rows."""
        v = self.values
        mesh = Mesh(v["tp"], v["cp"], v["dp"], v["pp"], v["ep"], v["etp"])
        return Context(
            problem.model,
            problem.cluster,
            problem.workload,
            problem.stack,
            mesh,
            v["micro_batch_size"],
            knobs,
        )


class Space:
    """The candidates of a problem.

    Args:
        problem: the problem.
        rows: places of the rows that some prefixes are searched on, by :func:`named`; without, all are on all.

    Raises:
        SpecError: a fixed knob or value is unknown, or a forbidden glob matches nothing.
    """

    def __init__(self, problem: Problem, rows: Mapping[Named, NDArray[np.intp]] | None = None) -> None:
        self.problem = problem
        self.fixed = self._checked(problem.fixed)
        self.values = {name: self.fixed[name] for name in (*_VALUE_KNOBS, *details()) if name in self.fixed}
        self._unmatched = {("--forbid", glob) for glob in problem.forbidden}
        self._unmatched |= {("--explore", glob) for glob in problem.explore if glob != "all"}
        self.choices = {slot: self._slot(slot) for slot in SLOTS}
        every = self._rows()
        self._searched: dict[Named, NDArray[np.bool_]] | None = None
        self.places = np.arange(len(every))
        """Of the rows among all that there are."""
        if rows is not None:
            self.places = distinct(np.concatenate([np.zeros(0, dtype=np.intp), *rows.values()]))
            self._searched = {}
            for name, own in rows.items():
                self._searched[name] = np.zeros(len(self.places), dtype=bool)
                self._searched[name][np.searchsorted(self.places, own)] = True
            every = every.take(self.places)
        self.rows = every
        self._report_unmatched()
        self._report_forbidden()

    # -- recipes ---------------------------------------------------------------------------------------------------

    def prefixes(self) -> Iterator[dict[str, Choice]]:
        """Every combination of the slots that shape a block's work."""
        return self._combinations([slot for slot in SLOTS if slot not in ADDITIVE_SLOTS])

    def searched(self, prefix: Mapping[str, Choice]) -> NDArray[np.bool_]:
        """Rows that a prefix is searched on."""
        if self._searched is None:
            return np.ones(len(self.rows), dtype=bool)
        return self._searched.get(named(prefix), np.zeros(len(self.rows), dtype=bool))

    def branches(self) -> Iterator[dict[str, Choice]]:
        """Every combination of the additive slots, the schedule left out."""
        return self._combinations([slot for slot in ADDITIVE_SLOTS if slot != "schedule"])

    def _combinations(self, slots: list[str]) -> Iterator[dict[str, Choice]]:
        for values in product(*(self.choices[slot] for slot in slots)):
            yield dict(zip(slots, values, strict=True))

    def knobs(self, recipe: Mapping[str, Choice]) -> dict[str, Any]:
        """The recipe's choices as the passes read them."""
        return {**self.values, **{slot: choice.value for slot, choice in recipe.items()}}

    def allows(self, name: str, values: Array) -> NDArray[np.bool_]:
        """Which values of a numeric knob the user's fixed and forbidden choices leave."""
        ok = np.ones(len(values), dtype=bool)
        if name in self.fixed:
            ok &= values == self.fixed[name]
        for glob in self.problem.forbidden:
            if glob.startswith(f"{name}="):
                self._unmatched.discard(("--forbid", glob))
                ok &= ~np.array([fnmatchcase(f"{name}={value:g}", glob) for value in values], dtype=bool)
        return ok

    def _slot(self, slot: str) -> list[Choice]:
        found: list[Choice] = []
        techniques = [t for t in discover("training").values() if t.slot == slot and t.status == "modelled"]
        if not any(t.default for t in techniques):
            found.append(Choice(off(slot), None))
        launcher = self.problem.launcher
        native = launcher.native.get(slot, frozenset()) if launcher is not None else frozenset()
        for technique in sorted(techniques, key=lambda t: not t.default):
            found += [
                Choice(value, technique)
                for value in technique.choices
                if slot in self.fixed or value in native or self._open(slot, Choice(value, technique))
            ]
        if slot in self.fixed:
            wanted = str(self.fixed[slot]).lower()
            known = [choice.value for choice in found]
            if wanted not in known:
                raise SpecError(
                    Fault(
                        f"--fix {slot}",
                        repr(self.fixed[slot]),
                        f"one of {', '.join(known)}",
                        _technique_named(wanted) or did_you_mean(wanted, known),
                    )
                )
            chosen = [choice for choice in found if choice.value == wanted]
            self._raise_unless_allowed(slot, chosen[0])
            return chosen
        if slot == "precision":
            found = [choice for choice in found if choice.value in self.problem.workload.precisions]
        if slot == "optimizer":
            found = [choice for choice in found if choice.value == self.problem.workload.optimizer]
        # What a launcher cannot run may be forbidden as well: globs are held against every choice.
        forbidden = {c.value for c in found if self._matches("--forbid", self.problem.forbidden, slot, c)}
        if launcher is not None:
            found = [choice for choice in found if launcher.allows(slot, choice.value)]
        kept = [choice for choice in found if choice.value not in forbidden]
        if not kept and launcher is not None and not found:
            raise SpecError(
                Fault(
                    f"--for {launcher.name}",
                    f"cannot run any allowed {slot}",
                    "another launcher, or other choices",
                )
            )
        if not kept:
            raise SpecError(Fault("--forbid", f"nothing is left for {slot}", "at least one choice per slot"))
        return kept

    def _open(self, slot: str, choice: Choice) -> bool:
        """Whether the search tries a choice that is not fixed."""
        technique = choice.technique
        assert technique is not None
        everything = "all" in self.problem.explore and not technique.asked
        named = self._matches("--explore", self.problem.explore, slot, choice)
        allowed = set(technique.needs) <= set(self.problem.allowed)
        return allowed and (technique.searched or everything or named)

    def _raise_unless_allowed(self, slot: str, choice: Choice) -> None:
        """A fixed choice is no permission: whoever names it also says that its effect on training is wanted."""
        needs = choice.technique.needs if choice.technique is not None else ()
        if missing := [name for name in needs if name not in self.problem.allowed]:
            raise SpecError(_not_permitted(f"--fix {slot}={choice.value}", missing))

    def _matches(self, option: str, globs: tuple[str, ...], slot: str, choice: Choice) -> bool:
        """Whether any glob of an option means a choice."""
        names = _names(slot, choice)
        hits = {(option, glob) for glob in globs if any(fnmatchcase(name, glob) for name in names)}
        self._unmatched -= hits
        return bool(hits)

    def undealt(self, pp: int) -> str:
        """Why no layout of a pipeline degree is left: too few layers, or a schedule that never has so many."""
        chunks, schedules = self.fixed.get("virtual_stages"), self.choices["schedule"]
        if (
            chunks is None
            or pp == 1
            or any(chunks in order_of(each).chunks(int(chunks)) for each in schedules)
        ):
            return NOT_DEALT
        names = "these schedules do" if len(schedules) > 1 else f"schedule={schedules[0].value} does"
        return f"{names} not run {chunks} virtual stages on a device"

    # -- rows --------------------------------------------------------------------------------------------------------

    def _rows(self) -> Rows:
        """Every mesh of the world size with every micro-batch size; degrees that no rule could accept are left out."""
        model, workload = self.problem.model, self.problem.workload
        devices = self.problem.cluster.devices
        blocks = [*model.blocks.values()]
        heads = [a.heads for b in blocks for a in (b.attention, b.cross_attention) if a] or [model.hidden]
        experts = [b.moe.experts for b in blocks if b.moe]
        layers = model.n_layers + sum(n for _, n in model.encoder_layers)
        tps = self._degrees("tp", devices, max(heads), lambda tp: all(h % tp == 0 for h in heads))
        cps = self._degrees(
            "cp", devices, max(1, workload.seq_len // 2), lambda cp: workload.seq_len % cp == 0
        )
        pps = self._degrees("pp", devices, layers + 2)
        # Many meshes share each of these.
        open_dp = cache(lambda dp: bool(self.allows("dp", np.array([dp]))[0]))
        sizes = cache(lambda share: self._degrees("micro_batch_size", share, share))
        most = max(experts, default=1)
        eps = cache(
            lambda ranks: self._degrees("ep", ranks, most, lambda ep: all(x % ep == 0 for x in experts))
        )
        etps = cache(lambda tp: self._degrees("etp", tp, tp if experts else 1))
        columns: list[Array] = []
        for tp, cp, pp in product(tps, cps, pps):
            dp, left = divmod(devices, tp * cp * pp)
            if left or not open_dp(dp):
                continue
            ranks = tp * cp * dp
            share = workload.global_batch_size // dp if workload.global_batch_size % dp == 0 else 1
            folds = [fold for fold in product(eps(ranks), etps(tp)) if ranks % math.prod(fold) == 0]
            grid = [(tp, cp, pp, dp, *fold, size) for fold, size in product(folds, sizes(share))]
            columns.append(np.array(grid, dtype=np.float64).reshape(-1, len(DEGREES)))
        if not any(len(grid) for grid in columns):
            wanted = ", ".join(f"{name}={self.fixed[name]}" for name in DEGREES if name in self.fixed)
            raise SpecError(
                Fault(
                    "--fix",
                    f"no mesh of {counted(devices, 'device')} has {wanted or 'these degrees'}",
                    "degrees whose product divides the devices",
                )
            )
        table = np.concatenate(columns)
        table = table[
            np.argsort(table[:, -1], kind="stable")
        ]  # small micro-batches first: they hold most good plans
        return Rows({name: np.ascontiguousarray(table[:, index]) for index, name in enumerate(DEGREES)})

    def _degrees(
        self, name: str, of: int, most: int, admits: Callable[[int], bool] = lambda degree: True
    ) -> list[int]:
        """Divisors of a number that the problem admits; a fixed degree is kept, so that its broken rule can be named."""
        if name in self.fixed:
            return [self.fixed[name]] if of % self.fixed[name] == 0 else []
        values = [d for d in _divisors(of) if d <= most and admits(d)]
        ok = self.allows(name, np.array(values, dtype=np.float64))
        return [value for value, keep in zip(values, ok, strict=True) if keep]

    # -- the user's choices --------------------------------------------------------------------------------------------

    def _checked(self, fixed: Mapping[str, Any]) -> dict[str, Any]:
        known = (*DEGREES, *_LAYOUT_KNOBS, *_VALUE_KNOBS, *details(), *SLOTS)
        faults: list[Fault] = []
        checked: dict[str, Any] = {}
        for name, value in fixed.items():
            if name not in known:
                faults.append(
                    Fault(
                        f"--fix {name}",
                        "unknown knob",
                        f"one of {', '.join(known)}",
                        did_you_mean(name, known),
                    )
                )
            elif name in (*DEGREES, "virtual_stages", "recompute_layers"):
                try:
                    number = int(str(value))
                except ValueError:
                    number = 0
                if not 1 <= number <= 10**7:
                    faults.append(Fault(f"--fix {name}", repr(value), "a whole number from 1"))
                checked[name] = number
            elif name in details():
                detail = details()[name]
                try:
                    checked[name] = _read(detail, str(value).lower())
                except ValueError:
                    faults.append(Fault(f"--fix {name}", repr(value), detail.expected))
            else:
                checked[name] = str(value).lower()
                if name == "pipeline_layout" and checked[name] not in LAYOUT_NAMES:
                    faults += self._misdealt(checked[name])
        for detail in details().values():
            slot, _, choice = detail.needed_by.partition("=")
            if choice and checked.get(slot) == choice and detail.name not in fixed:
                expected = f"--fix {detail.name}=… beside it: {detail.expected}"
                faults.append(Fault(f"--fix {detail.needed_by}", "does not say enough alone", expected))
        if checked.get("gradient_dtype", "fp32") not in FORMATS:
            faults.append(Fault("--fix gradient_dtype", repr(fixed["gradient_dtype"]), "fp32, bf16 or fp16"))
        if faults:
            raise SpecError(faults)
        return checked

    def _misdealt(self, layout: str) -> Iterator[Fault]:
        """What is wrong with a layout that has no name."""
        layers, dealt = len(block_order(self.problem.model)), sum(stages_named(layout))
        if not dealt:
            expected = (
                f"one of {', '.join(LAYOUT_NAMES)}, or the layers of every virtual stage, such as 19+2*21+19"
            )
            yield Fault("--fix pipeline_layout", repr(layout), expected, did_you_mean(layout, LAYOUT_NAMES))
        elif dealt != layers:
            yield Fault(f"--fix pipeline_layout={layout}", counted(dealt, "layer"), f"the model's {layers}")

    def _report_forbidden(self) -> None:
        """Refuses to explore nothing but what has no permission."""
        techniques = discover("training").values() if self.problem.explore else ()
        every = [(t, _names(t.slot, Choice(value, t))) for t in techniques if t.slot for value in t.choices]
        for glob in self.problem.explore:
            meant = [t for t, names in every if any(fnmatchcase(name, glob) for name in names)]
            missing = [[name for name in t.needs if name not in self.problem.allowed] for t in meant]
            if meant and all(missing):
                raise SpecError(_not_permitted(f"--explore {glob}", [*dict.fromkeys(chain(*missing))]))

    def _report_unmatched(self) -> None:
        for name in DEGREES:
            self.allows(name, self.rows.values[name][:0])
        if not self._unmatched:
            return
        techniques = {t.key: t for t in discover("training").values() if t.slot}
        choices = [f"{t.slot}={value}" for t in techniques.values() for value in t.choices]
        tokens = [*choices, *SLOTS, *techniques]
        for glob in self.problem.forbidden:  # what is not open anyhow may be forbidden as well
            if any(fnmatchcase(token, glob) for token in tokens):
                self._unmatched.discard(("--forbid", glob))
        if self._unmatched:
            raise SpecError(
                [
                    Fault(
                        f"{option} {glob}",
                        "matches no knob, choice or technique",
                        "",
                        did_you_mean(glob, tokens),
                    )
                    for option, glob in sorted(self._unmatched)
                ]
            )


def _names(slot: str, choice: Choice) -> list[str]:
    """What globs may mean a choice by."""
    technique = choice.technique
    off_by_default = [] if technique is None or technique.default else [slot]
    return [f"{slot}={choice.value}", *([] if technique is None else [technique.key]), *off_by_default]


def _not_permitted(where: str, missing: Sequence[str]) -> Fault:
    """The fault of asking for what changes the result of training, without saying that this is wanted."""
    expected = "; ".join(f"permission for {name}: {PERMISSIONS[name]}" for name in missing)
    options = " ".join(f"--allow {name}" for name in missing)
    return Fault(where, "needs a permission that is not given", expected, f"Add {options}.")


def _read(detail: Detail, text: str) -> Any:
    """What the user says of a detail; ValueError where it is none of the detail's values."""
    if detail.values and text not in detail.values:
        raise ValueError(text)
    return detail.read(text)


def _technique_named(word: str) -> str:
    """A hint for who gives a technique's name in place of a choice; empty where there is none of that name."""
    for key, technique in discover("training").items():
        if word in (key, key.partition("_")[0]) and technique.status == "modelled":
            if technique.kind == "preset":
                return f"{technique.name} is --preset {key}."
            if technique.slot is not None:
                return f"{technique.name} is --fix {technique.slot}={technique.choices[0]}."
            return f"{technique.name} is a technique, and no choice of a plan: {technique.summary}."
    return ""


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
