"""Low-rank adapters beside a model: what their slots hold, what they cost, and how engines are told."""

import pytest

import planner
from planner.errors import SpecError
from planner.export.serving import export_serving
from planner.serving.serve import serve
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic


def plan_of(tp=1, engine="vllm", **asked):
    model, fixed = planner.load_model("llama3.1-8b"), {"tp": tp, "pp": 1, "replicas": 1}
    traffic = Traffic(2000, 200, tpot_s=0.02, **asked)
    problem = ServeProblem(
        model,
        planner.load_cluster("h100-sxm:1x8"),
        traffic,
        load_stack(engine),
        modes=("aggregated",),
        fixed=fixed,
    )
    return serve(problem, top=1).best


def test_a_slot_holds_an_adapter():
    """Llama 3.1 8B, rank 16, all linear layers: 41,943,040 parameters (Hugging Face PEFT prints so), 2 bytes each."""
    plain, one, many = (plan_of(adapters=count).estimate for count in (None, 1, 32))
    slot = one.memory_bytes["weights"] - plain.memory_bytes["weights"]
    assert slot == pytest.approx(41943040 * 2)
    assert many.memory_bytes["weights"] - plain.memory_bytes["weights"] == pytest.approx(32 * slot)
    # What slots take is missing in the cache: of 2,200 tokens of 131,072 bytes, for 95 % of memory and blocks of 16.
    lost = plain.max_concurrency - many.max_concurrency
    assert lost == pytest.approx(31.0 * slot / (2208 * 131072), abs=2)
    assert many.goodput_requests_per_s < one.goodput_requests_per_s < plain.goodput_requests_per_s


def test_one_factor_is_whole_on_every_tensor_rank():
    """Rank 16, two ranks: attention 3·4096 whole + (4096 + 2·1024)/2, then 4096/2 + 4096 whole; network alike with 14,336."""
    held = [plan_of(2, adapters=count).estimate.memory_bytes["weights"] for count in (None, 1)]
    attention = 3 * 4096 + (4096 + 2 * 1024) / 2 + 4096 / 2 + 4096
    network = 2 * 4096 + 2 * 14336 / 2 + 14336 / 2 + 4096
    assert held[1] - held[0] == pytest.approx(2.0 * 16 * 32 * (attention + network))


def test_engines_are_told():
    told = export_serving(plan_of(adapters=4, adapter_rank=32), "vllm")["vllm.yaml"]
    assert "enable-lora: true\nmax-loras: 4\nmax-lora-rank: 32\n" in told
    told = export_serving(plan_of(adapters=4, engine="sglang"), "sglang")["sglang.yaml"]
    assert "max-loras-per-batch: 4" in told
    with pytest.raises(planner.PlannerError, match="adapters"):
        export_serving(plan_of(adapters=4, engine="trtllm"), "trtllm")


def test_a_rank_needs_adapters():
    with pytest.raises(SpecError, match="without adapters"):
        Traffic(100, 100, adapter_rank=8)
