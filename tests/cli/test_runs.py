"""Do the verbs about runs answer, in tables and in JSON, and say what is wrong with their input?"""

import pytest

RLHF = (
    "--actor",
    "gpt2",
    "--cluster",
    "a100-sxm-80gb:1x4",
    "--prompts",
    "64",
    "--isl",
    "256",
    "--osl",
    "256",
    "--parts",
    "2",
)
LENGTHS = (
    "--model", "gpt2", "--cluster", "a100-sxm-80gb:1x2", "--lengths", "128:1B,1024:9B", "--tokens-per-step", "131072",
    "--fix", "pp=1",
)  # fmt: skip


def test_calls_of_a_step_are_planned(planner):
    found = planner("solve", "rlhf", *RLHF, "--json").json
    assert [call["call"].split()[-1] for call in found["calls"]] == [
        "generates",
        "reads",
        "reads",
        "reads",
        "trains",
        "trains",
    ]
    assert found["certificate"]["status"] == "exact"
    assert found["time_s"] <= found["on_all_devices_s"] * (1 + 1e-9)
    assert found["tokens_per_s"] == pytest.approx(64 * 512 / found["time_s"])
    shown = planner("solve", "rlhf", *RLHF).out
    assert "actor generates" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_overlapping_steps_ask_for_permission(planner):
    refused = planner("solve", "rlhf", *RLHF, "--staleness", "1", "--json")
    assert refused.code == 2
    assert {fault["where"] for fault in refused.faults} == {"--staleness"}
    alone = planner("solve", "rlhf", *RLHF, "--json").json["time_s"]
    assert (
        planner("solve", "rlhf", *RLHF, "--staleness", "1", "--allow", "staleness", "--json").json["time_s"]
        <= alone
    )


def test_everything_wrong_with_a_step_is_said_at_once(planner):
    found = planner(
        "solve", "rlhf", "--actor", "nope", "--algorithm", "dpo", "--allow", "lossy", "--isl", "0", "--json"
    )
    assert found.code == 2
    assert {fault["where"] for fault in found.faults} >= {
        "--actor", "--algorithm", "--allow", "--isl", "--osl", "--prompts", "--cluster",
    }  # fmt: skip
    uneven = planner("solve", "rlhf", *RLHF, "--mini-batches", "7", "--json")
    assert {fault["where"] for fault in uneven.faults} == {"--mini-batches"}


def test_phases_of_a_curriculum_add_up(planner):
    found = planner("solve", "curriculum", *LENGTHS, "--json").json
    assert [phase["seq_len"] for phase in found["phases"]] == [128, 1024]
    assert found["run_s"] == pytest.approx(
        sum(phase["run_s"] + phase["switch_s"] for phase in found["phases"])
    )
    assert found["run_s"] < found["at_last_length_s"]
    assert "times as long" in planner("solve", "curriculum", *LENGTHS).out


def test_what_is_no_curriculum_is_refused(planner):
    found = planner("solve", "curriculum", *LENGTHS[:4], "--lengths", "128:x", "--json")
    assert found.code == 2
    assert {fault["where"] for fault in found.faults} == {"--lengths", "--tokens-per-step"}
    short = planner("solve", "curriculum", *LENGTHS[:6], "--tokens-per-step", "100", "--json")
    assert {fault["where"] for fault in short.faults} == {"--tokens-per-step"}


@pytest.mark.reaches("swarm")
def test_peers_are_dealt_to_stages(planner):
    found = planner("solve", "peers", "--peers", "3:2,2:3", "--stages", "1,1", "--json").json
    assert found["rate"] == pytest.approx(6.0)  # 3 + 3 and 2 + 2 + 2
    assert found["longest_first_rate"] == pytest.approx(5.0)
    assert "Exact under this model" in planner("solve", "peers", "--peers", "3:2,2:3", "--stages", "1,1").out
    wrong = planner("solve", "peers", "--peers", "3", "--stages", "0", "--json")
    assert {fault["where"] for fault in wrong.faults} == {"--peers", "--stages"}


def test_presets_are_published_combinations(planner):
    job = (
        "--model",
        "gpt3-1.3b",
        "--cluster",
        "a100-sxm-80gb:4x8",
        "--global-batch",
        "64",
        "--seq-len",
        "2048",
        "--top",
        "1",
    )
    plan = planner("train", *job, "--preset", "ptdp", "--json").json["plans"][0]
    assert (plan["mesh"]["tp"], plan["knobs"]["schedule"], plan["knobs"]["pipeline"]) == (
        8,
        "interleaved",
        "scatter_gather",
    )
    own = planner("train", *job, "--preset", "ptdp", "--fix", "tp=4", "--json").json["plans"][0]
    assert own["mesh"]["tp"] == 4
    assert {fault["where"] for fault in planner("train", *job, "--preset", "ptpd", "--json").faults} == {
        "--preset"
    }


def test_layers_are_placed_on_unlike_nodes(planner):
    nodes = ("--layers", 4, "--node", "fast:1:8,4", "--node", "slow:2:4,1")
    found = planner("solve", "flow", *nodes, "--json").json
    assert found["tokens_per_s"] == 4.0
    assert [(s["kind"], s["first"], s["layers"]) for s in found["spans"]] == [
        ("fast", 0, 2),
        ("slow", 2, 1),
        ("slow", 3, 1),
    ]
    assert "Exact under this model" in planner("solve", "flow", *nodes).out
    wrong = planner("solve", "flow", "--layers", 0, "--node", "t4:12", "--backend", "abacus", "--json")
    assert {fault["where"] for fault in wrong.faults} == {"--layers", "--node", "--backend"}
    assert planner("solve", "flow", "--layers", 9, "--node", "t4:1:5", "--json").code == 3
