"""The page on Calculon's space states how many candidates our searches of it have; they have them."""

import re
from pathlib import Path

import pytest

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack
from planner import search as find

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "calculon_space.md").read_text()
STATED = re.findall(r"^\| (.+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)


def choices(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in re.findall(r"(\w+=\w+)", text))


def test_three_searches_are_stated():
    assert [set(choices(fixed)) for fixed, _ in STATED] == [
        set(),
        {"sequence_parallel"},
        {"sequence_parallel", "pipeline"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("fixed", "count"), STATED)
def test_candidates_are_as_many_as_stated(fixed, count):
    command = re.search(r"`planner train (.+?)`", PAGE, re.DOTALL).group(1)
    assert "gpt3-175b --cluster a100-sxm-80gb:128x8 --global-batch 1536 --seq-len 2048" in command
    problem = Problem(
        load_model("gpt3-175b"), load_cluster("a100-sxm-80gb:128x8"), TrainWorkload(1536, 2048), load_stack(),
        fixed=choices(command) | choices(fixed),
    )  # fmt: skip
    report = find(problem).search
    assert report.candidates == int(count.replace(",", ""))
    assert report.candidates == report.scored + sum(report.excluded_by_bound.values()) + sum(
        report.rejected.values()
    )
