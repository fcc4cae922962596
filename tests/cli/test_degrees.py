"""``planner train --degrees``: what it prints, writes and refuses, and what the other commands make of such a plan."""

import json

import pytest

# Two nodes on a slow network, with little memory: some layers are replicated over all devices, others over nodes alone.
JOB = (
    "--model", "opt-1.3b", "--cluster", "rtx-4090:2x2", "--global-batch", "16", "--seq-len", "2048", "--reserve", "30%",
    "--forbid", "*_offload", "--fix", "cp=1", "--fix", "pp=1", "--fix", "tensor_overlap=none", "--fix", "zero_group=full",
    "--degrees", "layer",
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("degrees") / "plans.json"


@pytest.fixture
def plans(planner, path):
    if not path.exists():
        found = planner("train", *JOB, "--top", "2", "--json", "-o", path)
        assert (found.code, found.err) == (0, "")
    return path, json.loads(path.read_text())


def test_layers_have_degrees_of_their_own(plans):
    _, content = plans
    best, alike = content["plans"]
    layerwise = best["layerwise"]
    degrees = {(place["mesh"]["tp"], place["mesh"]["dp"]) for place in layerwise["places"]}
    assert len(degrees) == 2
    assert {tp * dp for tp, dp in degrees} == {4}
    assert len({place["mesh"]["dp"] * place["micro_batch_size"] for place in layerwise["places"]}) == 1
    assert best["estimate"]["step_time_s"] < alike["estimate"]["step_time_s"]
    assert best["estimate"]["breakdown_s"]["resharding"] > 0.0
    assert content["mixed"]["space"].endswith("degrees of every layer")
    assert content["mixed"]["bound_s"] <= best["estimate"]["step_time_s"]


def test_the_table_says_which_degrees_are_whose(planner, plans):
    shown = planner("train", *JOB, "--top", "1").out
    assert "degrees 0 on 4 × rtx-4090: " in shown
    assert "degrees 1" in shown
    assert "Over 1F1B pipelines, degrees of every layer: " in shown


def test_a_stored_plan_is_explained_as_it_was_found(planner, plans):
    path, content = plans
    explained = planner("explain", f"{path}:1", "--json").json
    assert explained["changed"] is None
    assert explained["plan"]["layerwise"] == content["plans"][0]["layerwise"]
    assert "resharding" in planner("explain", f"{path}:1").out
    assert planner("trace", f"{path}:1", "--json").code == 0


@pytest.mark.parametrize("other", [("--for", "megatron"), ("--fix", "schedule=gpipe"), ("--degrees", "rank")])
def test_what_goes_without_it_is_refused(planner, other):
    found = planner("train", *JOB, *other)
    assert found.code == 2
    assert "--degrees" in found.err


def test_launchers_refuse_degrees_that_differ(planner, plans):
    path, _ = plans
    found = planner("export", f"{path}:1", "--to", "megatron")
    assert found.code == 5
    assert "cannot express" in found.err
