"""Does goodput say what it costs to fail, and refuse what cannot be?"""

import pytest

JOB = (
    "--model",
    "llama3-8b",
    "--cluster",
    "h100-sxm:4x8",
    "--global-batch",
    "128",
    "--seq-len",
    "4096",
    "--fix",
    "tp=2",
)


def test_goodput_of_a_named_plan(planner):
    found = planner("goodput", *JOB, "--tokens", "1T", "--json").json
    assert 0.5 < found["goodput"] < 1.0
    assert found["run"]["usd"] is None or found["run"]["usd"] > 0
    text = planner("goodput", *JOB, "--tokens", "1T").out
    assert "goodput" in text
    assert "device hours" in text


def test_goodput_of_a_stored_plan(planner, plans):
    assert planner("goodput", f"{plans}:1", "--mtbf", "100h", "--json").json["device_mtbf_s"] == 360_000


def test_an_interval_of_ones_own_is_no_better_than_the_best(planner):
    best = planner("goodput", *JOB, "--json").json
    own = planner("goodput", *JOB, "--every", "6h", "--json").json
    assert own["interval_s"] == 6 * 3600
    assert own["goodput"] <= best["goodput"]
    assert own["best_interval_s"] == pytest.approx(best["interval_s"])


def test_everything_wrong_is_said_at_once(planner):
    found = planner("goodput", *JOB, "--mtbf", "0h", "--checkpoint", "never", "--store", "fast", "--json")
    assert found.code == 2
    assert {fault["where"] for fault in found.faults} == {"--mtbf", "--checkpoint", "--store"}


def test_ways_to_recover_stand_beside_each_other(planner):
    job = (
        *JOB,
        "--fix",
        "pp=4",
        "--mtbf",
        "20d",
        "--replace",
        "2h",
        "--tokens",
        "1T",
        "--pue",
        "1.1",
        "--carbon",
        "0.385",
    )
    found = planner("goodput", *job, "--recovery", "elastic", "--json").json
    assert set(found["other_recoveries"]) == {"restart", "redundant"}
    assert found["goodput"] == pytest.approx(1.0 - sum(found["lost"].values()))
    run = found["run"]
    # 1.1 of the devices' kWh at 0.385 kg each.
    assert run["kg_co2e"] == pytest.approx(run["joules"] / 3.6e6 * 1.1 * 0.385)
    assert "t CO2e" in planner("goodput", *job).out


def test_a_stored_plan_stands_where_one_says(planner, plans):
    for wrong in (
        ("--pue", "0.5", "--tokens", "1T"),
        ("--pue", "1.1"),
    ):  # out of range; of a run of no known length
        found = planner("goodput", f"{plans}:1", *wrong, "--json")
        assert {fault["where"] for fault in found.faults} == {"--pue"}
    run = planner("goodput", f"{plans}:1", "--tokens", "1T", "--usd-per-hour", "2", "--json").json["run"]
    assert run["usd"] == pytest.approx(2.0 * run["device_hours"])
    refused = planner("goodput", f"{plans}:1", "--recovery", "hope", "--json")
    assert {fault["where"] for fault in refused.faults} == {"--recovery"}
