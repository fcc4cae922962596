"""Do estimate, explain, compare and export treat plans as they promise?"""

import json
import math
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL

BIG = ("--model", "llama3.1-70b", "--global-batch", "64", "--seq-len", "4096")


def leaves(tree):
    return [leaf for group in tree["children"] for leaf in group["items"]]


def test_estimate_prices_the_plan_that_the_search_found(planner, plans):
    best = json.loads(plans.read_text())["plans"][0]
    choices = [
        f"--fix={name}={str(value).lower()}" for name, value in {**best["mesh"], **best["knobs"]}.items()
    ]
    found = planner("estimate", *SMALL, *choices, "--json")
    assert found.code == 0
    (plan,) = found.json["plans"]
    assert plan["estimate"]["step_time_s"] == pytest.approx(best["estimate"]["step_time_s"])
    assert plan["id"] == best["id"]
    assert plan["optimality"] == {
        "status": "heuristic",
        "gap": None,
        "bound_s": None,
        "solver": "none: the plan was named",
    }


def test_plan_that_does_not_fit_is_priced_and_says_so(planner):
    """70.6e9 parameters at 16 bytes are 1.1 TB; eight A100s hold 0.68 TB."""
    found = planner("estimate", *BIG, "--cluster", "a100:1x8", "--fix", "tp=8", "--json")
    (plan,) = found.json["plans"]
    assert found.code == 0
    assert plan["estimate"]["fits"] is False
    assert "DOES NOT FIT" in planner("estimate", *BIG, "--cluster", "a100:1x8", "--fix", "tp=8").out


def test_plan_that_breaks_a_rule_names_the_rule(planner):
    found = planner("estimate", *BIG, "--cluster", "a100:2x7", "--fix", "tp=7", "--json")
    assert found.code == 2
    assert found.json["error"]["kind"] in ("invalid_plan", "spec")
    found = planner(
        "estimate", *BIG, "--cluster", "a100:4x8", "--fix", "pp=4", "--fix", "virtual_stages=40", "--json"
    )
    assert found.code == 2
    assert found.json["error"]["kind"] == "invalid_plan"
    assert "layers cannot be dealt" in found.faults[0]["found"]


def test_explanation_adds_up(planner, plans):
    found = planner("explain", f"{plans}:1", "--json").json
    estimate = found["plan"]["estimate"]
    assert sum(leaf["seconds"] for leaf in leaves(found["seconds"])) == pytest.approx(estimate["step_time_s"])
    assert sum(leaf["bytes"] for leaf in leaves(found["bytes"])) == pytest.approx(
        estimate["memory_bytes"]["peak"]
    )
    for group in found["seconds"]["children"]:
        assert group["seconds"] == pytest.approx(estimate["breakdown_s"].get(group["name"], 0.0), abs=1e-12)
    for group in found["bytes"]["children"]:
        assert group["bytes"] == pytest.approx(estimate["memory_bytes"][group["name"]])
    assert found["changed"] is None


@pytest.mark.parametrize(
    ("model", "cluster", "choices"),
    [
        ("llama3.1-70b", "h100:8x8", "tp=4 pp=4 virtual_stages=5 cp=2"),
        ("llama3.1-70b", "h100:4x8", "tp=4 pp=4 recompute=block recompute_layers=3 optimizer_offload=cpu"),
        ("llama3.1-70b", "h100:4x8", "tp=8 recompute=selective zero_stage=3"),
        ("deepseek-v2-lite", "h100:2x8", "tp=2 ep=8"),
        ("t5-large", "a100:1x8", "tp=2"),
    ],
)
def test_every_second_and_byte_has_an_item_a_technique_and_a_source(planner, model, cluster, choices):
    fixed = [f"--fix={choice}" for choice in choices.split()]
    found = planner(
        "explain",
        "--model",
        model,
        "--cluster",
        cluster,
        "--global-batch=64",
        "--seq-len=2048",
        *fixed,
        "--json",
    )
    assert found.code == 0, found.out
    seconds, held = found.json["seconds"], found.json["bytes"]
    assert sum(leaf["seconds"] for leaf in leaves(seconds)) == pytest.approx(seconds["seconds"])
    assert sum(leaf["bytes"] for leaf in leaves(held)) == pytest.approx(held["bytes"])
    assert all(leaf["technique"] and leaf["source"] for leaf in leaves(seconds) + leaves(held))
    assert all(
        leaf["seconds"] <= leaf["alone_s"] * (1 + 1e-9) or leaf["technique"] == "software stack"
        for leaf in leaves(seconds)
    )


