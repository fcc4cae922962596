"""``planner calibrate``: profiles from measurement files, and one clear message for whatever is wrong."""

import csv
import sys
import tomllib
from pathlib import Path

import pytest

from planner.specs.hardware import load_cluster, load_device

SAMPLES = Path(__file__).parents[1] / "data" / "calibration"
NCCL = SAMPLES / "nccl_all_reduce_2x8_h100.txt"


@pytest.fixture
def streams(tmp_path):
    """Forty streams at 1.6 TB/s after 5 µs, all much larger than the second-level cache."""
    path = tmp_path / "streams.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["op", "bytes_moved", "latency_us"])
        for index in range(40):
            n_bytes = 4e8 * 1.1**index
            writer.writerow(["copy", n_bytes, 5.0 + n_bytes / 1.6e12 * 1e6])
    return path


def test_a_device_profile_that_reads_back(planner, streams, tmp_path):
    out = tmp_path / "mine.toml"
    found = planner(
        "calibrate", "device", streams, "--base", "a100-sxm-80gb", "-o", out, "--conditions", "driver 570"
    )
    assert (found.code, found.err) == (0, "")
    assert "efficiency.memory" in found.out
    assert "left-out rows" in found.out
    device = load_device(out)
    reached = device.efficiency.memory.value * device.memory_bytes_per_s.value
    assert reached == pytest.approx(1.6e12, rel=0.01)
    assert "driver 570" in device.efficiency.memory.source
    assert planner("hardware", "show", out).code == 0


def test_json_is_json_alone(planner, streams, tmp_path):
    found = planner(
        "calibrate", "device", streams, "--base", "a100-sxm-80gb", "-o", tmp_path / "x.toml", "--json"
    )
    fit = found.json["fits"]["kernels"]
    assert fit["rows"] == 40
    assert fit["left_out"]["n"] == 40
    assert {c["name"] for c in fit["fitted"]} | {c["name"] for c in fit["kept"]} >= {
        "efficiency.matmul",
        "launch_s",
    }


def test_eleven_messages_fit_nothing_and_the_report_says_so(planner, tmp_path):
    out = tmp_path / "fabric.toml"
    found = planner("calibrate", "fabric", NCCL, "--cluster", "h100-sxm:2x8", "-o", out)
    assert found.code == 0
    assert "Nothing is fitted" in found.out
    assert "fitted, same rows" not in found.out
    assert " ".join(found.out.split()).endswith("with every constant as before.")
    assert "fewer than 20" in found.out
    # Nothing was fitted, so the machine is as it was.
    fresh, written = load_cluster("h100-sxm:2x8"), load_cluster(out)
    assert [t.effective_bytes_per_s for t in written.tiers] == [t.effective_bytes_per_s for t in fresh.tiers]


def test_a_fabric_from_output_of_nccl_tests(planner, tmp_path):
    # The same times for four collectives, which is no machine's truth: enough rows for a constant or two of the network.
    text = NCCL.read_text()
    four = tmp_path / "four.txt"
    programs = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
    four.write_text("".join(text.replace("all_reduce_perf", f"{name}_perf") for name in programs))
    out = tmp_path / "fabric.toml"
    assert planner("calibrate", "fabric", four, "--cluster", "h100-sxm:2x8", "-o", out).code == 0
    table = tomllib.loads(out.read_text())
    numbers = [value for tier in table["tier"] for value in tier.values() if isinstance(value, dict)]
    assert any(number["kind"] == "fitted" and "four.txt" in number["source"] for number in numbers)
    assert load_cluster(out).devices == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("device", "none.csv", "--base", "h100-sxm", "-o", "x.toml"), "no such file"),
        (("device", NCCL, "--base", "h1000", "-o", "x.toml"), "--base: unknown device"),
        (("device", NCCL, "--base", "h100-sxm", "-o", "x.json"), "ends in .toml"),
        (("device", NCCL, "--base", "h100-sxm", "-o", "none/x.toml"), "cannot be written"),
        (("device", NCCL, "--base", "h100-sxm", "-o", "x.toml", "--folds", "1"), "2 to 100"),
        (("device", NCCL, "--base", "h100-sxm", "-o", "x.toml", "--dtype", "fp12"), "fp32, tf32"),
        (("device", NCCL, "--base", "h100-sxm", "-o", "x.toml"), "no collective within one node"),
        (("fabric", NCCL, "--cluster", "h100-sxm:1x8", "-o", "x.toml"), "none of which fits"),
        (("fabric", "streams", "--cluster", "h100-sxm:2x8", "-o", "x.toml"), "0 collectives"),
        (("stack", "streams", "-o", "x.toml"), "a training table"),
        (
            ("stack", "none.csv", "-o", "x.toml", "--base", "nonesuch"),
            "--base: 'nonesuch'; expected a .toml file, or one of",
        ),
        (
            ("device", "streams", "--base", "h100-sxm", "-o", "x.toml", "--only", "streams"),
            "expected of stream",
        ),
        (("measure", "-o", "folder", "--what", "gem"), "gemm"),
        (("measure", "-o", "folder", "--on", "tpu"), "cpu"),
        (("measure", "-o", "folder", "--processes", "1"), "2 to 1024"),
    ],
)
def test_wrong_input_is_one_message_and_no_file(planner, streams, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    found = planner("calibrate", *(streams if a == "streams" else a for a in arguments))
    assert found.code == 2
    assert words in found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streams.csv"]


def test_rows_of_several_accelerators_want_one_named(planner, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("accelerator,bytes_moved,latency_ms\n" + "A100,1e9,1\nH100,1e9,1\n" * 20)
    fit = ("calibrate", "device", rows, "--base", "h100-sxm", "-o", tmp_path / "x.toml")
    found = planner(*fit)
    assert found.code == 2
    assert "of A100, H100; expected of one accelerator" in found.err
    assert planner(*fit, "--accelerator", "H200").code == 2
    named = planner(*fit, "--accelerator", "A100", "--json")
    assert named.json["fits"]["kernels"]["rows"] == 20


def test_without_torch_there_is_one_message(planner, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # what Python leaves where an import is forbidden
    found = planner("calibrate", "measure", "-o", tmp_path / "rows")
    assert found.code == 2
    assert "PyTorch is not installed" in found.err
    assert "pip install torch" in found.err
    assert list(tmp_path.iterdir()) == []


def test_a_training_table_makes_a_stack(planner, tmp_path):
    # Two runs of the form that `planner validate` reads: too few for any constant, and one that cannot be priced.
    runs = tmp_path / "runs.csv"
    runs.write_text(
        "row_id,model,n_layers,hidden,n_heads,seq_len,accelerator,n_devices,tp,pp,micro_batch,global_batch,step_time_s\n"
        "a,small,12,768,12,1024,A100-SXM-80GB,8,1,1,4,32,0.5\nb,small,,768,12,1024,A100-SXM-80GB,8,1,1,4,32,0.5\n"
    )
    found = planner("calibrate", "stack", runs, "-o", tmp_path / "mine.toml")
    assert found.code == 0
    assert "b: mandatory cells are empty: n_layers" in found.out
    assert "matmul_slowdown" in found.out
    assert tomllib.loads((tmp_path / "mine.toml").read_text()) == {"name": "mine", "extends": "default"}
