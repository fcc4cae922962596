"""Writes docs/held_out.md: predictions held against published runs that no constant was fitted to.

    python benchmarks/held_out.py -o docs/held_out.md

The rows are in ``held_out/training``, one file per source, each row with the page and the commit that it was copied from; what
each file holds stands in ``held_out/sources.toml``, with what a first look found before mechanisms were mended. Files of the same
form may be named instead.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from planner.validation.report import Report, validate
from planner.validation.scores import coverage, interval_statistics

HERE = Path(__file__).resolve().parent
_TIME, _PEAK = "tokens_per_s_per_device", "peak_memory"


def main() -> None:
    """Scores the rows, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    files = options.files or sorted((HERE / "held_out" / "training").glob("*.csv"))
    about = tomllib.loads((HERE / "held_out" / "sources.toml").read_text(encoding="utf-8"))
    text = (HERE / "held_out.md.in").read_text(encoding="utf-8")
    for name, part in parts(validate(files), about).items():
        text = text.replace(f"{{{name}}}", part.strip())
    options.out.write_text(text, encoding="utf-8")


def parts(report: Report, about: Mapping[str, Any]) -> Mapping[str, str]:
    """The page's tables by name."""
    summary = report.summary("accelerator")
    return {
        "counts": fill(" ".join(_counts(report)), 130),
        "step_time": "\n".join(_step_time(summary, about)),
        "accelerators": "\n".join(_by(summary, "accelerator")),
        "memory": "\n".join(_memory(summary)),
        "refused": "\n".join(_refused(report)),
        "notes": "\n".join(_notes(about)),
    }


# -- details ---------------------------------------------------------------------------------------------------------


def _counts(report: Report) -> Iterator[str]:
    time = [row for row in report.rows if row.metric == _TIME and row.status == "scored"]
    yield f"{len(time)} rows of {len({row.file for row in time})} sources are scored for time;"
    priced = coverage(report.rows)
    yield f"{priced[_TIME]:.1%} of those that ask for it could be priced."
    held = interval_statistics(report.rows)[_TIME]
    yield (
        f"The 80 % intervals hold {held['held']:.0%} of them, at a median width of {held['median_width']:.0%} of the prediction."
    )
    summary = report.summary()
    if (oom := summary.get("oom")) is not None:
        yield (
            f"Of {oom['tp'] + oom['fn']} runs that ran out of memory {oom['tp']} were predicted to, and {oom['fp']} of the "
            f"{oom['fp'] + oom['tn']} others."
        )
    if (ranking := summary.get("ranking")) is not None:
        yield (
            f"Over {ranking['sweeps']} sweeps of four plans or more, Kendall's τ-b is {ranking['kendall_tau_mean']:.2f} and the "
            f"plan that would have been picked {ranking['top1_regret_mean']:.1%} slower than the best (means)."
        )


def _step_time(summary: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[str]:
    """Errors by source, beside those of the first look."""
    yield _row("source", "rows", "never fitted", "first look", "now", "bias")
    yield _row("---", "---:", "---", "---:", "---:", "---:")
    firsts: list[tuple[float, float]] = []
    for file, found in summary[_TIME]["by_source"].items():
        name = file.removesuffix(".csv")
        source = about[name]
        first = (source["first_median"], source["first_p90"])
        firsts.append(first)
        now = (found["median_ape"], found["p90_ape"])
        yield _row(
            name, str(found["n"]), source["unseen"], _pair(*first), _pair(*now), f"{found['bias']:+.1%}"
        )
    total = summary[_TIME]
    means = np.mean(firsts, axis=0)
    macro = _pair(total["macro_median_ape"], total["macro_p90_ape"])
    yield _row(
        f"**mean over {len(firsts)} sources**",
        str(total["n"]),
        "",
        f"**{_pair(*means)}**",
        f"**{macro}**",
        "",
    )


def _by(summary: Mapping[str, Any], what: str) -> Iterator[str]:
    yield _row(what, "rows", "median / 90th", "bias")
    yield _row("---", *["---:"] * 3)
    for name, found in summary[_TIME][f"by_{what}"].items():
        yield _row(
            name, str(found["n"]), _pair(found["median_ape"], found["p90_ape"]), f"{found['bias']:+.1%}"
        )


def _memory(summary: Mapping[str, Any]) -> Iterator[str]:
    yield _row("source", "rows", "median / 90th", "bias")
    yield _row("---", *["---:"] * 3)
    for file, found in summary[_PEAK]["by_source"].items():
        errors = _pair(found["median_ape"], found["p90_ape"])
        yield _row(file.removesuffix(".csv"), str(found["n"]), errors, f"{found['bias']:+.1%}")


def _refused(report: Report) -> Iterator[str]:
    refused = [row for row in report.rows if row.status == "unsupported"]
    if not refused:
        yield "None."
    for row in refused:
        yield f"- `{row.row_id}`: {row.reason}"


def _notes(about: Mapping[str, Any]) -> Iterator[str]:
    for name, source in about.items():
        yield from fill(
            f"- **{name}**: {source['holds']} {source.get('finding', '')}".rstrip(),
            130,
            subsequent_indent="  ",
        ).splitlines()


def _pair(median: float, p90: float) -> str:
    return f"{median:.1%} / {p90:.1%}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
