"""What a technique is: a slot, knobs, checks, one pass over the ledger, and the published figures that it reproduces.

A technique lives in one file under ``planner/techniques/<job>/``, ends in a module-level ``TECHNIQUE`` (or
``TECHNIQUES``), and is found by :func:`discover`. Slots give mutual exclusion by construction: a recipe is one choice per
slot, and passes run in slot order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.specs.formats import FORMATS, Format

if TYPE_CHECKING:
    from planner.ledger import Array, Index, Ledger
    from planner.mesh import Mesh
    from planner.schedule.order import Generator
    from planner.specs.cluster import Cluster
    from planner.specs.model import Model
    from planner.specs.stack import Stack
    from planner.specs.traffic import Traffic
    from planner.specs.workload import TrainWorkload

__all__ = [
    "ADDITIVE_SLOTS",
    "SERVING_SLOTS",
    "SLOTS",
    "Check",
    "Context",
    "Detail",
    "Figure",
    "Knob",
    "Launcher",
    "ServingContext",
    "Technique",
    "details",
    "discover",
    "off",
    "whole_number",
]

SLOTS = (
    "adaptation",  # what of the model is trained
    "precision",
    "attention_kernel",
    "elementwise_kernel",
    "loss_kernel",
    "gradient_accumulation",
    "tensor",
    "sequence_parallel",
    "context",
    "expert",
    "expert_overlap",
    "tensor_overlap",
    "pipeline",
    "cuda_graph",
    "optimizer",
    "checkpoint_end",  # where a recomputation stops
    "zero_stage",  # gradient synchronisation, and what is sharded over the data-parallel ranks
    "zero_group",  # over which of those ranks
    "synchronisation",  # how often replicas agree, and who with whom
    "compression",  # what travels between them in place of whole gradients and weights
    "recompute",
    "optimizer_offload",
    "activation_offload",
    "parameter_offload",
    "schedule",
)
"""Slots of a training recipe, in the order in which their passes run. A slot's name is also the knob that chooses in it."""

SERVING_SLOTS = (
    "weights",  # number formats of linear layers
    "adapters",  # of customers, beside the model
    "cache",  # number format of what is kept of the tokens seen
    "attention",  # kernels of attention and of recurrent mixers
    "latent",  # how latent attention generates
    "fusion",
    "shards",  # tensor parallelism
    "cache_copies",  # what tensor ranks hold of the same keys and values
    "prompt_ranks",  # how ranks that share a prompt's tokens meet each other's keys
    "experts",
    "micro_batches",  # parts of a batch that take turns on a device and its links
    "stages",  # pipeline parallelism
    "graphs",
)
"""Slots of a serving recipe, in the order in which their passes run."""

_JOBS: tuple[Literal["training", "serving"], ...] = ("training", "serving")

ADDITIVE_SLOTS = SLOTS[SLOTS.index("zero_stage") :]
"""From here on, passes only add time to a row: the ledger before them bounds it from below."""


def off(slot: str) -> str:
    """What a slot's knob says when no technique fills it."""
    return _OFF.get(slot, "none")


_OFF = {
    "checkpoint_end": "whole",
    "elementwise_kernel": "fused",
    "gradient_accumulation": "fused",
    "sequence_parallel": "false",
    "zero_group": "full",
}


class Check(NamedTuple):
    """One rule over rows: where ``ok`` is false they are rejected for ``reason``. ``of_machine``: it looks at no more."""

    reason: str
    ok: NDArray[np.bool_] | bool
    of_machine: bool = False


@dataclass(frozen=True, slots=True)
class Knob:
    """A choice that a technique opens: its name, what it means, and the values that it may take."""

    name: str
    meaning: str
    values: tuple[Any, ...] = ()
    default: Any = None


@dataclass(frozen=True, slots=True)
class Detail(Knob):
    """A knob that says more about a slot's choice: how many layers, which modules. It is open unless a plan names it.

    It is one of ``values``, if it has some; ``read`` makes it of the text, or raises ValueError. ``expected`` says so. The choice
    ``needed_by``, as ``slot=value``, means nothing without it.
    """

    read: Callable[[str], Any] = str
    expected: str = ""
    needed_by: str = ""


def whole_number(text: str) -> int:
    """The number from 1 that a text says.

    Raises:
        ValueError: it says none.
    """
    number = int(text)
    if not 1 <= number <= 10**7:
        raise ValueError(text)
    return number


