"""Does ``planner train`` find, rank and report plans as it promises?"""

import json
import math
import re

import pytest

from planner import Plan, Problem, TrainWorkload, load_cluster, load_model, load_stack, search
from tests.cli.conftest import SMALL


def without_wall(content):
    return {**content, "search": {**content["search"], "wall_s": 0.0}}


def test_result_is_that_of_the_library(planner):
    found = planner("train", *SMALL, "--top", "2", "--json")
    assert (found.code, found.err) == (0, "")
    problem = Problem(load_model("gpt2"), load_cluster("a100:1x4"), TrainWorkload(16, 1024), load_stack())
    expected = json.loads(json.dumps(search(problem, 2).as_dict()))
    assert found.json.keys() - expected.keys() == {"ties", "nearest"}
    assert without_wall({name: found.json[name] for name in expected}) == without_wall(expected)


def test_what_a_launcher_cannot_run_may_be_forbidden_as_well(planner):
    """Galvatron has no words for offloading: to forbid it besides is no slip of the keyboard."""
    job = (
        "train",
        "--model",
        "llama2-7b",
        "--cluster",
        "a100:1x4",
        "--global-batch",
        "16",
        "--seq-len",
        "1024",
    )
    asked = planner(*job, "--for", "galvatron", "--json").json
    besides = planner(*job, "--for", "galvatron", "--forbid", "*_offload", "--json").json
    assert besides["plans"][0]["knobs"] == asked["plans"][0]["knobs"]
    assert planner(*job, "--for", "galvatron", "--forbid", "*_ofload").code == 2


def test_every_candidate_is_accounted_for(planner):
    account = planner("train", *SMALL, "--json").json["search"]
    fates = account["scored"] + sum(account["excluded_by_bound"].values()) + sum(account["rejected"].values())
    assert account["candidates"] == fates > 1000


def test_plans_are_ranked_and_describe_themselves(planner):
    plans = planner("train", *SMALL, "--top", "5", "--json").json["plans"]
    steps = [plan["estimate"]["step_time_s"] for plan in plans]
    assert steps == sorted(steps)
    assert len(plans) == 5
    for plan in plans:
        mesh, estimate = plan["mesh"], plan["estimate"]
        assert mesh["tp"] * mesh["cp"] * mesh["pp"] * mesh["dp"] == 4
        assert sum(estimate["breakdown_s"].values()) == pytest.approx(estimate["step_time_s"])
        pools = {name: held for name, held in estimate["memory_bytes"].items() if name != "peak"}
        assert sum(pools.values()) == pytest.approx(estimate["memory_bytes"]["peak"])
        # 16 sequences of 1024 tokens on 4 devices.
        assert estimate["tokens_per_s_per_device"] == pytest.approx(16 * 1024 / 4 / estimate["step_time_s"])
    assert plans[0]["optimality"]["status"] == "exact"


def test_same_input_gives_the_same_bytes(planner):
    runs = [re.sub(r'"wall_s": [\d.e-]+', "", planner("train", *SMALL, "--json").out) for _ in range(2)]
    assert runs[0] == runs[1]


def test_file_holds_what_stdout_shows(planner, tmp_path):
    path = tmp_path / "plans.json"
    found = planner("train", *SMALL, "--json", "-o", path)
    assert path.read_text() == found.out
    assert [p.name for p in tmp_path.iterdir()] == ["plans.json"]
    assert Plan.from_json(path, 2).as_dict() == found.json["plans"][1]


def test_fixed_and_forbidden_choices_are_kept(planner):
    found = planner(
        "train", *SMALL, "--fix", "tp=2", "--fix", "zero_stage=3", "--forbid", "pp=2", "--json"
    ).json
    assert {(p["mesh"]["tp"], p["knobs"]["zero_stage"]) for p in found["plans"]} == {(2, 3)}
    assert 2 not in {p["mesh"]["pp"] for p in found["plans"]}


def test_launcher_bounds_the_space(planner):
    everything = planner("train", *SMALL, "--json").json["search"]["candidates"]
    found = planner("train", *SMALL, "--for", "fsdp", "--json").json
    assert 0 < found["search"]["candidates"] < everything


def test_reserve_is_a_share_or_a_size(planner):
    """A100 80 GB: the driver reports 85,198,045,184 bytes (79.35 GiB)."""
    share, size = (
        planner("train", *SMALL, "--reserve", text, "--json").json["plans"][0]["estimate"][
            "memory_budget_bytes"
        ]
        for text in ("5%", "4GiB")
    )
    whole = float(load_cluster("a100:1x4").device.memory_bytes)
    assert share == pytest.approx(0.95 * whole)
    assert size == pytest.approx(whole - 4 * 2**30)


TIGHT = ("--model", "llama3.1-8b", "--cluster", "h100-sxm:4x8", "--global-batch", "256", "--seq-len", "8192")


