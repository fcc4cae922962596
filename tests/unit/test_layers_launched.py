"""Plans whose layers differ, or whose stages have any size: what launchers are told, and that it is read back equal."""

import json
from dataclasses import replace

import pytest

import planner
from planner.errors import ExportError
from planner.export import export
from planner.export.launchers import launcher
from planner.export.layers import layerwise_of, of_layers
from planner.export.readers import read_launched
from planner.solve.layerwise.search import search_layerwise
from planner.technique import ADDITIVE_SLOTS, SLOTS

LAYERS = 32  # of Llama-2-7B


def problem(**fixed) -> planner.Problem:
    return planner.Problem(
        planner.load_model("llama2-7b"), planner.load_cluster("a100-sxm-80gb:2x8"), planner.TrainWorkload(128, 4096),
        planner.load_stack(), fixed={"micro_batch_size": "1", **fixed},
    )  # fmt: skip


def mixed(fixed, layers, stages, ends) -> planner.Plan:
    """The plan whose layers choose what they say."""
    return planner.estimate(replace(problem(**fixed), layerwise=layerwise_of(fixed, layers, stages, ends)))


def again(run, plan) -> planner.Plan:
    """What was read back, priced."""
    fixed = {**run.fixed, "dp": plan.mesh["dp"], "micro_batch_size": plan.knobs["micro_batch_size"]}
    return planner.estimate(
        replace(
            problem(),
            fixed={name: str(value).lower() for name, value in fixed.items()},
            layerwise=run.layerwise,
        )
    )


def test_galvatron_says_what_every_layer_does_and_is_read_back_equal(tmp_path):
    """Four stages of 7, 8, 9 and 8 layers; the first sixteen layers recompute, every fourth one shards its weights."""
    stages = [7, 8, 9, 8]
    layers = [
        {"recompute": "full" if n < 16 else "none", "zero_stage": "3" if n % 4 == 0 else "0"}
        for n in range(LAYERS)
    ]
    fixed = {"tp": "2", "pp": "4", "zero_stage": "3", "recompute": "full", "optimizer": "adamw"}
    plan = mixed(fixed, layers, stages, {"recompute": "none", "zero_stage": "0"})
    found = json.loads(export(plan, "galvatron")["galvatron.json"])
    assert found["checkpoint"] == ",".join(["1"] * 16 + ["0"] * 16)
    assert found["dp_types_enc"] == ",".join(["1", "0", "0", "0"] * 8)
    assert (found["pp_division"], found["default_dp_type"], found["embed_sdp"]) == ("7,8,9,8", "ddp", 0)
    (tmp_path / "g.json").write_text(json.dumps(found))
    back = again(read_launched("galvatron", tmp_path / "g.json"), plan)
    for slot in ("recompute", "zero_stage"):
        assert of_layers(back, slot) == of_layers(plan, slot) == [layer[slot] for layer in layers]
    assert back.stages == plan.stages == tuple(stages)
    assert back.estimate.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=1e-9)
    assert back.estimate.memory_bytes["peak"] == pytest.approx(plan.estimate.memory_bytes["peak"], rel=1e-9)


def cut(tp: int, other: int, end: int, **choices: str) -> planner.Plan:
    """Llama-2-7B in two stages of eight devices: the first half of each over ``tp`` ranks, the second over another number."""
    shaping = [slot for slot in SLOTS if slot not in ADDITIVE_SLOTS]
    additive = [slot for slot in ADDITIVE_SLOTS if slot != "schedule"]
    plans = [
        planner.estimate(problem(tp=str(n), pp="2", micro_batch_size=str(n), zero_stage="3", **choices))
        for n in (tp, other)
    ]
    places = [
        {
            "group": 0,
            "mesh": plan.mesh,
            "micro_batch_size": plan.knobs["micro_batch_size"],
            "choices": {slot: plan.knobs[slot] for slot in shaping},
        }
        for plan in plans
    ]
    strategy = {slot: plans[0].knobs[slot] for slot in additive}
    layerwise = {
        "strategies": [strategy, strategy], "stages": [[[0, 8], [1, 8]], [[0, 8], [1, 8]]], "embedding": 0, "head": end,
        "places": places, "at": [0, 1],
    }  # fmt: skip
    return planner.estimate(
        replace(problem(tp=str(tp), pp="2", zero_stage="3", **choices), layerwise=layerwise)
    )


