"""Writes docs/accuracy.md: predictions held against published measurements, by source, family and accelerator.

    python benchmarks/accuracy.py TRAINING.csv… --refitted FIT.json [--operators OPERATORS.csv…] -o docs/accuracy.md

``--refitted`` is what ``fit_stacks.py --json`` writes: the errors of every row with constants fitted without its model, and
without its source. Give the file that ``planner validate --residuals`` was given, so that page and intervals agree: these are of
the shipped table of runs, the held-out ones among them. The page's text is ``accuracy.md.in``; why single rows are far off stands
in ``accuracy_notes.toml``.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import hypot
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from planner.specs.library import hardware_folder
from planner.specs.stack import list_stacks, load_stack
from planner.uncertainty.constants import constant_shares, constants_spread
from planner.uncertainty.published import (
    PublishedRun,
    load_published_runs,
    rounded,
)
from planner.uncertainty.residuals import load_residuals
from planner.uncertainty.terms import TIME_TERMS, terms_spread, time_parts, time_shares
from planner.validation.outcomes import reliability
from planner.validation.report import Report, validate
from planner.validation.residual_files import (
    memory_outcomes,
    peak_residuals,
    published_runs,
    read_left_out,
    time_residuals,
)
from planner.validation.scores import coverage, error_statistics
from planner.validation.spreads import Intervals, left_out
from planner.validation.training import Priced

ROOT = Path(__file__).resolve().parents[1]
Errors = Callable[[PublishedRun], float | None]
THREE: Mapping[str, Errors] = {
    "fitted on all": lambda run: run.error,
    "model left out": lambda run: run.error_without_model,
    "source left out": lambda run: run.error_without_source,
}
_LEFT_OUT = ("model", "source")
_HELD_OUT = "held_out_"  # how names of rows begin that no constant is fitted to
_OF_MEMORY = ("framework_bytes", "communicator_bytes", "fragmentation", "bucket_copies")
_FITTED = re.compile(
    r"(?P<name>\w+) = (?P<value>\{.*kind = \"fitted\".*\})\s*(?:# (?P<rows>.*))?$"
)  # a line of a stack's file
_SAID = {"oom": "out of memory"}
_TIME = "tokens_per_s_per_device"
_TELLING = (
    "recompute",
    "zero_stage",
    "vpp",
    "sequence_parallel",
    "ffn_hidden",
    "vocab",
)  # defaults that move a prediction


def main() -> None:
    """Reads the tables, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--operators", nargs="+", type=Path, default=[])
    parser.add_argument("--refitted", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    report = validate(options.files)
    runs = rounded(published_runs(report.priced, read_left_out(options.refitted)))
    kernels = validate(options.operators, operators=True) if options.operators else None
    notes = tomllib.loads((ROOT / "benchmarks" / "accuracy_notes.toml").read_text(encoding="utf-8"))["note"]
    parts = {
        "counts": counts(runs),
        "constants": "\n".join(constants_table()),
        "step_time": "\n".join(step_time_table(runs)),
        "families": "\n".join(_grouped(report, "family")),
        "accelerators": "\n".join(_grouped(report, "accelerator")),
        "intervals": "\n".join(interval_table(load_published_runs())),
        "never_measured": _never_measured(report),
        "memory": "\n".join(_memory(report)),
        "outcomes": "\n".join(_outcomes(report)),
        "kernels": "\n".join(_kernels(kernels)),
        "runs": _output("sanity_korthikanti.py"),
        "worst_times": "\n".join(_worst(report, notes, _TIME, 20)),
        "worst_peaks": "\n".join(_worst(report, notes, "peak_memory", 10)),
        "uncounted": "\n".join(_uncounted(report)),
    }
    text = (ROOT / "benchmarks" / "accuracy.md.in").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part.strip())
    options.out.write_text(text, encoding="utf-8")


def counts(runs: Sequence[PublishedRun]) -> str:
    """How much there is to judge by, and how many constants were fitted to it."""
    scored = [run for run in runs if run.error is not None]
    models, sources = {(run.source, run.model) for run in scored}, {run.source for run in scored}
    fitted = _fitted_constants()
    of_memory = sum(field in _OF_MEMORY for _, field, _ in fitted)
    of_time, peaks = len(fitted) - of_memory, sum(run.peak_bytes is not None for run in runs)
    text = (
        f"{len(scored)} runs of {len(models)} models in {len(sources)} sources are scored for time. {of_time} constants of the "
        f"software stacks are fitted to them: one per {len(scored) // max(of_time, 1)} runs; {of_memory} more to {peaks} peaks "
        "of memory. Kernels and links are fitted to measurements of kernels and collectives alone."
    )
    return fill(text, 130)


