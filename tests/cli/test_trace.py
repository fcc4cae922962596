"""Is a trace a trace: valid events, whole slices, ending with the step?"""

import json
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

JOB = (
    "--model",
    "llama3-8b",
    "--cluster",
    "a100-sxm-80gb:1x8",
    "--global-batch",
    "16",
    "--seq-len",
    "1024",
    "--fix",
    "pp=4",
)
SVG = "{http://www.w3.org/2000/svg}"


def estimate(planner, *choices):
    (plan,) = planner("estimate", *JOB, *choices, "--json").json["plans"]
    return plan["estimate"]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_h1", "v_half", "chimera", "hanayo"])
def test_the_last_slice_ends_with_the_step(planner, schedule):
    choice = f"--fix=schedule={schedule}"
    events = planner("trace", *JOB, choice).json["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    ends = max(event["ts"] + event["dur"] for event in slices)
    assert ends / 1e6 == pytest.approx(estimate(planner, choice)["step_time_s"], rel=1e-9)


def test_slices_of_a_stream_follow_each_other(planner):
    events = planner("trace", *JOB, "--fix=schedule=zbv", "--fix=tp=2").json["traceEvents"]
    for device in range(4):
        compute = [e for e in events if e["ph"] == "X" and e["pid"] == device and e["tid"] == 0]
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in compute)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(spans))
        # 16 micro-batches over dp = 1: forward, backward and weight gradient of two chunks each, and the update.
        assert len(spans) == 16 * 3 * 2 + 1


def test_every_stream_is_a_named_thread(planner):
    choices = ("--fix=tp=2", "--fix=activation_offload=cpu", "--fix=recompute=none")
    events = planner("trace", *JOB, *choices).json["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    used = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
    assert used <= set(names)
    assert set(names.values()) == {"compute", "communication", "transfers"}


def test_messages_leave_before_they_arrive(planner):
    events = planner("trace", *JOB).json["traceEvents"]
    leaves = {e["id"]: e for e in events if e["ph"] == "s"}
    arrives = {e["id"]: e for e in events if e["ph"] == "f"}
    # Four ranks, dp 2, eight micro-batches: three edges, there and back.
    assert len(leaves) == len(arrives) == 8 * 3 * 2
    assert all(arrives[i]["ts"] >= leaves[i]["ts"] and arrives[i]["pid"] != leaves[i]["pid"] for i in leaves)


def test_a_picture_has_a_slice_for_every_operation(planner, tmp_path):
    path = tmp_path / "step.svg"
    found = planner("trace", *JOB, "-o", str(path))
    assert found.code == 0
    assert found.out.strip() == str(path)
    root = ET.parse(path).getroot()
    tips = [element.text or "" for element in root.iter(f"{SVG}title")]
    assert sum("forward, micro-batch" in tip for tip in tips) == 4 * 8
    assert sum("backward, micro-batch" in tip for tip in tips) == 4 * 8
    boxes = [b for b in root.iter(f"{SVG}rect") if b.get("x") is not None and not b.get("rx")]
    assert all(100 <= float(b.get("x")) <= 1480 for b in boxes)


def test_a_stored_plan_has_a_trace(planner, plans, tmp_path):
    path = tmp_path / "step.json"
    assert planner("trace", f"{plans}:1", "-o", str(path)).code == 0
    trace = json.loads(path.read_text())
    best = json.loads(plans.read_text())["plans"][0]
    assert trace["otherData"]["plan"] == best["id"]


def test_nothing_is_left_where_a_trace_fails(planner, tmp_path):
    found = planner(
        "trace",
        *JOB,
        "--fix=schedule=dualpipe",
        "--fix=pp=8",
        "--fix=micro_batch_size=2",
        "-o",
        str(tmp_path / "a.svg"),
    )
    assert found.code == 2
    assert list(tmp_path.iterdir()) == []
    found = planner("trace", *JOB, "-o", str(tmp_path / "a.png"))
    assert found.code == 2
    assert list(tmp_path.iterdir()) == []
