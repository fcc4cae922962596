"""Plans whose layers differ, or whose stages have any size: what launchers are told, and that it is read back equal."""

import json
from dataclasses import replace

import pytest

import planner
from planner.errors import ExportError, InvalidPlan
from planner.export import export
from planner.export.launchers import launcher
from planner.export.layers import layerwise_of, of_layers, ways_of_layers
from planner.export.readers import read_launched
from planner.solve.layerwise.search import search_layerwise

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


# Of every way to cut the work: tensor and Ulysses degree, as Galvatron's lists have them.
WAYS = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "u2": (1, 2), "u4": (1, 4)}


def cut(ways, ends, stages=(LAYERS,), layers=None, shared="true", **fixed) -> planner.Plan:
    """The plan on sixteen devices whose layers are cut in these ways, embedding and head in another."""
    used = list(dict.fromkeys([*ways, ends]))
    first = WAYS[ends]
    fixed = {
        "tp": first[0], "cp": first[1], "pp": len(stages), "zero_stage": "3", "recompute": "none", "optimizer": "adamw",
        "schedule": "1f1b", "micro_batch_size": max(first), **fixed,
    }  # fmt: skip
    numbers = [used.index(way) for way in (*ways, ends)]
    found = layerwise_of(fixed, layers or [{}] * LAYERS, list(stages), {}, numbers)
    found["places"] = [
        {
            "group": 0, "mesh": {"tp": WAYS[way][0], "cp": WAYS[way][1], "ep": 1, "etp": 1},
            "choices": {
                "sequence_parallel": shared if WAYS[way][0] > 1 else "false",
                "context": "a2a" if WAYS[way][1] > 1 else "p2p",
            },
        }
        for way in used
    ]  # fmt: skip
    texts = {name: str(value) for name, value in fixed.items()}
    return planner.estimate(replace(problem(**texts), layerwise=found))


@pytest.mark.parametrize(
    ("ways", "ends", "stages"),
    [
        (["2"] * 20 + ["1"] * 12, "2", [32]),
        (["1"] * 8 + ["4"] * 8 + ["2"] * 16, "4", [16, 16]),
        (["u4"] * 5 + ["2"] * 27, "1", [7, 9, 9, 7]),
        (["1"] * 32, "u2", [32]),
    ],
)
def test_galvatron_is_told_the_degrees_of_every_layer_and_is_read_back_equal(ways, ends, stages, tmp_path):
    layers = [
        {"recompute": "full" if n < 6 else "none", "zero_stage": "3" if n % 3 else "0"} for n in range(LAYERS)
    ]
    plan = cut(ways, ends, stages, layers)
    files = export(plan, "galvatron")
    found = json.loads(files["galvatron.json"])
    assert found["tp_sizes_enc"] == ",".join(way[-1] for way in ways)
    assert found["use_sp"] == ",".join(str(int(way[0] == "u")) for way in ways)
    assert (found["vtp"], found["vsp"]) == (int(ends[-1]), int(ends[0] == "u"))
    # Sixteen devices; a micro-batch has as many sequences as ranks of a stage, so that none is cut below one.
    assert found["chunks"] == 128 * len(stages) // 16
    assert ("--sequence-parallel" in files["run.sh"]) is (set(ways) != {"1"} or ends != "1")
    (tmp_path / "g.json").write_text(json.dumps(found))
    run = read_launched("galvatron", tmp_path / "g.json")
    back = again(run, plan)
    names = ("tp", "cp", "dp", "micro_batch_size", "sequence_parallel", "context")
    for mine, read in zip(ways_of_layers(plan), ways_of_layers(back), strict=True):
        assert [str(mine[name]) for name in names] == [str(read[name]) for name in names]
    for slot in ("recompute", "zero_stage"):
        assert of_layers(back, slot) == of_layers(plan, slot)
    assert back.stages == plan.stages
    assert back.estimate.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=1e-9)
    assert back.estimate.memory_bytes["peak"] == pytest.approx(plan.estimate.memory_bytes["peak"], rel=1e-9)


def test_galvatron_refuses_what_its_layers_cannot_differ_in():
    """One flag says for all layers whether the sequence is shared, and the vocabulary has one degree."""
    with pytest.raises(ExportError, match="one flag for all"):
        export(cut(["u2"] * 16 + ["2"] * 16, "2", shared="false"), "galvatron")
    export(cut(["1"] * 16 + ["2"] * 16, "2", shared="false"), "galvatron")
    unlike = cut(["1"] * 16 + ["2"] * 16, "1")
    layerwise = {**unlike.layerwise, "head": unlike.layerwise["stages"][0][-1][0]}
    with pytest.raises(ExportError, match="cannot express tp that differs between embedding and head"):
        export(replace(unlike, layerwise=layerwise), "galvatron")
    with pytest.raises(ExportError, match=r"cannot express tp that differs between layers \(1, 2\)"):
        export(cut(["1"] * 16 + ["2"] * 16, "1"), "megatron")


def test_degrees_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(InvalidPlan, match="devices do not divide"):
        cut(["1"] * 16 + ["4"] * 16, "1", [6, 5, 5, 5, 5, 6])
    with pytest.raises(InvalidPlan, match="no whole number of sequences on 16 replicas"):
        cut(["4"] * 16 + ["1"] * 16, "4", micro_batch_size=1)


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
