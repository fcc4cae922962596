"""Pipelines whose stages are stated layer by layer: one layout like any other, whoever states it and whoever prices it."""

import json

import numpy as np
import pytest

import planner
from planner.engine.block_table import FIELDS, BlockTable
from planner.errors import ExportError, InvalidPlan, SpecError
from planner.export import export
from planner.export.closest import closest_plan
from planner.export.readers import read_launched
from planner.export.run_row import run_row
from planner.export.target import Target
from planner.export.torchtitan import fewer_at_ends, stages_of
from planner.pipeline.layout import LAYOUT_NAMES, layout_name, layouts, stages_named
from planner.pipeline.step_time import exact_step_s
from planner.plans.plan import Plan
from planner.report.step_trace import step_trace
from planner.solve.named import examine
from planner.solve.replay import replay
from planner.validation.plans import run_of
from planner.validation.table import read_table

KINDS = ("dense", "embedding", "head", "boundary")


def problem(model="llama3.1-70b", cluster="h100-sxm:4x8", batch=64, seq_len=4096, **fixed) -> planner.Problem:
    return planner.Problem(
        planner.load_model(model), planner.load_cluster(cluster), planner.TrainWorkload(batch, seq_len),
        planner.load_stack(), fixed={"micro_batch_size": "1", **{name: str(value) for name, value in fixed.items()}},
    )  # fmt: skip


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages", [(8,), (20, 21, 20, 19), (0, 26, 27, 27), (9, 11, *[10] * 6), (1, 2, 1, 2)]
)
def test_stages_without_a_name_are_written_out_and_read_again(stages):
    text = layout_name(stages)
    assert text in LAYOUT_NAMES or stages_named(text) == stages


def test_stages_that_have_a_name_are_called_by_it():
    assert [layout_name(s) for s in ((7, 7), (7, 8), (8, 7), (7, 8, 8, 7), (7, 8, 7, 7))] == [
        "even", "short_first", "short_last", "short_ends", "balanced",
    ]  # fmt: skip


# -- the price, by hand ----------------------------------------------------------------------------------------------


