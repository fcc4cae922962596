"""Data-centric experts (Janus): experts travel to the tokens.

What it does: every rank keeps its share of the experts and all of its tokens; a layer's experts are gathered from all expert
    ranks before they work, and their gradients scattered back behind the backward.
Saves: the exchange of tokens, and the wait for ranks whose experts are popular: every rank works on its own tokens.
Costs: all experts of a layer over the network twice per micro-batch, once per machine; two experts at a time on the device.
Assumes: gathers run beside the layer before, as prefetching does; weights stay in the machine for the backward.
Source: Liu et al. 2023 (Janus, SIGCOMM, doi:10.1145/3603269.3604869) §3, §5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Collective, Item, Ledger, Resident, times
from planner.specs.model import Attention, Block, Model, Moe
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.expert import moe_folding
from planner.techniques.training.expert.load import popular

_KEY = "janus"
_AT_ONCE = 2.0  # experts on the device: the one at work, and the next


def valid(ctx: Context) -> Iterable[Check]:
    """Whole experts on several ranks."""
    yield from moe_folding.valid(ctx)
    yield Check("experts that travel need ep > 1", ctx.mesh.ep > 1)
    yield Check("experts that travel are whole (etp = 1)", ctx.mesh.etp == 1)
    yield Check("experts that travel work on as many tokens as come", ctx.workload.capacity_factor is None)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps a share of the experts' states; gathers weights, scatters gradients."""
    added: list[Item] = []

    def share(item: Resident) -> Item | None:
        if "expert" not in item.tags or item.pool not in ("parameters", "gradients", "optimizer"):
            return None
        if item.pool == "parameters":
            added.extend(_travel(item, ctx))
        return item.but(size=times(item.size, "/expert_ranks"), by=_KEY)

    return ledger.set_axes(expert_ranks=ctx.mesh.ep).edit(Resident, share).add(added)


def _travel(whole: Resident, ctx: Context) -> Iterable[Item]:
    experts = next(
        factor for factor in whole.size.split(" + ")[0].split("*") if factor.startswith("experts@")
    )
    for what, kind, phase in (
        ("fetch", "all_gather", "forward"),
        ("push_gradients", "reduce_scatter", "backward"),
    ):
        yield Collective(
            what=f"moe.{what}", block=whole.block, phase=phase, tags=frozenset({"moe", "expert"}), by=_KEY, kind=kind,
            group=ctx.mesh.group("ep"), size=whole.size, dtype=ctx.format.activation, track="experts",
        )  # fmt: skip
    yield replace(
        whole, what="moe.fetched", tags=frozenset({"moe"}), pool="gathered", lifetime="block", by=_KEY,
        size=times(whole.size, f"/{experts}"), bytes_per_element=2.0 * _AT_ONCE,
    )  # fmt: skip


def _less_traffic(subject: Pass) -> float:
    """Elements that tokens would move between 4 machines of one expert each, over what the experts move."""
    tokens, hidden, machines = 131072, 1024, 4
    layer = Block(attention=Attention(16, 16, 64), moe=Moe(machines, 2, 4 * hidden, gated=False))
    model = Model("janus", "janus", "decoder", hidden, 32000, 2048, {"moe": layer}, (("moe", 1),))
    ledger, _ = figures.run(
        "expert", subject, model=model, seq=2048, micro_batch_size=tokens // 2048, dp=4, ep=4, expert="fetched",
        attention_kernel="flash", cluster="a100-sxm-80gb:4x1",
    )  # fmt: skip
    moved = figures.sent_elements(ledger, lambda i: i.group.name == "ep")
    by_tokens = 4 * 2 * tokens * hidden * (machines - 1) / machines
    return by_tokens / moved if moved else 0.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Data-centric experts (Janus)",
    slot="expert",
    choices=("fetched",),
    searched=False,  # pays with small experts and many tokens per rank, which models of today do not have
    source="doi:10.1145/3603269.3604869",
    summary="Experts travel to the tokens, their gradients back",
    figures=(
        Figure(
            "times less traffic, T = 131,072 tokens, k = 2, h = 1,024, one expert on each of 4 machines: kT/(4nhE)",
            16.0,
            0.01,
            "Liu et al. 2023 (doi:10.1145/3603269.3604869), abstract: up to 16x; section 3: R = BSk/(4nHE)",
            _less_traffic,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: (ctx.mesh.ep > 1) & (popular(ctx) > 0),
)
