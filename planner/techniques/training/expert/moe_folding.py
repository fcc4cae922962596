"""Expert parallelism: experts are spread over ``ep`` ranks, each cut over ``etp``, on a mesh folded over the dense one.

What it does: every rank keeps experts/ep experts (1/etp of each); tokens travel to their experts and back by all-to-all.
Saves: expert weights, divided by ep·etp.
Costs: dispatch and combine, k·T·h elements each way, forward and backward; with etp > 1 an all-gather of the dispatched
    tokens and a reduce-scatter of the results; the busiest rank works and waits ``expert_load_factor`` times the mean,
    times what experts of unlike popularity (``expert_zipf``) add.
    Where the all-to-all is of a library that knows nothing of experts (``dispatch=copied``), tokens are copied into the order
    of ranks before it, and behind it into that of the rank's experts if it has several: (1 + 1/k) + 2 passes over k·T·h
    elements each way, in place of 2.
    Kernels made for experts send a token once to every rank and node that holds any of its experts: they are fewer where its
    experts are neighbours (``routing=neighbours``).
Assumes: tokens of the sequence-parallel shard are dispatched; a capacity factor cuts every expert's tokens off at it and pads
    them up to it; all-to-alls are exposed.
Source: Lepikhin et al. 2020 (GShard, arXiv:2006.16668) §3; Liu et al. 2025 (MoE parallel folding, arXiv:2504.14960); copies:
    Megatron-Core ``transformer/moe/token_dispatcher.py`` (``MoEAlltoAllTokenDispatcher``), and their rate as measured on a B200,
    MooreThreads/SimuMax ``configs/system/b200_bf16_ceperm.json`` @4dcaae5 (``permute_fwd``, ``permute_bwd``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from planner.ledger import Collective, Item, Ledger, Resident, Stream, times
from planner.technique import Check, Context, Detail, Figure, Knob, Technique, off
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.expert.load import loads

_COPY_RATE = 0.506
"""Of the memory's rate on the data sheet, what copies of tokens into another order reach: 0.501 forward, 0.511 backward."""

_LIBRARIES = {"fused": ("hybrid-ep", 0.0), "deepep": ("deepep-normal", 20.0)}
"""Of kernels made for experts, and the multiprocessors that they are given (DeepEP, ``Buffer.num_sms``)."""

_GENERATIONS = ("hopper", "blackwell")
"""That kernels of either are written for."""