def test_more_of_anything_never_makes_a_plan_slower(planner, plans):
    entries = {e["what"]: e["gain"] for e in planner("explain", f"{plans}:1", "--json").json["sensitivities"]}
    assert min(entries.values()) > -1e-9
    # Nothing is bound by peak alone, so a tenth more of it buys less than a tenth.
    assert 0 < entries["matrix peak +10 %"] < 0.1


@pytest.mark.parametrize("share", [0.5, 0.28, 0.2, 0.19])
def test_memory_is_priced_by_what_the_search_would_take_with_it(planner, tmp_path, share):
    """Held against searches of their own at both sizes."""
    path = tmp_path / "plans.json"
    job = ("--model", "llama3.2-1b", "--cluster", "a100:1x2", "--global-batch", "32", "--seq-len", "4096")

    def best_s(part):
        found = planner("train", *job, "--top", "1", "--reserve", f"{100 * (1 - part)}%", "-o", path)
        assert found.code == 0
        return json.loads(path.read_text())["plans"][0]["estimate"]["step_time_s"]

    gain = best_s(share) / best_s(1.1 * share) - 1
    best_s(share)
    entries = planner("explain", path, "--json").json["sensitivities"]
    (memory,) = (entry for entry in entries if entry["what"] == "memory +10 %")
    assert memory["gain"] == pytest.approx(gain if gain > 1e-3 else 0.0, abs=1e-6)
    assert bool(memory["choices"]) == (gain > 1e-3)
    assert "another plan" not in {entry["what"] for entry in entries}


def test_plan_that_does_not_fit_is_told_what_it_lacks(planner):
    """8 bytes of optimizer state and 6 of weights and gradients for each of 8e9 parameters on one device of 79.35 GiB."""
    job = ("--model", "llama3.1-8b", "--cluster", "a100:1x1", "--global-batch", "8", "--seq-len", "1024")
    found = planner("explain", *job, "--json").json
    estimate = found["plan"]["estimate"]
    lacks = math.ceil(100 * (estimate["memory_bytes"]["peak"] / estimate["memory_budget_bytes"] - 1))
    (memory,) = (entry for entry in found["sensitivities"] if entry["fits"])
    assert memory["what"] == f"memory +{lacks} %"
    assert lacks > 30
    assert f"memory +{lacks} %: this plan would fit" in planner("explain", *job).out


def test_plan_that_is_not_the_best_is_told_of_another(planner):
    job = (*SMALL, "--fix", "tp=4")
    entries = planner("explain", *job, "--json").json["sensitivities"]
    (other,) = (entry for entry in entries if entry["what"] == "another plan")
    assert other["gain"] > 0.1
    assert other["choices"]["tp"] < 4
    assert "another plan: +" in planner("explain", *job).out


def test_plan_written_by_another_version_is_priced_again(planner, plans, tmp_path):
    content = json.loads(plans.read_text())
    content["plans"][0]["estimate"]["step_time_s"] *= 1.25
    path = tmp_path / "old.json"
    path.write_text(json.dumps(content))
    changed = planner("explain", f"{path}:1", "--json").json["changed"]
    assert changed["step_time_s"]["written"] == pytest.approx(1.25 * changed["step_time_s"]["now"])
    assert "Changed since the plan was written" in planner("explain", f"{path}:1").out


def test_plans_are_found_by_number_id_or_alone(planner, plans, tmp_path):
    content = json.loads(plans.read_text())
    second = content["plans"][1]
    by_number = planner("explain", f"{plans}:2", "--json").json["plan"]["id"]
    by_id = planner("explain", f"{plans}:{second['id']}", "--json").json["plan"]["id"]
    alone = tmp_path / "one.json"
    alone.write_text(json.dumps(second))
    assert by_number == by_id == planner("explain", alone, "--json").json["plan"]["id"] == second["id"]


