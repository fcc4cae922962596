"""Loading of devices and clusters: names, specs, tiers, files, and what is said about mistakes."""

import pytest

from planner.errors import SpecError
from planner.specs import cluster_file, device_file, library
from planner.specs.hardware import check_hardware, list_devices, load_cluster, load_device
from planner.specs.library import canonical, hardware_folder, models_folder, resolve


def tiers(spec):
    return [(tier.name, tier.size, tier.bytes_per_s / 1e9) for tier in load_cluster(spec).tiers]


def problems(spec):
    with pytest.raises(SpecError) as caught:
        load_cluster(spec)
    return [str(problem) for problem in caught.value.problems]


def written(tmp_path, text, name="mine.toml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


# -- names -----------------------------------------------------------------------------------------


def test_folders_are_those_of_the_checkout():
    assert hardware_folder().name == "hardware_profiles"
    assert models_folder().name == "models"


def test_folders_of_an_installed_wheel_come_first(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_PACKAGE", tmp_path / "planner")
    with pytest.raises(SpecError, match="Reinstall"):
        hardware_folder()
    for folder in ("hardware_profiles", "planner/data/hardware_profiles"):
        (tmp_path / folder).mkdir(parents=True)
        assert hardware_folder() == tmp_path / folder


def test_names_resolve_by_canonical_spelling_and_alias():
    assert canonical(" Meta-Llama/Llama_3 8B ") == "meta-llama-llama-3-8b"
    assert resolve("B", ["a"], {"b": "a"}) == "a"
    assert resolve("b", ["a"], {"b": "gone"}) is None


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h100", "h100-sxm"),
        ("H100-SXM", "h100-sxm"),
        ("a100", "a100-sxm-80gb"),
        ("a100-80gb", "a100-sxm-80gb"),
        ("h100-80gb-hbm3", "h100-sxm"),
        ("b200", "b200-sxm"),
        ("4090", "rtx-4090"),
        ("gb200", "gb200-nvl72"),
        ("v100", "v100-sxm2-32gb"),
        ("mi300x", "mi300x"),
        # what torch.cuda.get_device_name() and nvidia-smi print
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA RTX A6000", "a6000"),
    ],
)
def test_common_names_are_understood(given, name):
    assert load_device(given).name == name


def test_unknown_device_gets_a_hint():
    with pytest.raises(SpecError, match=r"unknown device 'h100-smx'.*Did you mean h100-sxm"):
        load_device("h100-smx")


def test_listing_reads_no_file(monkeypatch):
    monkeypatch.setattr(device_file, "read_file", None)
    assert "h100-sxm" in list_devices()


def test_loading_a_cluster_reads_two_small_files(monkeypatch):
    read = []
    original = device_file.read_file
    monkeypatch.setattr(device_file, "read_file", lambda path: read.append(path.name) or original(path))
    load_cluster("h100-sxm:8x8")
    assert read == ["h100-sxm.toml", "hopper.toml"]


# -- device files ----------------------------------------------------------------------------------


def own_device(tmp_path, **replaced):
    text = (hardware_folder() / "devices" / "h100-sxm.toml").read_text()
    for old, new in replaced.values():
        assert old in text
        text = text.replace(old, new)
    return written(tmp_path, text)


def test_own_profile_overrides_its_generation(tmp_path):
    path = own_device(tmp_path, a=("[scale_up]", "[efficiency]\nmatmul = 0.5\n\n[scale_up]"))
    device = load_device(path)
    assert (device.efficiency.matmul.value, device.efficiency.matmul.kind) == (0.5, "assumed")
    assert device.efficiency.memory == load_device("h100").efficiency.memory


def test_own_profile_is_usable_in_a_spec(tmp_path):
    assert tiers(f"{own_device(tmp_path)}:2x8")[-1][:2] == ("nic", 16)


