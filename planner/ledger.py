"""The ledger: what a device computes, moves and holds, as tagged items over named axes.

A ledger says *what* is done; nothing in it is a second. Sizes are expressions over named axes (``"batch*seq*hidden"``),
and the axes are arrays over candidate rows: sharding an axis re-sizes every item that mentions it. Techniques edit
ledgers with the verbs of :class:`Ledger`; the engine alone turns items into seconds and peaks.

Axis names may be qualified by the block they belong to (``ffn@decoder``); the part before ``@`` is the axis's *role*.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BATCH_ROLES",
    "PART",
    "AttentionCore",
    "Axes",
    "Collective",
    "Group",
    "Item",
    "Kernel",
    "Ledger",
    "Matmul",
    "Phase",
    "Pool",
    "Resident",
    "Stream",
    "Transfer",
    "at",
    "role",
    "times",
]

Array: TypeAlias = NDArray[Any]  # float64, over rows
Index: TypeAlias = NDArray[np.intp]
# Names, checked where they are used: the engine knows these phases and pools.
Phase: TypeAlias = str  # forward | backward | weight | recompute | step
Pool: TypeAlias = str  # parameters | gradients | optimizer | activations | logits | workspace | gathered | buffers | kv_cache
Lifetime: TypeAlias = str  # always | micro_batch | recomputed | weight_input | block | apart | freed | step
CollectiveKind: TypeAlias = str  # all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|point_to_point


BATCH_ROLES = frozenset(
    {
        "seq", "residual_seq", "kv_seq", "logit_seq", "decodes", "prefill_tokens", "decode_keys", "prefill_keys",
        "prefill_visible", "context_keys", "index_keys", "busy_experts", "routed_tokens",
    }
)  # fmt: skip
"""Roles of the axes of a serving ledger whose sizes an iteration's batch decides."""

PART = "part_"
"""Before such a role: the same size for one of the batch's ``micro_batches``."""


