"""Operator-level recomputation: keep attention and every second product, run everything else in a block again.

What it does: inside a recomputed block, the outputs of attention, of every second linear layer (counted from the block's
    first, queries, keys and values being three, gate and up two) and of reduce-scatters are kept; all other operators run
    again in the backward.
Saves: of a Llama block without recomputation, keys, norms' outputs, one half of the network's width and all of its activation.
Costs: norms, activations and half of the products once more; the outputs of kept row-parallel products and of reduce-scatters,
    which nothing else keeps. Eager operators keep them all; a compiler (``elementwise_kernel = fused``), where a recomputation
    stops early, none that no backward reads: that of the product which ends a block is the next block's input. Casts to narrow
    formats run again, like all else.
Assumes: linear layers without biases (products with one are other operators, which are not kept); dense blocks of attention and
    one network.
Source: torchtitan ``torchtitan/distributed/activation_checkpoint.py`` (selective, ``op``); PyTorch
    ``create_selective_checkpoint_contexts``; what a compiled block keeps: saved tensors of PyTorch 2.13's AOTAutograd.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Item, Ledger, Matmul, Resident, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.recompute.again import UNREAD, recompute

_KEY = "selective_op"


def valid(ctx: Context) -> Iterable[Check]:
    """Blocks whose products can be counted."""
    for block in ctx.model.blocks.values():
        attention = (block.attention, block.cross_attention)
        plain = not any(spec is not None and (spec.latent or spec.index_heads) for spec in attention)
        dense = block.moe is None and block.ssm is None
        yield Check("operator-level recomputation is for plain attention and dense networks", plain and dense)
        biased = any(spec is not None and (spec.qkv_bias or spec.out_bias) for spec in attention)
        biased |= block.mlp is not None and block.mlp.bias
        yield Check("operator-level recomputation counts products without biases", not biased)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps the results of some operators, copies the others to the backward."""
    products = dict(_products(ledger))
    kept = {
        (block, output) for (block, _), parts in products.items() for output, _, is_kept in parts if is_kept
    }

    def inside(item: Item) -> bool:
        if isinstance(item, Resident):
            return True
        scattered = isinstance(item, Collective) and item.kind == "reduce_scatter"
        whole = isinstance(item, Matmul) and all(
            part[2] for part in products.get((item.block, item.what), [_RUNS])
        )
        return not (scattered or whole or "core_attn" in item.tags)

    def keeps(item: Resident) -> bool:
        return "input" in item.tags or "core_attn" in item.tags or (item.block, item.what) in kept

    def rest(item: Matmul) -> Item | None:
        parts = products.get((item.block, item.what), [])
        if item.phase != "recompute" or not any(part[2] for part in parts):
            return None
        return item.but(n=" + ".join(width for _, width, is_kept in parts if not is_kept))

    width = dtype_bytes(ctx.format.activation)
    compiled = ctx.knobs["elementwise_kernel"] == "fused"
    results = [_result(item, width) for item in _kept_results(ledger, products, compiled)]
    ledger = _without_casts(_halves(ledger, products), width).set_axes(scatter_parts=ctx.mesh.tp)
    return recompute(ledger, inside, keeps, _KEY).edit(Matmul, rest).add(results)


_RUNS = ("", "", False)
_Part = tuple[str, str, bool]  # the resident with its output, its width, whether it is kept


def _products(ledger: Ledger) -> Iterator[tuple[tuple[str, str], list[_Part]]]:
    """Every block's linear layers in order, by the product that the ledger has for them."""
    counts: dict[str, int] = {}
    for item in ledger.of(Matmul, phase="forward"):
        if (
            item.block in ("embedding", "head")
            or "core_attn" in item.tags
            or not item.tags & {"column", "row"}
        ):
            continue
        parts = []
        for output, width in _layers(item):
            counts[item.block] = counts.get(item.block, 0) + 1
            parts.append((output, width, counts[item.block] % 2 == 1))
        yield (item.block, item.what), parts


