"""``planner solve curriculum``: a run whose sequences grow, a plan per length."""

from __future__ import annotations

from typing import Annotated

from planner.cli.options import Json, option

__all__ = ["curriculum"]


def curriculum(
    model: Annotated[str | None, option("--model", text="Shipped model, .toml, or config.json.")] = None,
    cluster: Annotated[
        str | None, option("--cluster", text="DEVICE:NODESxDEVICES, a shipped cluster, or .toml.")
    ] = None,
    lengths: Annotated[
        str | None,
        option(
            "--lengths",
            text="Tokens of every length, in order: LENGTH:TOKENS,… e.g. 128:10B,1024:90B.",
            metavar="LIST",
        ),
    ] = None,
    tokens_per_step: Annotated[
        str | None, option("--tokens-per-step", text="Of every phase, e.g. 4M. Required.", metavar="N")
    ] = None,
    store: Annotated[
        str | None,
        option(
            "--store", text="What a device stores and loads per second [122 MB, Llama 3's].", metavar="SIZE"
        ),
    ] = None,
    restart: Annotated[
        str | None, option("--restart", text="To start again under another plan [9 min].", metavar="TIME")
    ] = None,
    fix: Annotated[
        list[str] | None,
        option("--fix", text="Every plan must have this. Repeatable.", metavar="KNOB=VALUE"),
    ] = None,
    stack: Annotated[str, option("--stack", text="Software stack [default].", metavar="NAME")] = "default",
    as_json: Json = False,
) -> None:
    """A plan for every length of a run whose sequences grow, and the time of them all.

    Where plans of neighbouring phases differ, states are stored and loaded under the other plan; that is weighed against a plan
    that suits both.
    """
    from dataclasses import asdict

    from planner.cli.output import print_json
    from planner.cli.solve_job import SolveJob
    from planner.cli.values import optional_quantity
    from planner.report.curriculum import show_curriculum
    from planner.report.goodput import RESTART_S, STORE_BYTES_PER_S
    from planner.solve.curriculum import plan_curriculum
    from planner.specs.problem import Problem
    from planner.units import parse_bytes, parse_count, parse_seconds

    job = SolveJob(None, model, cluster, "1", None, fix, stack, None, "60s", "scipy", length=False)
    phases = job.attempt(_read_phases, lengths)
    per_step = optional_quantity(job.faults, "--tokens-per-step", tokens_per_step, parse_count)
    if tokens_per_step is None:
        job.attempt(_missing)
    store_bytes_per_s = (
        optional_quantity(job.faults, "--store", store, parse_bytes) or STORE_BYTES_PER_S.value
    )
    restart_s = optional_quantity(job.faults, "--restart", restart, parse_seconds)
    job.raise_if_any()
    assert per_step is not None
    problem = Problem(job.model, job.cluster, job.workload(1), job.stack, fixed=job.knobs)
    found = plan_curriculum(
        problem, phases, per_step, store_bytes_per_s, RESTART_S.value if restart_s is None else restart_s
    )
    content = {
        "run_s": found.run_s, "at_last_length_s": found.at_last_length_s,
        "phases": [{**{k: v for k, v in asdict(p).items() if k != "plan"}, "plan": p.plan.as_dict()} for p in found.phases],
    }  # fmt: skip
    if as_json:
        print_json(content)
    else:
        show_curriculum(found, job.model, job.cluster)


def _missing() -> None:
    from planner.errors import Problem, SpecError

    raise SpecError(Problem("--tokens-per-step", "is missing", "a count such as 4M"))


def _read_phases(text: str | None) -> dict[int, float]:
    """Tokens of every length in ``128:10B,1024:90B``, in order.

    Raises:
        SpecError: it is no such list.

    >>> _read_phases("128:10B, 1024:90B")
    {128: 10000000000.0, 1024: 90000000000.0}
    """
    from planner.errors import Problem, SpecError
    from planner.units import parse_count

    found: dict[int, float] = {}
    try:
        for part in (text or "").split(","):
            length, tokens = part.split(":")
            seq_len, amount = int(parse_count(length.strip())), parse_count(tokens.strip())
            if not 1 <= seq_len <= 10**8 or amount <= 0.0 or seq_len in found:
                raise ValueError(part)
            found[seq_len] = amount
    except ValueError:
        told = repr((text or "")[:40]) if text else "is missing"
        raise SpecError(
            Problem("--lengths", told, "different lengths with tokens, such as 128:10B,1024:90B")
        ) from None
    return found
