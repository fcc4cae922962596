"""Mixed clusters: the search finds what trying everything finds, the engine prices every stage, and laws hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest

from planner.assignment import Assignment
from planner.place import Place, hops_s, of_group
from planner.schedule.engine import simulate
from planner.schedule.order import make_order
from planner.solve.layerwise.search import search_layerwise
from planner.solve.mixed.bounds import Bounds
from planner.solve.mixed.ground import Ground
from planner.solve.mixed.search import MixedSearch, search_mixed
from planner.solve.mixed.settle import Settler
from planner.solve.mixed.shapes import Shape, shapes
from planner.solve.replay import replay
from planner.solve.train import examine
from planner.specs.hardware import load_cluster
from planner.specs.model import Attention, Block, Mlp, Model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload

_CLOSED = {
    "sequence_parallel": "false", "context": "p2p", "tensor_overlap": "none", "zero_group": "full", "cp": "1",
    "zero_stage": "1", "parameter_offload": "none", "optimizer_offload": "none", "activation_offload": "none",
}  # fmt: skip
_ONLY_FULL = tuple(
    f"recompute={choice}" for choice in ("norm", "act", "norm+act", "selective", "mlp", "block", "norm+mla_up")
)
_DEVICES = ("a100-sxm-80gb", "rtx-4090", "h100-sxm", "l4", "a100-pcie-40gb")


def small(cluster: str, layers: int = 4, reserve: float = 0.0, batch: int = 4, **fixed: str) -> Problem:
    """A model of some gigabytes on a few devices."""
    block = Block(attention=Attention(16, 16, 128), mlp=Mlp(8192, gated=True))
    model = Model(
        name="small", family="small", arch="decoder", hidden=2048, vocab=32000, max_seq_len=4096, blocks={"decoder": block},
        layers=(("decoder", layers),), tied_embeddings=False, dropout=False,
    )  # fmt: skip
    return Problem(
        model, load_cluster(cluster), TrainWorkload(batch, 4096), load_stack(), fixed={**_CLOSED, **fixed}, reserve=reserve,
        forbidden=_ONLY_FULL,
    )  # fmt: skip


def random_problem(seed: int) -> Problem:
    """Two groups of one or two devices, some of whose memory is taken."""
    draw = np.random.default_rng(seed)
    names = draw.choice(_DEVICES, 2, replace=False)
    groups = [f"{name}:{nodes}x{each}" for name, (nodes, each) in zip(names, draw.choice([(1, 1), (1, 2), (2, 1)], 2), strict=True)]
    return small("+".join(groups), int(draw.integers(3, 5)), float(draw.choice([0.0, 0.4, 0.6, 0.7])), int(draw.choice([2, 4])))


def found(problem: Problem, solver: str = "brute") -> MixedSearch:
    run = MixedSearch(problem, 1e9, solver, np.inf)
    run.go()
    return run


# -- everything is tried ---------------------------------------------------------------------------------------------


def everything(problem: Problem) -> float:
    """The best step time of all plans: orders, stages, degrees and recomputed layers of every stage, cuts; what fits only."""
    ground = Ground(problem, found(problem).solver)
    groups = range(len(ground.groups))
    best = np.inf
    classes = [set(ground.groups[g].classes) for g in groups]
    for chosen in product(*classes):
        if len({of[:2] for of in chosen}) > 1:
            continue
        for order in permutations(groups):
            seats = [(g, chosen[g]) for g in order for _ in range(problem.cluster.groups[g].devices // chosen[g][2])]
            if len(seats) <= len(ground.stack) + 2:
                best = min(best, *(of_cuts(ground, seats, sizes) for sizes in cuts(len(ground.stack), len(seats))))
    return best


def cuts(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Layers per stage; embedding and head may stand alone."""
    ways = product(range(layers + 1), repeat=stages)
    return [sizes for sizes in ways if sum(sizes) == layers and all(sizes[1:-1])]


