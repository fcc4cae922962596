"""Published runs that are near a job: how many there are, how far off their predictions are, and whether any was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.uncertainty.published import PublishedRun, active_parameters, load_published_runs

if TYPE_CHECKING:
    from planner.specs.problem import Problem

__all__ = ["Nearby", "far_of", "far_without_source", "is_far", "nearby"]

# What near means: the nearest of these that any run fulfils. Equal columns, and the factor that sizes may differ by.
_STEPS = (
    (("stack", "accelerator"), 4.0),
    (("stack", "generation"), 4.0),
    (("generation",), 4.0),
    (("generation",), 16.0),
)
# What a run's own neighbours are: jobs that constants and mechanisms, which were found on it, are as right for.
_LIKE = ("stack", "generation", "experts", "state_space")
_SIZES = ("active_parameters", "devices", "seq_len")
_FACTOR = 2.0


class Nearby(NamedTuple):
    """Runs near a job.

    Attributes:
        runs: the runs, the worst predicted one first.
        alike: in words, what makes them near.
    """

    runs: tuple[PublishedRun, ...]
    alike: str

    @property
    def median_error(self) -> float:
        """Of the absolute errors of their rates, predicted with constants that were fitted without their model's runs."""
        errors = [_error(run) for run in self.runs]
        middle = len(errors) // 2
        return errors[middle] if len(errors) % 2 else 0.5 * (errors[middle - 1] + errors[middle])

    @property
    def worst_error(self) -> float:
        """The same, of the worst of them."""
        return _error(self.runs[0])

    def as_dict(self) -> dict[str, Any]:
        """The runs as JSON fields; errors are fractions."""
        return {
            "runs": len(self.runs),
            "alike": self.alike,
            "median_error": self.median_error,
            "worst_error": self.worst_error,
            "worst_run": self.runs[0].row_id,
            "sources": sorted({run.source for run in self.runs}),
        }


def nearby(problem: Problem) -> Nearby | None:
    """Published runs with a measured time that are near a job; None where there are none.

    They train the same kind of model (dense, or a mixture of experts), on the same accelerator with the same software stack;
    where there are none, on the same generation of accelerators, and then with any stack. Parameters that a token meets, devices
    and sequence length differ by a factor of four at most, or of sixteen where there are none within four.
    """
    device = problem.cluster.device
    job = {
        "stack": problem.stack.name,
        "accelerator": device.name,
        "generation": device.generation,
    }
    sizes = {
        "active_parameters": active_parameters(problem.model),
        "devices": float(problem.cluster.devices),
        "seq_len": float(problem.workload.seq_len),
    }
    experts = any(block.moe for block in problem.model.blocks.values())
    runs = [
        (run, max(max(getattr(run, name) / size, size / getattr(run, name)) for name, size in sizes.items()))
        for run in load_published_runs(device.generation)
        if run.error_without_model is not None and run.experts == experts
    ]
    for names, factor in _STEPS:
        found = [
            run
            for run, apart in runs
            if apart <= factor and all(getattr(run, name) == job[name] for name in names)
        ]
        if found:
            kind = "mixtures of experts" if experts else "dense models"
            software = f" with {job['stack']}" if "stack" in names else ""
            where = job[names[-1]]
            text = (
                f"{kind} on {where}{software}, parameters, devices and length within a factor of {factor:g}"
            )
            return Nearby(tuple(sorted(found, key=_error, reverse=True)), text)
    return None


def is_far(problem: Problem, *, measured: bool) -> bool:
    """Whether no run that constants were fitted to is a job's neighbour.

    Neighbours train the same kind of model on the same generation of accelerators, with the same software where that was
    ``measured``; parameters that a token meets, devices and sequence length differ by a factor of two at most.
    """
    generation, blocks = problem.cluster.device.generation, problem.model.blocks.values()
    job = (
        problem.stack.name, generation, any(block.moe for block in blocks), any(block.ssm for block in blocks),
        active_parameters(problem.model), float(problem.cluster.devices), float(problem.workload.seq_len),
    )  # fmt: skip
    return _is_far(generation, job if measured else job[1:])


def far_of(runs: Sequence[PublishedRun]) -> list[bool]:
    """The same of published runs, none of which is a neighbour of its own."""
    jobs = [_job(run) for run in runs]
    fitted = [at for at, run in enumerate(runs) if _fitted(run)]
    return [
        not any(_neighbours(job, jobs[other]) for other in fitted if other != at)
        for at, job in enumerate(jobs)
    ]


def far_without_source(runs: Sequence[PublishedRun]) -> list[bool]:
    """The same as if their software had not been measured, and nothing else of their source."""
    jobs = [_job(run)[1:] for run in runs]
    fitted = [(run.source, job) for run, job in zip(runs, jobs, strict=True) if _fitted(run)]
    return [
        not any(source != run.source and _neighbours(job, other) for source, other in fitted)
        for run, job in zip(runs, jobs, strict=True)
    ]


@lru_cache(maxsize=4096)
def _is_far(generation: str, job: tuple[Any, ...]) -> bool:
    """Without its first column, the software, a job is compared with whatever there is."""
    first = len(_LIKE) + len(_SIZES) - len(job)
    return not any(
        _fitted(run) and _neighbours(job, _job(run)[first:]) for run in load_published_runs(generation)
    )


def _fitted(run: PublishedRun) -> bool:
    return not run.held_out and run.error is not None


def _job(run: PublishedRun) -> tuple[Any, ...]:
    return tuple(getattr(run, name) for name in (*_LIKE, *_SIZES))


def _neighbours(job: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    same = len(job) - len(_SIZES)
    return job[:same] == other[:same] and all(
        1.0 / _FACTOR <= size / others <= _FACTOR
        for size, others in zip(job[same:], other[same:], strict=True)
    )


def _error(run: PublishedRun) -> float:
    assert run.error_without_model is not None
    return abs(run.error_without_model)
