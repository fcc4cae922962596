"""Runs, not only steps: RLHF pipelines, curricula, ways to recover, energy and what it emits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from planner import Problem, TrainWorkload, examine, load_cluster, load_model, load_stack
from planner.costs.energy import emitted_kg, energy_j
from planner.costs.reliability import adjacent_mtbf_s, whole_replicas
from planner.errors import Infeasible, InvalidPlan
from planner.report.goodput import RECOVERIES, Failures, goodput
from planner.report.totals import run_totals
from planner.serving.rlhf import ROLES, RlhfJob, call_problem
from planner.solve.combinatorial.calls import Call, CallProblem, Option, on_all_devices, plan_calls
from planner.solve.curriculum import plan_curriculum

DAY_S = 86400.0


# -- energy and emissions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu_hours", "tonnes"), [(184320, 31.22), (368640, 62.44), (1720320, 291.42)])
def test_emissions_of_llama_2(gpu_hours, tonnes):
    """Llama 2's model card: 400 W per A100; PUE 1.1 and 0.385 kg/kWh are those of LLaMA (arXiv:2302.13971, section 6)."""
    joules = energy_j(400.0, gpu_hours * 3600.0, pue=1.1)
    assert emitted_kg(joules, 0.385) / 1e3 == pytest.approx(tonnes, rel=1e-3)


def test_energy_of_bloom():
    """Luccioni et al. 2022 (arXiv:2211.02001), Table 1: 1,082,990 GPU hours at 400 W, 433,196 kWh, 24.69 t at 57 g/kWh."""
    joules = energy_j(400.0, 1_082_990 * 3600.0)
    assert joules / 3.6e6 == pytest.approx(433_196, rel=1e-5)
    assert emitted_kg(joules, 0.057) / 1e3 == pytest.approx(24.69, rel=1e-3)


def test_energy_of_bloom_is_predicted():
    """The same run from its plan: 366e9 tokens, 2,048 sequences, tp 4, pp 12, dp 8 on 384 A100 (arXiv:2211.05100, section 3.4).

    The measured hours hold restarts and the early steps with smaller batches, which a steady step does not.
    """
    fixed = {"tp": 4, "pp": 12, "micro_batch_size": 2, "recompute": "full", "zero_stage": 1}
    problem = Problem(
        load_model("bloom-176b"), load_cluster("a100-sxm-80gb:48x8"), TrainWorkload(2048, 2048, tokens=366e9),
        load_stack("megatron-deepspeed"), fixed=fixed, kg_per_kwh=0.057,
    )  # fmt: skip
    run = run_totals(examine(problem).plan, problem)
    assert run is not None
    assert 0.75 < run["device_hours"] / 1_082_990 < 1.0
    assert run["kg_co2e"] == pytest.approx(run["joules"] / 3.6e6 * 0.057)


def test_energy_at_the_meter_is_the_devices_times_the_pue():
    problem = Problem(
        load_model("gpt2"), load_cluster("a100-sxm-80gb:1x2"), TrainWorkload(8, 1024, tokens=1e9), load_stack(),
        pue=1.25, fixed={"tp": 1},
    )  # fmt: skip
    run = run_totals(examine(problem).plan, problem)
    assert run["meter_joules"] == pytest.approx(1.25 * run["joules"])
    assert run["kg_co2e"] is None


