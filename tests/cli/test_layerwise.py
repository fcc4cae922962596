"""``planner train --layerwise``: what it prints, writes and refuses, and what the other commands make of such a plan."""

import json

import pytest

TIGHT = (
    "--model", "gpt2-xl", "--cluster", "rtx-4090:1x4", "--global-batch", "16", "--seq-len", "1024", "--reserve", "45%",
    "--forbid", "*_offload", "--fix", "tp=1", "--fix", "cp=1", "--fix", "pp=2", "--fix", "zero_group=full",
)  # fmt: skip


@pytest.fixture
def plans(planner, tmp_path):
    path = tmp_path / "plans.json"
    found = planner("train", *TIGHT, "--layerwise", "--top", "2", "--json", "-o", path)
    assert (found.code, found.err) == (0, "")
    return path, found.json


@pytest.mark.reaches("galvatron")
def test_the_first_plan_says_what_every_layer_does(plans):
    _, content = plans
    best, uniform = content["plans"]
    layerwise = best["layerwise"]
    assert [sum(n for _, n in runs) for runs in layerwise["stages"]] == best["stages"]
    assert sum(best["stages"]) == 48  # layers of GPT-2 XL
    assert best["estimate"]["step_time_s"] < uniform["estimate"]["step_time_s"]
    assert "layerwise" not in uniform
    account = content["layerwise"]
    assert account["bound_s"] <= best["estimate"]["step_time_s"]
    assert best["optimality"]["bound_s"] == account["bound_s"]


def test_the_table_names_strategies_and_stages(planner, plans):
    path, content = plans
    shown = planner("train", *TIGHT, "--layerwise", "--top", "2").out
    assert "Layers of plan 1" in shown
    assert "  A  " in shown
    assert "stage 0: " in shown
    assert "Layer by layer: " in shown
    assert "recompute: per layer → " in planner("compare", f"{path}:1", f"{path}:2").out
    assert "Layers of the plan" in planner("explain", f"{path}:1").out
    explained = planner("explain", f"{path}:1", "--json").json
    assert explained["changed"] is None
    assert explained["plan"]["layerwise"] == content["plans"][0]["layerwise"]


def test_a_launcher_gets_stages_of_any_size(planner, tmp_path):
    path = tmp_path / "plans.json"
    few = (
        "--model",
        "gpt2-xl",
        "--cluster",
        "a100:1x8",
        "--global-batch",
        "64",
        "--seq-len",
        "1024",
        "--forbid",
        "*_offload",
    )
    open_ = (
        "--fix",
        "tp=1",
        "--fix",
        "cp=1",
        "--fix",
        "pp=8",
        "--fix",
        "virtual_stages=1",
        "--fix",
        "recompute=none",
    )
    found = planner(
        "train", *few, *open_, "--layerwise", "--for", "megatron", "--top", "1", "--json", "-o", path
    )
    best = found.json["plans"][0]
    assert len(best.get("layerwise", {"strategies": [None]})["strategies"]) == 1
    assert len(set(best["stages"])) > 1  # the head is worth more than two of GPT-2 XL's layers
    out = tmp_path / "run"
    assert planner("export", f"{path}:1", "--to", "megatron", "-o", out).code == 0
    layout = "|".join(f"t*{n}" for n in best["stages"])
    assert f"--pipeline-model-parallel-layout 'E{layout}L'" in (out / "run.sh").read_text()


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (("--stages", "odd"), "--stages"),
        (("--solver", "guess"), "--solver"),
        (("--time-limit", "soon"), "--time-limit"),
        (("--time-limit", "0"), "--time-limit"),
        (("--deadline", "5s", "--time-limit", "5s"), "--deadline"),
        (("--deadline", "30d", "--tokens", "1T"), "--deadline"),
        (("--exact", "--time-limit", "5s"), "--exact"),
        (("--exact", "--deadline", "5s"), "--exact"),
    ],
)
def test_wrong_options_are_named(planner, wrong, where):
    found = planner("train", *TIGHT, "--layerwise", *wrong, "--json")
    assert found.code == 2
    assert [fault["where"] for fault in found.faults] == [where]


@pytest.mark.parametrize(
    "option", [("--exact",), ("--time-limit", "5s"), ("--solver", "dp"), ("--stages", "even")]
)
def test_the_uniform_search_takes_no_options_of_the_layer_wise_one(planner, option):
    found = planner("train", *TIGHT, *option, "--json")
    assert found.code == 2
    assert [fault["where"] for fault in found.faults] == [option[0]]


def test_a_time_limit_gives_a_gap(planner):
    best = planner("train", *TIGHT, "--layerwise", "--time-limit", "1us", "--top", "1", "--json").json
    assert best["layerwise"]["stopped"] == "time"
    assert json.dumps(best["plans"][0]["optimality"]["gap"]) != "null"


def test_a_deadline_is_a_time_limit_of_the_whole_search(planner):
    best = planner("train", *TIGHT, "--layerwise", "--deadline", "1us", "--top", "1", "--json").json
    assert best["layerwise"]["stopped"] == "time"
    assert best["plans"][0]["optimality"]["gap"] > 0.0
    assert best["plans"][0]["optimality"]["bound_s"] > 0.0


def test_exact_waits(planner):
    """For the proof, with the best strategies there are: no worse than what a ten-thousandth may lose."""
    waited = planner(
        "train", *TIGHT, "--layerwise", "--exact", "--time-limit", "none", "--top", "1", "--json"
    ).json
    assert waited["layerwise"]["stopped"] == ""
    usual = planner("train", *TIGHT, "--layerwise", "--top", "1", "--json").json
    assert waited["plans"][0]["estimate"]["step_time_s"] <= usual["plans"][0]["estimate"]["step_time_s"] * (
        1.0 + 1e-9
    )