def test_galvatron_is_told_the_degrees_of_every_layer():
    """Keys of hetu-galvatron 2.4.0, utils/config_utils.py: a size per layer in the model's order, one for embedding and head."""
    plan = cut(2, 4, 0)
    assert plan.estimate.breakdown_s["resharding"] > 0.0
    found = json.loads(export(plan, "galvatron")["galvatron.json"])
    assert found["tp_sizes_enc"] == ",".join((["2"] * 8 + ["4"] * 8) * 2)
    assert (found["pp_deg"], found["pp_division"], found["vtp"]) == (2, "16,16", 2)
    assert found["chunks"] == 128 // (4 * 2)  # sequences of a step by those of a micro-batch: 4 replicas of 2
    ulysses = cut(1, 2, 0)
    assert json.loads(export(ulysses, "galvatron")["galvatron.json"])["use_sp"] == ",".join(["0"] * LAYERS)


def test_degrees_that_galvatron_has_no_words_for_are_refused():
    with pytest.raises(ExportError, match="degrees that differ between embedding and head"):
        export(cut(2, 4, 1), "galvatron")
    with pytest.raises(ExportError, match="cannot express tp that differs"):
        export(cut(2, 4, 0), "megatron")


def test_what_galvatron_has_no_words_for_is_refused():
    """Its layers shard as ZeRO-3 does or as all others do, so there is one kind of others; the ends share a flag."""
    fixed = {"tp": "2", "pp": "1", "zero_stage": "2", "recompute": "none"}
    stages = [{"zero_stage": "2"}] * 16 + [{"zero_stage": "0"}] * 16
    with pytest.raises(ExportError, match="zero_stage that differs between layers"):
        export(mixed(fixed, stages, [LAYERS], {}), "galvatron")
    with pytest.raises(ExportError, match="recompute"):
        export(mixed(fixed, [{"recompute": "norm"}] + [{}] * 31, [LAYERS], {}), "galvatron")


def test_megatrons_layout_and_blocks_are_read_back_equal(tmp_path):
    """Stages of 7, 8, 9 and 8 layers, of each of which the first two recompute."""
    stages = [7, 8, 9, 8]
    layers = [{"recompute": "full" if n < 2 else "none"} for size in stages for n in range(size)]
    fixed = {"tp": "2", "pp": "4", "zero_stage": "1", "recompute": "full", "sequence_parallel": "true"}
    plan = mixed(fixed, layers, stages, {"recompute": "none"})
    written = export(plan, "megatron")["args.txt"]
    assert "--pipeline-model-parallel-layout Et*7|t*8|t*9|t*8L" in written.replace("\n", " ")
    assert "--recompute-method block --recompute-num-layers 2" in written.replace("\n", " ")
    (tmp_path / "args.txt").write_text(written)
    back = again(read_launched("megatron", tmp_path / "args.txt"), plan)
    assert of_layers(back, "recompute") == of_layers(plan, "recompute")
    assert back.stages == plan.stages == tuple(stages)
    assert back.estimate.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=1e-9)
    assert back.estimate.memory_bytes["peak"] == pytest.approx(plan.estimate.memory_bytes["peak"], rel=1e-9)


def test_a_search_for_galvatron_mixes_what_it_has_words_for():
    """Llama-2-13B on sixteen devices with little memory: some layers recompute, not all; and Galvatron can be told so."""
    tight = planner.Problem(
        planner.load_model("llama2-13b"), planner.load_cluster("a100-sxm-80gb:2x8"), planner.TrainWorkload(128, 4096),
        planner.load_stack(), reserve=0.45, launcher=launcher("galvatron"), fixed={"tp": "1", "cp": "1"},
    )  # fmt: skip
    best, uniform = search_layerwise(tight, 2).plans[:2]
    assert best.estimate.step_time_s < uniform.estimate.step_time_s
    assert set(of_layers(best, "recompute")) == {"none", "full"}
    found = json.loads(export(best, "galvatron")["galvatron.json"])
    assert found["checkpoint"] == ",".join(str(int(own == "full")) for own in of_layers(best, "recompute"))
