"""Rows that are held out were fitted to by nothing, say where they are from, and are the ones that the page is about."""

import re
import tomllib
from pathlib import Path

import pytest

from planner.uncertainty.published import load_published_runs
from planner.validation.cells import MANDATORY
from planner.validation.table import read_table

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted((ROOT / "benchmarks" / "held_out" / "training").glob("*.csv"))
PAGE = (ROOT / "docs" / "held_out.md").read_text(encoding="utf-8")
SOURCES = tomllib.loads((ROOT / "benchmarks" / "held_out" / "sources.toml").read_text(encoding="utf-8"))


def test_every_file_is_told_of():
    assert {table.stem for table in TABLES} == set(SOURCES)
    assert not re.findall(r"^\{\w+\}$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_rows_are_whole_and_have_a_source(path):
    table = read_table(path)
    assert table.kind == "training"
    assert len({row.row_id for row in table.rows}) == len(table.rows)
    for row in table.rows:
        assert re.search(r"@[0-9a-f]{7}|@v\d", row.text("source")), row.row_id
        assert all(row.text(column) for column in MANDATORY), row.row_id


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_row_was_fitted_to(path):
    """Of the shipped runs, constants are fitted to those that are not held out: none is one that is, by its file, model, devices,
    plan and rate."""
    fitted = {
        (run.source, run.model, run.devices, run.tp, run.pp, f"{run.tokens_per_s_per_device:.3g}")
        for run in load_published_runs()
        if run.tokens_per_s_per_device is not None and not run.row_id.startswith("held_out")
    }
    for row in read_table(path).rows:
        if row.number("tokens_per_s_per_device"):
            plan = (row.whole("n_devices"), row.whole("tp"), row.whole("pp"))
            rate = f"{row.number('tokens_per_s_per_device'):.3g}"
            assert (path.name, row.text("model"), *plan, rate) not in fitted, row.row_id


def test_the_page_counts_the_rows_that_are_scored():
    asked = sum("time" in row.text("score_for") for path in TABLES for row in read_table(path).rows)
    counted = re.search(r"(\d+) rows of (\d+) sources are scored for time; ([\d.]+)%", PAGE)
    assert counted is not None
    assert int(counted[2]) == len(TABLES)
    assert abs(int(counted[1]) / asked - float(counted[3]) / 100) < 1e-3


def test_the_readme_quotes_the_page():
    means = re.search(
        r"\*\*mean over (\d+) sources\*\* \| (\d+) \|.*\*\*([\d.]+)% / ([\d.]+)%\*\* \|  \|", PAGE
    )
    assert means is not None
    sources, rows, median, p90 = means.groups()
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    means_of = f"means over {sources} sources of {rows} [held-out training runs]"
    assert f"{median} % and {p90} % (median and 90th percentile, {means_of}" in readme