def test_plans_that_may_well_run_out_of_memory_are_not_ranked(planner):
    """The fastest plan is predicted to leave 2 of 80 GiB; one that leaves more takes a hundredth longer."""
    safe = planner("train", *TIGHT, "--json").json["plans"]
    bold = planner("train", *TIGHT, "--max-oom-risk", "100%", "--json").json["plans"]
    assert all(plan["estimate"]["oom_probability"] <= 0.1 for plan in safe)
    assert bold[0]["estimate"]["oom_probability"] > 0.15
    assert 1.0 < safe[0]["estimate"]["step_time_s"] / bold[0]["estimate"]["step_time_s"] < 1.02
    assert safe[0]["optimality"]["status"] == "exact"


@pytest.mark.parametrize("more", [(), ("--layerwise", "--time-limit", "none")], ids=["uniform", "layerwise"])
def test_a_job_that_only_fits_with_risk_says_so(planner, more):
    """Of 79.6 GiB 78.8 are predicted to be used, and nothing else is allowed."""
    job = ("--model", "llama3.1-8b", "--cluster", "h100-sxm:1x8", "--global-batch", "8", "--seq-len", "9600",
           "--fix", "zero_stage=2", "--fix", "tp=1", "--fix", "pp=1", "--fix", "cp=1", "--fix", "recompute=none",
           "--fix", "micro_batch_size=1", "--forbid", "*_offload")  # fmt: skip
    found = planner("train", *job, *more, "--json").json
    assert found["plans"][0]["estimate"]["oom_probability"] > 0.1
    assert any("--max-oom-risk" in note for note in found["notes"])
    assert "are the best at any risk" in " ".join(planner("train", *job, *more).out.split())


def test_run_totals_follow_from_the_step(planner):
    """1e9 tokens in steps of 16·1024 are 61,035.2, so 61,036 steps."""
    found = planner("train", *SMALL, "--tokens", "1B", "--usd-per-hour", "2", "--json").json
    step_s, run = found["plans"][0]["estimate"]["step_time_s"], found["run"]
    assert run["steps"] == 61_036
    assert run["run_s"] == pytest.approx(1e9 / 16384 * step_s)
    assert run["device_hours"] == pytest.approx(run["run_s"] * 4 / 3600)
    assert run["usd"] == pytest.approx(2 * run["device_hours"])


def test_clusters_are_ranked_together_by_the_objective(planner):
    """Eight devices are faster than four, and never cheaper per device hour on a job that small."""
    job = (
        "--model",
        "gpt2",
        "--global-batch",
        "16",
        "--seq-len",
        "1024",
        "--cluster",
        "a100:1x4",
        "--cluster",
        "a100:1x8",
    )
    by_time = planner("train", *job, "--json", "--top", "4").json
    by_hours = planner("train", *job, "--json", "--top", "4", "--objective", "gpu_hours").json
    assert by_time["plans"][0]["cluster"] == "a100-sxm-80gb:1x8"
    assert by_hours["plans"][0]["cluster"] == "a100-sxm-80gb:1x4"
    assert [c["devices"] for c in by_time["clusters"]] == [4, 8]
    hours = [
        p["estimate"]["step_time_s"] * math.prod(p["mesh"][d] for d in ("tp", "cp", "pp", "dp"))
        for p in by_hours["plans"]
    ]
    assert hours == sorted(hours)


def test_cluster_that_cannot_hold_the_model_is_said_and_passed_over(planner):
    job = ("--model", "llama3.1-8b", "--global-batch", "8", "--seq-len", "1024", "--forbid", "*_offload")
    found = planner(
        "train", *job, "--cluster", "a10:1x4", "--cluster", "h100:1x8", "--json", "--top", "1"
    ).json
    assert found["plans"][0]["cluster"] == "h100-sxm:1x8"
    assert found["clusters"][0]["step_time_s"] is None
    assert "nothing fits" in found["clusters"][0]["outcome"]


def test_deadline_is_met_by_the_fewest_devices(planner):
    """Three nodes are neither a divisor nor a power of two; each smaller size is searched and misses, or excluded by a bound."""
    job = [
        "--model",
        "gpt2",
        "--global-batch",
        "48",
        "--seq-len",
        "1024",
        "--tokens",
        "1B",
        "--json",
        "--top",
        "1",
    ]

    def run_s(cluster):
        return planner("train", *job, "--cluster", cluster).json["run"]["run_s"]

    runs = {nodes: run_s(f"a100:{nodes}x1") for nodes in (1, 2, 3, 4)}
    deadline_s = (runs[2] + runs[3]) / 2
    found = planner("train", *job, "--cluster", "a100:8x1", "--deadline", f"{deadline_s}s").json
    tried = found["clusters"]
    assert tried[-1]["devices"] == 3
    assert tried[-1]["run_s"] == pytest.approx(runs[3])
    assert found["run"]["run_s"] == tried[-1]["run_s"] <= deadline_s == found["deadline_s"]
    for attempt in tried[:-1]:
        assert runs[attempt["devices"]] > deadline_s
        assert (
            runs[attempt["devices"]]
            >= (attempt["run_s"] or attempt["run_at_least_s"]) * (1 - 1e-9)
            > deadline_s
        )


