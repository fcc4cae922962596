"""The options that describe a job, shared by every verb that prices one, and the problems that they make.

Numbers arrive as text and are read here, so that everything that is wrong is said at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from planner.cli.options import option
from planner.cli.values import (
    attempt,
    check_objective,
    check_optimizer,
    make_problem,
    make_workload,
    optional_number,
    optional_quantity,
    optional_whole,
    parse_fixed,
    raise_if_any,
    read_cluster,
    read_launcher,
    read_list,
    read_model,
    read_preset,
    read_reserve,
    read_risk,
    read_stack,
)
from planner.errors import Problem as Fault
from planner.errors import SpecError

if TYPE_CHECKING:
    from planner.specs.cluster import Cluster
    from planner.specs.model import Model
    from planner.specs.problem import Problem
    from planner.specs.workload import TrainWorkload

__all__ = ["JobOptions"]

_SPEC_FLAGS = {name: f"--{name}" for name in ("model", "cluster", "stack")}
_WORKLOAD_FLAGS = {
    "global_batch_size": "--global-batch",
    "seq_len": "--seq-len",
    "encoder_seq_len": "--encoder-seq-len",
    "document_len": "--document-len",
    "expert_load_factor": "--expert-load-factor",
    "expert_zipf": "--expert-zipf",
    "capacity_factor": "--capacity-factor",
    "tokens": "--tokens",
    "precisions": "--precision",
}
_PROBLEM_FLAGS = {
    "reserve": "--reserve",
    "max_oom_risk": "--max-oom-risk",
    "objective": "--objective",
    "usd_per_device_hour": "--usd-per-hour",
    "pue": "--pue",
    "kg_per_kwh": "--carbon",
    "deadline_s": "--deadline",
    "allowed": "--allow",
    "explore": "--explore",
}


class Described(Protocol):
    """A job that a launcher's configuration describes: its model if any, fields of the workload, and choices of the plan and of
    its layers."""

    @property
    def model(self) -> Model | None: ...
    @property
    def workload(self) -> Mapping[str, Any]: ...
    @property
    def fixed(self) -> Mapping[str, Any]: ...
    @property
    def layerwise(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True, eq=False)
class JobOptions:
    """A job as the command line gives it; None and empty lists mean that the option was left out."""

    model: Annotated[
        str | None, option("--model", text="Shipped model, .toml, or config.json. Required.")
    ] = None
    cluster: Annotated[
        list[str] | None,
        option(
            "--cluster",
            text="DEVICE:NODESxDEVICES, a shipped cluster, or .toml. Required; repeat to compare.",
        ),
    ] = None
    global_batch: Annotated[
        str | None, option("--global-batch", text="Sequences per optimizer step. Required.", metavar="N")
    ] = None
    seq_len: Annotated[
        str | None, option("--seq-len", text="Tokens per sequence. Required.", metavar="N")
    ] = None
    fix: Annotated[
        list[str] | None,
        option(
            "--fix",
            text="Every plan must have this, e.g. tp=8 or zero_stage=3. Repeatable.",
            metavar="KNOB=VALUE",
        ),
    ] = None
    preset: Annotated[
        str | None,
        option(
            "--preset",
            text="Start from a published combination, e.g. ptdp (planner techniques); --fix goes before it.",
        ),
    ] = None
    forbid: Annotated[
        list[str] | None,
        option(
            "--forbid", text="No plan may match this, e.g. '*_offload' or tp=16. Repeatable.", metavar="GLOB"
        ),
    ] = None
    allow: Annotated[
        list[str] | None,
        option(
            "--allow",
            text="Plans may do this, though it changes the result of training: staleness, lossy. Repeatable.",
            metavar="PERMISSION",
        ),
    ] = None
    precision: Annotated[
        str | None,
        option("--precision", text="Formats to choose from, e.g. bf16,fp8 [bf16].", metavar="LIST"),
    ] = None
    optimizer: Annotated[
        str | None, option("--optimizer", text="Optimizer, e.g. muon [adamw].", metavar="NAME")
    ] = None
    reserve: Annotated[
        str | None, option("--reserve", text="Device memory to leave free: 5% or 4GiB [0].", metavar="SIZE")
    ] = None
    max_oom_risk: Annotated[
        str | None,
        option(
            "--max-oom-risk",
            text="Chance of running out of memory that plans may have, where any keeps it; 100% is no limit [10%].",
            metavar="SHARE",
        ),
    ] = None
    objective: Annotated[
        str,
        option(
            "--objective", text="Rank by step_time, usd, energy or gpu_hours [step_time].", metavar="NAME"
        ),
    ] = "step_time"
    tokens: Annotated[
        str | None,
        option(
            "--tokens", text="Length of the run, e.g. 15T: adds days, device hours and dollars.", metavar="N"
        ),
    ] = None
    usd_per_hour: Annotated[
        str | None,
        option("--usd-per-hour", text="Price per device and hour [the device profile's].", metavar="USD"),
    ] = None
    pue: Annotated[
        str | None,
        option("--pue", text="Energy at the meter over the devices', for run totals [1].", metavar="X"),
    ] = None
    carbon: Annotated[
        str | None,
        option("--carbon", text="Kilograms of CO2e per kWh, for run totals, e.g. 0.385.", metavar="KG"),
    ] = None
    launcher: Annotated[
        str | None,
        option(
            "--for",
            text="Only plans that it can run, e.g. megatron, deepspeed or accelerate.",
            metavar="LAUNCHER",
        ),
    ] = None
    document_len: Annotated[
        str | None,
        option(
            "--document-len", text="Mean document length where attention stops at documents.", metavar="N"
        ),
    ] = None
    encoder_seq_len: Annotated[
        str | None,
        option("--encoder-seq-len", text="Tokens per sequence of the encoder [as --seq-len].", metavar="N"),
    ] = None
    expert_load_factor: Annotated[
        str | None,
        option("--expert-load-factor", text="Busiest expert rank relative to the mean [1].", metavar="X"),
    ] = None
    expert_zipf: Annotated[
        str | None,
        option(
            "--expert-zipf",
            text="Popularity of the j-th expert falls off as j^-X [0: all alike].",
            metavar="X",
        ),
    ] = None
    capacity_factor: Annotated[
        str | None,
        option("--capacity-factor", text="Cap tokens per expert at this multiple of the mean.", metavar="X"),
    ] = None
    stack: Annotated[
        str, option("--stack", text="Software stack: shipped, or .toml [default].", metavar="NAME")
    ] = "default"

    @property
    def given(self) -> bool:
        """Whether a job was named at all."""
        return any((self.model, self.cluster, self.global_batch, self.seq_len))

    def flags_given(self) -> dict[str, str]:
        """Every option that is not at its default: its field and how it is spelt."""
        return {
            field.name: "--" + field.name.replace("_", "-")
            for field in fields(self)
            if getattr(self, field.name) not in (field.default, [])
        }

    def problems(
        self,
        extra: Sequence[Fault] = (),
        deadline_s: float | None = None,
        base: Described | None = None,
        explore: Sequence[str] = (),
    ) -> list[Problem]:
        """One problem per cluster.

        Args:
            extra: faults that the caller has found already, to be reported with the others.
            deadline_s: by when the run must be done.
            base: a job described elsewhere; what the options say goes before it.
            explore: choices to search that are left aside otherwise (:class:`planner.specs.problem.Problem`).

        Raises:
            SpecError: everything that is wrong with the options.
        """
        faults = list(extra)
        model = (
            base.model
            if base is not None and base.model is not None and self.model is None
            else attempt(faults, read_model, self.model, flags=_SPEC_FLAGS)
        )
        stack = attempt(faults, read_stack, self.stack, flags=_SPEC_FLAGS)
        clusters = self._clusters(faults)
        workload = self._workload(faults, base.workload if base is not None else {})
        fixed = attempt(faults, parse_fixed, self.fix or [])
        preset = attempt(faults, read_preset, self.preset)
        faults += [
            Fault(option, "is empty", "a glob over knobs and their values")
            for option, globs in (("--forbid", self.forbid or []), ("--explore", explore))
            if "" in globs
        ]
        launcher = attempt(faults, read_launcher, self.launcher)
        price = optional_number(faults, "--usd-per-hour", self.usd_per_hour)
        pue = optional_number(faults, "--pue", self.pue)
        carbon = optional_number(faults, "--carbon", self.carbon)
        stored = base.workload.get("tokens") if base is not None else None
        faults += self._idle_totals(self.tokens is not None or stored is not None)
        attempt(faults, check_objective, self.objective)
        reserves = [attempt(faults, read_reserve, self.reserve, cluster) for cluster in clusters]
        risk = attempt(faults, read_risk, self.max_oom_risk)
        raise_if_any(faults)
        choices = {**(preset or {}), **(base.fixed if base is not None else {}), **(fixed or {})}
        found = [
            attempt(
                faults, make_problem, model=model, cluster=cluster, workload=workload, stack=stack, fixed=choices,
                forbidden=tuple(self.forbid or ()), reserve=reserve, max_oom_risk=risk, launcher=launcher,
                objective=self.objective, usd_per_device_hour=price, pue=1.0 if pue is None else pue, kg_per_kwh=carbon,
                deadline_s=deadline_s, allowed=self._allowed(), explore=tuple(explore),
                layerwise=base.layerwise if base is not None else None, flags=_PROBLEM_FLAGS,
            )
            for cluster, reserve in zip(clusters, reserves, strict=True)
        ]  # fmt: skip
        raise_if_any(faults)
        return [problem for problem in found if problem is not None]

    def problem(self, extra: Sequence[Fault] = (), base: Described | None = None) -> Problem:
        """The only problem, of a command that names one plan; the arguments are those of :meth:`problems`.

        Raises:
            SpecError: there are several clusters, or anything else is wrong with the options.
        """
        found = self.problems(extra, base=base)
        if len(found) > 1:
            raise SpecError(Fault("--cluster", f"{len(found)} clusters", "one, since one plan is named"))
        return found[0]

    def at_site(self, problem: Problem) -> Problem:
        """A stored plan's problem with what the options say of the run's length and price, and of the data centre.

        Raises:
            SpecError: that is out of range.
        """
        from planner.units import parse_count

        faults: list[Fault] = []
        given = {
            "pue": optional_number(faults, "--pue", self.pue),
            "kg_per_kwh": optional_number(faults, "--carbon", self.carbon),
            "usd_per_device_hour": optional_number(faults, "--usd-per-hour", self.usd_per_hour),
        }
        tokens = optional_quantity(faults, "--tokens", self.tokens, parse_count)
        workload = problem.workload
        if tokens is not None:
            workload = attempt(faults, replace, workload, tokens=tokens, flags=_WORKLOAD_FLAGS) or workload
        faults += self._idle_totals(workload.tokens is not None or self.tokens is not None)
        raise_if_any(faults)
        site = {name: value for name, value in given.items() if value is not None}
        found: Problem | None = attempt(
            faults, replace, problem, workload=workload, flags=_PROBLEM_FLAGS, **site
        )
        raise_if_any(faults)
        assert found is not None
        return found

    def _idle_totals(self, known: bool) -> list[Fault]:
        """Options of a run's totals that say nothing, as its length is not ``known``."""
        given = {"--pue": self.pue, "--carbon": self.carbon}
        expected = "--tokens, the length of the run, beside it"
        return [
            Fault(flag, "is given without a length", expected)
            for flag, value in given.items()
            if value is not None and not known
        ]

    def _allowed(self) -> tuple[str, ...]:
        """Permissions, each once, whether given one by one or joined by commas."""
        return tuple(dict.fromkeys(name for text in self.allow or () for name in read_list(text)))

    def _clusters(self, faults: list[Fault]) -> list[Cluster]:
        if not self.cluster:
            faults.append(Fault("--cluster", "is missing", "a cluster, such as h100-sxm:8x8"))
        loaded = [attempt(faults, read_cluster, text, flags=_SPEC_FLAGS) for text in self.cluster or []]
        return [cluster for cluster in loaded if cluster is not None]

    def _workload(self, faults: list[Fault], base: Mapping[str, Any]) -> TrainWorkload | None:
        from planner.units import parse_count

        values: dict[str, Any] = {
            "global_batch_size": optional_whole(faults, "--global-batch", self.global_batch),
            "seq_len": optional_whole(faults, "--seq-len", self.seq_len),
            "encoder_seq_len": optional_whole(faults, "--encoder-seq-len", self.encoder_seq_len),
            "document_len": optional_whole(faults, "--document-len", self.document_len),
            "expert_load_factor": optional_number(faults, "--expert-load-factor", self.expert_load_factor),
            "expert_zipf": optional_number(faults, "--expert-zipf", self.expert_zipf),
            "capacity_factor": optional_number(faults, "--capacity-factor", self.capacity_factor),
            "tokens": optional_quantity(faults, "--tokens", self.tokens, parse_count),
            "optimizer": self.optimizer,
            "precisions": None if self.precision is None else read_list(self.precision),
        }
        given = {**base, **{name: value for name, value in values.items() if value is not None}}
        for name, flag, text, what in (
            ("global_batch_size", "--global-batch", self.global_batch, "sequences per optimizer step"),
            ("seq_len", "--seq-len", self.seq_len, "tokens per sequence"),
        ):
            if text is None and name not in base:
                faults.append(Fault(flag, "is missing", f"a whole number, {what}"))
            given.setdefault(
                name, 1
            )  # stands in for what is missing or unreadable, so that the rest is checked too
        if "optimizer" in given:
            attempt(faults, check_optimizer, given["optimizer"])
        return attempt(faults, make_workload, flags=_WORKLOAD_FLAGS, **given)
