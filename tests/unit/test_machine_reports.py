"""What machines and files say of themselves: links, memory, lists of nodes, headers of weights, nccl-tests of all ages."""

import json

import pytest

from planner.calibration.nccl_tests import is_nccl_tests, read_nccl_tests
from planner.errors import SpecError
from planner.specs.cluster_file import load_cluster
from planner.specs.device_file import load_device
from planner.specs.host_report import Nodes, read_adapters, read_nodes, read_processor
from planner.specs.machine_cluster import cluster_toml, device_named
from planner.specs.machine_report import Gpus, expand_nodes, read_gpus, read_topology
from planner.specs.safetensors import read_weights


def matrix(gpus, joined, nics=()):
    """A matrix as nvidia-smi prints it; ``joined(a, b)`` is the link between two GPUs, nics name their link to each GPU."""
    names = [f"GPU{i}" for i in range(gpus)] + [f"NIC{i}" for i in range(len(nics))]
    rows = ["\t" + "\t".join([*names, "CPU Affinity", "NUMA Affinity"])]
    for a in range(gpus):
        cells = ["X" if a == b else joined(a, b) for b in range(gpus)] + [nic[a] for nic in nics]
        rows.append(f"GPU{a}\t" + "\t".join(cells) + "\t0-31\t0")
    return "\n".join([*rows, "", "Legend:", "", "  X    = Self", "  SYS  = Connection traversing PCIe"])


def test_eight_gpus_behind_a_switch():
    near = [["PIX" if gpu == nic else "SYS" for gpu in range(8)] for nic in range(8)]
    found = read_topology(matrix(8, lambda a, b: "NV18", [*near, ["SYS"] * 8]), "topo")
    assert (found.gpus, found.domain, found.links, found.nics, found.far_nics) == (8, 8, 18, 8, 1)


