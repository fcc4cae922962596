"""Order of plans: tau-b, regret and outcomes of memory against hand arithmetic."""

import pytest
from scipy.stats import kendalltau

from planner.validation.outcomes import outcomes
from planner.validation.ranking import Comparison, kendall_tau_b, ranking_summary, sweeps, top1_regret
from planner.validation.scores import ScoredRow

MEASURED = [10.0, 9.0, 8.0, 7.0]


def runs(measured, predicted, plans=None, sweep=("f.csv", "s", "8")):
    names = plans or range(len(measured))
    return [
        Comparison(ScoredRow(f"{i}", "f.csv", "ranking", "scored", "", m, p), sweep, plan)
        for i, (m, p, plan) in enumerate(zip(measured, predicted, names, strict=True))
    ]


@pytest.mark.parametrize(
    ("left", "right"),
    [([1, 2, 3, 4], [1, 3, 2, 4]), ([1, 1, 2, 3], [1, 2, 2, 4]), ([3, 1, 2, 2, 5], [2, 2, 2, 1, 1])],
)
def test_tau_b_agrees_with_scipy(left, right):
    assert kendall_tau_b(left, right) == pytest.approx(kendalltau(left, right).statistic)


def test_tau_b_of_an_order_that_says_nothing():
    assert kendall_tau_b([1, 2, 3, 4], [1, 1, 1, 1]) == 0.0


def test_regret():
    assert top1_regret(MEASURED, [1.0, 2.0, 4.0, 3.0]) == pytest.approx(10.0 / 8.0 - 1.0)
    # Two plans tie at the top: the mean of no regret and of 10/9 - 1.
    assert top1_regret(MEASURED, [4.0, 4.0, 1.0, 2.0]) == pytest.approx(0.5 * (10.0 / 9.0 - 1.0))


def test_a_sweep_needs_four_distinct_plans():
    assert sweeps(runs(MEASURED[:3], [1.0, 2.0, 3.0])) == []
    assert sweeps(runs(MEASURED, MEASURED, plans=[0, 1, 2, 2])) == []
    (found,) = sweeps(runs(MEASURED, [5.0, 6.0, 4.0, 3.0]))
    assert (found.plans, found.kendall_tau) == (4, pytest.approx(4 / 6))  # five pairs agree, one does not
    assert found.top1_regret == pytest.approx(10.0 / 9.0 - 1.0)


def test_repeats_of_a_plan_count_once():
    (found,) = sweeps(runs([*MEASURED, 12.0], [4.0, 3.0, 2.0, 1.0, 4.0], plans=[0, 1, 2, 3, 0]))
    assert (found.plans, found.kendall_tau, found.top1_regret) == (4, pytest.approx(1.0), 0.0)


def test_runs_of_unlike_jobs_are_not_compared():
    small = runs(MEASURED[:2], MEASURED[:2], sweep=("f.csv", "s", "8"))
    large = runs(MEASURED[2:], MEASURED[2:], sweep=("f.csv", "s", "16"))
    assert sweeps(small + large) == []


def test_means_over_sweeps():
    found = sweeps(runs(MEASURED, MEASURED) + runs(MEASURED, MEASURED[::-1], sweep=("f.csv", "t", "8")))
    summary = ranking_summary(found)
    assert summary["sweeps"] == 2
    assert summary["kendall_tau_mean"] == pytest.approx(0.0)  # +1 and -1
    assert summary["top1_regret_mean"] == pytest.approx(0.5 * (10.0 / 7.0 - 1.0))


def test_outcomes():
    pairs = [(1, 1), (1, 0), (0, 0), (0, 0), (0, 0), (0, 1)]
    rows = [ScoredRow(f"{i}", "f", "oom", "scored", "", m, p) for i, (m, p) in enumerate(pairs)]
    # Half of the failures and three of four successes are foreseen.
    assert outcomes(rows) == {"tp": 1, "fp": 1, "tn": 3, "fn": 1, "balanced_accuracy": 0.625}
    assert outcomes(rows[2:]) == {"tp": 0, "fp": 1, "tn": 3, "fn": 0, "balanced_accuracy": 0.75}
    assert outcomes([]) is None
