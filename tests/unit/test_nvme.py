"""The drives of a node as a tier of memory: capacity and bandwidth are shared by its devices, and both bind."""

import json
from dataclasses import replace

import pytest

from planner import Problem, TrainWorkload, estimate, examine, load_cluster, load_model, load_stack, search
from planner.errors import Infeasible
from planner.export import export
from planner.export.readers import read_launched
from planner.report.account import byte_tree
from planner.specs.parameters import parameter_count

STATES = 16.0  # bytes per parameter on the drives: fp32 weights and moments, fp32 gradients
OFFLOADED = {"zero_stage": 3, "optimizer_offload": "nvme", "parameter_offload": "cpu"}


def problem(*, cluster="a100-sxm-80gb:1x8", drives=None, rate=None, **fixed):
    machine = load_cluster(cluster)
    machine = replace(
        machine,
        nvme_bytes=machine.nvme_bytes if drives is None else drives,
        nvme_bytes_per_s=machine.nvme_bytes_per_s if rate is None else rate,
    )
    workload = TrainWorkload(8, 2048)
    return Problem(load_model("llama-7b"), machine, workload, load_stack(), fixed={**OFFLOADED, **fixed})


def test_devices_share_the_drives_of_their_node():
    machine = load_cluster("a100-sxm-80gb:2x8")
    device = machine.device
    assert machine.nvme_bytes == pytest.approx(float(device.nvme_bytes) / 8)
    assert machine.nvme_bytes_per_s == pytest.approx(float(device.nvme_bytes_per_s) / 8)


def test_states_and_gradients_lie_on_the_drives_and_weights_on_the_host():
    assembly = examine(problem())
    found, parameters = assembly.plan.estimate, parameter_count(load_model("llama-7b"))
    assert found.nvme_bytes == pytest.approx(STATES * parameters / 8, rel=1e-6)
    assert found.host_bytes == pytest.approx(2.0 * parameters / 8, rel=1e-6)
    leaves = byte_tree(assembly)["nvme"]
    assert sum(leaf["bytes"] for leaf in leaves) == pytest.approx(found.nvme_bytes)
    assert {leaf["technique"] for leaf in leaves} == {"zero_infinity_states"}


def test_drives_that_are_too_small_bind():
    need = estimate(problem()).estimate.nvme_bytes
    assert estimate(problem(drives=1.01 * need)).estimate.fits
    assert not estimate(problem(drives=0.99 * need)).estimate.fits
    degrees = {"tp": 1, "cp": 1, "pp": 1, "micro_batch_size": 1}
    with pytest.raises(Infeasible, match="NVMe binds"):
        search(problem(drives=0.99 * need, **degrees))


@pytest.mark.parametrize("slot", ["optimizer_offload", "activation_offload", "parameter_offload"])
def test_faster_drives_are_never_slower(slot):
    fixed = {"optimizer_offload": "none", "parameter_offload": "none", slot: "nvme"}
    steps = [estimate(problem(rate=rate, **fixed)).estimate.step_time_s for rate in (1e9, 3e9, 12e9)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1]


@pytest.mark.parametrize("slot", ["activation_offload", "parameter_offload"])
def test_drives_faster_than_the_host_link_leave_what_the_link_takes(slot):
    """Both links work side by side; where drives keep up, only contention between the two is left over the host's time."""
    fixed = {"optimizer_offload": "none", "parameter_offload": "none"}
    host = estimate(problem(**{**fixed, slot: "cpu"})).estimate.step_time_s
    drives = estimate(problem(rate=1e12, **{**fixed, slot: "nvme"})).estimate.step_time_s
    assert host <= drives <= 1.1 * host


def test_an_update_beside_the_backward_waits_less():
    serial, beside = (
        estimate(problem(optimizer_offload=choice)).estimate for choice in ("nvme", "nvme+overlapped")
    )
    assert beside.step_time_s < serial.step_time_s
    assert beside.nvme_bytes == serial.nvme_bytes


def test_deepspeed_is_told_of_the_drives_and_reads_them_back(tmp_path):
    plan = estimate(problem(parameter_offload="nvme", gradient_dtype="bf16"))
    written = export(plan, "deepspeed")["deepspeed.json"]
    zero = json.loads(written)["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        assert zero[key]["device"] == "nvme"
        assert zero[key]["nvme_path"]
    path = tmp_path / "deepspeed.json"
    path.write_text(written, encoding="utf-8")
    knobs = read_launched("deepspeed", path).fixed
    assert (knobs["optimizer_offload"], knobs["parameter_offload"]) == ("nvme", "nvme")


def test_accumulated_gradients_go_to_the_drives_and_back_in_every_micro_batch():
    """Slow drives are all that counts. Per parameter and step: 24 bytes of states read and written, and for every micro-batch 4
    of gradients written and 4 read, by the next one or by the update: (24 + 3·8)/(24 + 8) times as long with three.
    """
    one = problem(rate=1e6, parameter_offload="none")
    three = replace(one, workload=TrainWorkload(24, 2048))
    times = [estimate(job).estimate.step_time_s for job in (one, three)]
    assert times[1] / times[0] == pytest.approx(48 / 32, rel=0.01)
