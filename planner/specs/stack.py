"""A software stack: what the framework adds to the hardware's own time and memory, and which kernels it brings.

A stack's file may name another that it ``extends``: constants and knobs that it leaves out are the other's. ``[[serves]]``
says which published runs it describes, by framework, version and date; :func:`stack_for` chooses by these rules alone::

    name = "megatron-eager"
    extends = "default"

    [[serves]]
    framework = "Megatron-LM"        # any name that begins so
    until = "2022"                   # inclusive; a year, or a year and month
    versions = ["v2."]               # what the version begins with; left out: any
    habits = {}                      # habits that these runs had otherwise than the stack has them now

    [knobs]
    attention_kernel = { value = "eager", kind = "datasheet", source = "megatron-deepspeed" }

    [habits]                         # what its code does in one way among several; no choice of a plan's
    gradient_sums = { value = "all_reduce", kind = "datasheet", source = "deepspeed" }

    [on.hopper]                      # constants that differ on one generation of accelerators
    matmul_slowdown = { value = 1.1, kind = "assumed", source = "planner-defaults" }
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import Problem, SpecError, did_you_mean
from planner.specs.device import KINDS, Sourced
from planner.specs.library import canonical, hardware_folder
from planner.specs.reader import Reader, read_file
from planner.specs.serving_stack import KernelRule, ServingSoftware, read_kernel_rules, read_serving
from planner.specs.sourced import read_optional, read_sourced

__all__ = ["Serves", "Stack", "list_stacks", "load_stack", "stack_for"]

DEFAULT = "default"
_WIDE_BITS = 16.0
# What a stack's code does in one of these ways; the first where its file says nothing.
_HABITS = {
    "weight_casts": ("each_micro_batch", "once", "alone"),
    "gradient_sums": ("reduce_scatter", "all_reduce"),
    "weight_shares": ("slices", "tensors"),
    "stage_outputs": ("dropped", "returned"),
    "tensor_scales": ("delayed", "current"),
    "updates": ("fused", "operators"),
    "training_metrics": ("none", "losses"),
    "stage_inputs": ("reused", "each_micro_batch"),
    "end_weights": ("resharded", "kept"),
    "shards": ("in_place", "apart"),
    "segments": ("fixed", "expandable"),
}
_USUAL = {habit: ways[0] for habit, ways in _HABITS.items()}


class Serves(NamedTuple):
    """Published runs that a stack describes.

    Attributes:
        framework: how the framework's name begins, in canonical form.
        versions: how its version may begin; empty: any version.
        since, until: first and last date, inclusive, as ``2022`` or ``2022-06``; empty: no bound.
        habits: of the stack that were others in these runs.
    """

    framework: str
    versions: tuple[str, ...] = ()
    since: str = ""
    until: str = ""
    habits: tuple[tuple[str, str], ...] = ()

    def matches(self, framework: str, version: str, date: str) -> bool:
        """Whether a run is one of these. What the run does not state cannot match a rule that asks for it.

        >>> Serves("megatron-lm", until="2022").matches("megatron-lm-+-deepspeed-3d", "", "2021")
        True
        >>> Serves("vllm", versions=("0.3",)).matches("vllm", "0.32.1", "")
        False
        """
        if not framework.startswith(self.framework):
            return False
        if self.versions and not any(_begins(version, start) for start in self.versions):
            return False
        if (self.since or self.until) and not date:
            return False
        # Dates are compared as far as both are given: 2022 lies within anything until 2022-06.
        early = self.since and date[: len(self.since)] < self.since[: len(date)]
        late = self.until and date[: len(self.until)] > self.until[: len(date)]
        return not (early or late)

    @property
    def narrowness(self) -> tuple[int, int, int]:
        """What a narrower rule has more of: letters of the framework's name, versions asked for, bounds on the date."""
        return len(self.framework), bool(self.versions), bool(self.since) + bool(self.until)


def _begins(version: str, start: str) -> bool:
    """Whether a version begins so, whole numbers compared."""
    return version.startswith(start) and not (start[-1].isdigit() and version[len(start) :][:1].isdigit())


