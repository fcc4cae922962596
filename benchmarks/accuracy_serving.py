"""Writes docs/accuracy_serving.md: predictions of serving held against published runs.

    python benchmarks/accuracy_serving.py FILE.csv… [--left-out benchmarks/serving_left_out.json] -o docs/accuracy_serving.md

``--left-out`` is what ``fit_serving.py --errors`` writes: errors of models, and of sources, with constants from the others' runs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from math import exp
from pathlib import Path
from typing import Any

from planner.specs.models import load_model
from planner.uncertainty.serving import QUANTITIES
from planner.validation import validate
from planner.validation.report import Report
from planner.validation.scores import coverage, error_statistics

WORDS = {
    "tpot": "time between tokens", "ttft": "time to the first token", "output_tokens_per_s": "throughput",
    "latency": "latency of a batch", "peak_memory": "peak memory",
}  # fmt: skip
HEAD = """# Accuracy of serving

Predictions of `planner validate`, held against published runs: errors are fractions of the measured value, medians and 90th
percentiles. This page is written by `benchmarks/accuracy_serving.py`; constants of the stacks are fitted by
`benchmarks/fit_serving.py` to the rows of the same tables, one set per stack and generation of accelerators. How a benchmark
drove its engine, and which options its scripts gave, is in `planner/validation/benchmark_suites.toml`. The tables are published
by ai-dynamo/aiconfigurator (InferenceX and Dynamo runs), NVIDIA/TensorRT-LLM, NVIDIA/FasterTransformer, Splitwise, llama.cpp
users, APEX and LLMServingSim; half of their rows were seen. On sources that nothing was fitted to, errors are two to four times
as large: [held-out serving runs](held_out_serving.md).
"""
TAIL = """
## What the model leaves out

- **Speculation.** Whether draft tokens were used is mostly not stated. Rows of models with a prediction module are predicted
  without it and not counted from the day on which a suite ran both ways, nor are configurations whose repeats differ by more than
  25 % in the time between tokens.
- **First runs.** Some published times to the first token hold a minute of compilation: they are counted. InferenceX sent no
  request before those that count until 2026-01-21, and kept no compiled kernels on its B200 from 2025-10-06 on; SGLang's own
  warm-up is one short request. The first prompt that an iteration's budget (16,384 tokens with 4-bit weights, 32,768 with 8-bit
  ones) splits goes on with kernels that FlashInfer ships as source: all first requests wait for them, one of ten, 20 or 50 of
  a client by the runner's script of the day. Those 60 s are what FlashInfer's users report, not fitted here; what the runs say
  is 30 to 110 s. Smaller stalls of 2 to 5 s, where nothing is split, are left out. Pools were warmed up; what is missing of some
  of their first tokens looks like a stall all the same: of 622 pairs of neighbouring numbers of clients on one deployment, 28
  have first tokens more than twice as long with the fewer clients (4 wait 39 s where 36 wait 11 s).
- **Listed twice.** Snapshots of the same benchmarks repeat runs, under both names of a model too. Where configuration and every
  digit agree, a run counts once.
- **Layouts.** Rows of some benchmarks carry the labels of a configuration that its scripts do not heed: attention ranks that a
  script chose by lengths and clients, workers whose layout is written into the script, experts that are always spread. Where
  the scripts of the day are public they are believed, else the rows.
- **The largest batch of a pool.** Workers for generation hold what the names of their recipes say, where they say it; of others
  it is what their caches can. Workers for prompts take as many that wait as their budget has room for: rows state a batch of
  one prompt throughout, and measured more than it allows.
- **Prompts held back.** An engine that lets prompts wait until every attention rank has one, or until it looks for requests
  again, runs those together that came meanwhile. That the wait ends sooner where prompts come faster is left out.
- **Fixed lengths.** Where all answers are equally long, milliseconds between their prompts decide how clients fall in step.
- **Frontends.** A frontend of its own (Dynamo, Triton) costs some tens of milliseconds, and more with many streams. What a
  request takes to be admitted, and each token of its prompt, are constants: queues in front of the engine are not modelled.
