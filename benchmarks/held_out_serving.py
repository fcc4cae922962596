"""Writes docs/held_out_serving.md: predictions of serving held against published runs that no constant was fitted to.

    python benchmarks/held_out_serving.py [-o docs/held_out_serving.md] [FILE.csv…]

Without files, those in ``benchmarks/held_out/serving``. They have the columns of ``planner validate``, whose scores these are.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.uncertainty.serving import novelty_of, serving_interval
from planner.validation import validate
from planner.validation.report import Report
from planner.validation.scores import ScoredRow, coverage, error_statistics
from planner.validation.serving import served_runs
from planner.validation.serving_bars import QUANTITY_OF, load_of_run
from planner.validation.serving_runs import ServedRun
from planner.validation.table import read_table

FOLDER = Path(__file__).parent / "held_out" / "serving"
WORDS = {
    "tpot": "time between tokens", "ttft": "time to the first token", "output_tokens_per_s": "throughput",
    "latency": "latency of a batch",
}  # fmt: skip
LOADS = {
    "concurrency": "clients", "offline": "all at once", "burst": "all at once", "static": "static batch", "rate": "arrivals",
    "pools": "pools",
}  # fmt: skip
HEAD = """# Serving runs that nothing was fitted to

[Accuracy of serving](accuracy_serving.md) leaves models out; here whole pages are left out: other benchmarks, clusters,
engines and devices than those that any constant has seen, but for `trtllm_v019`, another release of a page that constants
know. The rows are in `benchmarks/held_out/serving`, each with its
source's address and version; `python benchmarks/held_out_serving.py` scores them and writes this page. No constant is fitted to
them; widths of intervals are, each source counted once. Errors are fractions of the measured value; the interval is the one that
`planner serve` gives with every estimate, and promises to hold 80 %: what intervals hold of a source that they do not know
either is in [accuracy of serving](accuracy_serving.md#intervals).
"""
FIRST = """
## At first sight

Scored before anything was mended, 49.6 % of the values were priced; of these, medians and 90th percentiles were 33 % and 190
% for the time between tokens, 47 % and 125 % for the time to the first token, 46 % and 163 % for throughput. What was mended
since, because several of these sources agreed on it, is mechanism and coverage, never a constant that one of them could
choose: engines without a stack take that of no particular make; weights of 8 bits run on devices without such products; a
burst of requests is simulated, with lengths that vary where the data set's do; a run of stated length has a beginning;
devices with few large engines start no tiles of attention by a scheduler; SGLang reads 4-bit experts as they are; vLLM's
first engine stands between its iterations for longer; engines choose their batches by the machine, as their code says (vLLM
on an A100 runs 256 sequences, elsewhere 1,024). So the rows are no longer quite unseen: what is left of their errors flatters
a little.
"""
TAIL = """
## What is wrong, by family

- **Intervals.** They are as wide as sources that no constant knows needed, by how requests come (from clients that wait for
  their answers, or whenever they do) and what is new of a run: its source, its engine on such a device, or a device whose kernels
  nobody measured. Most of what constants are fitted to are clients that wait.
- **One machine, one answer.** Community runs (AccelMark) measure the same device twice with times 1.5 apart; an H200 is no
  faster there than an H100. One laboratory's A100 (GPUStack) answers as foretold, its H100 a fifth to a half slower, with
  three engines alike. Such rows bound what any model can reach.
- **First runs.** Bursts onto a server that was just started hold compilation: SGLang and TensorRT-LLM serve gpt-oss at a
  tenth of what they later do (GPUStack). They are counted.
- **Prompts seen before.** With one worker for prompts, 32 and 64 clients get about twice as many of the same 500 prompts per
  second as 128 do (dstack's pools), as if caches of prefixes were not emptied in between. They are counted.
- **Frontends.** A thousand requests at once wait for HTTP and tokenization first: prompts of 128 tokens with answers of 4 say
  so. The planner knows a request's admission alone, not the frontend's throughput.
- **Idle engines** answer a short prompt in 10 to 30 ms; the admission that was fitted to loaded ones is 20 to 50 ms, and 3.5 µs
  per token of the prompt.
- **Small models** (0.5B) generate a token in less than the host time that an iteration is charged with: newer engines
  schedule the next iteration while the device runs, which is not modelled.
- **MI300X** is foretold 20 to 60 % too fast by two sources that agree, more where its cache is full: an all-reduce is charged
  with 3.5 µs, and the efficiency of products is assumed.
- **Devices without kernels of their own in the tables** (Gaudi, Trainium, TPU, Ascend): products and attention carry over
  from assumed efficiencies. Decoding is mostly right within a third, prompts within a factor of two; on Ascend, throughput is
  not.
- **Checkpoints in several formats** (Meta's 405B with fp8 in its MLPs alone) have no name here, and are refused.
"""


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("files", nargs="*", metavar="FILE.csv")
    arguments.add_argument("-o", "--out")
    options = arguments.parse_args()
    files = options.files or sorted(str(path) for path in FOLDER.glob("*.csv"))
    text = "\n".join(page(validate(files), read_cells(files), read_runs(files))) + "\n"
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def read_cells(files: list[str]) -> dict[str, dict[str, str]]:
    """Cells of every row by its name in the scores, ``file:line``."""
    found = {}
    for path in files:
        with open(path, encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            found |= {f"{Path(path).name}:{reader.line_num}": row for row in reader}
    return found


def read_runs(files: list[str]) -> dict[str, ServedRun]:
    """The rows that can be priced, by the same names."""
    return {run.row.row_id: run for path in files for run, _ in served_runs(read_table(path))}


def page(
    report: Report, cells: Mapping[str, Mapping[str, str]], runs: Mapping[str, ServedRun]
) -> Iterator[str]:
    """The page, line by line."""
    rows = [row for row in report.rows if row.status == "scored"]
    yield HEAD
    yield from _table(rows, runs, "metric", lambda row: WORDS[row.metric])
    held: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        held[WORDS[row.metric]][_source(row)].append(_inside(row, runs[row.row_id]))
    means = {name: sum(sum(own) / len(own) for own in by.values()) / len(by) for name, by in held.items()}
    yield "\nIn the interval, mean over sources: " + ", ".join(f"{n} {m:.0%}" for n, m in means.items()) + "."
    priced = ", ".join(f"{WORDS[m]} {part:.1%}" for m, part in coverage(report.rows).items() if m in WORDS)
    yield f"\n{len(cells):,} rows of {len(_sources(cells))} sources. Priced of what they ask for: {priced}."
    yield FIRST
    yield "## By source\n"
    yield from _table(rows, runs, "source, metric", lambda row: f"{_source(row)}, {WORDS[row.metric]}")
    yield "\n## By device\n"
    yield from _table(
        rows,
        runs,
        "generation, metric",
        lambda row: f"{runs[row.row_id].cluster.device.generation}, {WORDS[row.metric]}",
    )
    yield "\n## By how the engine was driven\n"
    yield from _table(
        rows, runs, "load, metric", lambda row: f"{LOADS[runs[row.row_id].driver]}, {WORDS[row.metric]}"
    )
    yield TAIL
    yield "## What is not priced\n"
    reasons = Counter(
        (row.status, row.reason) for row in report.rows if row.status in ("unsupported", "excluded")
    )
    for (status, reason), count in reasons.most_common():
        yield f"- {count:,} {status}: {reason}"
    yield "\n## Sources\n"
    for name, count in sorted(_sources(cells).items()):
        yield f"- {name}: {count:,} rows"


def _table(
    rows: list[ScoredRow], runs: Mapping[str, ServedRun], what: str, key: Callable[[ScoredRow], str]
) -> Iterator[str]:
    """Errors of groups, and how many of their values lie inside the interval that goes with the prediction."""
    groups: dict[str, list[ScoredRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    yield f"| {what} | values | median | 90th | bias | in the interval |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, own in sorted(groups.items()):
        values: Any = error_statistics([row.error for row in own if row.error is not None])
        inside = [_inside(row, runs[row.row_id]) for row in own]
        yield (
            f"| {name} | {values['n']:,} | {values['median_ape']:.1%} | {values['p90_ape']:.1%} "
            f"| {values['bias']:+.1%} | {sum(inside) / len(inside):.0%} |"
        )


def _inside(row: ScoredRow, run: ServedRun) -> bool:
    """Whether the measured value lies in the interval of the prediction."""
    assert row.predicted is not None, "the row is scored"
    assert row.measured is not None, "the row is scored"
    quantity = QUANTITY_OF[row.metric]
    novelty = novelty_of(run.stack, run.cluster.device)
    pools, load = run.driver == "pools", load_of_run(run)
    found = serving_interval(run.experts, pools, load, novelty, {quantity: row.predicted})
    low, high = found[quantity]
    return low <= row.measured <= high


def _source(row: ScoredRow) -> str:
    return row.file.removesuffix(".csv")


def _sources(cells: Mapping[str, Mapping[str, str]]) -> Counter[str]:
    """Rows of every source: a repository with its commit, or a page."""
    return Counter(_address(row["source"]) for row in cells.values())


def _address(source: str) -> str:
    repository = re.match(r"\S+@\S+", source)
    return repository[0] if repository else source.split(" § ")[0]


if __name__ == "__main__":
    main()
