"""Any two choices together: they price without error and keep the laws, or a named rule refuses them.

Every pair of choices of different slots is run over the same handful of meshes of eight devices, all other slots at their first
choice. The laws are those that the search rests on; the pairs that no mesh allows are a closed list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from planner.engine.block_table import BlockTable, tabulate
from planner.ledger import Ledger
from planner.mesh import Mesh
from planner.operators.baseline import EMBEDDING, HEAD, block_order
from planner.pipeline.layout import BOUNDARY
from planner.solve.branches import Faults
from planner.solve.space import DEGREES, Choice, Rows
from planner.solve.uniform import UniformSearch
from planner.specs.formats import FORMATS
from planner.specs.hardware import load_cluster
from planner.specs.model import Attention, Block, Mlp, Model, Moe
from planner.specs.problem import PERMISSIONS, Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload
from planner.technique import ADDITIVE_SLOTS, SLOTS, discover

BATCH, SEQ = 32, 1024
MESHES = [  # tp, cp, pp, dp, ep, etp, micro-batch
    (1, 1, 1, 8, 1, 1, 4), (1, 1, 1, 8, 2, 1, 2), (8, 1, 1, 1, 1, 1, 32), (4, 1, 1, 2, 1, 1, 16), (2, 1, 1, 4, 2, 1, 8),
    (1, 2, 1, 4, 1, 1, 8), (2, 2, 1, 2, 2, 2, 8), (1, 1, 2, 4, 1, 1, 4), (2, 1, 2, 2, 1, 1, 4), (2, 1, 4, 1, 1, 1, 2),
]  # fmt: skip
ALONE = (1, 1, 1, 1, 1, 1, 32)
GROUPS = (
    "tensor",
    "sequence_parallel",
    "context",
    "expert",
    "expert_overlap",
    "tensor_overlap",
    "zero_group",
    "synchronisation",
    "compression",
)
"""Slots whose choices are about ranks that work together: on one device they change nothing."""
DETAILS = {
    "recompute_modules": "core_attn",
    "zero_group_ranks": 2,
    "resident_layers": 1,
    "target_percent": 50.0,
}  # what two choices need to be told
SWAPS = ("optimizer_offload", "activation_offload", "parameter_offload")
SHORT = 64.0  # times as fast as links are: as fast as device memory, so that what is moved hides behind work
LAUNCHES_S = 5e-6  # of an update on the device, which one on the host does without
SENDING = (*GROUPS, "zero_stage", "optimizer_offload", "activation_offload", "parameter_offload")
TIMES = ("forward_s", "backward_s", "weight_s", "recompute_s", "main_step_s")
PRICED_TOGETHER = (
    ("forward_s",),
    ("backward_s", "weight_s"),
    ("backward_s", "weight_s", "recompute_s"),
    ("main_step_s",),
)
"""Sums of times that a clock could take. Traffic beside a backward hides behind its weight gradients and recomputation too and
what outlasts them counts as the backward's: that share grows where a faster link makes a weight gradient faster beside a drive
that is as slow as before. With some layers recomputed the time lies between the two sums."""


def model(experts: int) -> Model:
    block = Block(
        attention=Attention(8, 8, 64),
        mlp=None if experts else Mlp(2048, gated=False),
        moe=Moe(experts, 2, 1024) if experts else None,
    )
    return Model(
        name="pairs", family="pairs", arch="decoder", hidden=512, vocab=32000, max_seq_len=4096, blocks={"decoder": block},
        layers=(("decoder", 4),), tied_embeddings=True,
    )  # fmt: skip


@cache
def bench(experts: int, faster: float = 1.0) -> UniformSearch:
    """A search whose spaces and prices are used one recipe at a time."""
    cluster = load_cluster("b200-sxm:2x4")
    tiers = tuple(
        replace(tier, bytes_per_s=tier.bytes_per_s * faster, transport=None) for tier in cluster.tiers
    )
    cluster = replace(
        cluster, tiers=tiers, host_link_bytes_per_s=cluster.host_link_bytes_per_s * faster, cxl_bytes=1e12,
        cxl_bytes_per_s=25e9 * faster,
    )  # fmt: skip
    workload = TrainWorkload(BATCH, SEQ, expert_zipf=0.5 if experts else 0.0)
    problem = Problem(
        model(experts), cluster, workload, load_stack(), allowed=tuple(PERMISSIONS), explore=("all",)
    )
    return UniformSearch(problem, 1, lambda batch: [])


@cache
def every_choice() -> dict[str, list[Choice]]:
    """All modelled choices, those that only a plan that names them has included."""
    found: dict[str, list[Choice]] = {}
    space = bench(0).space
    for slot in SLOTS:
        techniques = [t for t in discover().values() if t.slot == slot and t.status == "modelled"]
        plain = [choice for choice in space.choices[slot] if choice.technique is None]
        served = [
            Choice(value, t) for t in sorted(techniques, key=lambda t: not t.default) for value in t.choices
        ]
        found[slot] = plain + served
    return found


def rows_of(meshes: Sequence[tuple[int, ...]]) -> Rows:
    table = np.array(
        [(tp, cp, pp, dp, ep, etp, size) for tp, cp, pp, dp, ep, etp, size in meshes], dtype=np.float64
    )
    return Rows({name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(DEGREES)})


@cache
def mesh_of(experts: int, meshes: tuple[tuple[int, ...], ...]) -> Mesh:
    """The same object for all recipes, so that they share what they price alike."""
    return rows_of(meshes).context(bench(experts).problem, {}).mesh


@cache
def made_of(*_key: object) -> dict[tuple[str, ...], Ledger]:
    """Ledgers of recipes that begin alike, by what else their passes read."""
    return {}


class Run:
    """One recipe on the meshes: rules, ledgers and tables."""

    def __init__(
        self, experts: int, chosen: dict[str, Choice], meshes: list[tuple[int, ...]], faster: float = 1.0
    ) -> None:
        self.search = bench(experts, faster)
        first = {slot: choices[0] for slot, choices in every_choice().items()}
        self.recipe = {**first, **chosen}
        knobs = {slot: choice.value for slot, choice in self.recipe.items()} | DETAILS
        if knobs["gradient_accumulation"] == "in_place":
            knobs["gradient_dtype"] = FORMATS[knobs["precision"]].activation
        context = rows_of(meshes).context(self.search.problem, knobs)
        self.ctx = replace(context, mesh=mesh_of(experts, tuple(meshes)))
        self.made = made_of(experts, faster, tuple(meshes), knobs.get("gradient_dtype"))
        self.faults = Faults(len(meshes))
        for choice in self.recipe.values():
            if choice.technique is not None:
                for check in choice.technique.valid(self.ctx):
                    assert check.reason
                    self.faults.check(check.reason, check.ok)
        self.valid = self.faults.first < 0
        self.kinds = (*dict.fromkeys(block_order(self.search.problem.model)), EMBEDDING, HEAD, BOUNDARY)

    def table(self, upto: str = "") -> BlockTable:
        """Block totals on the valid rows; ``upto``: of the passes before a slot alone."""
        slots = SLOTS[: SLOTS.index(upto)] if upto else SLOTS
        ledger = self.search.ledger({slot: self.recipe[slot] for slot in slots}, self.ctx, self.made)
        table = tabulate(ledger, self.search.pricer, self.kinds, len(self.valid))
        return replace(table, values=table.values[:, :, self.valid])


OF_EXPERTS = {"expert", "expert_overlap"}


RULES = (
    "PyTorch's ring needs fused attention",
    "a box of grids leaves sequence parallelism nothing to shard",
    "a cube leaves sequence parallelism nothing to shard",
    "a square grid leaves sequence parallelism nothing to shard",
    "an update without gradients that last leaves no states to offload",
    "exchanges that go first need tokens that travel to experts, not experts to tokens",
    "gradients in place of weights need master weights",
    "gradients in place of weights stay until the update, and cannot be sent early",
    "partitioned checkpoints need tp > 1 without sequence parallelism",
    "points of the recomputation front need fused attention kernels",
    "queries travel a ring past fused attention kernels alone",
    "recomputation of all but attention needs fused attention kernels",
    "scattered stage messages need tp > 1 without sequence parallelism",
    "several copies of the weights, which the schedule keeps, cannot be sharded (zero_stage 3, fsdp)",
    "slices of a micro-batch are for column- and row-parallel products (tensor=1d)",
    "sums beside weight gradients are for column- and row-parallel products (tensor=1d)",
    "the matrix products of Muon's update are not modelled on the host",
    "workers that train on their own cut no group further (zero_group)",
    "zero_group needs sharded states (zero_stage ≥ 1)",
    "zeroth-order steps are modelled for all weights, not for adapters",
)
"""Why two choices that a mesh allows one by one are refused together."""


def pairs():
    for one, other in combinations(SLOTS, 2):
        for a in every_choice()[one]:
            for b in every_choice()[other]:
                first = (every_choice()[one][0], every_choice()[other][0])
                if a is not first[0] and b is not first[1]:
                    yield {one: a, other: b}


def named(pair: dict[str, Choice]) -> str:
    return " ".join(f"{slot}={choice.value}" for slot, choice in pair.items())


PAIRS = list(pairs())


@pytest.mark.parametrize("slot", SLOTS)
def test_every_pair_prices_and_keeps_the_laws(slot: str) -> None:
    """Finite, never negative, and never faster than the passes before the additive slots, which is what bounds rest on."""
    for pair in PAIRS:
        if next(iter(pair)) != slot:
            continue
        experts = 8 if OF_EXPERTS & pair.keys() else 0
        run = Run(experts, pair, MESHES)
        if not run.valid.any():
            continue
        table, base = run.table(), run.table("zero_stage")
        assert np.isfinite(table.values).all(), named(pair)
        assert (table.values >= 0.0).all(), named(pair)
        if pair.keys() & set(ADDITIVE_SLOTS):
            whole = sum(table[name] for name in TIMES)
            if any(choice.technique is not None and choice.technique.saves for choice in pair.values()):
                whole = (
                    whole + base["main_step_s"]
                )  # the update, of which a swap may save as much as there is
            assert (whole >= sum(base[name] for name in TIMES) * (1 - 1e-9) - LAUNCHES_S).all(), named(pair)
        held = sum(
            table[name] for name in ("always_bytes", "saved_bytes", "host_bytes", "cxl_bytes", "nvme_bytes")
        )
        assert (held > 0).any(), named(pair)


@pytest.mark.parametrize("slot", SWAPS)
def test_what_moves_to_slower_memory_leaves_the_work_as_it_is(slot: str) -> None:
    """Over links as fast as device memory, a swap takes no less than the plan without it: none of its work is gone.

    Schedules that move activations or keep versions of weights have less to move and to keep beside a swap.
    """
    for pair in PAIRS:
        if slot not in pair or "schedule" in pair:
            continue
        experts = 8 if OF_EXPERTS & pair.keys() else 0
        run = Run(experts, pair, MESHES, SHORT)
        other = {name: choice for name, choice in pair.items() if name != slot}
        plain = Run(experts, other, MESHES, SHORT)
        run.valid = plain.valid = run.valid & plain.valid
        if run.valid.any():
            table, without = run.table(), plain.table()
            for names in PRICED_TOGETHER[:3]:
                after_s, before_s = (sum(each[name] for name in names) for each in (table, without))
                assert (after_s >= before_s * (1 - 1e-9)).all(), (named(pair), names)


@pytest.mark.parametrize("slot", SENDING)
def test_pairs_that_send_are_never_slower_on_faster_links(slot: str) -> None:
    for pair in PAIRS:
        one, other = pair
        if one != slot or other not in SENDING:
            continue
        experts = 8 if OF_EXPERTS & pair.keys() else 0
        run = Run(experts, pair, MESHES)
        if run.valid.any():
            table, faster = run.table(), Run(experts, pair, MESHES, 2.0).table()
            for names in PRICED_TOGETHER:
                before_s, after_s = (sum(each[name] for name in names) for each in (table, faster))
                assert (after_s <= before_s * (1 + 1e-9)).all(), (named(pair), names)


@pytest.mark.parametrize("slot", GROUPS)
def test_on_one_device_ranks_that_work_together_change_nothing(slot: str) -> None:
    for choice in every_choice()[slot][1:]:
        for experts in (0, 8) if slot in OF_EXPERTS else (0,):
            run = Run(experts, {slot: choice}, [ALONE])
            if run.valid.all():
                np.testing.assert_allclose(
                    run.table().values,
                    Run(experts, {}, [ALONE]).table().values,
                    rtol=1e-12,
                    err_msg=choice.value,
                )


@cache
def alone(experts: int, slot: str, value: str) -> np.ndarray:
    """Meshes on which a choice is valid beside all first choices."""
    choice = next(c for c in every_choice()[slot] if c.value == value)
    return Run(experts, {slot: choice}, MESHES).valid


def test_what_refuses_a_pair_of_choices_that_are_valid_alone_is_one_of_these_rules() -> None:
    found: dict[str, str] = {}
    for pair in PAIRS:
        experts = 8 if OF_EXPERTS & pair.keys() else 0
        run = Run(experts, pair, MESHES)
        singly = np.all([alone(experts, slot, choice.value) for slot, choice in pair.items()], axis=0)
        for row in np.flatnonzero(singly & ~run.valid):
            found.setdefault(run.faults.reasons[run.faults.first[row]], named(pair))
    assert set(found) == set(RULES), found
