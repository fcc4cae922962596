"""The page on Calculon's space states how many candidates our search of it has; it has them."""

import re
from pathlib import Path

import pytest

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack
from planner import search as find

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "calculon_space.md").read_text()


@pytest.mark.slow
def test_candidates_are_as_many_as_stated():
    command = re.search(r"`planner train (.+?)`", PAGE, re.DOTALL).group(1)
    assert "gpt3-175b --cluster a100-sxm-80gb:128x8 --global-batch 1536 --seq-len 2048" in command
    problem = Problem(
        load_model("gpt3-175b"), load_cluster("a100-sxm-80gb:128x8"), TrainWorkload(1536, 2048), load_stack(),
        fixed=dict(re.findall(r"--fix (\w+)=(\w+)", command)), explore=tuple(re.findall(r"--explore (\S+)", command)),
    )  # fmt: skip
    assert len(problem.fixed) == 4
    assert len(problem.explore) == 2
    result = find(problem)
    report, stated = result.search, re.search(r"It has ([\d,]+) candidates", PAGE).group(1)
    assert result.best.optimality.status == "exact"
    assert report.candidates == int(stated.replace(",", ""))
    assert report.candidates == report.scored + sum(report.excluded_by_bound.values()) + sum(
        report.rejected.values()
    )
