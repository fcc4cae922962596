"""Serving plans as files that an engine, or a layer above engines, runs.

>>> from planner.export.serving import SERVING_EXPORTERS
>>> sorted(SERVING_EXPORTERS)
['dynamo', 'llm-d', 'sglang', 'trtllm', 'vllm']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.export.serving.exporter import ServingExporter
    from planner.serving.launcher import Rule, ServingLauncher
    from planner.serving.plan import Pool, ServePlan

__all__ = ["SERVING_EXPORTERS", "export_serving", "find_serving_exporter", "serving_problems"]

SERVING_EXPORTERS = ("dynamo", "llm-d", "sglang", "trtllm", "vllm")
"""Names that ``--to`` takes for serving plans."""
_ALIASES = {"k8s": "kubernetes"}


def find_serving_exporter(to: str) -> ServingExporter:
    """The exporter of that name.

    Raises:
        SpecError: there is none.
    """
    from planner.errors import Problem, SpecError, did_you_mean

    if to not in SERVING_EXPORTERS:
        raise SpecError(
            Problem(
                "--to",
                repr(to),
                f"one of {', '.join(SERVING_EXPORTERS)}",
                did_you_mean(to, SERVING_EXPORTERS),
            )
        )
    if to == "dynamo":
        from planner.export.serving.dynamo import EXPORTER

        return EXPORTER
    if to == "llm-d":
        from planner.export.serving.llm_d import EXPORTER as LLM_D

        return LLM_D
    from planner.export.serving.bare import EXPORTERS

    return EXPORTERS[to]


def export_serving(
    plan: ServePlan,
    to: str,
    version: str | None = None,
    around: Sequence[str] = (),
    image: str | None = None,
) -> dict[str, str]:
    """A runnable folder (name → content): the launcher's files, a batch system's, a measuring script, what to check first.

    Args:
        plan: the plan.
        to: one of :data:`SERVING_EXPORTERS`.
        version: the launcher's version.
        around: batch systems; keys of :data:`planner.export.serving.around.AROUND`.
        image: container image for those that need one.

    Raises:
        ExportError: the launcher cannot run the plan; names every feature.
        SpecError: no such launcher, version or batch system, or the plan's model, cluster or stack cannot be found.
    """
    from planner.errors import ExportError
    from planner.export import known_version
    from planner.export.folder import NO_IMAGE
    from planner.export.serving.folder import folder_files
    from planner.export.serving.target import ServingTarget

    exporter = find_serving_exporter(to)
    chosen = known_version(version, exporter.versions)
    systems = _systems(exporter, around)
    target = ServingTarget(plan)
    problems = serving_problems(target, exporter)
    if problems:
        raise ExportError(problems)
    return folder_files(target, exporter, exporter.engine(target), chosen, systems, image or NO_IMAGE)


def serving_problems(target: ServingTarget, exporter: ServingExporter) -> list[Problem]:
    """Everything that keeps a launcher from running a plan."""
    import numpy as np

    from planner.errors import Problem
    from planner.export.serving.rules import SERVING_LAUNCHERS

    plan = target.plan
    where = f"--to {exporter.name}"
    if plan.mode in ("offloaded", "static"):
        return [Problem(where, f"plan of mode {plan.mode}", "pools that take requests as they come")]
    if plan.mode == "ping_pong":
        expected = "pools of whole models; none of these engines runs attention and experts apart"
        return [Problem(where, f"plan of mode {plan.mode}", expected)]
    vendors = sorted({cluster.device.vendor for cluster in target.clusters})
    if len(vendors) > 1:
        return [
            Problem(
                where,
                f"devices of {' and '.join(vendors)}",
                "devices of one vendor, which one build of an engine runs on",
            )
        ]
    if len(target.clusters) > 1 and not exporter.around:
        return [
            Problem(
                where,
                f"pools on {plan.cluster}",
                "pools on one kind of node; vllm, sglang and trtllm start on each",
            )
        ]
    several = [role for role, count in Counter(pool.role for pool in plan.pools).items() if count > 1]
    if several and not exporter.around:
        expected = "one of each role; vllm, sglang and trtllm start several"
        return [Problem(where, f"unlike {' and '.join(several)} pools", expected)]
    engine = exporter.engine(target)
    launcher = SERVING_LAUNCHERS[engine.name]
    problems = [
        Problem(
            f"{where}: {target.pool_name(pool)} pool", f"{target.degrees(pool)}: {rule.reason}", rule.expected
        )
        for pool in plan.pools
        for rule in _rules(target, launcher, pool)
        if not np.all(rule.ok)
    ]
    if any(pool.knobs.get("draft") == "eagle" and "draft_head" not in pool.knobs for pool in plan.pools):
        problems.append(Problem(where, "a draft head that is not named", "serve --draft eagle:HUB_NAME"))
    return [*problems, *exporter.rules(target)]


def _rules(target: ServingTarget, launcher: ServingLauncher, pool: Pool) -> Iterator[Rule]:
    """What an engine says of a pool, alone and behind every pool of prompts."""
    from planner.serving.launcher import Rule

    replicas = target.replicas(pool)
    yield from launcher.rules(replicas)
    for slot, values in launcher.choices.items():
        value = str(pool.knobs.get(slot, ""))
        yield Rule(f"{slot}={value}", f"{slot} of {', '.join(sorted(values))}", not value or value in values)
    for other in target.plan.pools if pool.role == "decode" else ():
        if other.role == "prefill":
            yield from launcher.pairs(target.replicas(other).ctx.mesh, replicas.ctx.mesh)


def _systems(exporter: ServingExporter, around: Sequence[str]) -> tuple[str, ...]:
    from planner.errors import Problem, SpecError, did_you_mean
    from planner.export.serving.around import AROUND

    names = tuple(dict.fromkeys(_ALIASES.get(name, name) for name in around))
    faults = []
    for name in names:
        if name not in AROUND:
            faults.append(
                Problem("--with", repr(name), f"one of {', '.join(AROUND)}", did_you_mean(name, AROUND))
            )
        elif name not in exporter.around:
            faults.append(
                Problem(
                    "--with", f"{name} beside --to {exporter.name}", "nothing: it brings its own deployment"
                )
            )
    if faults:
        raise SpecError(faults)
    return names


if TYPE_CHECKING:
    from planner.errors import Problem
    from planner.export.serving.target import ServingTarget
