"""``planner solve peers``: unlike peers to the stages of a pipeline."""

from __future__ import annotations

from typing import Annotated

from planner.cli.options import Json, option
from planner.cli.solve_job import Backend, Deadline, read_backend, read_deadline

__all__ = ["peers"]


def peers(
    speeds: Annotated[
        str | None,
        option("--peers", text="How many of every speed: SPEED:COUNT,… e.g. 65:8,312:2.", metavar="LIST"),
    ] = None,
    stages: Annotated[
        str | None, option("--stages", text="Work of every stage, e.g. 1,1,2.", metavar="LIST")
    ] = None,
    backend: Backend = "scipy",
    deadline: Deadline = "60s",
    as_json: Json = False,
) -> None:
    """Which unlike peers work on which stage of a pipeline.

    Peers of a stage share its micro-batches; the slowest stage, whose rate is the pipeline's, is made as fast as can be. Speeds
    and work are in units of your own, such as TFLOP/s and TFLOP per micro-batch.
    """
    from planner.cli.output import print_json
    from planner.cli.values import attempt, raise_if_any
    from planner.errors import Problem
    from planner.report.peers import show_peers
    from planner.solve.combinatorial.peers import longest_first, staff

    faults: list[Problem] = []
    counts = attempt(faults, _read_peers, speeds)
    works = attempt(faults, _read_works, stages)
    limit_s = attempt(faults, read_deadline, deadline)
    attempt(faults, read_backend, backend)
    raise_if_any(faults)
    assert counts is not None
    assert works is not None
    found = staff(counts, works, backend=backend, time_limit_s=limit_s)
    content = {
        "rate": found.rate, "longest_first_rate": longest_first(counts, works), "speeds": list(counts), "works": works,
        "counts": found.counts, "certificate": found.certificate.as_dict(),
    }  # fmt: skip
    if as_json:
        print_json(content)
    else:
        show_peers(content)


def _read_peers(text: str | None) -> dict[float, int]:
    """How many peers there are of every speed in ``65:8,312:2``.

    Raises:
        SpecError: it is no such list.

    >>> _read_peers("65:8, 312:2")
    {65.0: 8, 312.0: 2}
    """
    from planner.errors import Problem, SpecError

    try:
        pairs = [
            (float(speed), int(count))
            for speed, count in (part.split(":") for part in (text or "").split(","))
        ]
        if len(dict(pairs)) < len(pairs) or not all(
            0.0 < speed < 1e12 and 0 < count <= 10**6 for speed, count in pairs
        ):
            raise ValueError(text)
    except ValueError:
        found = repr(text[:40]) if text else "is missing"
        raise SpecError(
            Problem("--peers", found, "different speeds with counts, such as 65:8,312:2")
        ) from None
    return dict(pairs)


def _read_works(text: str | None) -> list[float]:
    """The work of every stage in ``1,1,2``.

    Raises:
        SpecError: it is no such list.

    >>> _read_works("1, 1, 2")
    [1.0, 1.0, 2.0]
    """
    from planner.errors import Problem, SpecError

    try:
        works = [float(part) for part in (text or "").split(",")]
        if not all(0.0 < work < 1e12 for work in works):
            raise ValueError(text)
    except ValueError:
        found = repr(text[:40]) if text else "is missing"
        raise SpecError(Problem("--stages", found, "work of every stage, such as 1,1,2")) from None
    return works