def constants_table() -> Iterator[str]:
    """What the stacks' files say was fitted: value, 95 % interval (±1.96 standard errors of the logarithm), and to what."""
    yield _row("stack", "constant", "value", "95 % interval", "fitted to")
    yield _row("---", "---", "---:", "---:", "---")
    for name in list_stacks():
        if load_stack(name).serving is not None:
            continue
        place = ""
        for line in (hardware_folder() / "stacks" / f"{name}.toml").read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                place = line.strip("[").partition("]")[0]
            found = _FITTED.match(line)
            if found is None:
                continue
            constant = tomllib.loads(f"it = {found['value']}")["it"]
            value, spread = float(constant["value"]), constant.get("spread")
            ends = [value * math.exp(sign * 1.96 * spread) for sign in (-1, 1)] if spread else []
            generation = place.removeprefix("on.") if place.startswith("on.") else ""
            what = ", ".join(filter(None, (found["name"], generation)))
            interval = " to ".join(f"{end:.3g}" for end in ends) or "-"
            yield _row(name, what, f"{value:.3g}", interval, found["rows"] or constant["source"])


def step_time_table(runs: Sequence[PublishedRun]) -> Iterator[str]:
    """Errors by source, three ways, and their mean over sources."""
    sources = sorted({run.source for run in runs if run.error is not None})
    yield _row("source", "rows", *THREE, "bias")
    yield _row(*["---", *["---:"] * (len(THREE) + 2)])
    medians: dict[str, list[float]] = defaultdict(list)
    tails: dict[str, list[float]] = defaultdict(list)
    for source in sources:
        mine = [run for run in runs if run.source == source and run.error is not None]
        cells = []
        for name, errors in THREE.items():
            found = error_statistics([e for run in mine if (e := errors(run)) is not None])
            medians[name].append(found["median_ape"])
            tails[name].append(found["p90_ape"])
            cells.append(f"{found['median_ape']:.1%} / {found['p90_ape']:.1%}")
        bias = np.mean([run.error for run in mine])
        yield _row(source.removesuffix(".csv"), str(len(mine)), *cells, f"{bias:+.1%}")
    means = [f"**{np.mean(medians[name]):.1%} / {np.mean(tails[name]):.1%}**" for name in THREE]
    yield _row(
        f"**mean over {len(sources)} sources**", str(sum(run.error is not None for run in runs)), *means, ""
    )


def interval_table(runs: Sequence[PublishedRun]) -> Iterator[str]:
    """Coverage and width of intervals on runs left out; of memory, also by the meter that read it."""
    yield _row(
        "quantity",
        "left out",
        "rows",
        "held",
        "median width",
        "median error",
        "width / error",
        "one width / error",
    )
    yield _row("---", "---", *["---:"] * 6)
    timed = [run for run in runs if run.error is not None]
    weighed = [run for run in runs if run.peak_error is not None]
    held_out = [run.row_id.startswith(_HELD_OUT) for run in timed]
    times = {by: left_out(time_residuals(timed), by) for by in _LEFT_OUT}
    peaks = {by: left_out(peak_residuals(weighed), by, memory_outcomes(runs)) for by in _LEFT_OUT}
    cases: list[tuple[str, Mapping[str, Intervals], list[bool]]] = [
        ("step time", times, [True] * len(timed)),
        ("step time, tables above", times, [not held for held in held_out]),
        ("step time, held out", times, held_out),
        ("step time, experts", times, [run.experts for run in timed]),
        ("peak memory", peaks, [True] * len(weighed)),
    ]
    for meter in sorted({run.peak_counts for run in weighed}):
        of_meter = [run.peak_counts == meter for run in weighed]
        cases.append((f"peak memory, {meter or 'unstated'}", peaks, of_meter))
    for what, intervals, among in cases:
        for by in _LEFT_OUT:
            c = intervals[by].coverage(among)
            numbers = (
                f"{c.held:.1%}",
                f"{c.median_width:.1%}",
                f"{c.median_error:.1%}",
                f"{c.widths_per_error:.1f}",
                f"{c.one_width / c.median_error:.1f}",
            )
            yield _row(what, by, str(c.rows), *numbers)


# -- details ---------------------------------------------------------------------------------------------------------


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _fitted_constants() -> set[tuple[str, str, float]]:
    """Numbers of the shipped stacks that were fitted to training runs."""
    numbers = set()
    for name in list_stacks():
        stack = load_stack(name)
        if stack.serving is not None:
            continue
        every = {("", field): getattr(stack, field) for field in stack.__dataclass_fields__}
        for generation, constants in stack.on.items():
            every |= {(generation, field): value for field, value in constants.items()}
        for (generation, field), value in every.items():
            if getattr(value, "kind", "") == "fitted":
                numbers.add(
                    (generation, field, value.value)
                )  # what a stack takes from the one under it counts once
    return numbers