def one_f_one_b(stages: str, pp: int, micro_batches: int, schedule: str = "1f1b") -> float:
    """The step of layers that take 1 s forward and 2 s backward, without hops, embedding, head or tail."""
    values = np.zeros((len(FIELDS), 4, 1))
    values[FIELDS.index("forward_s"), 0], values[FIELDS.index("backward_s"), 0] = 1.0, 2.0
    sizes = stages_named(stages)
    (layout,) = layouts(("dense",) * sum(sizes), KINDS, pp, len(sizes) // pp, wanted=stages)
    return float(exact_step_s([BlockTable(KINDS, values)], layout, schedule, micro_batches, [None])[0])


def test_the_longest_stage_sets_the_pace():
    # Last stage of 3 layers: its first micro-batch comes after 1 s, each takes it 3 + 6 s, and 2 s of backward follow the last.
    assert one_f_one_b("1+3", 2, 4) == 1 + 4 * 9 + 2
    # First stage of 3 layers: it never waits, and nothing follows it.
    assert one_f_one_b("3+1", 2, 4) == 4 * 9
    # All forwards (0 to 12, the last stage to 13), then all backwards: the last stage done with the first at 15, then 4 of 6 s.
    assert one_f_one_b("3+1", 2, 4, "gpipe") == 13 + 2 + 4 * 6


def test_devices_of_an_interleaved_pipeline_hold_every_pp_th_stage():
    # Device 0 holds stages 0 and 2 of 1 and 2 layers, (3 + 6) s for each of 4 micro-batches, and never waits: its fifth forward
    # ends at 7 s, as the other device is done with the first backward (forward 4 to 5 s, backward to 7 s).
    assert one_f_one_b("2*1+2+1", 2, 4, "interleaved") == 4 * 9
    sizes = (1, 1, 2, 1)
    (layout,) = layouts(("dense",) * 5, KINDS, 2, 2, wanted="2*1+2+1")
    assert layout.device_counts[:, 0].tolist() == [sizes[0] + sizes[2], sizes[1] + sizes[3]]
    assert layout.device_counts[:, 1:3].tolist() == [[1.0, 0.0], [0.0, 1.0]]  # embedding first, head last


def test_stages_of_a_plan_take_what_their_blocks_take():
    """Stage times of a real plan are layers times a layer, and the embedding or the head; the step follows from the longest."""
    found = examine(problem(tp=8, pp=4, pipeline_layout="20+21+20+19"))
    layer, embedding, head, _ = (
        found.table["forward_s"][:, 0] + found.table["backward_s"][:, 0] + found.table["weight_s"][:, 0]
    )
    work_s = [20 * layer + embedding, 21 * layer, 20 * layer, 19 * layer + head]
    forward, backward = found.table["forward_s"], found.table["backward_s"] + found.table["weight_s"]
    assert (found.layout.counts @ (forward + backward))[:, 0] == pytest.approx(work_s, rel=1e-12)
    m, plan = found.micro_batches, found.plan
    assert plan.stages == (20, 21, 20, 19)
    slowest, before = int(np.argmax(work_s)), float(np.sum(work_s[: int(np.argmax(work_s))]))
    # No stage starts before the others have passed the first micro-batch on, nor is done before they passed the last back.
    assert plan.estimate.step_time_s >= before + m * work_s[slowest]
    assert (
        plan.estimate.step_time_s
        <= sum(work_s) + (m - 1) * work_s[slowest] + 0.05 * plan.estimate.step_time_s
    )


@pytest.mark.parametrize(
    ("schedule", "stages"), [("1f1b", "4*20"), ("gpipe", "4*20"), ("interleaved", "8*10"), ("zbv", "8*10")]
)
def test_equal_stages_are_the_even_layout(schedule, stages):
    """Written out or by name, the same plan: name, step, memory and identity."""
    chosen = {"tp": 8, "pp": 4, "schedule": schedule, "virtual_stages": len(stages_named(stages)) // 4}
    given, named = (
        planner.estimate(problem(**chosen, pipeline_layout=layout)) for layout in (stages, "even")
    )
    assert given == named
    assert given.knobs["pipeline_layout"] == "even"


# -- who states them -------------------------------------------------------------------------------------------------


def read(launcher: str, text: str, tmp_path, file="run.sh"):
    (tmp_path / file).write_text(text)
    return read_launched(launcher, tmp_path / file)


def priced(run, **fixed) -> Plan:
    return planner.estimate(problem(**{**run.fixed, **fixed}))


TITAN = "torchrun --nproc_per_node=8 --nnodes=4 -m torchtitan.train --module llama3 --config llama3_70b"
TITAN_STAGES = [
    # torchtitan 0.3.0, _generate_llm_fqn_per_model_part(stages, 80, first, last): the first stages get what is left over.
    ("--parallelism.pipeline_parallel_degree 4", (20, 21, 20, 19)),
    (
        "--parallelism.pipeline_parallel_degree 4 --parallelism.pipeline_parallel_schedule Interleaved1F1B",
        (10, 11, 10, 10, 10, 10, 10, 9),
    ),
    (
        "--parallelism.pipeline_parallel_degree 4 --parallelism.pipeline_parallel_last_stage_less_layers 4",
        (21, 21, 21, 17),
    ),
    ("--parallelism.pipeline_parallel_degree 2", (40, 40)),
]


@pytest.mark.parametrize(("flags", "stages"), TITAN_STAGES)
def test_torchtitans_own_stages_are_priced_and_written_again(flags, stages, tmp_path):
    run = read("torchtitan", f"{TITAN} {flags} --training.local_batch_size 32", tmp_path)
    plan = priced(run)
    assert plan.stages == stages
    written = export(plan, "torchtitan")["flags.txt"]
    assert (
        read("torchtitan", written, tmp_path, "flags.txt").fixed["pipeline_layout"]
        == plan.knobs["pipeline_layout"]
    )


def test_the_recipe_of_llama_405b_multiplies_in_fp8(tmp_path):
    """llama3_405b of torchtitan 0.3.0: Float8LinearConverter (rowwise, no lm_head), compiled, asynchronous tp = 8."""
    launch = TITAN.replace("70b", "405b").replace("nnodes=4", "nnodes=64")
    run = read(
        "torchtitan",
        f"{launch} --parallelism.pipeline_parallel_degree 8 --training.local_batch_size 32",
        tmp_path,
    )
    chosen = ("precision", "tensor_overlap", "elementwise_kernel", "recompute", "tp", "pipeline_layout")
    assert [run.fixed[name] for name in chosen] == [
        "fp8_rowwise",
        "chunked",
        "fused",
        "full",
        8,
        "short_ends",
    ]
    job = planner.Problem(
        planner.load_model("llama3.1-405b"), planner.load_cluster("h100-sxm:64x8"),
        planner.TrainWorkload(256, 8192, precisions=("fp8_rowwise",)), planner.load_stack(), fixed=run.fixed,
    )  # fmt: skip
    written = export(planner.estimate(job), "torchtitan")["flags.txt"]
    assert read("torchtitan", written, tmp_path, "flags.txt").fixed == {
        name: value for name, value in run.fixed.items() if name != "dp"
    }
    wide = planner.estimate(planner.Problem(
        job.model, job.cluster, planner.TrainWorkload(256, 8192), job.stack, fixed={**run.fixed, "precision": "bf16"}
    ))  # fmt: skip
    with pytest.raises(ExportError, match="multiplied in fp8 by recipes that convert them"):
        export(wide, "torchtitan")


def test_torchtitan_is_told_no_stages_that_it_does_not_deal():
    with pytest.raises(ExportError, match=r"cannot express pipeline_layout=2\*20\+21\+19"):
        export(planner.estimate(problem(tp=8, pp=4, pipeline_layout="20+20+21+19")), "torchtitan")


@pytest.mark.parametrize("pp", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("ends", [(0, 0), (1, 1), (2, 1), (0, 3), (4, 0)])
def test_layers_fewer_on_the_ends_follow_from_the_stages(pp, ends):
    stages = stages_of(80, pp, *ends)
    found = fewer_at_ends(stages)
    assert found is not None
    assert stages_of(80, pp, *found) == stages


@pytest.mark.parametrize(
    "wrong",
    [
        "--parallelism.pipeline_parallel_layers_per_stage 30",  # three stages of four ranks
        "--parallelism.pipeline_parallel_layers_per_stage 11",  # eight stages under 1F1B
        "--parallelism.pipeline_parallel_first_stage_less_layers 40",
        "--parallelism.pipeline_parallel_first_stage_less_layers -1",
        "--parallelism.module_fqns_per_model_part tok_embeddings layers.0",
    ],
)
def test_stages_that_torchtitan_refuses_are_named(wrong, tmp_path):
    with pytest.raises(SpecError, match="stage"):
        read("torchtitan", f"{TITAN} --parallelism.pipeline_parallel_degree 4 {wrong}", tmp_path)


MEGATRON = (
    "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --group-query-attention --num-query-groups 8 --ffn-hidden-size "
    "28672 --swiglu --seq-length 4096 --max-position-embeddings 4096 --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --disable-bias-linear --vocab-size 128256 --bf16 --micro-batch-size 1 "
    "--global-batch-size 64 --tensor-model-parallel-size 8 --sequence-parallel --use-distributed-optimizer "
    "--pipeline-model-parallel-size 4"
)
MEGATRON_STAGES = [
    # megatron-core 0.19.2, get_num_layers_to_build: the ends as given, the others alike, each cut into its chunks.
    ("--decoder-first-pipeline-num-layers 18 --decoder-last-pipeline-num-layers 20", (18, 21, 21, 20)),
    ("--decoder-last-pipeline-num-layers 17", (21, 21, 21, 17)),
    (
        "--decoder-first-pipeline-num-layers 16 --decoder-last-pipeline-num-layers 20 --num-virtual-stages-per-pipeline-rank 2",
        (8, 11, 11, 10, 8, 11, 11, 10),
    ),
    ("--pipeline-model-parallel-layout Et*19|(t*21|)*2t*19L", (19, 21, 21, 19)),
    ("--pipeline-model-parallel-layout E|t*26|t*27|t*27L", (0, 26, 27, 27)),
    ("--pipeline-model-parallel-layout Et*9|t*11|(t*10|)*5t*10L", (9, 11, *[10] * 6)),
    ("--num-virtual-stages-per-pipeline-rank 5", (4,) * 20),
    (
        "--pipeline-model-parallel-layout Et*19|(t*21|)*2t*19L --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 2",
        (19, 21, 21, 19),
    ),
]


@pytest.mark.parametrize(("flags", "stages"), MEGATRON_STAGES)
def test_megatrons_stages_are_priced_and_written_again(flags, stages, tmp_path):
    plan = priced(read("megatron", f"{MEGATRON} {flags}", tmp_path))
    assert plan.stages == stages
    again = priced(read("megatron", export(plan, "megatron")["args.txt"], tmp_path))
    assert (again.stages, again.knobs) == (plan.stages, plan.knobs)


@pytest.mark.parametrize(
    "wrong",
    [
        "--decoder-first-pipeline-num-layers 19",  # 61 on three devices
        "--decoder-first-pipeline-num-layers 18 --decoder-last-pipeline-num-layers 20 --num-virtual-stages-per-pipeline-rank 2",
        "--decoder-first-pipeline-num-layers 20 --account-for-loss-in-pipeline-split",  # transformer_config.py refuses both
        "--pipeline-model-parallel-layout Et*19|t*21|t*21|t*18L",
    ],
)
def test_stages_that_megatron_refuses_are_named(wrong, tmp_path):
    with pytest.raises(SpecError, match="pipeline"):
        read("megatron", f"{MEGATRON} {wrong}", tmp_path)


@pytest.mark.parametrize(
    ("model", "division", "stages"),
    [
        ("llama3.1-70b", {"pp_division": "18,21,21,20"}, (18, 21, 21, 20)),
        ("llama3.1-70b", {}, (20, 20, 20, 20)),
        # hybrid_parallel_config.py of 2.4.0: what is left over is the last stage's.
        ("llama3.1-405b", {}, (31, 31, 31, 33)),
    ],
)
def test_galvatrons_division_is_priced(model, division, stages, tmp_path):
    layers = ",".join(["8"] * sum(stages))
    strategy = {"pp_deg": 4, "tp_sizes_enc": layers, **division, "global_bsz": 64, "chunks": 64}
    run = read("galvatron", json.dumps({**strategy, "pipeline_type": "pipedream_flush"}), tmp_path, "g.json")
    assert run.layerwise is None  # all layers are alike: the layout says where they are
    plan = planner.estimate(problem(model, **{**run.fixed, "sequence_parallel": "true"}))
    assert plan.stages == stages
    written = json.loads(export(plan, "galvatron")["galvatron.json"])
    assert written["pp_division"] == ",".join(map(str, stages))


def test_the_closest_plan_keeps_stages_that_the_launcher_has_words_for():
    plan = planner.estimate(problem(tp=8, pp=4, pipeline_layout="20+21+20+19", zero_stage=1))
    closest = closest_plan(plan, "galvatron")  # which shards nothing or the weights as well
    assert closest is not None
    assert (closest.plan.stages, set(closest.changes)) == (plan.stages, {"zero_stage"})


# -- layers of a device that are recomputed ----------------------------------------------------------------------------


def blocks(stages: str, layers: int | None = None, recompute: str = "block"):
    """Llama 3.1 70B on four stages, some layers of each recomputed."""
    some = {} if layers is None else {"recompute_layers": layers}
    return examine(problem(tp=8, pp=4, pipeline_layout=stages, recompute=recompute, **some))


@pytest.mark.parametrize("layers", [5, 10, 19, 20, 21])
def test_as_many_layers_of_every_stage_are_recomputed_as_it_has(layers):
    slices = [one.details for one in step_trace(blocks("20+20+21+19", layers)).slices]
    found = {one["stage"]: one["recompute_s"] for one in slices if "recompute_s" in one}
    each_s = found[0] / min(layers, 20)
    # A stage recomputes so many of its layers, or all that it has.
    assert found == pytest.approx(
        {stage: each_s * min(layers, n) for stage, n in enumerate((20, 20, 21, 19))}
    )


@pytest.mark.parametrize("layers", [5, 10, 20, 21])
def test_the_first_stage_keeps_what_it_does_not_recompute(layers):
    stages = "20+20+21+19"
    none, full = (blocks(stages, recompute=name).plan.estimate.memory_bytes for name in ("none", "full"))
    some = blocks(stages, layers).plan.estimate.memory_bytes["activations"]
    # Of its 20 layers, by which most activations wait: 20 − n hold what they do without recomputation, n what full leaves.
    kept = max(20 - layers, 0) / 20
    assert some == pytest.approx(full["activations"] + kept * (none["activations"] - full["activations"]))


# -- a knob like any other -------------------------------------------------------------------------------------------


def test_a_stored_plan_is_priced_again():
    plan = planner.estimate(problem(tp=8, pp=4, pipeline_layout="20+21+20+19"))
    stored = Plan.from_dict(json.loads(json.dumps(plan.as_dict())))
    again = planner.estimate(replay(stored))
    assert (again.stages, again.knobs) == (plan.stages, plan.knobs)
    assert again.estimate.step_time_s == plan.estimate.step_time_s
    assert again.estimate.memory_bytes == plan.estimate.memory_bytes


def test_a_search_keeps_the_stages_that_are_fixed():
    best = planner.search(problem(tp=8, pp=4, pipeline_layout="20+21+20+19", schedule="1f1b"), top=1).best
    assert best.stages == (20, 21, 20, 19)


@pytest.mark.parametrize(
    ("layout", "error", "said"),
    [
        ("20+21+20+18", SpecError, "79 layers; expected the model's 80"),
        ("20-21-20-19", SpecError, "or the layers of every virtual stage, such as"),
        ("evn", SpecError, "even"),
        ("99999999999*1", SpecError, "or the layers of every virtual stage"),
        ("2*40", InvalidPlan, "layers cannot be dealt to the stages"),
    ],
)
def test_stages_that_cannot_be_are_refused(layout, error, said):
    with pytest.raises(error, match=said):
        planner.estimate(problem(tp=8, pp=4, pipeline_layout=layout))


def test_a_measured_row_says_its_stages_and_is_read_so(tmp_path):
    plan = planner.estimate(problem(tp=8, pp=4, pipeline_layout="20+21+20+19"))
    row = {name: str(value) for name, value in run_row(Target.of(plan), "Megatron-Core", "0.19").items()}
    path = tmp_path / "rows.csv"
    path.write_text(
        ",".join([*row, "step_time_s"]) + "\n" + ",".join(f'"{v}"' for v in [*row.values(), "1.0"]) + "\n"
    )
    assert planner.estimate(run_of(read_table(path).rows[0]).problem).stages == plan.stages