def test_bridged_pairs():
    found = read_topology(matrix(4, lambda a, b: "NV12" if a // 2 == b // 2 else "SYS"), "topo")
    assert (found.gpus, found.domain, found.links) == (4, 2, 12)


def test_uneven_nvlink_is_refused():
    with pytest.raises(SpecError, match="unevenly"):
        read_topology(matrix(3, lambda a, b: "NV4" if {a, b} == {0, 1} else "SYS"), "topo")


def test_no_matrix():
    with pytest.raises(SpecError, match="holds no matrix"):
        read_topology("hello", "topo")


GPUS = "name, memory.total [MiB], power.limit [W]\n" + "NVIDIA H100 80GB HBM3, 81559 MiB, 500.00 W\n" * 8


def test_the_driver_names_the_device():
    gpus = read_gpus(GPUS, "gpus")
    assert (gpus.count, gpus.memory_bytes) == (8, 81559 * 2**20)
    assert device_named(gpus, None).name == "h100-sxm"


def test_a_cluster_file_that_loads_and_says_what_it_assumes(tmp_path):
    gpus = read_gpus(GPUS, "gpus")
    topology = read_topology(matrix(8, lambda a, b: "NV18", [["PIX"] * 8] * 4), "topo")
    text, said = cluster_toml(load_device("h100-sxm"), 16, topology, gpus, 400.0, "topo")
    (tmp_path / "c.toml").write_text(text)
    cluster = load_cluster(tmp_path / "c.toml")
    assert [(tier.name, tier.size) for tier in cluster.tiers] == [("nvlink", 8), ("nic", 128)]
    # Four adapters of 400 Gb/s for eight devices: 25 GB/s each.
    assert cluster.tiers[1].bytes_per_s == pytest.approx(25e9)
    assert any("500 W" in sentence for sentence in said)  # of 700 W
    assert any("4 adapters of 400 Gb/s" in sentence for sentence in said)


def test_pairs_become_a_tier_of_two(tmp_path):
    topology = read_topology(matrix(4, lambda a, b: "NV12" if a // 2 == b // 2 else "SYS"), "topo")
    text, _ = cluster_toml(load_device("a100-sxm-80gb"), 1, topology, None, None, "topo")
    (tmp_path / "c.toml").write_text(text)
    assert [(tier.name, tier.size) for tier in load_cluster(tmp_path / "c.toml").tiers] == [
        ("nvlink", 2),
        ("pcie", 4),
    ]


@pytest.mark.parametrize(
    ("text", "count", "last"),
    [
        ("gpu[001-004,007]", 5, "gpu007"),
        ("a1,b[8-10]", 4, "b10"),
        ("r[1-2]n[01-03]", 6, "r2n03"),
        ("login", 1, "login"),
    ],
)
def test_node_lists(text, count, last):
    found = expand_nodes(text)
    assert (len(found), found[-1]) == (count, last)


@pytest.mark.parametrize("text", ["gpu[1-", "gpu[a-b]", "", "gpu]1["])
def test_bad_node_lists(text):
    with pytest.raises(SpecError):
        expand_nodes(text)


# -- what stands around the accelerators -----------------------------------------------------------------------------

# As ibstat prints a ConnectX-7 that is up, one whose cable is out, and a 100 Gb/s Ethernet port.
IBSTAT = """CA 'mlx5_0'
\tCA type: MT4129
\tNumber of ports: 1
\tPort 1:
\t\tState: Active
\t\tPhysical state: LinkUp
\t\tRate: 400
\t\tLink layer: InfiniBand
CA 'mlx5_1'
\tPort 1:
\t\tState: Down
\t\tPhysical state: Disabled
\t\tRate: 400
CA 'mlx5_2'
\tPort 1:
\t\tState: Active
\t\tRate: 100
\t\tLink layer: Ethernet
"""
LSCPU = """Architecture:             x86_64
CPU(s):                   224
Model name:               Intel(R) Xeon(R) Platinum 8480C
Thread(s) per core:       2
Core(s) per socket:       56
Socket(s):                2
NUMA node(s):             2
"""


def test_adapters_whose_link_is_up_are_counted_at_their_rate():
    adapters = read_adapters(IBSTAT, "ibstat")
    assert (adapters.gbit, adapters.down) == ({"mlx5_0": 400.0, "mlx5_2": 100.0}, ("mlx5_1",))
    text, said = cluster_toml(load_device("h100-sxm"), 2, None, None, None, "ibstat", adapters)
    # Without a matrix the fastest are taken: one of 400 Gb/s, 50 GB/s.
    assert "nics_per_node = 1\nnic_bytes_per_s = 5e+10" in text
    assert any("mlx5_2 for storage" in sentence for sentence in said)
    assert any("The link of mlx5_1 is down" in sentence for sentence in said)


def test_the_matrix_tells_which_adapters_are_near():
    near = matrix(8, lambda a, b: "NV18", [["PIX"] * 8, ["PIX"] * 8, ["SYS"] * 8])
    legend = "\nNIC Legend:\n\n  NIC0: mlx5_0\n  NIC1: mlx5_1\n  NIC2: mlx5_2\n"
    topology = read_topology(near + legend, "topo")
    assert topology.near_names == ("mlx5_0", "mlx5_1")
    text, said = cluster_toml(
        load_device("h100-sxm"), 2, topology, None, None, "topo", read_adapters(IBSTAT, "ibstat")
    )
    assert "nics_per_node = 1\nnic_bytes_per_s = 5e+10" in text  # mlx5_1 is near, and down
    assert any("as ibstat says" in sentence for sentence in said)


def test_the_host_is_described():
    processor = read_processor(LSCPU, "lscpu")
    assert (processor.sockets, processor.cores, processor.numa_nodes) == (2, 112, 2)
    text, said = cluster_toml(
        load_device("h100-sxm"), 1, None, None, None, "lscpu", None, processor, 1024.0**4
    )
    assert "[host]\nmemory_bytes = 1.09951e+12" in text
    assert any(
        "2 × Intel(R) Xeon(R) Platinum 8480C, 112 cores" in s and "14 cores per device" in s for s in said
    )


def test_a_list_of_nodes_says_how_many_accelerators_each_has():
    text, said = cluster_toml(load_device("h100-sxm"), 4, None, None, None, "sinfo", listed=4)
    assert "devices_per_node = 4" in text
    assert not any("per node, as usual" in one for one in said[:1])
    _, said = cluster_toml(load_device("h100-sxm"), 4, None, None, None, "")
    assert "8 per node, as usual around this part" in said[0]  # a DGX or HGX H100 holds eight
    gpus = Gpus("NVIDIA H100 80GB HBM3", 2, 80.0 * 2**30, None)
    with pytest.raises(SpecError, match="2 GPUs in the table, 4 GPUs in the list"):
        cluster_toml(load_device("h100-sxm"), 4, None, gpus, None, "", listed=4)


def test_a_table_of_nodes_leaves_out_those_without_gpus():
    table = "PARTITION NODELIST GRES\na gpu[01-04] gpu:h100:8(S:0-1)\nb gpu[03-06] gpu:h100:8\nc cpu[1-9] (null)\n"
    assert read_nodes(table, "sinfo") == Nodes(6, 8)  # two of them are in both partitions
    with pytest.raises(SpecError, match="nodes of 4 and 8 GPUs"):
        read_nodes(table.replace("gpu:h100:8\n", "gpu:h100:4\n"), "sinfo")


CONTROLLED = """NodeName=gpu001 Arch=x86_64 CoresPerSocket=56
   CPUAlloc=0 CPUEfctv=224 CPUTot=224 CPULoad=0.11
   Gres=gpu:h100:8(S:0-1)
   NodeAddr=gpu001 NodeHostName=gpu001 Version=23.02.7
   RealMemory=2063000 AllocMem=0 FreeMem=1900000 Sockets=2 Boards=1
   State=IDLE ThreadsPerCore=2 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A
   CfgTRES=cpu=224,mem=2063000M,billing=224,gres/gpu=8

NodeName=gpu002 Arch=x86_64 CoresPerSocket=56
   Gres=gpu:h100:8(S:0-1)
   RealMemory=2062000 AllocMem=0
   State=DOWN+DRAIN ThreadsPerCore=2

NodeName=login1 Arch=x86_64
   Gres=(null)
   RealMemory=128000
   State=IDLE
"""
"""Of the form that SLURM 23.02 prints (scontrol(1)); -o puts a node on a line."""


@pytest.mark.parametrize("one_line", [False, True])
def test_the_controller_tells_nodes_their_memory_and_which_are_out(one_line):
    text = "\n".join(" ".join(part.split()) for part in CONTROLLED.split("\n\n")) if one_line else CONTROLLED
    found = read_nodes(text, "scontrol")
    # The node that logins go to has no GPU; 2,062,000 MiB is the lesser memory.
    assert found == Nodes(2, 8, 2_062_000 * 2.0**20, out=1)


def test_a_table_of_nodes_counts_those_that_are_out():
    table = (
        "PARTITION AVAIL  TIMELIMIT  NODES  STATE NODELIST\n"
        "main*        up   infinite      2  drain gpu[003,007]\n"
        "main*        up   infinite     14   idle gpu[001-002,004-006,008-016]\n"
    )
    assert read_nodes(table, "sinfo") == Nodes(16, None, out=2)


def test_a_list_of_gpus_names_them_without_their_memory():
    text = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}a1)\n" for i in range(8))
    found = read_gpus(text, "nvidia-smi -L")
    assert (found.name, found.count, found.memory_bytes) == ("NVIDIA H100 80GB HBM3", 8, None)
    assert device_named(found, None).name == "h100-sxm"


@pytest.mark.parametrize(
    ("read", "text", "why"),
    [
        (read_adapters, IBSTAT.replace("Active", "Down"), "none of 3 adapters"),
        (read_processor, "Architecture: x86_64\n", "names no cores"),
    ],
)
def test_reports_that_say_nothing(read, text, why):
    with pytest.raises(SpecError, match=why):
        read(text, "report")


# -- headers of weights ----------------------------------------------------------------------------------------------


def safetensors(path, tensors):
    header = json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
            for name, (dtype, shape) in tensors.items()
        }
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())


