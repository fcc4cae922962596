"""Sequences of unlike lengths: packed, they are as many products; groups of unlike sizes win (arXiv:2412.01523)."""

from __future__ import annotations

import pytest

from planner import Problem, TrainWorkload, estimate, load_cluster, load_model, load_stack
from planner.errors import Infeasible
from planner.plans.assemble import model_flop
from planner.solve.lengths import deal, packed
from planner.solve.sequence_costs import sequence_problem
from planner.specs.parameters import parameter_count

HISTOGRAM = {1024: 512, 32768: 2, 131072: 1}


def problem(cluster: str, histogram: dict[int, int]) -> Problem:
    machine = load_cluster(cluster)
    fixed = {"zero_stage": 3, "cp": machine.devices}
    return Problem(
        load_model("llama2-7b"), machine, packed(TrainWorkload(1, 1), histogram), load_stack(), fixed=fixed
    )


def test_packing_keeps_tokens_and_what_they_see():
    job = packed(TrainWorkload(1, 1), HISTOGRAM)
    tokens = 512 * 1024 + 2 * 32768 + 131072
    assert (job.seq_len, job.global_batch_size) == (131072, -(-tokens // 131072))
    # 512·1024² + 2·32768² + 131072² score entries of full attention, over all tokens
    assert job.document_len == (512 * 1024**2 + 2 * 32768**2 + 131072**2) // tokens
    alike = packed(TrainWorkload(1, 1), {4096: 64})
    assert (alike.global_batch_size, alike.seq_len, alike.document_len) == (64, 4096, 4096)


def test_model_flop_count_attention_inside_documents():
    model = load_model("llama2-7b")
    # Two documents of 4,096 tokens are the products of two sequences: pairs of tokens across documents are nobody's work.
    alone, packed_ = TrainWorkload(1, 4096), TrainWorkload(1, 8192, document_len=4096)
    assert model_flop(model, packed_) == pytest.approx(2 * model_flop(model, alone))
    assert model_flop(model, TrainWorkload(1, 4096, document_len=8192)) == model_flop(model, alone)


def test_groups_of_unlike_sizes_win_where_lengths_are_unlike():
    job = problem("a100-sxm-80gb:4x8", HISTOGRAM)
    dealt = deal(job, estimate(job), HISTOGRAM, 30.0)
    assert len(set(dealt.groups.degrees)) > 1
    assert dealt.groups.counts.sum(axis=0).tolist() == [512, 2, 1]
    assert sum(dealt.groups.degrees) <= 32
    assert dealt.equal is not None
    assert dealt.groups.time_s < 0.9 * dealt.equal.time_s
    long = dealt.groups.degrees[int(dealt.groups.counts[:, 2].argmax())]
    assert long == max(dealt.groups.degrees)


def test_sequences_of_one_length_need_no_unlike_groups():
    job = problem("a100-sxm-80gb:1x8", {4096: 64})
    dealt = deal(job, estimate(job), {4096: 64}, 30.0)
    assert dealt.equal is not None
    assert dealt.groups.time_s == pytest.approx(dealt.equal.time_s, rel=0.01)


def test_what_fits_no_group_is_refused():
    histogram = {2**22: 1}
    job = problem("a100-sxm-40gb:1x8", {1024: 8})
    with pytest.raises(Infeasible):
        deal(job, estimate(job), histogram, 30.0)


def test_states_are_those_of_the_optimizer():
    # Weights of 65B in 16 bits over eight devices are 16.25 GB each; LOMO keeps nothing else (arXiv:2306.09782).
    model, cluster = load_model("llama-65b"), load_cluster("rtx-3090:1x8")
    job = TrainWorkload(1, 512, optimizer="lomo")
    left = sequence_problem(model, cluster, load_stack(), job, {512: 8}, [1], {}).budget_bytes
    held = float(cluster.device.memory_bytes) - float(load_stack().framework_bytes) - left
    assert held == pytest.approx(2 * parameter_count(model) / 8)
    with pytest.raises(Infeasible, match="states take"):
        sequence_problem(model, cluster, load_stack(), TrainWorkload(1, 512), {512: 8}, [1], {})
