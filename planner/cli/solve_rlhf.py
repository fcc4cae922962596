"""``planner solve rlhf``: devices and layouts for every call of a step of reinforcement learning from feedback."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["rlhf"]

_PERMISSION = "staleness"


def _option(*names: str, text: str, metavar: str = "TEXT") -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def rlhf(
    actor: Annotated[
        str | None, _option("--actor", text="Model that answers and is trained. Required.")
    ] = None,
    critic: Annotated[
        str | None, _option("--critic", text="Model that judges and is trained [as --actor].")
    ] = None,
    reward: Annotated[str | None, _option("--reward", text="Model that rewards [as --critic].")] = None,
    cluster: Annotated[str | None, _option("--cluster", text="DEVICE:NODESxDEVICES. Required.")] = None,
    prompts: Annotated[str | None, _option("--prompts", text="Of one step. Required.", metavar="N")] = None,
    prompt_tokens: Annotated[
        str | None, _option("--isl", text="Tokens of a prompt. Required.", metavar="N")
    ] = None,
    answer_tokens: Annotated[
        str | None, _option("--osl", text="Tokens of an answer. Required.", metavar="N")
    ] = None,
    mini_batches: Annotated[
        str, _option("--mini-batches", text="Optimizer steps that prompts are dealt to [8].", metavar="N")
    ] = "8",
    algorithm: Annotated[
        str, _option("--algorithm", text="ppo, or grpo, which has no critic [ppo].", metavar="NAME")
    ] = "ppo",
    parts: Annotated[
        str, _option("--parts", text="Equal parts that the devices may be cut to at most [4].", metavar="N")
    ] = "4",
    staleness: Annotated[
        str,
        _option("--staleness", text="Further steps under way; needs --allow staleness [0].", metavar="N"),
    ] = "0",
    allow: Annotated[
        list[str] | None,
        _option("--allow", text="staleness: answers of earlier weights.", metavar="PERMISSION"),
    ] = None,
    stack: Annotated[
        str, _option("--stack", text="Software that trains [default].", metavar="NAME")
    ] = "default",
    engine: Annotated[
        str, _option("--engine", text="Software that generates [vllm].", metavar="NAME")
    ] = "vllm",
    deadline: Annotated[
        str,
        _option(
            "--deadline",
            text="Of the search over calls; then the best so far, with its gap [60s].",
            metavar="TIME",
        ),
    ] = "60s",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Which devices run which call of a step of PPO or GRPO, and how.

    Every call (generate, read, train) has a block of devices and a layout of its own; weights move where they differ. Generation
    is priced by the engine of serving, training is the best plan of a search. With --staleness, answers to the next prompts are
    generated while earlier ones are trained on.
    """
    from planner.cli.output import print_json
    from planner.cli.solve_job import read_deadline
    from planner.cli.values import attempt, raise_if_any, read_cluster, read_list, read_model, read_stack
    from planner.errors import Problem
    from planner.report.calls import content_of, show_calls
    from planner.serving.rlhf import ALGORITHMS, RlhfJob, call_problem
    from planner.solve.combinatorial.calls import plan_calls

    faults: list[Problem] = []
    names = {
        "actor": actor,
        "critic": critic or actor,
        "reference": actor,
        "reward": reward or critic or actor,
    }
    if algorithm == "grpo":
        del names["critic"]
    flags = {"model": "--actor", "stack": "--stack", "cluster": "--cluster"}
    models = {
        role: attempt(faults, read_model, name, flags={**flags, "model": f"--{role}"})
        for role, name in names.items()
    }
    faults = list({fault.found + fault.expected: fault for fault in reversed(faults)}.values())[::-1]
    machine = attempt(faults, read_cluster, cluster, flags=flags) if cluster else None
    if cluster is None:
        faults.append(Problem("--cluster", "is missing", "a cluster, such as h100-sxm:2x8"))
    trains, generates = (attempt(faults, read_stack, name, flags=flags) for name in (stack, engine))
    counts = {
        flag: _whole(faults, flag, text, least)
        for flag, text, least in (
            ("--prompts", prompts, 1), ("--isl", prompt_tokens, 1), ("--osl", answer_tokens, 1),
            ("--mini-batches", mini_batches, 1), ("--parts", parts, 1), ("--staleness", staleness, 0),
        )
    }  # fmt: skip
    if algorithm not in ALGORITHMS:
        faults.append(Problem("--algorithm", repr(algorithm[:40]), f"one of {', '.join(ALGORITHMS)}"))
    allowed = {name for text in allow or () for name in read_list(text)}
    for name in sorted(allowed - {_PERMISSION}):
        faults.append(Problem("--allow", repr(name[:40]), _PERMISSION))
    if counts["--staleness"] and _PERMISSION not in allowed:
        faults.append(
            Problem(
                "--staleness",
                "changes the result of training",
                "permission for it",
                f"Add --allow {_PERMISSION}.",
            )
        )
    limit_s = attempt(faults, read_deadline, deadline)
    raise_if_any(faults)
    assert machine is not None
    assert trains is not None
    assert generates is not None
    job = RlhfJob(
        {role: model for role, model in models.items() if model is not None}, machine, trains, generates, counts["--prompts"],
        counts["--isl"], counts["--osl"], counts["--mini-batches"], algorithm, counts["--parts"], counts["--staleness"],
    )  # fmt: skip
    problem = call_problem(job)
    content = content_of(job, problem, plan_calls(problem, time_limit_s=limit_s))
    if as_json:
        print_json(content)
    else:
        show_calls(content)


def _whole(faults: list[Any], flag: str, text: str | None, least: int) -> int:
    """A whole number from ``least``; a fault is noted."""
    from planner.errors import Problem

    digits = (text or "").strip()
    number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 8 else -1
    if number < least:
        found = "is missing" if text is None else repr(text[:40])
        faults.append(Problem(flag, found, f"a whole number from {least}"))
    return max(number, least)
