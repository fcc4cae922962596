"""The shipped hardware data: every profile loads, every number has a source, known traps are avoided."""

import tomllib
from dataclasses import replace

import pytest

from planner.specs.cluster_file import list_clusters
from planner.specs.device import KINDS, Device, Sourced
from planner.specs.device_file import merged_profile
from planner.specs.hardware import check_hardware, list_devices, load_cluster, load_device
from planner.specs.hardware_check import check_device
from planner.specs.library import hardware_folder

DATA = sorted(
    path for path in hardware_folder().rglob("*.toml") if path.name not in ("SOURCES.toml", "ALIASES.toml")
)
SOURCES = tomllib.loads((hardware_folder() / "SOURCES.toml").read_text())
COUNTS = {"year", "domain", "devices_per_node", "nodes", "nics_per_node", "nodes_per_leaf", "size"}
TERA, GIGA, MIB = 1e12, 1e9, 2**20


def numbers(table, path=""):
    """Every number of a table: (key path, sourced table or bare number)."""
    for key, value in table.items():
        for row in value if isinstance(value, list) else [value]:
            if isinstance(row, dict) and "value" not in row:
                yield from numbers(row, f"{path}{key}.")
            elif isinstance(row, dict | int | float):
                yield f"{path}{key}", row


@pytest.mark.parametrize("path", DATA, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_number_names_its_kind_and_source(path):
    for key, number in numbers(tomllib.loads(path.read_text())):
        if isinstance(number, dict):
            assert set(number) - {"spread"} == {"value", "kind", "source"}, key
            assert number["kind"] in KINDS, key
            assert number["source"] in SOURCES, key
        else:
            assert key.rpartition(".")[2] in COUNTS, f"{key} is a bare number"


def test_no_source_is_left_over():
    used = set()
    for path in DATA:
        table = tomllib.loads(path.read_text())
        used |= {number["source"] for _, number in numbers(table) if isinstance(number, dict)}
        used.add(table.get("source"))
    assert set(SOURCES) - used == set()


@pytest.mark.parametrize("name", list_devices())
def test_device_loads(name):
    device = load_device(name)
    assert device.name == name
    assert device.memory_bytes.value > 1e9
    assert device.peak_flop_per_s


@pytest.mark.parametrize("name", list_clusters())
def test_cluster_loads(name):
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.tiers[-1].size == cluster.devices
    assert cluster.source in SOURCES


def test_required_devices_are_shipped():
    required = {
        "v100-sxm2-16gb", "v100-sxm2-32gb", "t4", "a10", "a100-sxm-40gb", "a100-sxm-80gb", "a100-pcie-40gb",
        "a100-pcie-80gb", "h100-sxm", "h100-pcie", "h100-nvl", "h800-sxm", "h20", "h200-sxm", "b200-sxm",
        "b300-sxm", "gb200-nvl72", "gb300-nvl72", "l4", "l40s", "rtx-3090", "rtx-4090", "rtx-5090", "mi250x",
        "mi300x", "mi325x", "mi355x", "tpu-v4", "tpu-v5e", "tpu-v5p", "trainium2", "gaudi3", "ascend-910b",
    }  # fmt: skip
    assert required <= set(list_devices())


def test_nothing_to_complain_about():
    assert check_hardware() == []


# Dense 16-bit peaks in TFLOP/s, with the wrong figure that circulates.
@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("h200-sxm", "bf16", 989.4),  # H200 data sheet: 1979 with sparsity; lightning-fabric lists 2.0e15
        ("h100-nvl", "bf16", 835.0),  # H100 NVL data sheet: 1671 with sparsity; lightning-fabric lists 1978.8
        ("h100-sxm", "fp16", 989.4),  # APEX+ lists 1979 (sparse), vidur 1000
        ("gh200", "bf16", 989.4),  # GenZ lists 1979
        ("h100-sxm", "fp8", 1978.9),  # data sheet: 3958 with sparsity
        (
            "v100-sxm2-32gb",
            "fp16",
            125.0,
        ),  # V100 data sheet, tensor performance; APEX+ lists the PCIe vector rate 14
        (
            "rtx-4090",
            "fp16",
            165.2,
        ),  # Ada white paper, fp32 accumulation; lightning-fabric lists the vector rate 82.6
        ("rtx-3090", "fp16", 71.2),  # GA102 white paper, fp32 accumulation
        ("a40", "fp16", 149.7),  # A40 data sheet; lightning-fabric lists the vector rate 37.4
        ("a6000", "fp16", 154.85),  # A6000 data sheet: 309.7 with sparsity
        ("mi250x", "bf16", 191.5),  # one die of the module's 383 (AMD; torchtitan get_peak_flops)
        ("mi300x", "bf16", 1307.4),  # AMD: 2614.9 with sparsity
        ("mi210", "int8", 181.0),  # AMD: the fp16 rate; llm-analysis doubles it
        ("b300-sxm", "int8", 153.5),  # int8 is cut to 1/29 of the B200's
        ("trainium2", "fp8", 1299.0),  # AWS Neuron documentation: 2563 with sparsity
    ],
)
def test_peaks_are_dense_matrix_rates(name, dtype, tflops):
    assert load_device(name).peak_flop_per_s[dtype].value == pytest.approx(tflops * TERA, rel=1e-3)