@dataclass(frozen=True, slots=True)
class Stack:
    """The constants of one software stack, each with its kind and source.

    Attributes:
        matmul_slowdown: seconds of this stack's matrix products in a step, relative to those of the device's profile, which
            was measured on the best library's kernels alone.
        grouped_matmul_slowdown: the same of products of experts that are one kernel; None: they are products like others.
        narrow_matmul_slowdown: the same of products of fewer than 16 bits that are not grouped; None: as of wider ones.
        attention_slowdown: the same of fused attention kernels.
        stream_slowdown: the same of memory-bound kernels: what is not fused moves its operands again.
        collective_slowdown: the same of collectives, relative to the links' profile; all-to-alls, and what runs once per step
            with nothing beside it, have none.
        dispatch_s: host time to issue one kernel.
        waited_dispatches: what a kernel or collective costs beside its own time where the host waits for each before it issues
            the next, in dispatches of one kernel: the synchronisation, and the kernels that an item of the ledger stands for.
        overlap_slowdown: κ, how much compute and communication stretch while they share the device (1: not at all), by bytes.
        framework_bytes: context, libraries and workspaces of an idle process.
        communicator_bytes: buffers of one communicator, per group of more than one rank.
        fragmentation: what the caching allocator holds beyond what is live, as a fraction of activations and workspace.
        gradient_bucket_bytes: bytes of gradients that one reduction waits for; more than there are, where none hides.
        weight_bucket_bytes: the same of one gather of updated weights; None: as of gradients.
        copied_bucket_bytes: bytes of the bucket that reductions copy gradients to; None: ``gradient_bucket_bytes``.
        bucket_copies: copies of a bucket that reduction and gather hold, where weights have several replicas; None: they work in
            the gradients' and the weights' own buffers. None means nothing of the sort below as well.
        update_bytes_per_parameter: what the update of 16-bit gradients holds besides states, of the parameters that a rank
            updates: a copy in fp32, which accumulators in fp32 save, and flat buffers.
        kept_gradients: copies of the products' gradients that stay beside accumulators of another format.
        sequence_copies: copies of what sequence parallelism gathers or scatters, where tensors have their sequences in the second
            dimension and collectives cut along the first.
        stage_tensors: inputs and outputs of a pipeline stage that it holds per micro-batch in flight, besides what it saves.
        knobs: choices of this stack where a named plan leaves them open, e.g. its attention kernel.
        habits: what its code does in one way among several. ``weight_casts``, to fewer bits: in ``each_micro_batch``, ``once`` a
            step and kept beside the weights, or ``alone``, where those of 8 bits take the weights' place. ``gradient_sums`` of
            ZeRO 1 and 2: a ``reduce_scatter``, or an ``all_reduce`` of which a rank keeps its share. ``weight_shares`` that ranks
            update there: ``slices`` of one length, which an all-gather brings together, or whole ``tensors``, of which every
            owner broadcasts its own before the next forward begins. ``stage_outputs``, the last pipeline stage's: ``dropped``
            once their loss is known, or ``returned`` to the caller, all at the end of the step. ``stage_inputs`` are received in
            buffers that are ``reused``, or in one of ``each_micro_batch``. ``end_weights``, of embedding and head in stage 3:
            ``resharded`` after use like a layer's, or ``kept`` whole from forward to backward. ``shards`` that ZeRO 1 reduces
            gradients to, and what it gathers into: ``in_place``, or in memory ``apart``. ``segments`` that an allocator takes:
            ``fixed``, so that freed ones fit nothing larger, or ``expandable``. ``tensor_scales``, one per tensor of 8 bits:
            ``delayed``, known from the steps before, or ``current``, of a pass over the tensor itself. ``updates`` of the
            optimizer: one ``fused`` kernel, or tensor ``operators`` one after the other. ``training_metrics`` of every
            micro-batch: ``none``, or ``losses`` that are computed from the logits once more.
        serves: published runs that it describes.
        on: constants that differ on a generation of accelerators, e.g. where its kernels were written for an earlier one.
        serving: what a serving engine adds; None: the stack trains.
        kernels: libraries whose kernels a serving engine runs; without a rule, the device's own constants hold.
    """

    name: str
    matmul_slowdown: Sourced
    attention_slowdown: Sourced
    stream_slowdown: Sourced
    collective_slowdown: Sourced
    dispatch_s: Sourced
    waited_dispatches: Sourced
    overlap_slowdown: Sourced
    framework_bytes: Sourced
    communicator_bytes: Sourced
    fragmentation: Sourced
    gradient_bucket_bytes: Sourced
    grouped_matmul_slowdown: Sourced | None = None
    narrow_matmul_slowdown: Sourced | None = None
    weight_bucket_bytes: Sourced | None = None
    copied_bucket_bytes: Sourced | None = None
    bucket_copies: Sourced | None = None
    update_bytes_per_parameter: Sourced | None = None
    kept_gradients: Sourced | None = None
    sequence_copies: Sourced | None = None
    stage_tensors: Sourced | None = None
    notes: str = ""
    knobs: Mapping[str, str] = field(default_factory=dict)
    habits: Mapping[str, str] = field(default_factory=lambda: _USUAL)
    serves: tuple[Serves, ...] = ()
    on: Mapping[str, Mapping[str, Sourced]] = field(default_factory=dict)
    serving: ServingSoftware | None = None
    kernels: tuple[KernelRule, ...] = ()

    def kernel(self, operation: str, label: str, generation: str) -> str | None:
        """What kernel libraries call the kernel of an operation in a number format; None: no rule is for it."""
        return next((r.kernel for r in self.kernels if r.fits(operation, label, generation)), None)

    def product_constant(self, bits: float, *, grouped: bool = False) -> str:
        """Name of the slowdown that holds for matrix products of operands so many bits wide.

        >>> load_stack("megatron-bridge").product_constant(8)
        'narrow_matmul_slowdown'
        """
        if grouped and self.grouped_matmul_slowdown is not None:
            return "grouped_matmul_slowdown"
        narrow = self.narrow_matmul_slowdown is not None and bits < _WIDE_BITS
        return "narrow_matmul_slowdown" if narrow else "matmul_slowdown"

    def on_generation(self, generation: str) -> Stack:
        """The stack with the constants that it has on one generation of accelerators."""
        constants: Mapping[str, Any] = self.on.get(generation, {})
        serving = None if self.serving is None else self.serving.on_generation(generation)
        return replace(self, serving=serving, **constants)