- **Skewed experts.** Routing is uniform; the busiest rank follows from chance alone.
- **Mixed lengths.** Prompts and answers have their mean lengths, but for the variation of answers that `--length-scv` states.
- **Preemption.** A request is admitted when its final length fits.
"""


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("files", nargs="+", metavar="FILE.csv")
    arguments.add_argument("--left-out", metavar="FILE.json")
    arguments.add_argument("-o", "--out", required=True)
    options = arguments.parse_args()
    report = validate(options.files)
    left_out = json.loads(Path(options.left_out).read_text(encoding="utf-8")) if options.left_out else {}
    Path(options.out).write_text("\n".join(page(report, left_out)) + "\n", encoding="utf-8")


def page(report: Report, left_out: dict[str, Any]) -> Iterator[str]:
    """The page, line by line."""
    yield HEAD
    summary = report.summary()
    for metric, words in WORDS.items():
        if metric in summary:
            yield f"## {words.capitalize()}\n"
            yield "| table | rows | median | 90th | bias |"
            yield "|---|---:|---:|---:|---:|"
            for name, values in summary[metric]["by_source"].items():
                yield f"| {name} | {_cells(values)} |"
            yield f"| all rows | {_cells(summary[metric])} |\n"
    yield "## By kind of model and engine\n"
    yield from _by_engine(report)
    yield "\n## By quality of the rows\n"
    yield from _by_quality(report)
    if left_out:
        yield from _left_out(left_out)
    if "ranking" in summary:
        ranking = summary["ranking"]
        yield (
            f"\nOrder of layouts in {ranking['sweeps']} sweeps of TensorRT-LLM's throughput tables, by rate per device: mean "
            f"Kendall τ-b {ranking['kendall_tau_mean']:.2f}; the layout that is predicted best is "
            f"{ranking['top1_regret_mean']:.1%} slower than the best one.\n"
        )
        taus = [sweep["kendall_tau"] for sweep in ranking["by_sweep"]]
        worst = max(sweep["top1_regret"] for sweep in ranking["by_sweep"])
        yield (
            f"{sum(tau == 1.0 for tau in taus)} of them are in the measured order throughout; the worst choice is {worst:.1%} "
            "slower than the best.\n"
        )
    yield "## Rows that do not count\n"
    asked = coverage(report.rows)
    yield (
        "Of the rows that ask for a metric, this share is priced: "
        + ", ".join(
            f"{WORDS.get(metric, metric)} {part:.1%}" for metric, part in asked.items() if metric in WORDS
        )
        + ".\n"
    )
    reasons = Counter(
        (row.status, row.reason) for row in report.rows if row.status in ("unsupported", "excluded")
    )
    for (status, reason), count in reasons.most_common(12):
        yield f"- {count:,} {status}: {reason}"
    yield TAIL.rstrip()


def _left_out(left_out: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## Models left out\n"
    yield (
        "Constants fitted without any run of the model, on all stacks at once (`fit_serving.py`); models that are alone on their "
        "engine are not here.\n"
    )
    yield from _errors_of(left_out["models"], "by stack and generation")
    yield "\n## Sources left out\n"
    yield (
        "Constants fitted without any run of who measured it: benchmarks that an upstream table gathers count one by one, and so "
        "does every repository. Engines that nobody else measured take constants of no particular make.\n"
    )
    yield from _errors_of(left_out["sources"], "by source")
    yield "\n## Intervals\n"
    yield (
        "The interval that `planner serve` gives with every estimate is that of a source which no constant knows "
        "(`planner/validation/serving_spreads.py`), as wide as the load and what is new of engine and device say: widths, and "
        "nothing else, know the [held-out runs](held_out_serving.md). With all runs of a source left out, of constants and of "
        "widths, intervals hold this share of its runs, mean over sources; 80 % is meant.\n"
    )
    yield "| what | runs | sources | held | of all runs | predicted, times or divided by, median |"
    yield "|---|---|---:|---:|---:|---:|"
    for name, v in left_out["intervals"].items():
        for kind, own in v.items():
            yield (
                f"| {_QUANTITIES[name]} | {kind} | {own['sources']} | {own['held']:.0%} | {own['held_rows']:.0%} "
                f"| {exp(own['half_width']):.2f} |"
            )


_QUANTITIES = dict(
    zip(
        QUANTITIES,
        ("time between tokens", "time to the first token", "throughput, latency of a batch"),
        strict=True,
    )
)


def _errors_of(groups: Mapping[str, Any], parts: str) -> Iterator[str]:
    yield "| what, and how the engine was driven | rows | median | 90th | bias |"
    yield "|---|---:|---:|---:|---:|"
    yield from (f"| {_what(name)} | {_errors(v)} |" for name, v in groups.items() if ":" not in name)
    yield f"\n| of these, {parts} | rows | median | 90th | bias |"
    yield "|---|---:|---:|---:|---:|"
    for name, v in groups.items():
        if ":" in name and v["n"] >= _FEWEST:
            yield f"| {_what(name)} | {_errors(v)} |"


def _what(name: str) -> str:
    metric, _, how = name.partition(", ")
    return f"{WORDS[metric]}, {how}"


def _errors(v: Mapping[str, Any]) -> str:
    return f"{v['n']:,} | {v['median']:.1%} | {v['p90']:.1%} | {v['bias']:+.1%}"


_FEWEST = 10


def _by_engine(report: Report) -> Iterator[str]:
    errors: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in report.rows:
        if row.status == "scored" and row.metric in ("tpot", "ttft") and row.error is not None:
            errors[row.metric, _kind(row.groups["model"]), row.groups["engine"]].append(row.error)
    yield "| what | models | engine | rows | median | 90th | bias |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for (metric, kind, engine), values in sorted(errors.items(), reverse=True):
        if len(values) >= 20:
            yield f"| {WORDS[metric]} | {kind} | {engine} | {_cells(error_statistics(values))} |"


def _by_quality(report: Report) -> Iterator[str]:
    """Errors by how much of its configuration a row states."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in report.rows:
        if row.status == "scored" and row.metric in WORDS and row.error is not None:
            errors[row.metric, row.groups["quality"]].append(row.error)
    yield (
        "Rows of grade A state their whole configuration; of grade B, one part is derived or left out. Rows of grade C "
        "contradict themselves, or lack their layout: they are not counted.\n"
    )
    yield "| what | grade | rows | median | 90th | bias |"
    yield "|---|---|---:|---:|---:|---:|"
    for metric, words in WORDS.items():
        for grade in ("A", "B"):
            if values := errors.get((metric, grade)):
                yield f"| {words} | {grade} | {_cells(error_statistics(values))} |"


def _kind(model: str) -> str:
    return "with experts" if any(block.moe for block in load_model(model).blocks.values()) else "dense"


def _cells(values: Any) -> str:
    return f"{values['n']:,} | {values['median_ape']:.1%} | {values['p90_ape']:.1%} | {values['bias']:+.1%}"


if __name__ == "__main__":
    main()