@pytest.mark.parametrize("width", [80, 140])
def test_explanation_fits_the_terminal(planner, plans, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = planner("explain", f"{plans}:1").out
    assert max(map(len, out.splitlines())) <= width
    for heading in (
        "Seconds of a step",
        "Bytes at the peak",
        "What binds",
        "What a little more would buy",
        "Sources",
    ):
        assert heading in out
    assert len(planner("explain", f"{plans}:1", "--all").out) > len(out)


def test_comparison_is_term_by_term(planner, plans):
    content = planner("compare", f"{plans}:1", f"{plans}:3", "--json").json
    first, third = (json.loads(plans.read_text())["plans"][i] for i in (0, 2))
    a, b = first["estimate"]["step_time_s"], third["estimate"]["step_time_s"]
    assert content["step_time_s"] == {"a": a, "b": b, "delta": pytest.approx(b - a)}
    assert sum(term["delta"] for term in content["seconds"].values()) == pytest.approx(b - a)
    both = {**first["mesh"], **first["knobs"]}, {**third["mesh"], **third["knobs"]}
    assert set(content["choices"]) == {name for name in both[0] if both[0][name] != both[1][name]}
    assert "the same" in planner("compare", f"{plans}:1", f"{plans}:1").out


def test_export_writes_the_launchers_files(planner, plans, tmp_path):
    for launcher in ("megatron", "torchrun"):
        shown = planner("export", f"{plans}:1", "--to", launcher, "--json")
        if shown.code == 5:  # the plan has what this launcher cannot express, and that is said
            assert shown.faults
            continue
        folder = tmp_path / launcher / "deep"
        written = planner("export", f"{plans}:1", "--to", launcher, "-o", folder)
        assert written.code == 0
        files = {path.name: path.read_text() for path in folder.iterdir()}
        assert files == shown.json["files"]
        assert {Path(line).name for line in written.out.splitlines()} == set(files)


def test_what_a_launcher_cannot_express_is_an_error(planner, tmp_path):
    path = tmp_path / "plan.json"
    job = ("--model", "llama3.1-8b", "--cluster", "h100:2x8", "--global-batch", "64", "--seq-len", "4096")
    assert planner("estimate", *job, "--optimizer", "lamb", "--fix", "tp=8", "-o", path).code == 0
    found = planner("export", path, "--to", "megatron", "--json")
    assert found.code == 5
    assert found.json["error"]["kind"] == "export"
    assert "lamb" in json.dumps(found.faults)


SCRIPT = """
torchrun --nproc-per-node 8 --nnodes 2 pretrain_gpt.py --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 \\
  --num-attention-heads 32 --group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 8192 \\
  --vocab-size 128256 --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights \\
  --position-embedding-type rope --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 --sequence-parallel \\
  --micro-batch-size 1 --global-batch-size 64 --bf16 --use-distributed-optimizer --use-flash-attn
"""


def test_launch_script_is_priced_and_held_against_the_best(planner, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(SCRIPT)
    found = planner("estimate", "--from-megatron", script, "--cluster", "h100:2x8", "--json")
    assert found.code == 0, found.out
    (plan,) = found.json["plans"]
    assert (plan["mesh"]["tp"], plan["mesh"]["pp"], plan["mesh"]["dp"]) == (8, 2, 1)
    best = found.json["best"]
    ratio = plan["estimate"]["step_time_s"] / best["plan"]["estimate"]["step_time_s"]
    assert best["speedup"] == pytest.approx(ratio)
    assert ratio >= 1.0
    assert "as fast" in planner("estimate", "--from-megatron", script, "--cluster", "h100:2x8").out
    wrong = planner("estimate", "--from-megatron", script, "--cluster", "h100:4x8", "--json")
    assert wrong.code == 2
    assert wrong.faults[0]["where"] == "--cluster"


def test_comparison_begins_with_its_verdict(planner, plans):
    """Tokens per second of b over those of a, and the difference of the peaks."""
    a, b = (planner("explain", f"{plans}:{n}", "--json").json["plan"]["estimate"] for n in (1, 3))
    out = " ".join(planner("compare", f"{plans}:1", f"{plans}:3").out.split())
    share = 1 - b["tokens_per_s_per_device"] / a["tokens_per_s_per_device"]
    assert share > 0
    assert f"b does {share:.1%} fewer tokens per second and device" in out or share < 5e-4
    assert (
        "b is as fast as a per device, with the same peak memory."
        in planner("compare", f"{plans}:1", f"{plans}:1").out
    )


def test_commands_that_train_suggests_work(planner, tmp_path):
    path = tmp_path / "plans.json"
    job = ("--model", "llama3.2-1b", "--cluster", "a100:1x4", "--global-batch", "16", "--seq-len", "2048")
    out = planner("train", *job, "--for", "megatron", "--top", "3", "-o", path).out
    commands = [
        line.split()[1:]
        for line in out.partition("Next")[2].splitlines()
        if line.strip().startswith("planner")
    ]
    assert {command[0] for command in commands} >= {"explain", "export"}
    assert ["export", f"{path}:1", "--to", "megatron"] in commands
    for command in commands:
        assert planner(*command).code == 0


def test_plan_that_a_launcher_cannot_run_is_not_suggested_to_it(planner, tmp_path):
    """Megatron-LM's schedules are 1F1B and its interleaved form (megatron/core/pipeline_parallel/schedules.py)."""
    path = tmp_path / "plans.json"
    out = planner("train", *SMALL, "--fix", "schedule=gpipe", "--top", "1", "-o", path).out
    assert "--to megatron" not in out
    assert "none of these runs under" in out
    assert "megatron" in out.rpartition("none of these runs under")[2]
    found = planner("export", f"{path}:1", "--to", "megatron")
    assert found.code == 5
    assert "Closest plan that it can run: schedule gpipe → " in found.err


def test_explain_says_what_could_make_a_run_slower(planner, plans):
    step_s = json.loads(plans.read_text())["plans"][0]["estimate"]["step_time_s"]
    found = planner("explain", f"{plans}:1", "--measured", f"{2.0 * step_s}s", "--measured-memory", "20GiB")
    assert (found.code, found.err) == (0, "")
    text = " ".join(found.out.split())
    for words in (
        "Why ",
        "(+100.0 %)",
        "the likeliest first",
        "Look at:",
        "Why 20.0 GiB",
        "under other software",
    ):
        assert words in text
    difference = planner("explain", f"{plans}:1", "--measured", f"{2.0 * step_s}s", "--json").json[
        "discrepancy"
    ]
    assert difference["peak"] is None
    assert difference["step_time"]["measured"] == pytest.approx(2.0 * step_s)
    assert planner("explain", f"{plans}:1", "--json").json["discrepancy"] is None


def test_a_run_within_the_interval_needs_no_explanation(planner, plans):
    low, high = json.loads(plans.read_text())["plans"][0]["estimate"]["interval"]["step_time_s"]
    found = planner("explain", f"{plans}:1", "--measured", f"{0.5 * (low + high)}s")
    assert "Nothing needs to be wrong" in found.out


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (("--measured", "soon"), "--measured"),
        (("--measured", "0s"), "--measured"),
        (("--measured-memory", "much"), "--measured-memory"),
        (("--measured-memory", "-1GiB"), "--measured-memory"),
        (("--measured-memory", "71"), "--measured-memory"),
    ],
)
def test_wrong_measurements_are_refused(planner, plans, options, where):
    found = planner("explain", f"{plans}:1", *options, "--json")
    assert found.code == 2
    assert [fault["where"] for fault in found.faults] == [where]


@pytest.mark.parametrize("command", ["explain", "goodput", "trace"])
def test_a_stored_plan_says_its_whole_job(planner, plans, command):
    found = planner(command, f"{plans}:1", "--fix", "tp=2", "--reserve", "5%")
    assert found.code == 2
    assert "--fix: stands beside" in found.err
    assert "--reserve: stands beside" in found.err