def load_stack(name_or_path: str | Path = DEFAULT) -> Stack:
    """A shipped stack by name, or a TOML file.

    Raises:
        SpecError: no such stack, or the file is wrong.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = _folder() / f"{path.name}.toml"
        if not path.is_file():
            shipped = sorted(file.stem for file in _folder().glob("*.toml"))
            expected = f"a .toml file, or one of {', '.join(shipped)}"
            raise SpecError(
                Problem("stack", repr(str(name_or_path)), expected, did_you_mean(path.stem, shipped))
            )
    reader = Reader(_merged(path, ()), str(path))
    constants = [field.name for field in fields(Stack) if field.type == Sourced.__name__]
    values: dict[str, Any] = {name: read_sourced(reader, name) for name in constants}
    optional = [field.name for field in fields(Stack) if field.type == f"{Sourced.__name__} | None"]
    values |= {name: read_optional(reader, name) for name in optional}
    stack = Stack(
        name=reader.text("name"),
        notes=reader.text("notes", ""),
        knobs=_choices(reader.table("knobs", None)),
        habits=_USUAL | _choices(reader.table("habits", None), _HABITS),
        serves=tuple(_serves(row) for row in reader.tables("serves", [])),
        on=_on_generations(reader.table("on", None), [*constants, *optional]),
        serving=read_serving(reader.table("serving", None)),
        kernels=read_kernel_rules(reader.tables("kernels", [])),
        **values,
    )
    reader.finish()
    reader.raise_if_any()
    return stack


def stack_for(framework: str, framework_version: str = "", measured_date: str = "") -> Stack:
    """The shipped stack that describes runs of a framework; the default one where no rule fits.

    Of several rules that fit, the narrowest decides: the longest name, then one that asks for a version, then for dates.

    Args:
        framework: its name as printed; case and separators do not matter.
        framework_version: release or container; empty where it is not known.
        measured_date: ``2022``, ``2022-06`` or ``2022-06-30``; empty where it is not known.

    >>> stack_for("Megatron-LM", measured_date="2021").name
    'megatron-eager'
    """
    run = canonical(framework), framework_version.strip(), measured_date.strip()
    fitting = [(rule.narrowness, name, rule.habits) for name, rule in _rules() if rule.matches(*run)]
    if not fitting:
        return load_stack(DEFAULT)
    _, name, habits = max(fitting)
    stack = load_stack(name)
    return replace(stack, habits={**stack.habits, **dict(habits)})


def list_stacks() -> list[str]:
    """Names of the shipped stacks, sorted; no file is read."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