def valid(ctx: Context) -> Iterable[Check]:
    """Both meshes hold the same ranks; whole experts per rank."""
    mesh = ctx.mesh
    yield Check("etp·ep does not divide tp·cp·dp", (mesh.tp * mesh.cp * mesh.dp) % (mesh.etp * mesh.ep) == 0)
    moes = [block.moe for block in ctx.model.blocks.values() if block.moe is not None]
    if not moes:
        yield Check("expert degrees without experts", (mesh.ep == 1) & (mesh.etp == 1))
    runs = dispatcher(ctx) == "copied" or ctx.cluster.device.generation in _GENERATIONS
    yield Check("DeepEP's and Hybrid-EP's kernels need devices of Hopper or Blackwell (dispatch)", runs)
    for moe in moes:
        yield Check("experts not divisible by ep", moe.experts % mesh.ep == 0)
        yield Check("expert width not divisible by etp", moe.expert_ffn % mesh.etp == 0)
        yield Check(
            "experts with tp > 1 need sequence parallelism",
            (mesh.tp == 1) | (ctx.knobs["sequence_parallel"] != off("sequence_parallel")),
        )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards experts, multiplies the rows per expert, adds the exchanges."""
    return folded(ledger, ctx, "moe_folding")


def folded(ledger: Ledger, ctx: Context, by: str, replicated: int = 0) -> Ledger:
    """Experts over ep and etp; the first ``replicated`` ones also on every rank, whose tokens for them stay there."""
    if not any(block.moe for block in ctx.model.blocks.values()):
        return ledger
    ep, etp = ctx.mesh.ep, ctx.mesh.etp
    rows, sent = loads(ctx, replicated)
    ledger = (
        ledger.shard(experts=ep, expert_ffn=etp)
        .scale(expert_rows=ep * etp * rows)
        .set_axes(etp_ranks=etp, exchanged=sent)
    )
    added: list[Item] = []
    for item in ledger.of(Stream):
        exchange = {"moe.permute": "moe.dispatch", "moe.unpermute": "moe.combine"}.get(item.what)
        if exchange is None:
            continue
        # The backward of the dispatch is a combine and vice versa: same bytes.
        all_to_all = Collective(
            what=exchange, block=item.block, phase=item.phase, tags=item.tags - {"activation"}, by=by,
            source="arXiv:2006.16668", kind="all_to_all", group=ctx.mesh.group("ep"), size=times(item.size, "exchanged"),
            dtype=ctx.format.activation,
        )  # fmt: skip
        outward = (exchange == "moe.dispatch") == (item.phase == "forward")
        all_to_all = _by_kernel(all_to_all, ctx, outward)
        cut = replace(
            all_to_all, kernel="", what=f"{exchange}.expert_tensor", source="arXiv:2504.14960", group=ctx.mesh.group("etp"),
            kind="all_gather" if outward else "reduce_scatter", size=times(item.size, "exchanged*etp_ranks"),
        )  # fmt: skip
        added += [all_to_all, cut]
    return _copied(ledger, ctx).add(added)


def dispatcher(ctx: Context) -> str:
    """What brings tokens to their experts: as the plan says, or kernels made for it where the device has them."""
    has = ctx.cluster.device.generation in _GENERATIONS
    return ctx.knobs.get("dispatch") or ("fused" if has else "copied")


def _by_kernel(exchange: Collective, ctx: Context, outward: bool) -> Collective:
    """The exchange by a kernel made for it."""
    moe = ctx.model.layer_in(exchange.block).moe
    assert moe is not None, "tokens go to experts alone"
    if (how := dispatcher(ctx)) == "copied":
        return exchange
    library, units = _LIBRARIES[how]
    kernel = f"{library}.dispatch" if outward else f"{library}.combine"
    near = float(moe.experts) if ctx.knobs.get("routing") == "neighbours" else 0.0
    return replace(exchange, kernel=kernel, choices=float(moe.top_k), neighbours_of=near, units=units)


def _copied(ledger: Ledger, ctx: Context) -> Ledger:
    """Copies of tokens into the order of ranks and of experts, where no library brings them to their experts by itself."""
    if dispatcher(ctx) != "copied":
        return ledger
    slower, moved = float(ctx.cluster.device.efficiency.memory) / _COPY_RATE, ("moe.permute", "moe.unpermute")
    for name in {item.block for item in ledger.of(Stream) if item.what in moved}:
        moe = ctx.model.layer_in(name).moe
        assert moe is not None, "tokens go to experts alone"
        sorted_again = 2.0 * np.greater(moe.experts / np.asarray(ctx.mesh.ep), 1.0)
        passes = 1.0 + 1.0 / moe.top_k + sorted_again
        ledger = ledger.set_axes(**{f"copied@{name}": slower * passes / 2.0})
    return ledger.edit(
        Stream,
        lambda item: item.but(size=times(item.size, f"copied@{item.block}")) if item.what in moved else None,
    )


def _parameters(subject: Pass) -> float:
    """Parameters of GShard's 600B model, from what one of 2048 ranks holds of each layer."""
    ledger, ctx = figures.run("expert", subject, model="gshard-600b", dp=2048, ep=2048, seq=1024)
    repeats = dict.fromkeys(("embedding", "head"), 1)
    for prefix, layers in (("encoder.", ctx.model.encoder_layers), ("", ctx.model.layers)):
        for name, repeat in layers:
            repeats[prefix + name] = repeats.get(prefix + name, 0) + repeat
    total = 0.0
    for item in ledger.of(Resident, pool="parameters", lifetime="always"):
        ranks = 2048 if "expert" in item.tags else 1
        total += ranks * repeats[item.block] * figures.total_bytes(ledger, [item]) / item.bytes_per_element
    return total


TECHNIQUE = Technique(
    key="moe_folding",
    name="Expert parallelism on a folded mesh",
    slot="expert",
    choices=("folded",),
    default=True,
    source="arXiv:2504.14960",
    summary="Experts spread over ep ranks and cut over etp",
    knobs=(
        Knob("ep", "expert-parallel degree"),
        Knob("etp", "expert-tensor-parallel degree"),
        Knob(
            "expert",
            "whether tokens travel to experts or experts to tokens",
            ("folded", "shadow1", "shadow4", "sparse1", "sparse4", "fetched", "grouped"),
            "folded",
        ),
        Detail(
            "dispatch",
            "whether kernels made for it (on Hopper, Blackwell: Hybrid-EP's, DeepEP's) or an all-to-all bring tokens to experts",
            ("fused", "deepep", "copied"),
            "fused",
            expected="fused, deepep or copied",
        ),
        Detail(
            "routing",
            "where a token's experts lie: anywhere, or beside one another, as a benchmark deals them out without a router",
            ("anywhere", "neighbours"),
            "anywhere",
            expected="anywhere or neighbours",
        ),
    ),
    figures=(
        Figure(
            "parameters of the 600B model with one expert per layer on each of 2048 ranks",
            600e9,
            0.05,  # printed with one digit
            "Lepikhin et al. 2020 (arXiv:2006.16668), Table 1",
            _parameters,
        ),
    ),
    valid=valid,
    apply=apply,
)
