"""Every published figure of every technique: reproduced by what the technique brings, and missed without it."""

import pytest

from planner.technique import discover

FIGURES = [
    pytest.param(technique, figure, id=f"{technique.key}: {figure.what}")
    for technique in discover().values()
    for figure in technique.figures
]


def deviation(value, figure):
    return abs(value - figure.published) / abs(figure.published)


@pytest.mark.parametrize(("technique", "figure"), FIGURES)
def test_figure_is_reproduced(technique, figure):
    assert deviation(figure.compute(technique.subject(figure)), figure) <= figure.tolerance


@pytest.mark.parametrize(("technique", "figure"), FIGURES)
def test_figure_is_missed_without_the_technique(technique, figure):
    assert deviation(figure.compute(technique.absence(figure)), figure) > 2 * figure.tolerance
