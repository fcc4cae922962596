"""Software stacks: which runs a stack describes, and what a file may leave to another."""

from dataclasses import fields

import pytest

import planner
from planner.errors import SpecError
from planner.specs.stack import Serves, load_stack, stack_for

OLD = 'name = "mine"\nextends = "default"\n'


def test_constants_of_an_extended_stack_carry_over(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OLD + "framework_bytes = 1e9\n")
    mine, default = load_stack(path), load_stack()
    assert float(mine.framework_bytes) == 1e9
    assert mine.fragmentation == default.fragmentation


def test_habits_of_an_extended_stack_carry_over(tmp_path):
    path = tmp_path / "mine.toml"
    casts = 'weight_casts = { value = "once", kind = "assumed", source = "x" }\n'
    path.write_text('name = "mine"\nextends = "megatron-deepspeed"\n[habits]\n' + casts)
    usual = {
        "weight_casts": "each_micro_batch",
        "gradient_sums": "reduce_scatter",
        "weight_shares": "slices",
        "stage_outputs": "dropped",
        "tensor_scales": "delayed",
        "updates": "fused",
        "training_metrics": "none",
        "stage_inputs": "reused",
        "end_weights": "resharded",
        "shards": "in_place",
        "segments": "fixed",
    }
    assert load_stack().habits == usual
    assert load_stack(path).habits == usual | {"weight_casts": "once", "gradient_sums": "all_reduce"}


def test_a_rule_says_what_its_runs_did_otherwise():
    # torchtitan's pull request 1922 of 22 October 2025 has schedules drop the last stage's outputs.
    def habit(date):
        return stack_for("PyTorch FSDP2", measured_date=date).habits["stage_outputs"]

    assert [habit(date) for date in ("2024-12", "2025", "2026", "")] == [*["returned"] * 2, *["dropped"] * 2]
    assert stack_for("PyTorch FSDP2", measured_date="2025").name == "pytorch-fsdp"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('name = "mine"\nextends = "megatron"\n', "'megatron'"),
        (OLD + '[[serves]]\nframework = "x"\nfrom = "2020"\n', "unknown key"),
        (OLD + '[knobs]\nattention_kernel = "eager"\n', "(str)"),
        (OLD + '[knobs]\nattention_kernel = { value = "eager" }\n', "is missing"),
        (
            OLD + '[habits]\ngradient_sums = { value = "gather", kind = "assumed", source = "x" }\n',
            "'gather'",
        ),
        (
            OLD + '[[serves]]\nframework = "x"\nhabits = { gradient_sums = { value = "gather" } }\n',
            "'gather'",
        ),
        (OLD + '[habits]\ngradient_sum = { value = "all_reduce" }\n', "unknown key"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, found):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        load_stack(path)
    assert found in str(error.value)


@pytest.mark.parametrize(
    ("rule", "run", "fits"),
    [
        (Serves("megatron-lm"), ("megatron-lm", "", ""), True),
        (Serves("megatron-lm"), ("megatron-lm-v1.1.5-+-deepspeed", "", ""), True),
        (Serves("megatron-lm"), ("megatron-core", "", ""), False),
        (Serves("x", until="2022"), ("x", "", "2022-12"), True),
        (Serves("x", until="2022-06"), ("x", "", "2022"), True),  # the year alone: nothing speaks against it
        (Serves("x", until="2022-06"), ("x", "", "2022-07"), False),
        (Serves("x", until="2022"), ("x", "", ""), False),
        (Serves("x", since="2024"), ("x", "", "2023-12"), False),
        (Serves("x", since="2024"), ("x", "", "2024-01-01"), True),
        (Serves("x", versions=("25.", "26.02")), ("x", "26.02", ""), True),
        (Serves("x", versions=("25.", "26.02")), ("x", "26.04", ""), False),
    ],
)
def test_rules_of_a_stack(rule, run, fits):
    assert rule.matches(*run) is fits


def test_the_framework_and_its_date_choose_the_stack():
    assert stack_for("Megatron-LM", "", "2021").name == "megatron-eager"
    assert stack_for("Megatron-LM", "", "2023").name == "default"
    assert stack_for("Megatron-Core", "24.07", "2024").name == "nemo-2024"
    assert stack_for("Megatron-Core", "26.02", "2026").name == "megatron-bridge"
    assert stack_for("Composer FSDP1", "torch 1.13", "2023").name == "composer-2023"
    assert stack_for("Composer FSDP1", "torch 2.x", "2024").name == "composer"
    assert stack_for("PyTorch FSDP2", "", "2025").name == "pytorch-fsdp"
    assert stack_for("NeMo Automodel", "", "2026").name == "automodel"
    assert stack_for("NeMo Automodel PyTorch attention").name == "automodel-torch"
    assert stack_for("something else").name == "default"


def test_vllms_first_engine_is_vllm_but_for_what_is_published_of_it():
    """Its rows are of one source and one model: too few for constants of its own."""
    first, engine = load_stack("vllm-v0"), load_stack("vllm")
    assert first.on == engine.on
    for generation in engine.serving.on:
        own, other = (stack.serving.on_generation(generation) for stack in (first, engine))
        differ = {f.name for f in fields(own) if getattr(own, f.name) != getattr(other, f.name)} - {"on"}
        assert differ == {"prompts", "max_sequences", "graph_sequences", "sequence_s"}
        assert own.sequence_s.source == "vllm-v0-profile"


def test_a_named_plan_takes_its_kernels_from_the_stack():
    model, cluster = planner.load_model("gpt2"), planner.load_cluster("a100-sxm-80gb:1x8")
    job = planner.TrainWorkload(64, 1024)
    kernels = [
        planner.estimate(planner.Problem(model, cluster, job, load_stack("megatron-eager"), fixed)).knobs[
            "attention_kernel"
        ]
        for fixed in ({}, {"attention_kernel": "flash"})
    ]
    assert kernels == ["eager", "flash"]


@pytest.mark.parametrize(
    ("fixed", "messages"),
    [
        ({"tp": 4, "pp": 2, "sequence_parallel": "false"}, "scatter_gather"),
        ({"tp": 4, "pp": 2, "sequence_parallel": "false", "pipeline": "stages"}, "stages"),
        ({"tp": 4, "pp": 2, "sequence_parallel": "true"}, "stages"),  # every rank has its slice already
        ({"tp": 1, "pp": 2}, "stages"),
        ({"tp": 4, "pp": 1, "sequence_parallel": "false"}, "stages"),
    ],
)
@pytest.mark.parametrize("stack", ["megatron-eager", "megatron-2022", "megatron-deepspeed"])
def test_stages_of_megatron_and_deepspeed_send_slices_where_ranks_hold_the_same(stack, fixed, messages):
    """scatter_gather_tensors_in_pipeline is Megatron-LM's default from February 2021 on, is_pipe_partitioned DeepSpeed's."""
    model, cluster = planner.load_model("gpt3-2.7b"), planner.load_cluster("a100-sxm-80gb:2x8")
    problem = planner.Problem(model, cluster, planner.TrainWorkload(64, 2048), load_stack(stack), fixed)
    assert planner.estimate(problem).knobs["pipeline"] == messages