def at(values: Array, index: Index) -> Array:
    """Values of some rows; what is the same on all rows stays one value."""
    return values.take(index, axis=0) if values.size > 1 else values


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Ranks that communicate: ``size`` ranks, ``stride`` apart in the mesh order (innermost first); arrays over rows.

    ``key`` is the group's own, and the same on any part of its rows; ``whole`` is the group that this one is a part of, and its
    rows there.
    """

    name: str
    size: Array
    stride: Array
    key: object = field(default_factory=object, repr=False)
    whole: tuple[Group, Index] | None = field(default=None, repr=False)

    def take(self, index: Index) -> Group:
        """The group on the rows at ``index``."""
        whole, rows = (self, index) if self.whole is None else (self.whole[0], self.whole[1][index])
        return Group(self.name, at(self.size, index), at(self.stride, index), self.key, (whole, rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """What every item carries.

    Attributes:
        what: dotted name, e.g. ``attention.qkv``.
        block: the block kind it belongs to; amounts are per block instance.
        phase: when it happens. ``backward`` is the input gradient, ``weight`` the weight gradient; ``step`` items
            happen once per optimizer step, all others once per micro-batch.
        tags: what passes select by; also names the recompute region that produces it.
        by: key of the technique that put it here.
        source: where its formula comes from.
        window: items of one window run side by side (one track per ``track``); the empty window is the block's own
            serial order, which everything on another track of the empty window runs beside. A window of the step is named
            after the step's track that it lies on (main, gradients, weights).
        track: the stream inside the window.
        waited: the host waits for each kernel or call before it issues the next.
    """

    what: str
    block: str
    phase: Phase = "forward"
    tags: frozenset[str] = frozenset()
    by: str = "model"
    source: str = ""
    window: str = ""
    track: str = "main"
    waited: bool = False

    def but(self, **changes: Any) -> Self:
        """The item with other values of some fields: ``dataclasses.replace`` in a tenth of its time.

        Passes copy items by the thousand. Items have no rule of their own that a copy would have to be held against.
        """
        assert changes.keys() <= self.__dict__.keys(), f"no fields of {type(self).__name__}: {[*changes]}"
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **changes)
        return other


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel(Item):
    """Device work; ``launches`` kernels per instance, which the host issues unless they are ``captured`` in a graph."""

    dtype: str = "fp32"
    launches: float = 1.0
    captured: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Matmul(Kernel):
    """``groups`` products of (m, k) by (k, n): 2·groups·m·n·k FLOP. ``grouped``: of experts, see ``apart``.

    ``single``: its groups' sizes stay on the device, so that it is one kernel, and not one that the host issues per group.
    """

    m: str
    n: str
    k: str
    groups: str = "1"
    grouped: bool = False
    single: bool = False
    out_bytes: float | str | None = (
        None  # bytes per output element, or what they are on each row; None follows dtype
    )
    format: str = ""  # of inputs and weights where they are not of ``dtype``: a key of KERNEL_FORMATS

    @property
    def apart(self) -> bool:
        """Whether each group is a product of its own, as Transformer Engine issues experts; an engine's are one kernel."""
        return self.grouped and not (self.format or self.single)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCore(Kernel):
    """A fused attention kernel: softmax(QKᵀ)V without the score matrix in memory.

    FLOP = 2·batch·heads·q·kv·(qk_dim + v_dim)·``visible``·``passes``: ``visible`` is the fraction of the score matrix
    that the mask leaves and the kernel does not skip, ``passes`` 1 forward and 2.5 backward (5 products for 2). ``stored`` is the
    dtype of the cache that it reads (empty: keys and values of ``dtype``); ``latent``: values are the first part of the keys, and
    read with them; ``decode``: it is the generation phase's kernel.
    """

    batch: str
    heads: str
    kv_heads: str
    q: str
    kv: str
    qk_dim: str
    v_dim: str
    visible: str = "1"
    passes: float = 1.0
    stored: str = ""
    latent: bool = False
    decode: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream(Kernel):
    """A memory-bound kernel that moves ``bytes_per_element`` for each of ``size`` elements.

    ``flop_per_element`` are vector operations beside the traffic, ``product_flop_per_element`` small 16-bit matrix products that
    no traffic hides. ``calls`` is how many kernels the host issues for it, where those are small and many (None: ``launches``).
    """

    size: str
    bytes_per_element: float
    flop_per_element: float = 0.0
    product_flop_per_element: float = 0.0
    calls: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Collective(Item):
    """``kind`` over ``group`` on ``size`` elements of ``dtype``.

    ``size`` is the full tensor for all-reduce, all-gather, reduce-scatter and broadcast, and what one rank holds for all-to-all
    and point-to-point. ``messages`` is into how many calls it is cut. ``custom``: kernels of the serving engine's own compete
    with the library's while the message is small. ``ahead_bytes``: pieces of so many bytes in which traffic of the step lets it
    go first on a link of both; 0: they share it. ``kernel`` names one of ``hardware_profiles/exchange_libraries.toml`` that
    exchanges tokens in the library's place on ``units`` multiprocessors (0: as it takes); ``size`` has a token once for each of
    its ``choices``, which it need not send, and which are neighbours among ``neighbours_of`` experts (0: they lie anywhere).
    ``share``: of one call, whose rest is another item.
    """

    kind: CollectiveKind
    group: Group
    size: str
    dtype: str = "fp32"
    messages: str = "1"
    custom: bool = False
    ahead_bytes: float = 0.0
    kernel: str = ""
    choices: float = 1.0
    neighbours_of: float = 0.0
    units: float = 0.0
    share: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer(Item):
    """``size`` elements between the device and a slower ``tier``; host arithmetic is a transfer over host memory."""

    size: str
    bytes_per_element: float
    tier: Literal["host_link", "host_memory", "cxl", "nvme"] = "host_link"


@dataclass(frozen=True, kw_only=True, eq=False)
class Resident(Item):
    """Bytes held: ``size`` elements of ``bytes_per_element``.

    ``lifetime``: ``always``; ``micro_batch`` from a micro-batch's forward to its backward (times the micro-batches in
    flight); ``recomputed`` the same where its block is not recomputed, and only while the block is at work where it
    is; ``weight_input`` from a micro-batch's backward to its weight gradient, where a schedule splits them; ``block`` while
    one block is at work (the peak takes the largest); ``apart`` the share of that which an allocator lends to no other
    stream; ``freed`` while a block is at work, but before it holds most; ``step`` in the optimizer step only.
    """

    size: str
    bytes_per_element: float
    pool: Pool
    lifetime: Lifetime
    tier: Literal["device", "host", "cxl", "nvme"] = "device"  # where it lives
    dtype: str = ""


