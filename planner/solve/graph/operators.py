"""Operators as a graph: kernels with the tensors that they read, keep and hold, of a model's layers or of a file.

A model's graph is its ledger after the passes that choose formats and kernels, cut into operators; which reads which is
in :mod:`planner.operators.dataflow`. Sizes stay expressions over axes, so that an operator is priced under any sharding
by scaling the axes, in the one engine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.costs.optimizer import optimizer_state_bytes
from planner.costs.precision import dtype_bytes
from planner.errors import Problem, SpecError
from planner.ledger import AttentionCore, Axes, Item, Kernel, Ledger, Matmul, Resident, Stream, role, times
from planner.mesh import Mesh
from planner.operators.baseline import EMBEDDING, HEAD, block_order
from planner.operators.dataflow import INPUT, knows, reads
from planner.solve.passes import run_passes
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.stack import Stack
from planner.specs.workload import TrainWorkload
from planner.technique import Context

__all__ = ["DIMENSIONS", "Operator", "OperatorGraph", "Read", "model_graph", "names_in"]

DIMENSIONS: Mapping[str, str] = {
    "batch": "batch", "seq": "seq", "residual_seq": "seq", "logit_seq": "seq", "hidden": "hidden", "heads": "heads",
    "kv_heads": "heads", "ffn": "ffn", "expert_ffn": "ffn", "shared_ffn": "ffn", "experts": "experts", "vocab": "vocab",
}  # fmt: skip
"""Roles of axes that can be split, by the dimension that they belong to. Keys' tokens are not among them: a rank that has some of
the queries needs all of the keys."""

_FIRST_SHARDING = "gradient_accumulation"  # the slots before this one decide formats and kernels
_AXIS = re.compile(r"[A-Za-z_]\w*(?:@[\w.]+)?")


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A tensor that an operator reads: ``size`` elements (an expression) of ``bytes_per_element`` from another operator."""

    source: int
    size: str
    bytes_per_element: float


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One operator.

    Attributes:
        name: unique in the graph.
        kernels: its forward, backward and weight-gradient kernels.
        reads: tensors that other operators made.
        output: elements of what it makes, an expression; ``bytes_per_element`` of each.
        weight: elements of its weights, an expression; empty without.
        held: what is kept for its backward.
        whole: dimensions that cannot be split here: a norm's width.
        sums: dimensions that are summed over in small collectives of fp32 rows, and how often: a cross-entropy's vocabulary.
    """

    name: str
    kernels: tuple[Item, ...]
    reads: tuple[Read, ...]
    output: str
    bytes_per_element: float
    weight: str = ""
    held: tuple[Resident, ...] = ()
    whole: frozenset[str] = frozenset()
    sums: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class OperatorGraph:
    """Operators in an order in which they can run, the axes of their sizes, and what weights cost in memory.

    Attributes:
        dimensions: of each role of an axis that can be split, its dimension.
        padded: dimensions that are padded to any degree.
        weight_bytes: per parameter, in use.
        gradient_bytes: per parameter.
        state_bytes: per parameter, of the optimizer, master weights included.
    """

    operators: tuple[Operator, ...]
    axes: Axes
    dimensions: Mapping[str, str]
    padded: frozenset[str]
    weight_bytes: float
    gradient_bytes: float
    state_bytes: float

    def dimensions_of(self, *sizes: str) -> set[str]:
        """Dimensions that can be split among the axes of some sizes."""
        return {
            self.dimensions[r] for size in sizes for r in map(role, names_in(size)) if r in self.dimensions
        }


def names_in(size: str) -> list[str]:
    """Axes that a size names.

    >>> names_in("2*batch*ffn@moe.cross + hidden/kv")
    ['batch', 'ffn@moe.cross', 'hidden', 'kv']
    """
    return _AXIS.findall(size)


def model_graph(
    model: Model, cluster: Cluster, stack: Stack, workload: TrainWorkload, *, layers: int | None = None,
    knobs: Mapping[str, str] | None = None,
) -> OperatorGraph:  # fmt: skip
    """The graph of a training step's forward and backward of one micro-batch; modules that predict further tokens are left out.

    Args:
        model: whose layers.
        cluster: its device decides which formats there are.
        stack: the software.
        workload: ``global_batch_size`` sequences are the micro-batch, whole before it is split.
        layers: how many of the model's layers, from the first; None: all. With embedding and head.
        knobs: choices of formats and kernels other than the defaults.

    Raises:
        SpecError: the model has operators whose data flow is not known (state-space mixers, cross-attention, indexers, encoders),
            or fewer layers.
    """
    order = block_order(model)
    if layers is not None and not 1 <= layers <= len(order):
        raise SpecError(
            Problem(
                "--layers", str(layers), f"a whole number from 1 to {len(order)}, the layers of {model.name}"
            )
        )
    if "adaptation" in (knobs or {}):
        raise SpecError(Problem("--fix adaptation", "does not apply here", "a model that is trained in full"))
    one = np.ones(1)
    mesh, batch = Mesh(one, one, one, one, one, one), one * workload.global_batch_size
    ledger, ctx, allowed, reason = run_passes(
        replace(model, mtp_modules=0), cluster, stack, workload, mesh, batch, _FIRST_SHARDING, knobs or {}
    )
    if not allowed.all():
        raise SpecError(Problem("--fix", reason, "choices that the job allows"))
    wanted = order[:layers]
    operators: list[Operator] = []
    before: int | None = None
    for index, block in enumerate([EMBEDDING, *wanted, HEAD]):
        prefix = block if block in (EMBEDDING, HEAD) else f"layer{index - 1}"
        operators += _layer(ledger, ctx, block, prefix, len(operators), before)
        before = len(operators) - 1
    name = workload.optimizer
    master = None if ctx.format.master else 0.0  # None: as wide as the optimizer keeps them
    return OperatorGraph(
        tuple(operators), ledger.axes, DIMENSIONS, frozenset({"vocab"}), dtype_bytes(ctx.format.activation),
        dtype_bytes(ctx.gradient_dtype), float(optimizer_state_bytes(name, master_bytes=master)),
    )  # fmt: skip


# -- layers --------------------------------------------------------------------------------------------------


def _layer(
    ledger: Ledger, ctx: Context, block: str, prefix: str, first: int, before: int | None
) -> list[Operator]:  # fmt: skip
    """The operators of one layer, numbered from ``first``; its input is made by operator ``before``."""
    kernels: dict[str, list[Item]] = {}
    for item in ledger.items:
        if (
            item.block == block
            and isinstance(item, Kernel)
            and item.phase in ("forward", "backward", "weight")
        ):
            kernels.setdefault(_operator_of(item.what), []).append(item)
    _check_known(kernels, block)
    sources = {name: reads(name, kernels) for name in kernels}
    ordered = _in_order(sources)
    number = {name: first + index for index, name in enumerate(ordered)}
    forward = {
        name: next(i for i in items if i.phase == "forward" and i.what == name)
        for name, items in kernels.items()
    }
    sizes = {name: _output(forward[name], name, kernels) for name in kernels}
    held = _held(ledger, block, kernels)
    width = dtype_bytes(ctx.format.activation)
    values = next((r.size for r in ledger.of(Resident, block=block) if r.what == "attention.v"), "")
    keys = next((r.size for r in ledger.of(Resident, block=block) if r.what == "attention.k"), "")
    found = []
    for name in ordered:
        item = forward[name]
        inputs = []
        for source in sources[name]:
            if source == INPUT:
                if before is not None:
                    inputs.append(Read(before, "batch*residual_seq*hidden", width))
                continue
            size = _read_size(name, source, sources[name], item, sizes[source], values, keys)
            inputs.append(Read(number[source], size, _width(forward[source], width)))
        found.append(
            Operator(
                name if name.startswith(prefix) else f"{prefix}.{name}", tuple(kernels[name]), tuple(inputs), sizes[name],
                _width(item, width), _weight(name, kernels[name]), tuple(held.get(name, ())), _whole(item, name),
                {"vocab": 3} if name == "head.cross_entropy" else None,
            )
        )  # fmt: skip
    return found


def _operator_of(kernel: str) -> str:
    """The operator that a kernel belongs to: its own, or the one whose operands it casts (``mlp.fc1.quantise``)."""
    operator = kernel.rpartition(".")[0]
    return operator if not knows(kernel) and knows(operator) else kernel


def _check_known(kernels: Collection[str], block: str) -> None:
    strange = sorted(name for name in kernels if not knows(name))
    if strange:
        raise SpecError(
            Problem(
                f"block {block!r}", f"the data flow of {', '.join(strange[:3])} is not known",
                "layers of self-attention, dense networks and mixtures of experts",
                "Give the graph as a JSON file.",
            )
        )  # fmt: skip


def _in_order(sources: Mapping[str, Sequence[str]]) -> list[str]:
    """Names so that each stands behind what it reads, otherwise in the order in which they were emitted."""
    done: dict[str, None] = {}
    while len(done) < len(sources):
        ready = next(
            n for n, needs in sources.items() if n not in done and all(s in done or s == INPUT for s in needs)
        )
        done[ready] = None
    return list(done)


def _output(item: Item, name: str, layer: Collection[str]) -> str:
    """Elements of what a forward kernel makes."""
    if isinstance(item, Matmul):
        return times(times(item.n, item.m), item.groups) if item.groups != "1" else times(item.n, item.m)
    if isinstance(item, AttentionCore):
        return f"{item.batch}*{item.q}*{item.heads}*{item.v_dim}"
    assert isinstance(item, Stream)
    return (
        re.sub(r"\*top_k@[\w.]+", "", item.size) if name == "moe.unpermute" else item.size
    )  # it sums over the experts


def _read_size(
    name: str, source: str, sources: Sequence[str], item: Item, made: str, values: str, keys: str
) -> str:
    """Elements that a kernel reads of what another one made: a part where queries, keys and values are one product."""
    if len(sources) > 1 and name in ("attention.core", "attention.context") and source == sources[-1]:
        return values
    if source == "attention.kv_up":
        return keys
    if isinstance(item, Matmul) and item.grouped:  # what was tokens is rows of experts from here on
        return times(times(item.k, item.m), item.groups)
    if name in ("attention.rope", "attention.qk_norm") and len(sources) == 1:
        assert isinstance(item, Stream)
        return item.size
    if name == "attention.gate" and source != sources[0]:
        assert isinstance(item, Stream)
        return item.size
    return made


def _width(item: Item, activation_bytes: float) -> float:
    """Bytes per element of a kernel's output."""
    if isinstance(item, Matmul) and isinstance(item.out_bytes, float):
        return item.out_bytes
    return activation_bytes


