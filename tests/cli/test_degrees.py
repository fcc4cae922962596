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


# Nodes of two devices: some layers share weights over a node, others over both.
SMALL = (
    "--model", "llama2-7b", "--cluster", "a100-sxm-40gb:4x2", "--global-batch", "16", "--seq-len", "2048",
)  # fmt: skip


def test_a_search_for_galvatron_finds_degrees_that_it_runs_and_that_are_read_back(planner, tmp_path):
    # Galvatron's file does not say whether tensor-parallel ranks share the sequence: it is read as if they did.
    kept = ("--fix", "pp=2", "--fix", "cp=1", "--fix", "zero_stage=0", "--fix", "sequence_parallel=true")
    found = planner(
        "train", *SMALL, "--reserve", "12%", *kept, "--degrees", "layer", "--for", "galvatron", "--top", "1",
        "-o", tmp_path / "plans.json",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    best = json.loads((tmp_path / "plans.json").read_text())["plans"][0]
    layerwise = best["layerwise"]
    places, at = layerwise["places"], layerwise["at"]
    assert len({place["mesh"]["tp"] for place in places}) == 2
    ends = [places[at[layerwise[end]]]["mesh"] for end in ("embedding", "head")]
    assert ends[0] == ends[1]
    assert (
        planner("export", f"{tmp_path}/plans.json:1", "--to", "galvatron", "-o", tmp_path / "run").code == 0
    )
    told = json.loads((tmp_path / "run" / "galvatron.json").read_text())
    of_layers = [places[at[s]]["mesh"] for runs in layerwise["stages"] for s, n in runs for _ in range(n)]
    assert told["tp_sizes_enc"] == ",".join(str(mesh["tp"]) for mesh in of_layers)
    assert told["vtp"] == ends[0]["tp"]
    page = (tmp_path / "run" / "README.md").read_text()
    assert "gathers whole sequences" in page
    assert "no row for" in page
    assert '"row": null' in (tmp_path / "run" / "measure.py").read_text()
    knobs = [f"--fix={knob}={str(best['knobs'][knob]).lower()}" for knob in ("gradient_dtype", "loss_kernel")]
    again = planner(
        "estimate", "--from", "galvatron", tmp_path / "run" / "galvatron.json", *SMALL, *knobs, "--json",
    )  # fmt: skip
    read = again.json["plans"][0]
    assert [place["mesh"] for place in read["layerwise"]["places"]] == [place["mesh"] for place in places]
    assert read["estimate"]["step_time_s"] == pytest.approx(best["estimate"]["step_time_s"], rel=1e-9)
    refused = planner("export", f"{tmp_path}/plans.json:1", "--to", "megatron")
    assert refused.code == 5
    assert "cannot express tp that differs between layers" in refused.err
    assert "Closest plan that it can run" in refused.err


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