def test_all_problems_of_a_device_file_at_once(tmp_path):
    path = own_device(
        tmp_path,
        kind=('value = 700.0, kind = "datasheet"', 'value = 700.0, kind = "guess"'),
        negative=("value = 3.35e12", "value = -3.35e12"),
        fraction=(
            "domain = 8",
            'efficiency = { value = 74.5, kind = "assumed", source = "mine" }\ndomain = 8',
        ),
        topology=('topology = "switch"', 'topology = "swich"'),
        dtype=("bf16 =", "bf61 ="),
        missing=("multiprocessors", "multi_processors"),
    )
    with pytest.raises(SpecError) as caught:
        load_device(path)
    places = {problem.where.rpartition(": ")[2] for problem in caught.value.problems}
    assert places == {
        "power_w.kind",
        "memory_bytes_per_s.value",
        "scale_up.efficiency.value",
        "scale_up.topology",
        "peak_flop_per_s.bf61",
        "multiprocessors",
        "multi_processors",
    }


def test_link_that_nobody_knows(tmp_path):
    with pytest.raises(SpecError, match="Did you mean nvlink-4"):
        load_device(own_device(tmp_path, a=('link = "nvlink-4"', 'link = "nvlnk-4"')))


def test_link_of_its_own_needs_no_more_than_rate_latency_and_efficiency(tmp_path):
    plain = own_device(tmp_path, a=('link = "nvlink-4"', "latency_s = 1e-6\nefficiency = 0.8"))
    assert load_device(plain).scale_up.transport is None
    assert load_device("h100").scale_up.transport.launch_s.kind == "fitted"


def test_reasons_for_oddities_are_text(tmp_path):
    path = own_device(tmp_path, a=("[scale_up]", "[unusual]\nfp8 = 2\n\n[scale_up]"))
    (problem,) = check_hardware([path])
    assert problem.where.endswith("unusual.fp8")


def test_a_data_sheet_without_generation_is_told_that_there_are_some(tmp_path):
    path = own_device(tmp_path, a=('generation = "hopper"', ""))
    with pytest.raises(SpecError, match="generation: is missing; expected one of ada, ") as refused:
        load_device(str(path))
    assert len(refused.value.problems) == 1


def test_unknown_generation_names_the_known_ones(tmp_path):
    path = own_device(tmp_path, a=('generation = "hopper"', 'generation = "hoper"'))
    with pytest.raises(SpecError, match="Did you mean hopper"):
        load_device(path)


def test_check_reports_what_is_implausible_in_an_own_file(tmp_path):
    path = own_device(tmp_path, a=("fp8 = { value = 1978.9e12", "fp8 = { value = 3957.8e12"))
    (problem,) = check_hardware([path])
    assert "fp8 / 16-bit = 4" in problem.found
    assert "unknown device" in check_hardware(["nope"])[0].found


# -- specs -----------------------------------------------------------------------------------------

# Rates in GB/s per device and direction from the data sheets named in the profiles; across the host, as measured there.
NV4, NV3, NV5, PCIE5, HOST, NDR = (
    ("nvlink", 450.0),
    ("nvlink", 300.0),
    ("nvlink", 900.0),
    ("pcie", 63.0),
    ("pcie-host", 13.5),
    ("nic", 50.0),
)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("h100-sxm:8x8", [(*NV4, 8), (*NDR, 64)]),
        ("H100:1x8", [(*NV4, 8)]),
        ("h100:4x4", [(*NV4, 4), (*NDR, 16)]),
        ("h100:1x6", [(*NV4, 6)]),
        ("h100:8x1", [(*NDR, 8)]),
        ("h100:1x1", [(*NV4, 1)]),
        ("gb200-nvl72:1x4", [(*NV5, 4)]),
        ("gb200-nvl72:18x4", [(*NV5, 72)]),
        ("gb200-nvl72:36x4", [(*NV5, 72), (*NDR, 144)]),
        ("gb200-nvl72:20x4", [(*NV5, 40), (*NDR, 80)]),  # two racks of ten trays
        ("h100-nvl:4x8", [("nvlink", 300.0, 2), (*HOST, 8), (*NDR, 32)]),
        ("h100-nvl:1x3", [(*HOST, 3)]),
        ("h100-pcie:2x8", [(*PCIE5, 2), (*HOST, 8), (*NDR, 16)]),
        (
            "mi250x:2x8",
            [("xgmi-module", 200.0, 2), ("xgmi", 100.0, 8), ("nic", 12.5, 16)],
        ),  # 4 NICs of 25 GB/s for 8 dies
        ("tpu-v5e:32x8", [("ici", 200.0, 256)]),
        # mixed: level by level at the slower part's rate
        ("h100-sxm:4x8+a100-sxm-80gb:4x8", [(*NV3, 8), ("nic", 25.0, 64)]),
        # domains of 72 and 8 have only blocks of 8 in common
        ("h100-sxm:2x8+gb200-nvl72:18x4", [(*NV4, 8), (*NDR, 88)]),
    ],
)
def test_tiers_follow_the_scale_up_domain(spec, expected):
    assert tiers(spec) == [(name, size, rate) for name, rate, size in expected]