@cache
def _rules() -> tuple[tuple[str, Serves], ...]:
    """Every rule of the shipped stacks, with its stack."""
    return tuple((name, rule) for name in list_stacks() for rule in load_stack(name).serves)


def _folder() -> Path:
    return hardware_folder() / "stacks"


def _merged(path: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The file's table over that of the stack which it extends; runs that it serves are not handed on."""
    table = read_file(path)
    base = table.pop("extends", None)
    if base is None:
        return table
    known = list_stacks()
    if base not in known or base in seen:
        found = f"{base!r}" + (" extends this one in turn" if base in seen else "")
        raise SpecError(Problem(f"{path}: extends", found, f"one of {', '.join(known)}"))
    under = _merged(_folder() / f"{base}.toml", (*seen, path.stem))
    under.pop("serves", None)
    merged = _over(under, table)
    for choices in ("knobs", "habits"):
        if isinstance(table.get(choices), dict):
            merged[choices] = {**under.get(choices, {}), **table[choices]}
    if isinstance(table.get("serving"), dict):
        merged["serving"] = _over(under.get("serving", {}), table["serving"])
    return merged


def _over(under: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Constants over those of a stack below: what is said of all generations goes before what that one says of one."""
    merged = {**under, **table}
    by_generation = {
        generation: {name: value for name, value in constants.items() if name not in table}
        for generation, constants in under.get("on", {}).items()
    }
    if isinstance(table.get("on"), dict):
        for generation, constants in table["on"].items():
            by_generation[generation] = {**by_generation.get(generation, {}), **constants}
    if by_generation:
        merged["on"] = by_generation
    return merged


def _choices(reader: Reader | None, known: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """Values by name, of those ``known``; without these (knobs, by slot) they are checked where a plan is made."""
    if reader is None:
        return {}
    found = {}
    for name in reader.keys() if known is None else known:
        entry: Reader | None = reader.table(name, None)
        if entry is not None:
            found[name] = entry.text("value", choices=None if known is None else known[name])
            entry.text("kind", choices=KINDS)
            entry.text("source")
            entry.finish()
    reader.finish()
    return found


def _on_generations(reader: Reader | None, constants: list[str]) -> dict[str, dict[str, Sourced]]:
    """Constants by generation of accelerators."""
    found: dict[str, dict[str, Sourced]] = {}
    for generation in () if reader is None else reader.keys():
        assert reader is not None
        entry: Reader = reader.table(generation)
        present = set(entry.keys())
        found[generation] = {name: read_sourced(entry, name) for name in constants if name in present}
        entry.finish()
    return found


def _serves(reader: Reader) -> Serves:
    rule = Serves(
        canonical(reader.text("framework")),
        reader.texts("versions", ()),
        reader.text("since", ""),
        reader.text("until", ""),
        tuple(_choices(reader.table("habits", None), _HABITS).items()),
    )
    reader.finish()
    return rule