# -- failures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "each", "out"), [(4, 8, 0.02), (8, 2, 0.1), (1, 16, 0.01), (64, 1, 0.3)]
)
def test_whole_replicas_are_those_of_drawn_losses(replicas, each, out):
    rng = np.random.default_rng(1)
    left = (rng.random((200_000, replicas * each)) >= out).sum(axis=1)
    assert whole_replicas(replicas, each, out) == pytest.approx((left // each).mean() / replicas, rel=5e-3)


def test_neighbours_are_lost_together_as_often_as_drawn():
    """A ring of devices that fail at random: time until one is lost while a neighbour is away."""
    rng, mtbf, away, devices = np.random.default_rng(2), 1000.0, 2.0, 16
    clock, last, times, begun = 0.0, np.full(devices, -np.inf), [], 0.0
    while len(times) < 400:
        clock += rng.exponential(mtbf / devices)
        lost = int(rng.integers(devices))
        if any(clock - last[(lost + step) % devices] < away for step in (-1, 1)):
            times.append(clock - begun)
            begun, last = clock, np.full(devices, -np.inf)
        else:
            last[lost] = clock
    assert np.mean(times) == pytest.approx(float(adjacent_mtbf_s(mtbf, devices, away)), rel=0.15)


@pytest.fixture(scope="module")
def pipelined():
    """GPT-3 6.7B on four nodes of eight A100, pp 8, dp 4: many small pipelines, as on spot instances."""
    fixed = {"tp": 1, "pp": 8, "micro_batch_size": 1}
    return examine(
        Problem(
            load_model("gpt3-6.7b"), load_cluster("a100-sxm-80gb:4x8"), TrainWorkload(128, 2048), load_stack(), fixed=fixed
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wins", "failures"),
    [
        # Spares are at hand and failures rare: nothing beats waiting.
        ("restart", Failures(device_mtbf_s=2000 * DAY_S)),
        # Another spot instance comes after hours: Varuna goes on with the replicas that are left (arXiv:2111.04007).
        ("elastic", Failures(device_mtbf_s=20 * DAY_S, replace_s=4 * 3600.0)),
        # One is lost every half an hour, and another is there in minutes: Bamboo undoes no work (arXiv:2204.12013).
        ("redundant", Failures(device_mtbf_s=16 * 3600.0, replace_s=120.0)),
    ],
)
@pytest.mark.reaches("bamboo", "varuna")
def test_each_recovery_wins_where_its_paper_says(pipelined, wins, failures):
    each = {
        name: goodput(pipelined, replace(failures, recovery=name), 25e9)["goodput"] for name in RECOVERIES
    }
    assert max(each, key=lambda name: each[name]) == wins, each


def test_recoveries_agree_without_failures(pipelined):
    rare = Failures(device_mtbf_s=1e15)
    each = [
        goodput(pipelined, replace(rare, recovery=name), 25e9)["goodput"] for name in ("restart", "elastic")
    ]
    assert each == pytest.approx([1.0, 1.0], abs=1e-3)


@pytest.mark.reaches("c4")
def test_detection_costs_what_a_restart_costs(pipelined):
    """C4 (arXiv:2406.04594) shortens what is lost before the restart; to first order both are paid once per failure."""
    often = Failures(device_mtbf_s=30 * DAY_S)
    late = goodput(pipelined, replace(often, detect_s=3600.0), 25e9)
    slow = goodput(pipelined, replace(often, restart_s=often.restart_s + 3600.0 - often.detect_s), 25e9)
    assert late["goodput"] == pytest.approx(slow["goodput"])
    assert late["goodput"] < goodput(pipelined, often, 25e9)["goodput"]


def test_redundant_stages_need_neighbours_and_room():
    problem = Problem(
        load_model("gpt2"),
        load_cluster("a100-sxm-80gb:1x8"),
        TrainWorkload(32, 1024),
        load_stack(),
        fixed={"tp": 1},
    )
    with pytest.raises(InvalidPlan, match="no neighbour"):
        goodput(examine(problem), Failures(recovery="redundant"), 25e9)


# -- reinforcement learning from feedback ------------------------------------------------------------------------------------


def brute(problem: CallProblem) -> float:
    """The least period over all choices, each priced as a one-option problem."""
    best = np.inf
    for chosen in product(*(call.options for call in problem.calls)):
        calls = tuple(
            replace(call, options=(option,)) for call, option in zip(problem.calls, chosen, strict=True)
        )
        try:
            best = min(best, plan_calls(replace(problem, calls=calls)).time_s)
        except Infeasible:
            continue
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("staleness", [0, 1])
def test_the_plan_of_all_calls_is_the_best_of_all(seed, staleness):
    rng = np.random.default_rng(seed)

    def options() -> tuple[Option, ...]:
        found = []
        for size in (4, 2, 1):
            time_s, rests = float(rng.uniform(1, 5)) * (4 / size) ** 0.7, float(rng.uniform(1, 4)) / size
            found += [
                Option(first, size, "", time_s, float(rng.uniform(0, 0.5)), rests, rests * 1.5)
                for first in range(0, 4, size)
            ]
        return tuple(found)

    calls = (
        Call("generate", "actor", options()), Call("read", "reward", options(), (0,)),
        Call("judge", "critic", options(), (0,)), Call("train", "actor", options(), (1, 2), trains=True),
    )  # fmt: skip
    # Options of one size are alike but for their place: the twins that the search leaves out.
    alike = tuple(
        replace(
            call,
            options=tuple(
                replace(next(o for o in call.options if o.devices == option.devices), first=option.first)
                for option in call.options
            ),
        )
        for call in calls
    )
    problem = CallProblem(alike, 4, budget_bytes=6.0, staleness=staleness)
    assert plan_calls(problem).time_s == pytest.approx(brute(problem))
    assert plan_calls(problem).certificate.status == "exact"


def job(model: str, cluster: str, **changes) -> RlhfJob:
    models = dict.fromkeys(ROLES, load_model(model))
    made = RlhfJob(models, load_cluster(cluster), load_stack(), load_stack("vllm"), 512, 1024, 1024)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def seven_billion():
    return call_problem(job("llama2-7b", "h100-sxm:2x8", parts=2))


@pytest.mark.reaches("asyncflow")
def test_overlapping_steps_split_the_devices(seven_billion):
    """AsyncFlow (arXiv:2507.01663): generation has devices of its own, and the period is the busiest device's work."""
    alone = plan_calls(seven_billion)
    overlapped = plan_calls(replace(seven_billion, staleness=1), time_limit_s=30.0)
    assert overlapped.time_s < alone.time_s
    generates, *_, trains = overlapped.options
    assert set(range(generates.first, generates.first + generates.devices)).isdisjoint(
        range(trains.first, trains.first + trains.devices)
    )


@pytest.mark.reaches("realhf")
def test_weights_move_between_training_and_generation(seven_billion):
    """Training keeps states that generation has no use for, and generation wants another layout (arXiv:2406.14088, section 2)."""
    plan = plan_calls(seven_billion)
    assert plan.moves[0]
    assert not plan.moves[-1]


def test_grpo_has_no_critic():
    models = {role: load_model("llama2-7b") for role in ROLES if role != "critic"}
    made = job("llama2-7b", "h100-sxm:1x8", models=models, algorithm="grpo", parts=1)
    assert [call.name for call in call_problem(made).calls] == [
        "actor generates", "reference reads", "reward reads", "actor trains",
    ]  # fmt: skip


@pytest.mark.slow
def test_hours_of_a_full_rlhf_of_four_70b_models():
    """ReaLHF, docs/source/intro.rst: 17.0 hours for 4 × 400 steps of 4 × 70B; on 128 H100 (arXiv:2406.14088, section 8).

    Batch and lengths are those of its profiling example: 512 prompts of 1,024 tokens, 1,024 generated, 8 mini-batches.
    """
    problem = call_problem(job("llama2-70b", "h100-sxm:16x8", parts=2))
    plan = plan_calls(problem, time_limit_s=60.0)
    assert plan.time_s * 1600 / 3600 == pytest.approx(17.0, rel=0.15)
    assert plan.time_s < on_all_devices(problem).time_s
    actor, critic = plan.options[-2:]  # trained side by side, each on half of the devices
    assert {actor.devices, critic.devices} == {64}


# -- curricula -----------------------------------------------------------------------------------------------------------------


NARROW = {
    "tp": 1,
    "pp": 1,
    "loss_kernel": "fused",
    "gradient_accumulation": "fused",
    "optimizer_offload": "none",
}


def curriculum(tokens: float):
    problem = Problem(
        load_model("llama3-8b"), load_cluster("h100-sxm:4x8"), TrainWorkload(1, 1), load_stack()
    )
    lengths = {2048: 5 * tokens, 8192: 5 * tokens, 131072: tokens}
    return plan_curriculum(problem, lengths, 2.0**22, 122e6, 540.0)


@pytest.mark.reaches("growlength")
def test_short_sequences_first_take_less():
    """GrowLength (arXiv:2310.00576): as many tokens in less time than at the last length throughout."""
    found = curriculum(10e9)
    assert found.run_s < found.at_last_length_s
    assert found.run_s == pytest.approx(sum(p.run_s + p.switch_s for p in found.phases))
    assert [p.seq_len for p in found.phases] == [2048, 8192, 131072]


@pytest.mark.reaches("universal_ckpt")
def test_a_plan_changes_only_where_that_pays():
    """Storing and loading states takes minutes (arXiv:2406.18820): days of tokens pay it, minutes of them do not."""
    assert any(phase.switch_s for phase in curriculum(10e9).phases)
    assert not any(phase.switch_s for phase in curriculum(10e6).phases)
