"""A wide search that starts from narrow ones ends where the plain one does; without the time to, it says what is known."""

from __future__ import annotations

import pytest

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search
from planner.errors import Infeasible, Interrupted, SpecError
from planner.solve.kernel_floor import kernel_floor_s
from planner.solve.widening import search_widening

NARROW = {
    "tp": 1, "cp": 1, "loss_kernel": "fused", "gradient_accumulation": "fused", "micro_batch_size": 1,
    "activation_offload": "none", "parameter_offload": "none",
}  # fmt: skip


def problem(model="gpt2-xl", cluster="a100-sxm-40gb:1x4", batch=8, **options) -> Problem:
    fixed = {**NARROW, **options.pop("fixed", {})}
    return Problem(
        load_model(model), load_cluster(cluster), TrainWorkload(batch, 1024), load_stack(), fixed=fixed,
        **{"explore": ("schedule=*", "zero_stage=*", "recompute=*"), **options},
    )  # fmt: skip


@pytest.mark.parametrize("allowed", [(), ("staleness",)])
def test_it_finds_the_plan_that_a_search_of_everything_finds(allowed):
    wide = problem(allowed=allowed, fixed={"pp": 4})
    plain, widened = search(wide, top=1), search_widening(wide, top=4)
    assert widened.best.id == plain.best.id
    assert widened.best.optimality.status == "exact"
    assert widened.search.candidates == plain.search.candidates
    assert not widened.notes
    times = [plan.estimate.step_time_s for plan in widened.plans]
    assert times == sorted(times)
    assert len({plan.id for plan in widened.plans}) == len(times)


def test_without_time_it_has_the_best_of_the_default_space_and_a_gap_to_the_kernels_alone():
    wide = problem()
    found, plain = search_widening(wide, time_limit_s=0.0), search(problem(explore=()))
    assert found.best.estimate.step_time_s >= plain.best.estimate.step_time_s
    optimality = found.best.optimality
    assert optimality.status == "gap"
    assert optimality.bound_s == pytest.approx(kernel_floor_s(wide) / 4)
    assert optimality.gap == pytest.approx(1.0 - optimality.bound_s / found.best.estimate.step_time_s)
    assert optimality.bound_s <= search(wide, top=1).best.estimate.step_time_s
    assert "all choices together" in found.notes[0]


def test_what_fits_nowhere_is_refused_as_a_search_refuses_it():
    with pytest.raises(Infeasible, match="nothing fits"):
        search_widening(problem(model="gpt3-175b", fixed={"optimizer_offload": "none"}))
    with pytest.raises(SpecError, match="--explore"):
        search_widening(problem(explore=("no_such_choice",)))


def test_who_stops_it_has_the_best_plan_so_far():
    def stop(done: int, parts: int) -> None:
        if ended:
            raise KeyboardInterrupt
        if done == parts:
            ended.append(parts)

    ended: list[int] = []
    with pytest.raises(Interrupted) as stopped:
        search_widening(problem(), on_progress=stop)
    best = stopped.value.best
    assert best.best.id == search(problem(explore=()), top=1).best.id
    assert best.best.optimality.status == "gap"
    assert "all choices together" in best.notes[0]


def test_what_is_not_open_may_be_forbidden():
    """The narrow searches before the wide one have no such choice to forbid; what exists nowhere is still refused."""
    without = problem(forbidden=("schedule=gpipe", "schedule=zb*"), fixed={"pp": 4})
    found = search_widening(without, top=4)
    assert not any(plan.knobs["schedule"].startswith(("gpipe", "zb")) for plan in found.plans)
    closed = problem(explore=(), forbidden=("schedule=zbv",))
    assert search(closed, top=1).best.id == search(problem(explore=()), top=1).best.id
    with pytest.raises(SpecError, match="--forbid"):
        search(problem(forbidden=("schedule=zvb",)), top=1)
