"""Calibrates a fabric: latency and reached bandwidth of a cluster's tiers, from collectives inside and between its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.calibration.constants import changed, constants_of
from planner.calibration.device import family_weights, transport_constants
from planner.calibration.measurements import Measurement, Message
from planner.calibration.predict import messages_s
from planner.calibration.robust_fit import Fit, fit
from planner.errors import Problem, SpecError
from planner.specs.cluster import Cluster, Tier

__all__ = ["fit_fabric"]


def fit_fabric(
    cluster: Cluster, measurements: Sequence[Measurement], *, folds: int = 5
) -> tuple[Cluster, Fit, int]:
    """The cluster with the constants of its tiers that collectives determine, the fit, and how many messages it could not place.

    Outer tiers come first: they are what a device's own profile cannot know. A message that does not fit into the cluster (more
    ranks, or more of them per node, than it has) is not placed.

    Raises:
        SpecError: no message can be placed.
    """
    messages = [m for m in measurements if isinstance(m.work, Message)]
    placed = [m for m in messages if isinstance(m.work, Message) and _fits(m.work, cluster)]
    if not placed:
        none = f"{len(messages)} collectives, none of which fits into {cluster.name}"
        raise SpecError(Problem("measurements", none, "collectives of nodes like the cluster's"))
    seconds = messages_s(placed)
    tiers = {tier.name: tier for tier in cluster.tiers}
    bounds = [b for tier in reversed(cluster.tiers) for b in transport_constants(tier.name, tier.transport)]
    found = fit(
        lambda values: seconds(_with_tiers(cluster, changed(tiers, values))),
        [m.seconds for m in placed],
        constants_of(tiers, bounds),
        [m.group for m in placed],
        folds=folds,
        weights=family_weights(placed),
    )
    fitted = changed(tiers, {c.name: c.value for c in found.fitted})
    return _with_tiers(cluster, fitted), found, len(messages) - len(placed)


def _fits(work: Message, cluster: Cluster) -> bool:
    here = cluster.groups[0].devices_per_node
    nodes = -(-work.ranks // work.per_node)
    return work.per_node <= here and here % work.per_node == 0 and nodes * here <= cluster.devices


def _with_tiers(cluster: Cluster, tiers: Mapping[str, Tier]) -> Cluster:
    return replace(cluster, tiers=tuple(tiers.values()))