def test_screen_of_a_deadline_names_the_answer_and_counts_the_rest(planner):
    job = (*SMALL[:2], "--cluster", "a100:64x1", *SMALL[4:], "--tokens", "10B")
    found = planner("train", *job, "--deadline", "5h")
    assert found.code == 0
    assert re.search(r"Fewest devices that finish 10.0B tokens in 5.00 h: \d+ \(a100", found.out)
    assert re.search(r"(?m)^a100-sxm-80gb:\d+x1 .* meets the deadline$", found.out)
    assert re.search(r"\d+ sizes up to \d+ devices: excluded: the kernels alone take", found.out)


def test_deadline_that_nothing_meets_says_how_far_off(planner):
    job = (
        "--model",
        "gpt2",
        "--global-batch",
        "16",
        "--seq-len",
        "1024",
        "--tokens",
        "1T",
        "--cluster",
        "a100:2x4",
    )
    found = planner("train", *job, "--deadline", "1d", "--json")
    assert found.code == 3
    assert found.json["error"]["kind"] == "infeasible"


@pytest.mark.parametrize("width", [80, 140])
def test_screen_fits_the_terminal(planner, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    found = planner("train", *SMALL, "--tokens", "1B")
    lines = found.out.splitlines()
    assert found.err == ""
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line != line.rstrip()]
    assert "\x1b" not in found.out
    text = " ".join(found.out.split())
    for word in (
        "124.4M parameters",
        "candidates",
        "weakest: assumed",
        "fabric:",
        "exact under this model",
        "excluded by a bound",
        "Next",
    ):
        assert word in text


def test_interrupted_search_shows_its_best_and_says_so(planner, monkeypatch):
    from planner.solve.uniform import UniformSearch

    whole = UniformSearch.run

    def stopped(search):
        whole(search)
        raise KeyboardInterrupt

    monkeypatch.setattr(UniformSearch, "run", stopped)
    found = planner("train", *SMALL, "--json")
    assert found.code == 130
    assert "interrupted" in found.err
    content = found.json
    assert content["interrupted"]
    assert content["plans"][0]["optimality"]["status"] == "heuristic"
    assert content["plans"][0]["optimality"]["gap"] is None


def test_interruption_before_the_first_plan(planner, monkeypatch):
    from planner.cli.progress import Progress

    def press(self, done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "__call__", press)
    found = planner("train", *SMALL, "--json")
    assert found.code == 130
    assert found.json["error"]["kind"] == "interrupted"
    assert re.search(r"before any plan was priced, [\d,]+ candidates", found.faults[0]["found"])


def test_exploring_and_looking_for_a_size_are_two_searches(planner):
    job = (*SMALL[:2], "--cluster", "a100:8x1", *SMALL[4:], "--tokens", "10B", "--deadline", "9d")
    found = planner("train", *job, "--explore", "all", "--json")
    assert found.code == 2
    assert [fault["where"] for fault in found.faults] == ["--explore"]


def test_interrupted_deadline_says_how_far_it_is_proved(planner, monkeypatch):
    """The first size that its kernels do not exclude is searched, and then the user stops."""
    from planner.cli.progress import Progress

    def press(self, done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "__call__", press)
    job = (*SMALL[:2], "--cluster", "a100:64x1", *SMALL[4:], "--tokens", "10B", "--deadline", "4h", "--json")
    found = planner("train", *job)
    assert found.code == 130
    assert re.search(r"up to \d+ devices nothing is in time", found.faults[0]["found"])


def test_lengths_are_packed_for_plans_and_dealt_beside_them(planner):
    job = (
        "--model",
        "gpt2",
        "--cluster",
        "a100:1x4",
        "--lengths",
        "1024:24,4096:2",
        "--fix",
        "tp=1",
        "--top",
        "1",
    )
    found = planner("train", *job, "--json").json
    # (24·1024 + 2·4096) / 4096 = 8 sequences; their tokens see (24·1024² + 2·4096²) / 32768 of them on the average.
    workload = found["plans"][0]["workload"]
    assert [workload[name] for name in ("global_batch_size", "seq_len", "document_len")] == [8, 4096, 1792]
    dealt = found["sequences"]
    assert dealt["lengths"] == [1024, 4096]
    assert [sum(group["sequences"][i] for group in dealt["groups"]) for i in (0, 1)] == [24, 2]
    assert dealt["time_s"] <= dealt["equal"]["time_s"]
    shown = planner("train", *job)
    assert "Sequences in groups of unlike sizes" in shown.out
    both = planner("train", *job, "--seq-len", "1024", "--json")
    assert [fault["where"] for fault in both.faults] == ["--seq-len"]


def test_exploring_ends_in_time_with_what_is_known(planner):
    found = planner("train", *SMALL, "--explore", "all", "--time-limit", "1ms", "--top", "1", "--json").json
    assert found["plans"][0]["optimality"]["status"] == "gap"
    assert "all choices together" in found["notes"][0]
    refused = planner("train", *SMALL, "--time-limit", "1s", "--json")
    assert [fault["where"] for fault in refused.faults] == ["--time-limit"]