ItemT = TypeVar("ItemT", bound=Item)


class Axes:
    """Sizes of named axes, arrays over rows; evaluates and remembers expressions over them.

    >>> axes = Axes({"batch": 2.0, "seq": np.array([8.0, 4.0])})
    >>> axes["3*batch*seq + seq/2"]
    array([52., 26.])
    """

    __slots__ = ("_memo", "_sizes", "prices", "sums")

    def __init__(self, sizes: Mapping[str, Array | float]) -> None:
        self._sizes: dict[str, Array] = {
            name: np.asarray(size, dtype=np.float64) for name, size in sizes.items()
        }
        self._memo: dict[str, Array] = {}
        # What the engine has priced on these axes: by key, which begins with all expressions that the price depends on;
        # and the sums of whole phases, which begin with all of theirs.
        self.prices: dict[Any, Array] = {}
        self.sums: dict[Any, tuple[str, Any]] = {}

    def __getitem__(self, expression: str) -> Array:
        value = self._memo.get(expression)
        if value is None:
            value = self._memo[expression] = self._evaluate(expression)
        return value

    def __contains__(self, axis: str) -> bool:
        return axis in self._sizes

    def names(self) -> list[str]:
        """All axis names."""
        return list(self._sizes)

    def with_sizes(self, sizes: Mapping[str, Array | float]) -> Axes:
        """A copy with some axes set; what is known of expressions without them stays known."""
        axes = Axes({**self._sizes, **sizes})
        changed = [name for name in sizes if name in self._sizes]
        if not changed:
            axes._memo, axes.prices, axes.sums = self._memo.copy(), self.prices.copy(), self.sums.copy()
            return axes

        found = re.compile("|".join(map(re.escape, changed))).search
        axes._memo = {text: value for text, value in self._memo.items() if not found(text)}
        axes.prices = {key: value for key, value in self.prices.items() if not found(key[0])}
        axes.sums = {key: value for key, value in self.sums.items() if not found(value[0])}
        return axes

    def extends(self, other: Axes) -> bool:
        """Whether the other's axes are all among these, as they are."""
        return all(self._sizes.get(name) is size for name, size in other._sizes.items())

    def take(self, index: Index) -> Axes:
        """The axes on the rows at ``index``, with what was priced on all of them."""
        axes = Axes({name: at(size, index) for name, size in self._sizes.items()})
        axes.recall(self, index)
        return axes

    def recall(self, other: Axes, index: Index) -> None:
        """Takes over what was priced on other axes, which are these on the rows at ``index``."""
        self.prices |= {key: at(np.asarray(price), index) for key, price in other.prices.items()}

    def scaled(self, factors: Mapping[str, Array | float]) -> Axes:
        """A copy in which every axis of the given roles is multiplied by its factor."""
        return Axes(
            {n: size * factors[role(n)] if role(n) in factors else size for n, size in self._sizes.items()}
        )

    def _evaluate(self, expression: str) -> Array:
        total: Any = None
        for coefficient, above, below in _terms(expression):
            value: Any = None
            for axis in above:
                value = self._sizes[axis] if value is None else value * self._sizes[axis]
            value = (
                np.float64(coefficient)
                if value is None
                else value
                if coefficient == 1.0
                else value * coefficient
            )
            for axis in below:
                value = value / self._sizes[axis]
            total = value if total is None else total + value
        assert total is not None
        return np.asarray(total)


def times(size: str, factor: str) -> str:
    """Every term of a sum, times (or, with a leading slash, divided by) a factor.

    >>> times("a*b + c", "d"), times("a + b", "/e")
    ('a*b*d + c*d', 'a/e + b/e')
    """
    joint = "" if factor.startswith("/") else "*"
    terms = []
    for term in size.split(" + "):
        above, slash, below = term.partition("/")
        terms.append(f"{term}{factor}" if not joint else f"{above}*{factor}{slash}{below}")
    return " + ".join(terms)