def _grouped(report: Report, by: str) -> Iterator[str]:
    yield from _statistics(by, report.summary(by)[_TIME][f"by_{by}"])


def _statistics(what: str, groups: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    yield _row(what, "rows", "median", "90th", "bias")
    yield _row("---", *["---:"] * 4)
    for name, found in groups.items():
        errors = f"{found['median_ape']:.1%}", f"{found['p90_ape']:.1%}", f"{found['bias']:+.1%}"
        yield _row(name, f"{found['n']:,}", *errors)


def _never_measured(report: Report) -> str:
    """The interval that the median published step would have on software of which nothing is known."""
    residuals, found = load_residuals(), []
    if residuals is None:
        return "there is none yet"
    known = residuals.step_time
    for one in report.priced:
        problem, step = one.run.problem, one.assembly.plan.estimate
        stack = problem.stack.on_generation(problem.cluster.device.generation)
        shares = time_shares(step.step_time_s, step.breakdown_s, one.assembly.spends, float(stack.dispatch_s))
        unknown = constants_spread(constant_shares(one.assembly.spends, stack), stack, known.between)
        found.append(hypot(terms_spread(shares, known.terms), unknown))
    ends = known.at(float(np.median(found))).interval(1.0)
    low, high = (100.0 * (end - 1.0) for end in ends)
    return f"{low:+.0f} to {high:+.0f} % of the predicted step"


def _memory(report: Report) -> Iterator[str]:
    found = report.summary().get("peak_memory")
    if found is None:
        yield "No row was scored."
        return
    parts = {name.removesuffix(".csv"): values for name, values in found["by_source"].items()}
    yield from _statistics(
        "source", parts | {f"counted: {n}": values for n, values in found["by_kind"].items()}
    )
    mean = f"**{found['macro_median_ape']:.1%}**", f"**{found['macro_p90_ape']:.1%}**"
    yield _row(f"**mean over {len(found['by_source'])} sources**", str(found["n"]), *mean, "")


def _outcomes(report: Report) -> Iterator[str]:
    summary = report.summary()
    if (oom := summary.get("oom")) is not None:
        yield f"Of the runs that ran out of memory, {oom['tp']} were predicted to and {oom['fn']} were not; of the others,"
        yield f"{oom['tn']} were predicted to fit and {oom['fp']} were not: balanced accuracy {oom['balanced_accuracy']:.2f}.\n"
        yield from _reliability(report)
    if (ranking := summary.get("ranking")) is not None:
        yield "Sweeps of four plans or more for one job; regret is how much slower the plan is that would have been picked.\n"
        yield _row("sweep", "plans", "Kendall τ-b", "top-1 regret")
        yield _row("---", *["---:"] * 3)
        for sweep in ranking["by_sweep"]:
            found = f"{sweep['kendall_tau']:.2f}", f"{sweep['top1_regret']:.1%}"
            yield _row(sweep["sweep_id"], str(sweep["plans"]), *found)
        mean = f"**{ranking['kendall_tau_mean']:.2f}**", f"**{ranking['top1_regret_mean']:.1%}**"
        yield _row(f"**mean of {ranking['sweeps']}**", "", *mean)
        asked = sum(row.metric == "ranking" and row.status == "scored" for row in report.rows)
        yield ""
        yield (
            f"{ranking['rows']} of the {asked} runs that ask to be ranked are in these sweeps; the others' have fewer than four"
        )
        yield "distinct plans. Runs that ask the same of every device are repeats of one plan and count by their mean."


def _reliability(report: Report) -> Iterator[str]:
    """Probabilities of running out of memory, held against what ran out."""
    cases = [
        (one.assembly.plan.estimate.oom_probability or 0.0, bool(score.measured))
        for one in report.priced
        if (score := one.scores.get("oom")) is not None and score.status == "scored"
    ]
    yield "How likely a plan was said to run out of memory, and how many did:\n"
    yield _row("said to", "runs", "mean of what was said", "ran out")
    yield _row("---", *["---:"] * 3)
    for found in reliability(cases):
        said = f"{found.low:.0%} to {found.high:.0%}"
        yield _row(said, str(found.runs), f"{found.predicted:.1%}", f"{found.failed} ({found.observed:.1%})")
    yield ""


def _kernels(report: Report | None) -> Iterator[str]:
    if report is None:
        yield "Not scored for this page."
        return
    summary = report.summary()
    yield from _statistics("what", {metric.replace("_", " "): found for metric, found in summary.items()})
    rest = [
        f"{name.replace('_', ' ')} {part:.1%}" for name, part in coverage(report.rows).items() if part < 1.0
    ]
    yield (
        f"\nRows that could be priced: all, except of {', '.join(rest)}."
        if rest
        else "\nEvery row could be priced."
    )


def _output(script: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return done.stdout


def _worst(report: Report, notes: Sequence[Mapping[str, Any]], metric: str, count: int) -> Iterator[str]:
    """The rows that are farthest off, each with what is known of the reason."""
    by_row = {one.run.row.row_id: one for one in report.priced}
    scored = [(row, row.error) for row in report.rows if row.metric == metric and row.status == "scored"]
    errors: dict[str, list[float]] = defaultdict(list)
    for row, error in scored:
        errors[row.file].append(error or 0.0)
    yield _row("row", "what", "error", "why")
    yield _row("---", "---", "---:", "---")
    for row, error in sorted(scored, key=lambda one: -abs(one[1] or 0.0))[:count]:
        one, off = by_row[row.row_id], error or 0.0
        why = _noted(one, notes, metric) or "; ".join(
            _shown(one, off, float(np.median(errors[row.file])), report.priced, metric)
        )
        yield _row(row.row_id, _what(one), f"{off:+.0%}", why or "not known")


def _what(one: Priced) -> str:
    plan, row = one.assembly.plan, one.run.row
    degrees = " ".join(f"{name}{n}" for name, n in plan.mesh.items() if n > 1)
    return f"{row.text('model')}, {plan.devices} × {row.text('accelerator')}, {degrees}, {plan.knobs['precision']}"


def _noted(one: Priced, notes: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The note on a row's metric; empty where there is none."""
    experts = any(block.moe for block in one.run.problem.model.blocks.values())
    for note in notes:
        fits = note.get("experts", experts) == experts and note.get("metric", _TIME) == metric
        if fits and re.fullmatch(note["rows"], one.run.row.row_id):
            return str(note["text"])
    return ""


def _shown(one: Priced, error: float, bias: float, priced: Sequence[Priced], metric: str) -> Iterator[str]:
    """What the tables themselves say of a row's error."""
    if bias * error > 0.0 and abs(bias) > 0.5 * abs(error):
        yield f"half of its source is off by {bias:+.0%} or more"
    repeats = _repeats(one, priced, metric)
    if len(repeats) > 1 and max(repeats) / min(repeats) > 1.05:
        apart = max(repeats) / min(repeats) - 1.0
        yield f"the same plan was measured {len(repeats)} times, {apart:.0%} apart"
    silent = [column for column in one.run.defaults if column in _TELLING]
    if silent:
        yield f"the row is silent about {', '.join(silent)}"
    if metric != "peak_memory":
        yield from _uncertain(one)


def _repeats(one: Priced, priced: Sequence[Priced], metric: str) -> list[float]:
    """Measurements of the same plan for the same job in the same file."""

    def key(other: Priced) -> tuple[Any, ...]:
        plan = other.assembly.plan
        return (
            other.run.row.file,
            other.run.row.text("model"),
            other.run.row.text("accelerator"),
            other.run.plan_key,
            plan.devices,
        )

    mine = key(one)
    scores = (other.scores.get(metric) for other in priced if key(other) == mine)
    return [score.measured for score in scores if score is not None and score.measured]


def _uncertain(one: Priced) -> Iterator[str]:
    """The term that makes the row's step most uncertain."""
    residuals, estimate = load_residuals(), one.assembly.plan.estimate
    if residuals is None:
        return
    dispatch_s = float(one.run.problem.stack.dispatch_s)
    parts = time_parts(estimate.step_time_s, estimate.breakdown_s, one.assembly.spends, dispatch_s)
    known = residuals.step_time.terms
    variances = {name: (seconds * known.get(name, 0.0)) ** 2 for name, seconds in parts.items()}
    name = max(variances, key=lambda term: variances[term])
    what = next(term.what for term in TIME_TERMS if term.name == name)
    yield f"{parts[name] / estimate.step_time_s:.0%} of the step is {what}, its most uncertain term"


def _uncounted(report: Report) -> Iterator[str]:
    asked = coverage(report.rows)
    yield "Of the rows that ask for a metric, this share could be priced: " + ", ".join(
        f"{_SAID.get(metric, metric.replace('_', ' '))} {part:.1%}" for metric, part in asked.items()
    ) + ".\n"  # fmt: skip
    reasons = Counter(
        row.reason for row in report.rows if row.status == "unsupported" and row.metric != "ranking"
    )
    yield from (f"- {reason} ({count} entries)" for reason, count in reasons.most_common())
    excluded = {row.row_id: row.reason for row in report.rows if row.status == "excluded"}
    if excluded:
        yield "\nRows that contradict themselves at their source, predicted and not counted:\n"
        yield from (f"- `{row_id}`: {reason}" for row_id, reason in excluded.items())


if __name__ == "__main__":
    main()
