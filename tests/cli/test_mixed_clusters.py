"""``planner train`` on clusters of unlike devices: what it prints, writes and refuses, and what other commands make of it."""

import json

import pytest

JOB = (
    "--model", "llama2-7b", "--global-batch", "64", "--seq-len", "4096", "--forbid", "*_offload", "--fix", "cp=1",
    "--fix", "tensor_overlap=none", "--fix", "zero_group=full", "--top", "2",
)  # fmt: skip
MIXED = ("--cluster", "a100-sxm-80gb:1x8+l4:2x8")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("mixed") / "plans.json"


@pytest.fixture
def plans(planner, path):
    if not path.exists():
        found = planner("train", *JOB, *MIXED, "--json", "-o", path)
        assert (found.code, found.err) == (0, "")
    return path, json.loads(path.read_text())


def test_the_first_plan_says_where_every_stage_runs(plans):
    _, content = plans
    best, alike = content["plans"]
    places = best["layerwise"]["places"]
    assert {place["device"] for place in places} == {"a100-sxm-80gb", "l4"}
    assert sorted(stage for place in places for stage in place["stages"]) == list(range(best["mesh"]["pp"]))
    ranks = [
        place["mesh"]["tp"] * place["mesh"]["cp"] * place["mesh"]["dp"] * len(place["stages"])
        for place in places
    ]
    assert sum(ranks) == 8 + 16  # all devices
    micro_batches = {64 / (place["mesh"]["dp"] * place["micro_batch_size"]) for place in places}
    assert len(micro_batches) == 1
    assert sum(best["stages"]) == 32  # layers of Llama 2 7B
    assert best["estimate"]["step_time_s"] < alike["estimate"]["step_time_s"]
    assert content["mixed"]["bound_s"] <= best["estimate"]["step_time_s"]
    assert best["optimality"]["status"] in ("exact", "gap")


def test_the_table_names_groups_and_stages(planner):
    shown = planner("train", *JOB, *MIXED).out
    assert " × a100-sxm-80gb: " in shown
    assert " × l4: " in shown
    assert "Over 1F1B pipelines over all node groups, degrees of every stage: " in shown
    assert "left open" in shown


def test_a_stored_plan_is_explained_as_it_was_found(planner, plans):
    path, content = plans
    explained = planner("explain", f"{path}:1", "--json").json
    assert explained["changed"] is None
    assert explained["plan"]["layerwise"] == content["plans"][0]["layerwise"]
    gains = {entry["what"]: entry["gain"] for entry in explained["sensitivities"]}
    assert gains["matrix peak +10 %"] > 0.01
    assert planner("trace", f"{path}:1", "--json").code == 0
    assert planner("compare", f"{path}:1", f"{path}:2").code == 0


def test_launchers_refuse_degrees_that_differ_between_stages(planner, plans, tmp_path):
    _, content = plans
    plan = content["plans"][0]
    place = plan["layerwise"]["places"][0]
    place["mesh"] |= {"tp": 2 * place["mesh"]["tp"], "dp": place["mesh"]["dp"] // 2}
    place["micro_batch_size"] *= 2
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found = planner("export", tmp_path / "plan.json", "--to", "megatron")
    assert found.code == 5
    assert "cannot express dp that differs between stages" in found.err
    assert planner("export", tmp_path / "plan.json", "--to", "torchrun").code == 5  # mesh.py has one mesh
    assert planner("explain", tmp_path / "plan.json").code == 0  # the engine prices it all the same
    place["micro_batch_size"] *= 2
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert "micro-batches in one pipeline" in planner("explain", tmp_path / "plan.json").err


def test_even_stages_and_launchers_keep_to_one_mesh(planner):
    for option in (("--stages", "even"), ("--for", "megatron")):
        found = planner("train", *JOB, *MIXED, *option, "--json")
        assert "mixed" not in found.json
        assert all("places" not in plan.get("layerwise", {}) for plan in found.json["plans"])


def test_nothing_fits_either_way(planner):
    """405B parameters: 810 GB in bf16 alone, of which 16 consumer devices hold less than half."""
    few = ("--fix", "cp=1", "--fix", "tensor_overlap=none", "--fix", "micro_batch_size=1")
    job = (
        "--model",
        "llama3.1-405b",
        "--global-batch",
        "64",
        "--seq-len",
        "4096",
        "--forbid",
        "*_offload",
        *few,
    )
    clusters = ("--cluster", "rtx-4090:1x8+l4:1x8", "--json")
    assert planner("train", *job, *clusters, "--time-limit", "none").code == 3
    # Out of time, nobody knows.
    found = planner("train", *job, *clusters, "--time-limit", "1ms")
    assert found.code == 4
    assert "is over before a plan was found" in found.json["error"]["problems"][0]["found"]
