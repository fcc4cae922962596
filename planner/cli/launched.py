"""A configuration of a launcher as the problem whose only plan it is: shared by ``planner estimate`` and ``planner check``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.cli.job import JobOptions

if TYPE_CHECKING:
    from planner.export.launched import LaunchedRun
    from planner.plans.plan import Plan
    from planner.specs.problem import Problem

__all__ = ["best_of_launcher", "launched_problem"]

_FLAGS = {"global_batch_size": "--global-batch", "seq_len": "--seq-len"}


def launched_problem(job: JobOptions, launcher: str, path: str) -> tuple[Problem, LaunchedRun]:
    """The problem that a configuration describes, completed and overruled by the options.

    Raises:
        SpecError: what is wrong with the file or the options, or missing from both, all at once.
    """
    from planner.cli.values import parse_fixed
    from planner.errors import Problem as Fault
    from planner.errors import SpecError
    from planner.export.readers import read_launched

    run = read_launched(launcher, path)
    given = parse_fixed(job.fix or [])
    run = _with_batches(run, job, given)
    faults = [
        Fault(f"{path}: {_FLAGS.get(name, name)}", said, _option(name))
        for name, said in run.missing.items()
        if name not in given and not (name == "global_batch_size" and job.global_batch is not None)
    ]
    if faults and (run.model is not None or job.model is not None):
        raise SpecError(faults)
    problem = job.problem(faults, base=run)
    if run.devices not in (None, problem.cluster.devices):
        found = f"{problem.cluster.devices:,} devices"
        hint = "Numbers that a script takes from its environment are its defaults here: set them in a copy of it."
        raise SpecError(
            Fault(
                "--cluster", found, f"{run.devices:,}, as {path} starts", hint if path.endswith("sh") else ""
            )
        )
    if not any(block.moe for block in problem.model.blocks.values()):
        # Launchers ignore expert degrees where there are no experts.
        problem = replace(problem, fixed={**problem.fixed, "ep": 1, "etp": 1})
    return problem, run


def best_of_launcher(problem: Problem, launcher: str) -> Plan | None:
    """The best plan for the same job that the same launcher can run; None where none fits."""
    from planner import search
    from planner.cli.progress import Progress
    from planner.errors import Infeasible, SpecError
    from planner.export.launchers import launcher as find_launcher

    kept = {
        name: value
        for name, value in problem.fixed.items()
        if name in ("precision", "optimizer", "gradient_dtype")
    }
    try:
        with Progress() as progress:
            return search(replace(problem, fixed=kept, launcher=find_launcher(launcher)), 1, progress).best
    except (Infeasible, SpecError):
        return None


def _option(name: str) -> str:
    return f"{_FLAGS[name]} N" if name in _FLAGS else f"--fix {name}=N"


def _with_batches(run: LaunchedRun, job: JobOptions, given: Mapping[str, str]) -> LaunchedRun:
    """The run with the batch, or the size of micro-batches, that follows from their number and the cluster's devices."""
    from planner.cli.values import read_cluster
    from planner.errors import PlannerError

    steps, known = run.micro_batches, {**run.fixed, **given}
    whole = job.global_batch or run.workload.get("global_batch_size")
    if steps is None or not job.cluster or (whole is not None and "micro_batch_size" in known):
        return run
    try:
        replicas = read_cluster(job.cluster[0]).devices / (
            run.fixed["tp"] * run.fixed["cp"] * run.fixed["pp"]
        )
        found = (
            int(known["micro_batch_size"]) * replicas * steps
            if whole is None
            else int(whole) / (replicas * steps)
        )
    except (PlannerError, ValueError, KeyError):
        return run  # the options' own fault, which is found with the others
    if found != int(found) or found < 1:
        return run
    name = "global_batch_size" if whole is None else "micro_batch_size"
    missing = {knob: said for knob, said in run.missing.items() if knob != name}
    if whole is None:
        return replace(run, workload={**run.workload, name: int(found)}, missing=missing)
    return replace(run, fixed={**run.fixed, name: int(found)}, missing=missing)