def test_mixed_cluster_has_the_poorest_host():
    cluster = load_cluster("h100-sxm:4x8+a100-sxm-40gb:4x8")
    assert cluster.mixed
    assert cluster.devices == 64
    assert cluster.host_memory_bytes == 1024 * 2**30 / 8  # the A100 node's, of 2048 and 1024 GiB
    assert cluster.host_link_bytes_per_s == 31.5e9  # PCIe 4


def test_part_of_a_node_has_its_share_of_the_host():
    assert load_cluster("h100:1x2").host_memory_bytes == load_cluster("h100:1x8").host_memory_bytes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h100-sxm:8", "NAME:NODESxDEVICES_PER_NODE"),
        ("h100:axb", "NAME:NODESxDEVICES_PER_NODE"),
        ("h100:8x8x8", "NAME:NODESxDEVICES_PER_NODE"),
        ("h100:-1x8", "NAME:NODESxDEVICES_PER_NODE"),
        ("h100:1.5x8", "NAME:NODESxDEVICES_PER_NODE"),
        ("", "NAME:NODESxDEVICES_PER_NODE"),
        (":8x8", "NAME:NODESxDEVICES_PER_NODE"),
        ("h100:8x8+", "NAME:NODESxDEVICES_PER_NODE"),
        ("h100", "Try h100-sxm:1x8"),
        ("h100-sxm:0x8", "has no devices"),
        ("h100-sxm:8x0", "has no devices"),
        ("h100:2000000x8", "at most 10,000,000 devices"),
        ("h100:" + "9" * 5000 + "x8", "at most 10,000,000 devices"),
        ("h100:1000000x8+a100:1000000x8", "at most 10,000,000 devices"),
        ("nope:8x8", "unknown device 'nope'"),
        ("h10:1x8", "Did you mean h100"),
        ("h100:4x16", "Try h100-sxm:8x8"),
        ("gb200:19x4", "Try 18 or 36 nodes"),
        ("aws-p5:2x8+h100:1x8", "'aws-p5' is a cluster"),
        ("missing.toml", "no such file"),
    ],
)
def test_a_bad_spec_gets_one_clear_message(spec, message):
    (problem,) = problems(spec)
    assert message in problem
    assert len(problem) < 300


def test_all_bad_groups_of_a_spec_at_once():
    assert len(problems("h100:8+a100:0x8")) == 2
    assert len(problems("nope:1x8+nada:1x8")) == 2


# -- cluster files ---------------------------------------------------------------------------------


def test_shipped_clusters_by_name():
    # Llama 3 report, section 3.3.1: pods of 3072 GPUs, 1:7 between pods, 400 Gb/s per GPU.
    leaf, spine = load_cluster("llama3-24k").tiers[1:]
    assert (leaf.size, leaf.bytes_per_s, leaf.oversubscription) == (3072, 50e9, 1.0)
    assert (spine.size, spine.oversubscription) == (24576, 7.0)
    # Four 100 Gb/s adapters for eight devices are 6.25 GB/s each (AWS p4d).
    assert tiers("aws-p4d:4x8") == [("nvlink", 8, 300.0), ("nic", 32, 6.25)]
    assert load_cluster("aws-p4d:4x8").name == "aws-p4d:4x8"
    assert load_cluster("Selene").devices == 3072