class Figure(NamedTuple):
    """A published number, and how the technique's pass reproduces it.

    ``compute(subject)`` exercises what the technique brings (:meth:`Technique.subject`) on the source's inputs and returns
    the number; with :meth:`Technique.absence` in its place it must return another one. ``tolerance`` is relative. Of a technique
    that brings an order and a pass, ``of_pass`` says which of them the figure is about. Of a source that could not be opened the
    number is ``second_hand``: other authors' accounts of it have it.
    """

    what: str
    published: float
    tolerance: float
    source: str
    compute: Callable[[Any], float]
    of_pass: bool = False
    second_hand: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a pass may look at: the problem, the mesh and micro-batch size of every row, and the recipe's own knobs."""

    model: Model
    cluster: Cluster
    workload: TrainWorkload
    stack: Stack
    mesh: Mesh
    micro_batch_size: Array
    knobs: Mapping[str, Any]

    def take(self, index: Index) -> Context:
        """The context of the rows at ``index``."""
        return replace(self, mesh=self.mesh.take(index), micro_batch_size=self.micro_batch_size[index])

    @property
    def format(self) -> Format:
        """Numeric formats of the recipe."""
        return FORMATS[self.knobs["precision"]]

    @property
    def gradient_dtype(self) -> str:
        """Dtype in which gradients are accumulated and reduced."""
        return str(self.knobs.get("gradient_dtype", self.format.gradient))

    @property
    def micro_batches(self) -> Array:
        """Micro-batches per pipeline and step, per row."""
        return self.workload.global_batch_size / (self.mesh.dp * self.micro_batch_size)


@dataclass(frozen=True, slots=True, eq=False)
class ServingContext:
    """What a pass over an iteration of a serving replica may look at: the problem, the replica's mesh per row, its knobs.

    ``mesh.dp`` counts the replica's attention-parallel ranks, which batch requests of their own and share the experts.
    """

    model: Model
    cluster: Cluster
    traffic: Traffic
    stack: Stack
    mesh: Mesh
    knobs: Mapping[str, Any]

    @property
    def format(self) -> Format:
        """Formats of activations and of products that are never quantised: those of 16-bit weights, bf16 under narrower ones."""
        usual = "fp16" if self.knobs.get("weights") == "fp16" else "bf16"
        return FORMATS[self.knobs.get("activations", usual)]


def _no_checks(ctx: Any) -> Iterable[Check]:
    return ()


def _identity(ledger: Ledger, ctx: Any) -> Ledger:
    return ledger


def _nothing(*arguments: Any, **named: Any) -> float:
    return 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Technique:
    """One entry of the catalogue.

    Attributes:
        key: the catalogue's key.
        slot: one of :data:`SLOTS` or :data:`SERVING_SLOTS`, as its job says; None for presets, solvers and objectives.
        kind: technique, baseline (the ledger as it is, named so that it can be chosen), preset (a published combination),
            solver or objective.
        status: ``modelled``, or ``declared`` with the reason in ``summary`` (never counted as covered).
        choices: the values of the slot's knob that this technique serves, e.g. ``1f1b``.
        default: whether its first choice is the slot's default.
        valid: composition rules; each becomes a rejection with its reason.
        apply: the pass.
        order: for a schedule, its order generator, or the name of one; for a collective, the name of its algorithm.
        compose: for what is neither a pass nor an order, such as a queue in front of a pool, the formula that it brings.
        searched: whether the search tries it without being asked; the others it tries where everything is to be explored.
        asked: whether only a plan that names it has it: another job than training all weights in full, a detail to be given, or
            software that does what the usual choice does and more.
        needs: permissions without which no plan has it (:data:`planner.specs.problem.PERMISSIONS`).
        by_row: of what moves states or activations to slower memory: whether its rules look at more than machine and job.
        moves: pools that the pass takes off the device, so that no bound of memory may rest on them.
        apart: of a schedule that edits the ledger, whether its pass looks at nothing that the additive slots put there.
        saves: whether its pass may take the update's time off a row: it is no bound then for what the pass makes of the row.
        active: rows on which the pass does anything; elsewhere it repeats another candidate and is not counted.
        fixes: of a preset, what every plan has (``--preset``), as ``--fix`` takes it.
        solve: of a solver, what finds its answers; ``naive`` takes the same problem and answers without one.
    """

    key: str
    name: str
    slot: str | None
    source: str
    summary: str
    choices: tuple[str, ...] = ()
    default: bool = False
    job: Literal["training", "serving"] = "training"
    kind: Literal["technique", "baseline", "preset", "solver", "objective"] = "technique"
    status: Literal["modelled", "declared"] = "modelled"
    knobs: tuple[Knob, ...] = ()
    figures: tuple[Figure, ...] = ()
    valid: Callable[[Any], Iterable[Check]] = _no_checks
    apply: Callable[[Ledger, Any], Ledger] = _identity
    order: Generator | str = ""
    compose: Callable[..., Any] | None = None
    searched: bool = True
    asked: bool = False
    needs: tuple[str, ...] = ()
    by_row: bool = False
    moves: tuple[str, ...] = ()
    apart: bool = False
    saves: bool = False
    active: Callable[[Any], NDArray[np.bool_] | bool] | None = None
    fixes: Mapping[str, Any] = field(default_factory=dict)
    solve: Callable[..., Any] | None = None
    naive: Callable[..., Any] | None = None

    @property
    def edits(self) -> bool:
        """Whether its pass does anything to a ledger."""
        return self.apply is not _identity

    def subject(self, figure: Figure) -> Any:
        """What a figure exercises: the solver, the preset's choices, the pass, the order, or the formula."""
        if self.kind == "preset":
            return self.fixes
        if self.solve:
            return self.solve
        return self.apply if figure.of_pass else self.order or self.compose or self.apply

    def absence(self, figure: Figure) -> Any:
        """What takes its place where the technique is missing: no plan, a pass or an order that does nothing, or nothing."""
        if self.kind == "preset":
            return {}
        if self.solve:
            return self.naive
        if figure.of_pass or not (self.order or self.compose):
            return _identity
        return "" if self.order else _nothing

    def as_dict(self) -> dict[str, Any]:
        """The entry as ``planner techniques --json`` prints it."""
        return {
            "key": self.key,
            "name": self.name,
            "job": self.job,
            "kind": self.kind,
            "slot": self.slot,
            "status": self.status,
            "source": self.source,
            "summary": self.summary,
            "needs": list(self.needs),
            "knobs": [knob.name for knob in self.knobs],
            "fixes": dict(self.fixes),
            "figures": [
                {
                    name: getattr(f, name)
                    for name in ("what", "published", "tolerance", "source", "second_hand")
                }
                for f in self.figures
            ],
        }


