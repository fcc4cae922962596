"""Why a run is slower than predicted: terms by their part of the variance, and what each would have to be on its own."""

import pytest

import planner
from planner.report.discrepancy import _terms, discrepancy
from planner.uncertainty.terms import OUTSIDE, PEAK_TERMS, TIME_TERMS


@pytest.fixture(scope="module")
def problem():
    return planner.Problem(
        planner.load_model("llama3.1-8b"),
        planner.load_cluster("h100-sxm:4x8"),
        planner.TrainWorkload(256, 8192),
        planner.load_stack("pytorch-fsdp"),
        fixed={"zero_stage": "fsdp", "recompute": "full"},
    )


@pytest.fixture(scope="module")
def assembly(problem):
    return planner.examine(problem)


PARTS = {"matmul": 6.0, "data_parallel": 1.0, "overlap": 0.5, OUTSIDE: 10.0}
DEVIATIONS = {"matmul": 0.05, "data_parallel": 0.4, "overlap": 0.2, OUTSIDE: 0.02}


def by_name(terms):
    return {term["name"]: term for term in terms}


def test_terms_share_the_difference_by_their_variances():
    """(6·0.05)² = 0.09, (1·0.4)² = 0.16, (0.5·0.2)² = 0.01, (10·0.02)² = 0.04: of 0.30."""
    terms = _terms(TIME_TERMS, PARTS, 2.0, DEVIATIONS)
    assert [term["name"] for term in terms] == ["data_parallel", "matmul", OUTSIDE, "overlap"]
    shares = {term["name"]: term["share"] for term in terms}
    assert shares == pytest.approx(
        {"data_parallel": 16 / 30, "matmul": 9 / 30, OUTSIDE: 4 / 30, "overlap": 1 / 30}
    )


def test_what_a_term_would_have_to_be_alone():
    """2 s more: matrix products 8/6 as long, traffic 3 times; half a second of hidden traffic cannot explain it."""
    terms = by_name(_terms(TIME_TERMS, PARTS, 2.0, DEVIATIONS))
    assert terms["matmul"]["alone"] == pytest.approx(8 / 6)
    assert terms["data_parallel"]["alone"] == pytest.approx(3.0)
    assert terms["overlap"]["alone"] is None
    assert by_name(_terms(TIME_TERMS, PARTS, 0.4, DEVIATIONS))["overlap"]["alone"] == 1.0


def test_a_faster_run_is_not_explained_by_what_can_only_be_slower():
    terms = by_name(_terms(TIME_TERMS, PARTS, -2.0, DEVIATIONS))
    assert set(terms) == {"matmul", "data_parallel"}
    assert terms["data_parallel"]["alone"] is None  # one second cannot become two fewer
    assert terms["matmul"]["alone"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("terms", [TIME_TERMS, PEAK_TERMS])
def test_reasons_for_less_are_others_than_those_for_more(terms):
    parts = {term.name: 1.0 for term in terms}
    more, less = (by_name(_terms(terms, parts, difference, {})) for difference in (0.5, -0.5))
    assert set(more) - set(less) == {name for name in ("overlap", "host_dispatch", OUTSIDE) if name in more}
    assert all(less[name]["why"] and less[name]["why"] != more[name]["why"] for name in less)


def test_every_term_says_what_to_look_at(problem, assembly):
    step_s = assembly.plan.estimate.step_time_s
    found = discrepancy(problem, assembly, 1.3 * step_s, 60e9)
    for quantity in ("step_time", "peak"):
        terms = found[quantity]["terms"]
        assert sum(term["share"] for term in terms) == pytest.approx(1.0)
        assert [t["share"] for t in terms] == sorted((t["share"] for t in terms), reverse=True)
        assert all(term["why"] and term["check"] for term in terms)
    assert found["step_time"]["measured"] == pytest.approx(1.3 * step_s)
    assert {term["name"] for term in found["step_time"]["terms"]} >= {
        "matmul",
        "attention",
        "overlap",
        OUTSIDE,
    }


def test_how_unusual_a_run_is(problem, assembly):
    """A run as predicted is about as often exceeded as not; one three times as long is beyond all."""
    step_s = assembly.plan.estimate.step_time_s
    as_predicted, far = (discrepancy(problem, assembly, by * step_s, None)["step_time"] for by in (1.0, 3.0))
    assert 0.2 < as_predicted["beyond"] < 0.8
    assert far["beyond"] > 0.99
    assert far["interval"] == pytest.approx(assembly.plan.estimate.interval["step_time_s"])


def test_other_software_is_priced_with_the_same_plan(problem, assembly):
    stacks = discrepancy(problem, assembly, 10.0, None)["stacks"]
    assert "pytorch-fsdp" not in stacks
    assert "default" in stacks
    assert list(stacks.values()) == sorted(stacks.values())
    assert discrepancy(problem, assembly, None, 60e9)["stacks"] == {}
