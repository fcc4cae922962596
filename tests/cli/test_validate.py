"""``planner validate``: its report, its exit codes, and what it says about wrong input."""

from pathlib import Path

import pytest

PUBLISHED = sorted((Path(__file__).parents[2] / "examples" / "published_runs").glob("*.csv"))
RATE = "tokens_per_s_per_device"


def test_report(planner):
    found = planner("validate", *PUBLISHED)
    assert found.code == 0
    for words in (
        "tokens per s per device",
        "all rows",
        "mean over 2 sources",
        "Coverage",
        "Empty cells taken as",
    ):
        assert words in found.out


def test_json_is_json_alone(planner):
    found = planner("validate", *PUBLISHED, "--json")
    assert (found.code, found.err) == (0, "")
    assert found.json["summary"][RATE]["n"] == 9
    assert {row["status"] for row in found.json["rows"]} == {"scored"}


@pytest.mark.parametrize("group", ["family", "accelerator", "source", "model"])
def test_groups(planner, group):
    found = planner("validate", *PUBLISHED, "--by", group, "--json").json["summary"][RATE]
    assert sum(values["n"] for values in found[f"by_{group}"].values()) == 9


def test_an_exceeded_bound_fails(planner, tmp_path):
    path = tmp_path / "bounds.toml"
    path.write_text(f'["{PUBLISHED[0].name}".{RATE}]\nmape = 1e-6\nreason = "nobody is that good"\n')
    found = planner("validate", *PUBLISHED, "--bounds", path)
    assert found.code == 1
    assert "Bounds exceeded" in found.out
    assert (
        planner("validate", *PUBLISHED, "--bounds", path, "--json").json["bounds_exceeded"][0]["most"] == 1e-6
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"name,price\nx,1\n", "columns of no known kind"),
        (b"a,b\n1,2,3\n", "columns of no known kind"),
        (b"accelerator,m,latency_ms\nx,1,2,3\n", "4 cells"),
        (b"accelerator,m,m,latency_ms\nx,1,2,3\n", "columns that stand twice: m"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'a,b\n"x\n', "columns of no known kind"),
    ],
)
def test_wrong_files(planner, tmp_path, content, found):
    path = tmp_path / "runs.csv"
    if content is not None:
        path.write_bytes(content)
    refused = planner("validate", path, "--json")
    assert refused.code == 2
    assert found in refused.faults[0]["found"]
    assert str(path) in refused.faults[0]["where"]


def test_files_of_another_kind_are_passed_over_whatever_their_rows(planner, tmp_path):
    notes = tmp_path / "README.csv"
    notes.write_text("# Runs\n\nOne row, one run\n")
    found = planner("validate", PUBLISHED[0], notes, "--json")
    assert (found.code, found.json["passed_over"]) == (0, {str(notes): "unknown"})


def test_a_table_without_rows_says_so(planner, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(PUBLISHED[0].read_text().splitlines()[0] + "\n")
    found = planner("validate", path)
    assert (found.code, found.out.strip()) == (0, "The files hold no rows.")


def test_rows_that_follow_each_other_are_told_of_by_their_ends(planner, tmp_path):
    header, first = PUBLISHED[0].read_text().splitlines()[:2]
    cells = dict(zip(header.split(","), first.split(","), strict=True)) | {"score_for": "none"}
    path = tmp_path / "runs.csv"
    rows = [",".join((cells | {"row_id": f"r-{number:03}"}).values()) for number in (7, 8, 9, 10, 12)]
    path.write_text("\n".join([header, *rows]))
    assert "r-007 to r-010, r-012" in planner("validate", path).out


def test_a_table_that_lacks_a_column_is_told_which(planner, tmp_path):
    header, *rows = (line.split(",") for line in PUBLISHED[0].read_text().splitlines())
    place = header.index("pp")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(",".join(cells[:place] + cells[place + 1 :]) for cells in (header, *rows)))
    assert planner("validate", path, "--json").faults[0]["try"].endswith("has these columns too: pp.")


def test_many_ragged_rows_are_told_of_in_few_lines(planner, tmp_path):
    path = tmp_path / "kernels.csv"
    path.write_text("accelerator,m,latency_ms\n" + "x,1,2,3\n" * 300)
    told = planner("validate", "--operators", path, "--json").faults
    assert len(told) < 10
    assert told[-1]["found"] == "295 more rows like these"


def test_wrong_options(planner):
    assert "family" in planner("validate", *PUBLISHED, "--by", "colour", "--json").faults[0]["expected"]
    assert planner("validate", *PUBLISHED, "--bounds", "missing.toml", "--json").code == 2
    assert planner("validate", "--json").code == 2
    missing = planner("validate", *PUBLISHED, "--residuals", "missing", "--json")
    assert (missing.code, missing.faults[0]["found"]) == (2, "no folder 'missing'")


def test_numbers_that_are_none_concern_their_row_alone(planner, tmp_path):
    lines = PUBLISHED[0].read_text().splitlines()
    columns = lines[0].split(",")
    cells = dict(zip(columns, lines[1].split(","), strict=True))
    rows = [
        {**cells, "row_id": "", name: value}
        for name, value in (("hidden", "nan"), ("tp", "-8"), ("step_time_s", "inf"))
    ]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([lines[0], *(",".join(row.values()) for row in rows)]))
    found = planner("validate", path, "--json")
    assert found.code == 0
    reasons = {row["row_id"]: row["reason"] for row in found.json["rows"] if row["metric"] == RATE}
    assert {place: reason.split(" is ")[0] for place, reason in reasons.items()} == {
        "runs.csv:2": "hidden", "runs.csv:3": "tp", "runs.csv:4": "step_time_s",
    }  # fmt: skip
    assert found.json["coverage"][RATE] == 0.0
    assert RATE not in found.json["summary"]
