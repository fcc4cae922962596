"""``planner solve rlhf``: devices and layouts for every call of a step of reinforcement learning from feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from planner.cli.options import Json, option, with_options
from planner.cli.solve_job import read_deadline
from planner.cli.values import (
    attempt,
    raise_if_any,
    read_cluster,
    read_list,
    read_model,
    read_stack,
)
from planner.errors import Problem

if TYPE_CHECKING:
    from planner.serving.rlhf import RlhfJob
    from planner.specs.model import Model

__all__ = ["rlhf"]

_PERMISSION = "staleness"


@dataclass(frozen=True)
class RlhfOptions:
    """A step as the command line gives it; None means that the option was left out."""

    actor: Annotated[str | None, option("--actor", text="Model that answers and is trained. Required.")] = (
        None
    )
    critic: Annotated[
        str | None, option("--critic", text="Model that judges and is trained [as --actor].")
    ] = None
    reward: Annotated[str | None, option("--reward", text="Model that rewards [as --critic].")] = None
    cluster: Annotated[str | None, option("--cluster", text="DEVICE:NODESxDEVICES. Required.")] = None
    prompts: Annotated[str | None, option("--prompts", text="Of one step. Required.", metavar="N")] = None
    prompt_tokens: Annotated[
        str | None, option("--isl", text="Tokens of a prompt. Required.", metavar="N")
    ] = None
    answer_tokens: Annotated[
        str | None, option("--osl", text="Tokens of an answer. Required.", metavar="N")
    ] = None
    mini_batches: Annotated[
        str, option("--mini-batches", text="Optimizer steps that prompts are dealt to [8].", metavar="N")
    ] = "8"
    algorithm: Annotated[
        str, option("--algorithm", text="ppo, or grpo, which has no critic [ppo].", metavar="NAME")
    ] = "ppo"
    parts: Annotated[
        str, option("--parts", text="Equal parts that the devices may be cut to at most [4].", metavar="N")
    ] = "4"
    staleness: Annotated[
        str,
        option("--staleness", text="Further steps under way; needs --allow staleness [0].", metavar="N"),
    ] = "0"
    allow: Annotated[
        list[str] | None,
        option("--allow", text="staleness: answers of earlier weights.", metavar="PERMISSION"),
    ] = None
    stack: Annotated[str, option("--stack", text="Software that trains [default].", metavar="NAME")] = (
        "default"
    )
    engine: Annotated[str, option("--engine", text="Software that generates [vllm].", metavar="NAME")] = (
        "vllm"
    )
    deadline: Annotated[
        str,
        option(
            "--deadline",
            text="Of the search over calls; then the best so far, with its gap [60s].",
            metavar="TIME",
        ),
    ] = "60s"

    def read(self) -> tuple[RlhfJob, float]:
        """The step to plan, and the seconds that the search may take.

        Raises:
            SpecError: all that is wrong with the options.
        """
        from planner.serving.rlhf import ALGORITHMS, RlhfJob

        faults: list[Problem] = []
        models = self._models(faults)
        flags = {"stack": "--stack", "cluster": "--cluster"}
        cluster = attempt(faults, read_cluster, self.cluster, flags=flags) if self.cluster else None
        if self.cluster is None:
            faults.append(Problem("--cluster", "is missing", "a cluster, such as h100-sxm:2x8"))
        trains, generates = (
            attempt(faults, read_stack, name, flags=flags) for name in (self.stack, self.engine)
        )
        counts = {
            flag: _whole(faults, flag, text, least)
            for flag, text, least in (
                ("--prompts", self.prompts, 1), ("--isl", self.prompt_tokens, 1), ("--osl", self.answer_tokens, 1),
                ("--mini-batches", self.mini_batches, 1), ("--parts", self.parts, 1), ("--staleness", self.staleness, 0),
            )
        }  # fmt: skip
        if self.algorithm not in ALGORITHMS:
            expected = f"one of {', '.join(ALGORITHMS)}"
            faults.append(Problem("--algorithm", repr(self.algorithm[:40]), expected))
        self._check_permission(faults, counts["--staleness"])
        limit_s = attempt(faults, read_deadline, self.deadline)
        raise_if_any(faults)
        assert cluster is not None
        assert trains is not None
        assert generates is not None
        assert limit_s is not None
        job = RlhfJob(
            models, cluster, trains, generates, counts["--prompts"], counts["--isl"], counts["--osl"],
            counts["--mini-batches"], self.algorithm, counts["--parts"], counts["--staleness"],
        )  # fmt: skip
        return job, limit_s

    def _models(self, faults: list[Problem]) -> dict[str, Model]:
        """The model of every role; what is wrong with one that several roles have is said once."""
        critic = self.critic or self.actor
        names = {
            "actor": self.actor,
            "critic": critic,
            "reference": self.actor,
            "reward": self.reward or critic,
        }
        if self.algorithm == "grpo":
            del names["critic"]
        found: dict[str, Model] = {}
        said: dict[str, Problem] = {}
        for role, name in names.items():
            wrong: list[Problem] = []
            model = attempt(wrong, read_model, name, flags={"model": f"--{role}"})
            said = {fault.found + fault.expected: fault for fault in wrong} | said
            if model is not None:
                found[role] = model
        faults += said.values()
        return found

    def _check_permission(self, faults: list[Problem], staleness: int) -> None:
        allowed = {name for text in self.allow or () for name in read_list(text)}
        unknown = sorted(allowed - {_PERMISSION})
        faults += [Problem("--allow", repr(name[:40]), _PERMISSION) for name in unknown]
        if staleness and _PERMISSION not in allowed:
            hint = f"Add --allow {_PERMISSION}."
            faults.append(Problem("--staleness", "changes the result of training", "permission for it", hint))


@with_options
def rlhf(asked: RlhfOptions, as_json: Json = False) -> None:
    """Which devices run which call of a step of PPO or GRPO, and how.

    Every call (generate, read, train) has a block of devices and a layout of its own; weights move where they differ. Generation
    is priced by the engine of serving, training is the best plan of a search. With --staleness, answers to the next prompts are
    generated while earlier ones are trained on.
    """
    from planner.cli.output import print_json
    from planner.report.calls import content_of, show_calls
    from planner.serving.rlhf import call_problem
    from planner.solve.combinatorial.calls import plan_calls

    job, limit_s = asked.read()
    problem = call_problem(job)
    content = content_of(job, problem, plan_calls(problem, time_limit_s=limit_s))
    if as_json:
        print_json(content)
    else:
        show_calls(content)


def _whole(faults: list[Problem], flag: str, text: str | None, least: int) -> int:
    """A whole number from ``least``; a fault is noted."""
    digits = (text or "").strip()
    number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 8 else -1
    if number < least:
        found = "is missing" if text is None else repr(text[:40])
        faults.append(Problem(flag, found, f"a whole number from {least}"))
    return max(number, least)
