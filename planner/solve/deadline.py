"""The fewest devices that finish a run in time: every number of nodes is searched, or excluded by a proof.

A step does not get shorter with every node: degrees have to divide the batch, the heads and the devices. So sizes are
tried one by one, ascending, and nothing is inferred from one size to the next but what holds for all: the kernels of a step
take some device time on any size (:func:`~planner.solve.kernel_floor.kernel_floor_s`), which excludes all sizes below some
number of devices at once. Above it, each size is searched under a limit: bounds exclude what cannot be in time.

Whole nodes are counted, and all devices of a node are used; a plan that leaves nodes idle is a plan of a smaller size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil
from time import perf_counter

import numpy as np

from planner.costs.arrays import distinct
from planner.errors import Infeasible, Interrupted, SpecError
from planner.errors import Problem as Fault
from planner.plans.plan import SearchResult
from planner.solve.fleet import Attempt, Fleet, OnProgress, merged, nothing, planned, run_s
from planner.solve.kernel_floor import kernel_floor_s
from planner.solve.space import Space
from planner.solve.train import search_strictly
from planner.specs.cluster_file import load_cluster
from planner.specs.problem import Problem
from planner.units import format_seconds

__all__ = ["fewest_devices"]

_NEAR = (
    1.1  # a size that misses the deadline by less is searched to the end, so that the answer says by how much
)


def fewest_devices(
    problems: Sequence[Problem], top: int = 10, on_progress: OnProgress | None = None
) -> Fleet:
    """Plans of the fewest nodes on which the run meets its deadline.

    Args:
        problems: each on its cluster's largest size; of equally many devices of several clusters, all are tried.
        top: plans to return.
        on_progress: called with (sizes done, sizes in all).

    Raises:
        SpecError: a cluster has no sizes (several groups, or a file), or a fixed or forbidden choice is unknown.
        Infeasible: no size meets the deadline.
        Interrupted: the user pressed Ctrl-C; says how far the proof is.
    """
    start = perf_counter()
    machines = [_machine(problem) for problem in problems]
    attempts = [attempt for machine in machines for attempt in machine.below()]
    sizes = sorted(
        ((nodes * machine.per_node, nodes, machine) for machine in machines for nodes in machine.open()),
        key=lambda size: size[0],
    )
    refusals: list[SpecError] = []
    done = 0
    try:
        for _, alike in groupby(sizes, key=lambda size: size[0]):
            tried = [machine.tried(nodes, refusals) for _, nodes, machine in alike]
            attempts += [attempt for attempt, _ in tried]
            met = [problem for _, problem in tried if problem is not None]
            done += len(tried)
            if on_progress is not None:
                on_progress(done, len(sizes))
            if met:
                return _searched(met, top, attempts, start)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted) and stop.best is not None:
            raise
        devices = max((attempt.devices for attempt in attempts), default=0)
        note = f"up to {devices:,} devices nothing is in time; larger sizes were not tried"
        raise Interrupted(None, note if devices else "") from None
    if refusals and len(refusals) == len(sizes):
        raise refusals[-1]
    raise _missed(machines, attempts)


# -- details ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Machine:
    """Nodes of one kind, up to as many as the problem's cluster has.

    Attributes:
        problem: on the largest size.
        name: of the cluster, without its counts.
        device_s: seconds times devices that a step takes at least.
    """

    problem: Problem
    name: str
    device_s: float

    @property
    def nodes(self) -> int:
        return self.problem.cluster.groups[0].nodes

    @property
    def per_node(self) -> int:
        return self.problem.cluster.groups[0].devices_per_node

    @property
    def deadline_s(self) -> float:
        assert self.problem.deadline_s is not None
        return self.problem.deadline_s

    def spec(self, nodes: int) -> str:
        return f"{self.name}:{nodes}x{self.per_node}"

    def sized(self, nodes: int) -> Problem:
        """The problem on that many nodes.

        Raises:
            SpecError: the machine cannot be built in this size.
        """
        spec = self.spec(nodes)
        return replace(self.problem, cluster=replace(load_cluster(spec), name=spec))

    def at_least_s(self, nodes: int) -> float:
        """Seconds that the run takes at least on some nodes."""
        return run_s(self.problem, self.device_s / (nodes * self.per_node))

    def open(self) -> range:
        """Sizes whose kernels may be in time, or nearly."""
        return range(max(1, ceil(self.at_least_s(1) / (_NEAR * self.deadline_s))), self.nodes + 1)

    def below(self) -> Iterator[Attempt]:
        """The sizes that their kernels exclude, as one entry that names the largest of them."""
        most = min(self.open().start - 1, self.nodes)
        if most:
            least_s = self.at_least_s(most)
            outcome = f"excluded: the kernels alone take {format_seconds(least_s)}"
            yield Attempt(
                self.spec(most), most * self.per_node, None, None, outcome, "kernel time", least_s, most - 1
            )

    def tried(self, nodes: int, refusals: list[SpecError]) -> tuple[Attempt, Problem | None]:
        """One size searched under the limit; the problem only if its best plan is in time.

        Sizes that cannot be built, or have no mesh with the fixed degrees, are noted among the refusals.
        """
        spec, devices = self.spec(nodes), nodes * self.per_node
        try:
            problem = self.sized(nodes)
            batch, degrees = problem.workload.global_batch_size, distinct(Space(problem).rows.values["dp"])
            if np.all(batch % degrees):
                outcome = f"global batch size {batch:,} not divisible by any possible dp"
                return Attempt(spec, devices, None, None, outcome, "no plan"), None
            found = search_strictly(problem, 1, limit_s=_NEAR * self.deadline_s / run_s(problem, 1.0))
        except SpecError as error:
            refusals.append(error)
            return Attempt(spec, devices, None, None, error.problems[0].found, "no mesh"), None
        except Infeasible as error:
            return nothing(problem, error), None
        if not found.plans:
            least_s = _NEAR * self.deadline_s
            outcome = f"excluded: no plan takes less than {format_seconds(least_s)}"
            return Attempt(spec, devices, None, None, outcome, "step time", least_s), None
        late = run_s(problem, found.best.estimate.step_time_s) / self.deadline_s - 1.0
        if late > 0.0:
            return planned(problem, found.best, f"too slow by {100.0 * late:.1f} %"), None
        return planned(problem, found.best, "meets the deadline"), problem


def _machine(problem: Problem) -> _Machine:
    cluster = problem.cluster
    name, _, counts = cluster.name.partition(":")
    if len(cluster.groups) > 1 or (not counts and name.endswith(".toml")):
        what = f"{cluster.name} cannot be resized"
        raise SpecError(Fault("--deadline", what, "clusters of the form NAME:NODESxDEVICES_PER_NODE"))
    return _Machine(problem, name, kernel_floor_s(problem))


def _searched(problems: Sequence[Problem], top: int, attempts: Sequence[Attempt], start: float) -> Fleet:
    """The size that meets the deadline, or the sizes of equally many devices, searched without a limit."""
    found: list[SearchResult] = []
    stopped = False
    for problem in problems:
        try:
            found.append(search_strictly(problem, top))
        except Interrupted as stop:
            stopped = True
            found += [stop.best] if isinstance(stop.best, SearchResult) else []
            break
    if not found:
        raise Interrupted
    result = merged(found, problems[0].objective, top)
    report = replace(result.search, wall_s=perf_counter() - start)
    fleet = Fleet(replace(result, search=report), tuple(attempts))
    if stopped:
        raise Interrupted(fleet)
    return fleet


def _missed(machines: Sequence[_Machine], attempts: Sequence[Attempt]) -> Infeasible:
    """No size is in time: by how much the fastest or the largest misses, or why none has a plan."""
    deadline_s = machines[0].deadline_s
    near = [attempt for attempt in attempts if attempt.run_s is not None]
    late = [attempt for attempt in attempts if attempt.run_at_least_s is not None]
    if near:
        best = min(near, key=lambda attempt: attempt.run_s or 0.0)
        which, takes, run = "the fastest size", "takes", best.run_s or 0.0
    elif late:
        best = max(late, key=lambda attempt: attempt.devices)
        which, takes, run = "the largest size", *_takes(machines, best)
    else:
        return Infeasible(
            Fault(f"{a.cluster} ({a.devices:,} devices)", a.outcome, "a run that meets the deadline")
            for a in attempts[-3:]
        )
    return Infeasible(
        Fault(
            "--deadline",
            f"{which}, {best.cluster} with {best.devices:,} devices, {takes} {format_seconds(run)}",
            f"at most {format_seconds(deadline_s)}",
            f"That is {run / deadline_s:,.2f}× too slow: allow more devices, more time, or fewer tokens.",
        )
    )


def _takes(machines: Sequence[_Machine], attempt: Attempt) -> tuple[str, float]:
    """How long the run takes on a size that a bound excludes; of its kernels alone, where they are the bound."""
    if attempt.excluded_by == "kernel time":
        return "takes at least", attempt.run_at_least_s or 0.0
    machine = next(m for m in machines if attempt.cluster == m.spec(attempt.devices // m.per_node))
    problem = machine.sized(attempt.devices // machine.per_node)
    return "takes", run_s(problem, search_strictly(problem, 1).best.estimate.step_time_s)
