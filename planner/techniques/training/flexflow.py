"""FlexFlow: every operator splits samples, attributes, parameters or none of them, to any degree.

What it does: chooses for every operator which of its dimensions is cut along which axis of the devices, changes of layout
    between them included; ``planner solve sharding``. FlexFlow draws such choices at random and keeps what is faster; here they
    are eliminated operator by operator, with proof.
Saves: traffic that one rule for all operators causes.
Costs: a sharding per operator, which few launchers run.
Assumes: as Alpa's intra-operator problem.
Source: Jia et al. 2019 (FlexFlow, MLSys 2019, arXiv:1807.05358) §4, §6.
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

_OPERATORS, _CHOICES = 6, 4


def _above_the_best(subject: Any) -> float:
    """Seconds of the answer over those of the best of all 4,096 choices, of a chain of operators with a shortcut."""
    from itertools import product

    import numpy as np

    from planner.solve.combinatorial.choices import ChoiceGraph

    rng = np.random.default_rng(7)
    seconds = [rng.uniform(1.0, 2.0, _CHOICES) for _ in range(_OPERATORS)]
    held = [np.zeros(_CHOICES) for _ in range(_OPERATORS)]
    pairs = [(i, i + 1) for i in range(_OPERATORS - 1)] + [(0, _OPERATORS - 1)]
    edges = {pair: rng.uniform(0.0, 2.0, (_CHOICES, _CHOICES)) * (1.0 - np.eye(_CHOICES)) for pair in pairs}
    graph = ChoiceGraph([f"operator {i}" for i in range(_OPERATORS)], seconds, held, edges)
    best = min(graph.seconds(choice) for choice in product(range(_CHOICES), repeat=_OPERATORS))
    return graph.seconds(subject(graph)) / best


TECHNIQUE = Technique(
    key="flexflow",
    name="FlexFlow (splits per operator)",
    slot=None,
    kind="solver",
    source="arXiv:1807.05358",
    summary="Which dimension every operator splits, and how far",
    figures=(
        Figure(
            "time of the answer over the optimum's, where all choices can be tried: 1",
            1.0,
            1e-9,
            "Jia et al. 2019 (arXiv:1807.05358), section 8.4: the optimum, on executions small enough to search exhaustively",
            _above_the_best,
        ),
    ),
    solve=solver("choices.minimise", "choice"),
    naive=solver("choices.cheapest_alone"),
)