# What the driver reports (nvidia-smi), against marketed decimal figures.
@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("h100-sxm", 81559),
        ("h200-sxm", 143771),
        ("a100-sxm-80gb", 81920),
        ("v100-sxm2-16gb", 16160),  # llm-analysis lists 32 GB for this part
        ("v100-sxm2-32gb", 32510),
        ("a10", 23028),  # llm-analysis lists 28 GB
        ("b200-sxm", 183359),  # SimuMax lists 80 GB
        ("b300-sxm", 275040),
        ("gb200-nvl72", 189471),
    ],
)
def test_memory_is_the_drivers_total(name, mib):
    assert load_device(name).memory_bytes.value == mib * MIB


# Per direction and per device, where both directions, one link or bits circulate.
@pytest.mark.parametrize(
    ("name", "gb_per_s"),
    [
        ("h100-sxm", 450),  # "900 GB/s" is both directions
        ("h800-sxm", 200),  # "400 GB/s"
        ("b200-sxm", 900),  # "1.8 TB/s"
        ("v100-sxm2-32gb", 150),  # "300 GB/s"
        ("tpu-v4", 270),  # six links of 45; GenZ lists 24
        ("tpu-v5p", 600),  # Cloud TPU documentation: 1200 over both directions
        ("mi300x", 448),  # seven links of 64
        ("trainium2", 640),  # AWS: 1.28 TB/s over both directions
    ],
)
def test_links_are_per_direction(name, gb_per_s):
    assert load_device(name).scale_up.bytes_per_s.value == gb_per_s * GIGA


def wrong(name: str, **changes: float) -> list[str]:
    """Names of the checks that a shipped device fails once the given dtypes or fields are changed."""
    device = load_device(name)
    table = merged_profile(hardware_folder() / "devices" / f"{name}.toml")
    peaks, fields = dict(device.peak_flop_per_s), {}
    for key, value in changes.items():
        number = Sourced(value, "assumed", "a wrong table")
        if key in peaks:
            peaks[key] = number
        else:
            fields[key] = number
    changed: Device = replace(device, peak_flop_per_s=peaks, **fields)
    problems = check_device(changed, table.get("matrix_to_vector", {}).get("value"), table.get("unusual"))
    return [problem.where.rpartition(": ")[2] for problem in problems]


# Each row is an error of a published table (the first source named in the comment), or of its kind.
@pytest.mark.parametrize(
    ("name", "changes", "check"),
    [
        ("h200-sxm", {"bf16": 2.0e15, "fp16": 2.0e15}, "fp8"),  # lightning-fabric: sparse
        ("h200-sxm", {"bf16": 2.0e15, "fp16": 2.0e15}, "tf32"),
        (
            "h100-sxm",
            {"bf16": 1979e12, "fp16": 1979e12, "fp8": 3958e12, "tf32": 989e12},
            "matrix",
        ),  # all sparse
        ("mi300x", {"bf16": 2614.9e12, "fp16": 2614.9e12, "fp8": 5229.8e12, "tf32": 1307.4e12}, "matrix"),
        (
            "a6000",
            {"bf16": 309.7e12, "fp16": 309.7e12, "tf32": 154.8e12},
            "matrix",
        ),  # the data sheet's sparse figure
        ("rtx-4090", {"bf16": 82.6e12, "fp16": 82.6e12}, "matrix"),  # lightning-fabric: vector rate
        ("a40", {"bf16": 37.4e12, "fp16": 37.4e12}, "matrix"),  # lightning-fabric: vector rate
        ("v100-sxm2-32gb", {"fp16": 14e12}, "matrix"),  # APEX+: vector rate
        ("v100-sxm2-16gb", {"memory_bytes": 32 * 2**30}, "memory"),  # llm-analysis
        ("h100-sxm", {"nic_bytes_per_s": 400e9}, "nic"),  # llm-analysis: 400 Gb/s as GB/s
        ("l40s", {"bf16": 733e12, "fp16": 733e12, "fp8": 1466e12, "tf32": 366e12}, "ridge"),  # sparse
        ("rtx-3090", {"int8": 568e12}, "int8"),  # sparse
        ("h100-sxm", {"memory_bytes_per_s": 3350e12}, "bandwidth"),
        ("h100-sxm", {"power_w": 0.7}, "power"),
    ],
)
def test_checks_catch_published_errors(name, changes, check):
    assert check in wrong(name, **changes)
    assert wrong(name) == []


def test_explained_oddities_are_accepted_and_unknown_ones_not():
    # Gaudi 3 runs fp8 at the bf16 rate (Hot Chips 2024); the profile says so, and only that is excused.
    assert wrong("gaudi3") == []
    assert [p.where for p in check_device(load_device("gaudi3"))] == ["device 'gaudi3': fp8"]
    assert "no such check" in check_device(load_device("l4"), unusual={"speed": "fast"})[0].found