@dataclass(frozen=True, slots=True, eq=False)
class Launcher:
    """What a launcher can run: rules of the tool, not of physics.

    Attributes:
        name: as ``--for`` takes it.
        allows: whether it can express a slot's value.
        valid: its own rules over rows, each with a reason.
        stages: whether it can cut layers into virtual stages of these sizes, of a pipeline of so many devices; None: into any.
        native: slot → values that it works with by itself: a search for it tries them without being asked.
        per_layer: slot → sets of values that layers of one plan may have side by side.
        alike_at_ends: those of them, and of the degrees, in which embedding and head are alike.
        per_place: degrees, and slots that cut the work, that layers of one plan may have of their own; empty: one mesh for all.
        families: rules besides ``valid``, of which all layers of a plan keep one set together.
    """

    name: str
    allows: Callable[[str, str], bool]
    valid: Callable[[Context], Iterable[Check]]
    stages: Callable[[Sequence[int], int], bool] | None = None
    native: Mapping[str, frozenset[str]] = field(default_factory=dict)
    per_layer: Mapping[str, tuple[frozenset[str], ...]] = field(default_factory=dict)
    alike_at_ends: frozenset[str] = frozenset()
    per_place: frozenset[str] = frozenset()
    families: tuple[Callable[[Context], Iterable[Check]], ...] = ()

    def takes_stages(self, stages: Sequence[int], pp: int) -> bool:
        """Whether it can cut layers into virtual stages of these sizes."""
        return self.stages is None or self.stages(stages, pp)

    def side_by_side(self, slot: str, values: Collection[str]) -> bool:
        """Whether layers of one plan may have these values of a slot."""
        return len(set(values)) <= 1 or any(set(values) <= some for some in self.per_layer.get(slot, ()))


@cache
def catalogue() -> Mapping[str, Technique]:
    """Every technique by key: those that are modelled, then those that are only declared, with the reason as summary.

    A declared entry gives way to a modelled one of the same key.
    """
    import tomllib
    from importlib.resources import files

    found = dict(discover())
    for job in _JOBS:
        text = files("planner.techniques").joinpath(job, "catalogue.toml").read_text(encoding="utf-8")
        for group in tomllib.loads(text).values():
            reason = group.pop("reason", "")
            for key, entry in group.items():
                summary = entry.pop("reason", reason)
                declared = Technique(key=key, slot=None, job=job, status="declared", summary=summary, **entry)
                found.setdefault(key, declared)
    return found


@cache
def details() -> Mapping[str, Detail]:
    """Details by name, of all techniques that train."""
    knobs = (knob for technique in discover("training").values() for knob in technique.knobs)
    return {knob.name: knob for knob in knobs if isinstance(knob, Detail)}


@cache
def discover(job: str | None = None) -> Mapping[str, Technique]:
    """Every modelled technique by key: those of ``planner.techniques``, then those of its entry-point group.

    Args:
        job: training or serving, whose techniques alone are loaded; None: both.
    """
    found: dict[str, Technique] = {}
    if job is None:
        for one in _JOBS:
            for key, entry in discover(one).items():
                assert key not in found, f"two techniques are called {key}"
                found[key] = entry
        return found
    package = import_module(f"planner.techniques.{job}")
    for info in walk_packages(package.__path__, f"{package.__name__}."):
        module = import_module(info.name)
        entries = getattr(module, "TECHNIQUES", None) or (
            (module.TECHNIQUE,) if hasattr(module, "TECHNIQUE") else ()
        )
        for entry in entries:
            assert entry.key not in found, f"two techniques are called {entry.key}"
            found[entry.key] = entry
    for technique in _of_others():
        if technique.job == job:
            found.setdefault(technique.key, technique)
    return found


def _of_others() -> list[Technique]:
    """Techniques of the entry-point group."""
    group = "planner.techniques"
    files = (file for folder in sys.path for file in Path(folder).glob("*.*-info/entry_points.txt"))
    if not any(f"[{group}]" in file.read_text(encoding="utf-8") for file in files):
        return []  # the reader of entry points takes longer to load than all techniques together
    from importlib.metadata import entry_points

    return [point.load() for point in entry_points(group=group)]
