"""Per-operator selective checkpointing (torchtitan): keep the outputs of every other product, run everything cheap again.

What it does: of a block's products in their order of execution (gate and up projections are two), the first, third, fifth …
    keep their output; attention's output, its log-sum-exp and what tensor parallelism reduce-scatters are kept as well. The
    backward starts from the block's input, runs the other products and all memory-bound kernels again.
Saves: every saved tensor but those: of Llama's 34 bytes per token and element of width, about 14.
Costs: the forward of every second product, of norms, rotations, activation functions and additions; gathers of activations.
Assumes: the block's own output, which no backward reads, is neither kept nor computed again (as ``torch.compile`` leaves it out);
    grouped products of experts are run again; products in 8 bits are kept as those in 16 bits are.
Source: torchtitan ``parallelisms/parallelize_llama.py`` (``_save_list``, ``_apply_ac_to_transformer_block``), 2024-12;
    PyTorch ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from planner.ledger import AttentionCore, Collective, Item, Ledger, Matmul, Resident, Stream
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.recompute.again import OUTSIDE, drop_saved

_BY = "per_op_sac"
# Which saved tensors are a product's outputs, part by part.
_OUTPUTS = {
    "qkv": ("q", "k", "v"),
    "q": ("q",),
    "q_up": ("q",),
    "kv": ("k", "v"),
    "kv_up": ("k v",),
    "fc1": ("act_input", "act_input"),
}
_ALWAYS_KEPT = ("core_output", "log_sum_exp")


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Copies what runs again, and drops what is then not kept."""
    parts = {id(item): _parts(item) for item in ledger.of(Matmul, phase="forward") if _counts(item)}
    kept = _kept_parts(ledger, parts)
    saved = {
        (item.block, f"{item.what.rpartition('.')[0]}.{name}")
        for item in ledger.of(Matmul, phase="forward")
        for part, names in enumerate(_OUTPUTS.get(item.what.rpartition(".")[2], ()))
        for name in names.split()
        if (id(item), part) in kept
    }
    scattered = any("tp_scatter" in item.tags for item in ledger.of(Collective, phase="forward"))

    def keeps(item: Resident) -> bool:
        if {"input", "mask"} & item.tags or item.what.endswith(_ALWAYS_KEPT):
            return True
        return (item.block, item.what) in saved or (scattered and item.what.endswith("norm2.input"))

    again = list(_again(ledger, parts, kept))
    halved = [
        item
        for item in ledger.of(Resident)
        if item.what.endswith(".act_input") and keeps(item) and item.size.startswith("2*")
    ]
    whole = set(map(id, halved))
    ledger = drop_saved(ledger.drop(lambda item: id(item) in whole), lambda item: True, keeps, _BY)
    halves = [replace(item, size=item.size.removeprefix("2*")) for item in halved]
    transient = [replace(item, lifetime="recomputed", by=_BY) for item in halves]
    windows = {item.window for item in again if item.window}
    chunks = {window: ledger.chunks[window.removesuffix(".recompute")] for window in windows}
    return replace(ledger.add([*halves, *transient, *again]), chunks={**ledger.chunks, **chunks})


def _counts(item: Matmul) -> bool:
    """Whether a product is one of weights that the policy counts: no batched product, no grouped one."""
    return item.block not in OUTSIDE and item.groups == "1" and not item.grouped


def _parts(item: Matmul) -> list[str]:
    """Widths of the products that PyTorch runs for this one: one per projection."""
    terms = item.n.split(" + ")
    if item.what.endswith(".fc1") and item.n.startswith("2*"):
        return [item.n.removeprefix("2*")] * 2
    return terms if item.what.endswith((".qkv", ".kv")) else [item.n]


def _kept_parts(ledger: Ledger, parts: Mapping[int, list[str]]) -> set[tuple[int, int]]:
    """Every other part of a block's products, from the first."""
    kept, count = set(), dict.fromkeys((item.block for item in ledger.items), 0)
    for item in ledger.of(Matmul, phase="forward"):
        for part in range(len(parts.get(id(item), ()))):
            count[item.block] += 1
            if count[item.block] % 2:
                kept.add((id(item), part))
    return kept


def _again(ledger: Ledger, parts: Mapping[int, list[str]], kept: set[tuple[int, int]]) -> Iterator[Item]:
    """Copies of what runs again."""
    last = {item.block: id(item) for item in ledger.of(Stream, phase="forward") if "add" in item.tags}
    idle = set()
    for item in ledger.items:
        if item.phase != "forward" or item.block in OUTSIDE or isinstance(item, Resident | AttentionCore):
            continue
        if isinstance(item, Matmul) and id(item) in parts:
            widths = [n for part, n in enumerate(parts[id(item)]) if (id(item), part) not in kept]
            if not widths:
                idle.add((item.block, item.what))
                continue
            item = replace(item, n=" + ".join(widths))
        elif isinstance(item, Collective):
            if "data_parallel" in item.tags or {"tp_scatter", "core_attn"} & item.tags:
                continue
        elif id(item) == last.get(item.block) or (item.block, item.what.removesuffix(".quantise")) in idle:
            continue
        yield replace(item, phase="recompute", by=_BY, window=item.window and f"{item.window}.recompute")


def _share(subject: Pass) -> float:
    """FLOP of products that run again, over those of the forward."""
    ledger, _ = figures.run(
        "recompute", subject, model="llama3-8b", attention_kernel="flash", recompute="per_op"
    )
    products = {
        phase: figures.flop(ledger, phase, where=lambda i: "gemm" in i.tags)
        for phase in ("forward", "recompute")
    }
    return products["recompute"] / products["forward"]


def _saved(subject: Pass) -> float:
    """Bytes that a layer keeps per token."""
    ledger, _ = figures.run(
        "recompute", subject, model="llama3-8b", attention_kernel="flash", recompute="per_op"
    )
    return figures.saved_bytes(ledger) / 2048


_POLICY = "torchtitan _apply_ac_to_transformer_block: every second aten.mm is run again, attention's outputs are kept"
TECHNIQUE = Technique(
    key=_BY,
    name="Per-operator selective checkpointing (torchtitan)",
    slot="recompute",
    choices=("per_op",),
    searched=False,  # a policy of one framework; norm+act and mlp span the same trade
    source="torchtitan selective_ac_option=op",
    summary="Outputs of every other product are kept, the rest runs again",
    figures=(
        Figure(
            "products of Llama 3 8B run again, in forwards: wk, wo and w3 of wq wk wv wo w1 w3 w2",
            (1024 + 4096 + 14336) / (4096 + 2 * 1024 + 4096 + 3 * 14336),
            1e-9,
            _POLICY,
            _share,
        ),
        Figure(
            "bytes kept per token and layer of Llama 3 8B: input, wq, wv, attention, its log-sum-exp, w1",
            2.0 * (4096 + 4096 + 1024 + 4096 + 14336) + 4 * 32,
            1e-9,
            _POLICY,
            _saved,
        ),
    ),
    apply=apply,
)