def _weight(name: str, kernels: Sequence[Item]) -> str:
    """Elements of the matrix that an operator multiplies with, or looks up in."""
    if name == "embedding":
        return "vocab*hidden"
    forward = next(i for i in kernels if i.phase == "forward" and i.what == name)
    if isinstance(forward, Matmul) and any(i.phase == "weight" for i in kernels):
        size = times(forward.n, forward.k) if forward.n != "1" else forward.k
        return times(size, forward.groups) if forward.groups != "1" else size
    return ""


def _whole(item: Item, name: str) -> frozenset[str]:
    """Dimensions that a kernel cannot split without sums of its own."""
    if "norm" in item.tags or name.endswith("_norm"):
        return frozenset({"hidden", "heads"} if "all_heads" in item.tags else {"hidden"})
    if isinstance(item, Matmul):  # one name on both sides: which of them is split could not be told
        return frozenset(DIMENSIONS.get(role(a), "") for a in names_in(item.n)) & frozenset(
            DIMENSIONS.get(role(a), "") for a in names_in(item.k)
        )
    return frozenset()


# -- tensors that are kept ---------------------------------------------------------------------------------------------------

_KEPT_FOR = {
    "attention.q": "attention.core|attention.scores", "attention.k": "attention.core|attention.scores",
    "attention.v": "attention.core|attention.context", "attention.log_sum_exp": "attention.core",
    "attention.core_output": "attention.gate|attention.output", "attention.gated_output": "attention.output",
    "attention.probabilities": "attention.softmax", "attention.probabilities_mask": "attention.softmax",
    "attention.probabilities_dropped": "attention.context", "attention.qkv_input": "attention.qkv|attention.q|attention.q_down",
    "attention.q_latent": "attention.q_up", "attention.kv_latent": "attention.kv_up", "moe.input": "moe.router",
    "moe.combined": "moe.latent_up", "shared_expert.output": "shared_expert.scale", "head.input": "head.logits",
}  # fmt: skip


def _held(ledger: Ledger, block: str, layer: Collection[str]) -> dict[str, list[Resident]]:
    """Tensors that are kept from forward to backward, and logits, by the operator whose backward reads them."""
    found: dict[str, list[Resident]] = {}
    for item in ledger.of(Resident, block=block):
        if item.lifetime != "micro_batch" and item.pool != "logits":
            continue
        stem = re.sub(r"[._](input|mask|dropout_mask)$", "", item.what)
        names = (
            "head.cross_entropy"
            if item.pool == "logits"
            else _KEPT_FOR.get(item.what, f"{stem}|{stem}.add|{stem}.act")
        )
        beginning = max((name for name in layer if item.what.startswith(f"{name}.")), key=len, default=None)
        owner = next((name for name in names.split("|") if name in layer), beginning)
        if owner is None:
            what = f"the operator that needs {item.what} is not known"
            raise SpecError(
                Problem(
                    f"block {block!r}", what, "other choices of kernels", "Give the graph as a JSON file."
                )
            )
        found.setdefault(owner, []).append(item)
    return found