def test_headers_tell_the_exact_count(tmp_path):
    safetensors(tmp_path / "a.safetensors", {"w": ("BF16", [4, 8]), "s": ("F8_E4M3", [16])})
    safetensors(tmp_path / "b.safetensors", {"v": ("F32", [3])})
    found = read_weights(tmp_path)
    # 32 of 2 bytes, 16 of 1, 3 of 4.
    assert (found.tensors, found.elements, found.n_bytes, found.files) == (3, 51, 92, 2)


def test_an_index_alone_tells_bytes(tmp_path):
    index = {"metadata": {"total_size": 1024}, "weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_weights(tmp_path)
    assert (found.tensors, found.elements, found.n_bytes, found.files) == (2, None, 1024, 0)


def test_no_weights_and_bad_ones(tmp_path):
    assert read_weights(tmp_path) is None
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(SpecError, match="header"):
        read_weights(tmp_path)


# -- nccl-tests of all ages ---------------------------------------------------------------------------------------------

# Layouts as in NVIDIA/nccl-tests issues 107 (2021) and 249 (2024).
OLD = """mpirun all_reduce_perf -b 8 -e 128M -f 2 -g 2
# Using devices
#   Rank  0 Pid  1 on host device  0 [0x07] A100-SXM4-40GB
#   Rank  1 Pid  1 on host device  1 [0x0f] A100-SXM4-40GB
#
#                                                     out-of-place                       in-place
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                     (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
   134217728      33554432   float     sum   1019.7  131.62  131.62  0e+00   1020.1  131.57  131.57  0e+00
"""
NEW = """all_reduce_perf -b 8 -e 128M -f 2 -g 2
  Using devices
  Rank  0 Group  0 Pid  1 on host device  0 [0x07] NVIDIA H100
  Rank  1 Group  0 Pid  1 on host device  1 [0x0f] NVIDIA H100
       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
   134217728      33554432     float     sum      -1    523.4  256.4   256.4      0    523.1   256.6   256.6      0
"""


@pytest.mark.parametrize(("text", "seconds"), [(OLD, 1019.7e-6), (NEW, 523.4e-6)], ids=["2021", "2024"])
def test_tables_of_all_ages(text, seconds):
    assert is_nccl_tests(text)
    (row,) = read_nccl_tests(text, "log")
    assert row.seconds == pytest.approx(seconds)
    assert row.work.ranks == 2


@pytest.mark.parametrize("prefix", ["[1,0]<stdout>:", "0: ", " 0: "], ids=["mpirun", "srun", "srun of ten"])
def test_lines_that_say_which_rank_printed_them(prefix):
    """mpirun --tag-output, as in aws/aws-k8s-tester pull request 503; srun --label."""
    text = "".join(f"{prefix}{line}\n" for line in NEW.splitlines())
    assert is_nccl_tests(text)
    (row,) = read_nccl_tests(text, "log")
    assert (row.seconds, row.work.kind) == (pytest.approx(523.4e-6), "all_reduce")


def test_a_file_without_its_command_may_be_named_after_the_collective():
    text = NEW.partition("\n")[2].replace("sum ", "none")
    (row,) = read_nccl_tests(text, "logs/all_gather_2.txt")
    assert row.work.kind == "all_gather"
    with pytest.raises(SpecError, match="or name the file after it"):
        read_nccl_tests(text, "logs/job-17.out")


def test_wrong_results_are_refused():
    with pytest.raises(SpecError, match="3 wrong results"):
        read_nccl_tests(NEW.replace("256.4      0 ", "256.4      3 "), "log")