def role(axis: str) -> str:
    """The axis's role, without its block: ``ffn`` of ``ffn@decoder``."""
    return axis.partition("@")[0]


@lru_cache(maxsize=8192)
def _terms(expression: str) -> tuple[tuple[float, tuple[str, ...], tuple[str, ...]], ...]:
    """``"2*a*b/c + d"`` as ((2.0, (a, b), (c,)), (1.0, (d,), ()))."""
    terms = []
    for term in expression.split(" + "):
        coefficient = 1.0
        above: list[str] = []
        below: list[str] = []
        for index, part in enumerate(term.split("/")):
            for factor in part.split("*"):
                name = factor.strip()
                if name[0].isdigit():
                    coefficient = coefficient * float(name) if index == 0 else coefficient / float(name)
                else:
                    (above if index == 0 else below).append(name)
        terms.append((coefficient, tuple(above), tuple(below)))
    return tuple(terms)


@dataclass(frozen=True, slots=True, eq=False)
class Ledger:
    """Items over axes. Every verb returns a new ledger; items that a verb does not touch are shared.

    ``chunks`` says into how many pieces the work of a named window is cut (absent: endlessly many, so that tracks
    overlap fully).
    """

    axes: Axes
    items: tuple[Item, ...]
    chunks: Mapping[str, Array | float]

    def take(self, index: Index, regroup: Callable[[Group, Index], Group]) -> Ledger:
        """The ledger on the rows at ``index``; ``regroup`` says which group takes a group's place."""
        items = [
            item.but(group=regroup(item.group, index)) if isinstance(item, Collective) else item
            for item in self.items
        ]
        chunks = {window: at(np.asarray(n), index) for window, n in self.chunks.items()}
        return Ledger(self.axes.take(index), tuple(items), chunks)

    def shard(self, **degrees: Array | float) -> Ledger:
        """Divides the axes of the given roles by a degree: every item that names them shrinks."""
        return self.scale(**{r: 1.0 / np.asarray(d) for r, d in degrees.items()})

    def scale(self, **factors: Array | float) -> Ledger:
        """Multiplies the axes of the given roles."""
        return Ledger(self.axes.scaled(factors), self.items, self.chunks)

    def set_axes(self, **sizes: Array | float) -> Ledger:
        """Sets or adds axes."""
        return Ledger(self.axes.with_sizes(sizes), self.items, self.chunks)

    def add(self, items: Iterable[Item]) -> Ledger:
        """Adds items."""
        return Ledger(self.axes, (*self.items, *items), self.chunks)

    def drop(self, where: Callable[[Item], bool]) -> Ledger:
        """Removes the items that ``where`` selects."""
        return Ledger(self.axes, tuple(item for item in self.items if not where(item)), self.chunks)

    def edit(self, kind: type[ItemT], change: Callable[[ItemT], Item | None]) -> Ledger:
        """Replaces each item of a kind by what ``change`` returns for it; None leaves it as it is."""
        items = [(change(item) or item) if isinstance(item, kind) else item for item in self.items]
        return Ledger(self.axes, tuple(items), self.chunks)

    def copy_to_phase(self, where: Callable[[Item], bool], phase: Phase, by: str) -> Ledger:
        """Copies kernels, collectives and transfers to another phase (recompute), windows and tracks included."""
        copies = [
            item.but(phase=phase, by=by, window=item.window and f"{item.window}.{phase}")
            for item in self.items
            if not isinstance(item, Resident) and where(item)
        ]
        chunks = dict(self.chunks)
        for item in copies:
            original = item.window.removesuffix(f".{phase}")
            if item.window and original in chunks:
                chunks[item.window] = chunks[original]
        return Ledger(self.axes, (*self.items, *copies), chunks)

    def cut(self, window: str, chunks: Array | float) -> Ledger:
        """Says into how many chunks a window's work is cut."""
        return Ledger(self.axes, self.items, {**self.chunks, window: chunks})

    def of(self, kind: type[ItemT], **fields: Any) -> list[ItemT]:
        """The items of a kind whose fields have the given values."""
        wanted = fields.items()
        return [item for item in self.items if isinstance(item, kind) and wanted <= item.__dict__.items()]