def test_cluster_file_with_network_host_and_price(tmp_path):
    cluster = load_cluster(
        written(
            tmp_path,
            """
            [[group]]
            device = "h100"
            nodes = 16
            devices_per_node = 8
            usd_per_hour = 2.5

            [network]
            nics_per_node = 4
            nic_bytes_per_s = 25e9
            nodes_per_leaf = 4
            spine_oversubscription = 2

            [host]
            memory_bytes = 1e12
            link_bytes_per_s = 40e9
            """,
        )
    )
    # 4 NICs x 25 GB/s over 8 devices = 12.5 GB/s each; leaves of 4 nodes hold 32 devices.
    assert [(t.name, t.size, t.bytes_per_s) for t in cluster.tiers[1:]] == [
        ("leaf", 32, 12.5e9),
        ("spine", 128, 12.5e9),
    ]
    assert cluster.tiers[2].effective_bytes_per_s == pytest.approx(
        12.5e9 * 0.92 / 2
    )  # InfiniBand's efficiency
    assert (cluster.host_memory_bytes, cluster.host_link_bytes_per_s) == (1.25e11, 40e9)
    assert cluster.device.usd_per_hour.value == 2.5
    assert cluster.name == "mine"


EXPLICIT = """
[[group]]
device = "a100-pcie-80gb"
nodes = 2
devices_per_node = 16

[[tier]]
name = "bridge"
size = 2
bytes_per_s = 300e9
latency_s = 1e-6
topology = "mesh"
efficiency = 0.7

[[tier]]
name = "nic"
size = 32
bytes_per_s = 3e9
latency_s = 5e-6
topology = "fabric"
oversubscription = 3
"""


def test_explicit_tiers_describe_any_node(tmp_path):
    cluster = load_cluster(written(tmp_path, EXPLICIT))
    assert [tier.size for tier in cluster.tiers] == [2, 32]
    assert cluster.tiers[1].effective_bytes_per_s == 1e9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size = 32", "size = 31", "sizes that grow and divide"),
        ("size = 32", "size = 16", "the last tier 'nic' holds 16"),
        ("size = 2\n", "size = 64\n", "sizes that grow and divide"),
        ("efficiency = 0.7", "efficiency = 1.7", "a number from 0 to 1"),
        ("oversubscription = 3", "oversubscription = 0.5", "full bisection"),
        ("latency_s = 5e-6", "latency = 5e-6", "unknown key"),
        ('device = "a100-pcie-80gb"', 'device = "a100-pice-80gb"', "Did you mean a100-pcie-80gb"),
        ("nodes = 2", "nodes = 0", "a number from 1"),
        ("nodes = 2", "nodes = 9999999", "at most 10,000,000"),
        ("[[group]]", "[network]\n[[group]]", "either [network] or [[tier]]"),
    ],
)
def test_mistakes_in_a_cluster_file(tmp_path, old, new, message):
    assert old in EXPLICIT
    assert message in "\n".join(problems(written(tmp_path, EXPLICIT.replace(old, new, 1))))


EIGHT_NODES = '[[group]]\ndevice = "h100"\nnodes = 8\ndevices_per_node = 8\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "group: is missing"),
        ("group = []", "at least one [[group]]"),
        ("group = 3", "a list of tables"),
        ('[[group]]\ndevice = "h100"\nnodes = 1\ndevices_per_node = 16', "describe the node with [[tier]]"),
        (
            '[[group]]\ndevice = "h100"\nnodes = 8\ndevices_per_node = 8\n[network]\nnics_per_node = 2',
            "has no rate",
        ),
        (
            EIGHT_NODES + "[network]\nspine_oversubscription = 2",
            "no spine without leaves",
        ),
        (
            '[[group]]\ndevice = "gb200"\nnodes = 36\ndevices_per_node = 4\n[network]\nnodes_per_leaf = 12',
            "tier 'leaf' of 48 devices after 'nvlink' of 72",
        ),
    ],
)
def test_incomplete_cluster_files(tmp_path, text, message):
    assert message in "\n".join(problems(written(tmp_path, text)))


def test_clusters_of_several_groups_cannot_be_resized(monkeypatch, tmp_path):
    (tmp_path / "clusters").mkdir()
    (tmp_path / "devices").symlink_to(hardware_folder() / "devices")
    (tmp_path / "clusters" / "two.toml").write_text(
        '[[group]]\ndevice = "h100"\nnodes = 1\ndevices_per_node = 8\n' * 2
    )
    monkeypatch.setattr(cluster_file, "hardware_folder", lambda: tmp_path)
    assert "cannot be resized to 4x8" in problems("two:4x8")[0]
