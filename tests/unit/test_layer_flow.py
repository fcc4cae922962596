"""Intervals of layers on unlike nodes: against enumeration with another's max-flow, and against Helix's recorded placements."""

from itertools import product

import networkx as nx
import numpy as np
import pytest

from planner.errors import Infeasible
from planner.report.flow import show_flow
from planner.solve.combinatorial.layer_flow import NodeKind, even_stages, place_layers


def through(spans, layers):
    """Tokens per second through nodes ``(first, layers, rate)``."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(layers + 1))
    for first, held, rate in spans:
        known = graph.get_edge_data(first, first + held, {"capacity": 0.0})["capacity"]
        graph.add_edge(first, first + held, capacity=known + rate)
    return nx.maximum_flow_value(graph, 0, layers)


def by_enumeration(kinds, layers):
    choices = [
        [(s, k, rate) for k, rate in enumerate(kind.tokens_per_s, 1) for s in range(layers - k + 1)]
        for kind in kinds
        for _ in range(kind.count)
    ]
    return max(through(spans, layers) for spans in product(*choices))


@pytest.mark.parametrize("seed", range(6))
def test_no_placement_carries_more(seed):
    random = np.random.default_rng(seed)
    kinds = [
        NodeKind(name, count, tuple(float(r) for r in np.sort(random.integers(1, 30, size=held))[::-1]))
        for name, count, held in (("fast", 2, 2), ("slow", 2, 2))
    ]
    found = place_layers(kinds, 3)
    assert found.tokens_per_s == pytest.approx(by_enumeration(kinds, 3))
    assert found.certificate.status == "exact"
    spans = [
        (s.first, s.layers, s.nodes * kinds[s.kind == "slow"].tokens_per_s[s.layers - 1]) for s in found.spans
    ]
    assert through(spans, 3) == pytest.approx(found.tokens_per_s)
    for kind in kinds:
        assert sum(s.nodes for s in found.spans if s.kind == kind.name) <= kind.count
    assert even_stages(kinds, 3) <= found.tokens_per_s * (1 + 1e-9)


# Thesys-lab/Helix-ASPLOS25, artifact_evaluation/distributed_clusters/layout_llama30b/ilp: tokens/s by layers held of 60 (in each
# ilp_model.lp, ``node_throughput_constraint``), and the objective of the placement that is recorded beside it (ilp_solution.sol).
_A100 = (
    24422.683, 11751.671, 7569.127, 5481.217, 4380.946, 3525.199, 3021.840, 2535.882, 2158.991, 1942.715, 1678.975, 1462.934,
    1349.650, 1185.805, 1044.533345, 912.987, 802.564,
)  # fmt: skip
_L4 = (2678.282, 1339.634, 828.492, 572.539, 458.171, 320.681, 275.018, 214.981402, 168.095, 252.650, 193.314)


@pytest.mark.parametrize(
    ("kind", "recorded"), [(NodeKind("a100", 4, _A100), 1044.533345), (NodeKind("l4", 8, _L4), 214.981402)]
)
def test_recorded_placements_of_helix_are_reached(kind, recorded):
    """Gurobi's for four A100 is 15 layers on each; of eight L4, six with 10 layers carry more than what is recorded."""
    found = place_layers([kind], 60, time_limit_s=0.5)
    assert found.tokens_per_s >= recorded * (1 - 1e-6)
    assert -found.certificate.bound >= found.tokens_per_s
    assert sum(s.layers for s in found.spans) == 60


def test_more_layers_than_nodes_hold():
    with pytest.raises(Infeasible, match="room for 4 of 5 layers"):
        place_layers([NodeKind("small", 2, (2.0, 1.0))], 5)


def test_what_may_be_missed_is_said_to_be_above(capsys):
    """Rates are maximised: the bound of an unproved placement is more than what it carries."""
    certificate = {"status": "gap", "gap": 0.1, "bound": -110.0, "solver": "some", "wall_s": 1.0, "notes": {}}
    show_flow({"tokens_per_s": 100.0, "even_tokens_per_s": 50.0, "spans": [], "certificate": certificate})
    assert "nothing is above 110 " in capsys.readouterr().out