def _layers(item: Matmul) -> list[tuple[str, str]]:
    """The linear layers that one product stands for: what has their output, and their width."""
    region, _, name = item.what.rpartition(".")
    if name in ("qkv", "kv", "q"):
        return [
            (f"{region}.{letter}", width) for letter, width in zip(name, item.n.split(" + "), strict=True)
        ]
    if name == "fc1" and item.n.startswith("2*"):
        return [(f"{region}.act_input.{half}", item.n.removeprefix("2*")) for half in ("gate", "up")]
    return [(f"{region}.act_input" if name == "fc1" else f"{item.what}.result", item.n)]


def _halves(ledger: Ledger, products: dict[tuple[str, str], list[_Part]]) -> Ledger:
    """The input of a gated activation as two tensors, of which one is kept."""
    halves: list[Item] = []
    split = {
        (block, parts[0][0].removesuffix(".gate"))
        for (block, _), parts in products.items()
        if len(parts) == 2
    }

    def first(item: Resident) -> Item | None:
        if (item.block, item.what) not in split:
            return None
        size = item.size.removeprefix("2*")
        halves.append(item.but(what=f"{item.what}.up", size=size, by=_KEY))
        return item.but(what=f"{item.what}.gate", size=size, by=_KEY)

    edited = ledger.edit(Resident, first)
    return edited.add(halves)


def _without_casts(ledger: Ledger, width: float) -> Ledger:
    """Attention's output without the narrow copy beside it that the product behind it reads: that is made again."""
    copies: list[Item] = []

    def output(item: Resident) -> Item | None:
        if not item.what.endswith(".core_output") or item.bytes_per_element <= width:
            return None
        copies.append(
            item.but(
                what=f"{item.what}.cast",
                bytes_per_element=item.bytes_per_element - width,
                tags=item.tags - {"core_attn"},
                by=_KEY,
            )
        )
        return item.but(bytes_per_element=width, by=_KEY)

    edited = ledger.edit(Resident, output)
    return edited.add(copies)


def _kept_results(
    ledger: Ledger, products: dict[tuple[str, str], list[_Part]], compiled: bool
) -> Iterator[tuple[str, str, str]]:
    """Block, name and size of results that are kept and that nothing else keeps."""
    for item in ledger.items:
        if item.phase != "forward" or item.block in ("embedding", "head"):
            continue
        if compiled and UNREAD in item.tags:
            continue
        if isinstance(item, Matmul) and (f"{item.what}.result", item.n, True) in products.get(
            (item.block, item.what), []
        ):
            yield item.block, f"{item.what}.result", times(item.n, item.m)
        elif isinstance(item, Collective) and item.kind == "reduce_scatter" and "tp_scatter" in item.tags:
            yield item.block, f"{item.what}.result", times(item.size, "/scatter_parts")


def _result(kept: tuple[str, str, str], width: float) -> Resident:
    block, what, size = kept
    return Resident(
        what=what, block=block, tags=frozenset({"saved", "activation"}), by=_KEY, size=size, bytes_per_element=width,
        pool="activations", lifetime="micro_batch",
    )  # fmt: skip


def _kept_bytes(subject: Pass) -> float:
    """Bytes that a layer of Llama-3 8B keeps, in units of sbh, operator by operator."""
    ledger, _ = figures.run(
        "recompute", subject, model="llama3-8b", seq=8192, attention_kernel="flash", recompute="per_op"
    )
    return figures.saved_bytes(ledger) / (8192 * 4096)


TECHNIQUE = Technique(
    key=_KEY,
    name="Operator-level recomputation",
    slot="recompute",
    choices=("per_op",),
    searched=False,
    asked=True,
    source="https://github.com/pytorch/torchtitan torchtitan/distributed/activation_checkpoint.py",
    summary="Attention and every second product are kept, all other operators of a block run again",
    figures=(
        Figure(
            "bytes saved per layer of Llama-3 8B, in sbh: input 2, queries 2, values ½, attention 2 + 4a/h, gate 2f/h, output 2",
            2 + 2 + 0.5 + 2 + 4 * 32 / 4096 + 2 * 14336 / 4096 + 2,
            1e-9,
            "PyTorch 2.13's MemTracker (torch.distributed._tools) on torchtitan's policy",
            _kept_bytes,
        ),
    ),
    valid=valid,
    apply=apply,
)