def of_cuts(ground: Ground, seats: list, sizes: tuple[int, ...]) -> float:
    """The best of one partition: every way of every stage that fits, priced together by the schedule engine."""
    pp, m = len(seats), seats[0][1][1]
    ways = [list(of_stage(ground, *seat, stage, pp, m, n)) for stage, (seat, n) in enumerate(zip(seats, sizes, strict=True))]
    every = list(product(*ways))
    if not every:
        return np.inf
    seconds = np.array([[way[:3] for way in plan] for plan in every])  # (plans, stages, forward backward tail)
    hops = np.array([[hop(ground, a[3], b[3]) for a, b in zip(plan, plan[1:], strict=False)] for plan in every])
    line = simulate(
        make_order("1f1b", pp, m), seconds[:, :, 0].T, seconds[:, :, 1].T, hop_s=hops.T, tail_s=seconds[:, :, 2].T
    )
    return float(line.makespan_s.min())


def hop(ground: Ground, one: Place, other: Place) -> float:
    known = ground.__dict__.setdefault("of_test", {})
    if (id(one), id(other)) not in known:
        known[id(one), id(other)] = float(hops_s(ground.problem.cluster, (one, other))[0])
    return known[id(one), id(other)]


def of_stage(ground: Ground, group: int, of, stage: int, pp: int, m: int, layers: int):
    """Forward, backward and tail seconds, and the place, of every member and number of recomputed layers that fits."""
    members = ground.groups[group]
    problem, stack = members.problem, members.problem.stack
    flights = min(pp - stage, m)  # 1F1B: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2
    for member in members.classes[of]:
        option = members.option(member, pp)
        if option is None:
            continue
        mesh = option.mesh
        names = [option.choices(s)["recompute"].value for s in range(len(mesh.branches))]
        plain, again = (names.index(name) if name in names else None for name in ("none", "full"))
        ends = [kind for kind, here in ((-3, stage == 0), (-2, stage == pp - 1)) if here]
        for recomputed in range(layers + 1):
            if (recomputed and again is None) or (recomputed < layers and plain is None):
                continue
            columns = [(plain, 0)] * (layers - recomputed) + [(again, 0)] * recomputed
            columns += [(plain if plain is not None else again, kind) for kind in ends]

            def total(name: str, columns=columns, mesh=mesh) -> float:
                return float(sum(mesh[name][s, k] for s, k in columns))

            transient = max(mesh["block_bytes"][s, k] + mesh["recomputed_bytes"][s, k] for s, k in columns)
            passes = (1.0 + stack.fragmentation.value) * (flights * total("saved_bytes") + transient)
            idle = stack.framework_bytes.value + stack.communicator_bytes.value * mesh.communicators
            if total("always_bytes") + max(passes, total("step_bytes")) + idle > problem.memory_budget_bytes:
                continue
            forward = total("forward_s")
            backward = total("backward_s") + total("weight_s") + total("recompute_s")
            yield forward, backward, tail_s(total, forward, backward), option.place


def tail_s(total, forward: float, backward: float) -> float:
    """The update, and what backward and forward do not hide of gradients and weights: all but the last of equal messages."""
    from planner.costs.overlap import uniform_bucket_exposure_s

    exposed = total("main_step_s")
    for track, beside in (("gradients", backward), ("weights", forward)):
        messages = max(total(f"{track}_messages"), 1.0)
        exposed += float(uniform_bucket_exposure_s(total(f"{track}_step_s"), beside, messages))
    return exposed


@pytest.mark.parametrize("seed", range(60))
def test_the_search_finds_what_trying_everything_finds(seed):
    problem = random_problem(seed)
    run, best_s = found(problem), everything(problem)
    if run.best is None:
        assert best_s == np.inf
        return
    assert run.best_s == pytest.approx(best_s, rel=1e-9)
    assert run.finished().bound_s <= best_s * (1.0 + 1e-12)
