"""Measurements are read from every form as it is in the wild; what is wrong is one message that names its place."""

import json
from pathlib import Path

import pytest

from planner.calibration.measurements import Attention, Message, Product, Stream, read_measurements
from planner.errors import SpecError

SAMPLES = Path(__file__).parents[1] / "data" / "calibration"


def written(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_products_of_an_operators_table(tmp_path):
    text = "source,accelerator,dtype,m,n,k,latency_ms\nx,H100,bfloat16,128,4096,8192,0.05\n"
    text += "x,H100,int4_wo,1,2,3,1\nx,H100,fp8_block,1,2,3,1\n"
    (row,) = read_measurements(written(tmp_path, text))  # formats without a rate are passed over
    assert (row.work, row.seconds, row.alone) == (
        Product(128, 4096, 8192, 1, "bf16"),
        pytest.approx(5e-5),
        True,
    )


def test_attention_of_an_operators_table(tmp_path):
    text = (
        "passes,batch_size,q_len,kv_len_total,num_heads,num_key_value_heads,head_dim,window_size,attn_dtype,latency_ms\n"
        "1,2,512,512,32,8,128,0,bfloat16,0.25\n2.5,2,512,512,32,8,128,0,bfloat16,0.75\n"
    )
    forward, backward = read_measurements(written(tmp_path, text))
    assert forward.work == Attention(2, 32, 8, 512, 512, 128, 0, True, False, "bf16")
    assert (backward.work.backward, backward.seconds) == (True, pytest.approx(7.5e-4))


def test_streams_and_collectives(tmp_path):
    (stream,) = read_measurements(written(tmp_path, "op,bytes_moved,latency_us\ncopy,8e6,10\n"))
    assert (stream.work, stream.seconds) == (Stream(8e6), pytest.approx(1e-5))
    text = "collective,n_nodes,n_devices,size_bytes,latency_ms\nalltoall,2,16,1048576,0.5\n"
    (message,) = read_measurements(written(tmp_path, text))
    assert message.work == Message("all_to_all", 16, 8, 1048576)
    text = "collective,num_workers,devices_per_node,size_bytes,latency_ms\nall_reduce,2,1,2048,0.043\n"
    assert read_measurements(written(tmp_path, text))[0].work == Message("all_reduce", 2, 1, 2048)


def test_output_of_nccl_tests():
    rows = read_measurements(SAMPLES / "nccl_all_reduce_2x8_h100.txt")
    assert len(rows) == 11
    # The lines of 512 B and 8 GiB: 126.6 µs and 47,535 µs out of place, 16 ranks on two hosts.
    assert (rows[0].work, rows[0].seconds) == (Message("all_reduce", 16, 8, 512), pytest.approx(126.6e-6))
    assert (rows[-1].work.n_bytes, rows[-1].seconds) == (8589934592, pytest.approx(47535e-6))
    assert rows[0].where.endswith(":26")


def test_output_of_nccl_tests_without_its_command_says_what_is_missing(tmp_path):
    text = (SAMPLES / "nccl_all_reduce_2x8_h100.txt").read_text().split("\n", 1)[1]
    with pytest.raises(SpecError, match="does not name the collective"):
        read_measurements(written(tmp_path, text, "out.txt"))


def test_a_gather_prints_no_operation(tmp_path):
    # all_gather_perf and sendrecv_perf print "none" for redop; older versions left the column out.
    text = (
        "# all_gather_perf -b 1M\n# Using devices\n"
        "#  Rank  0 Pid 1 on a device  0 [0x07] A100\n#  Rank  1 Pid 2 on a device  1 [0x0f] A100\n"
        "#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong\n"
        "     1048576        131072     float    none      -1    23.67   44.30   22.15      0    23.26   45.08   22.54      0\n"
        "     1048576        131072     float            23.67   44.30   22.15      0    23.26   45.08   22.54      0\n"
    )
    rows = read_measurements(written(tmp_path, text, "out.txt"))
    assert [(row.work, row.seconds) for row in rows] == [
        (Message("all_gather", 2, 2, 1048576), pytest.approx(23.67e-6))
    ] * 2


def test_a_profilers_trace():
    rows = {row.work: row for row in read_measurements(SAMPLES / "profiler_trace.json")}
    # Two calls of addmm of (256, 128) by (128, 512): 494.737 and 409.891 … µs are in the file; the median is taken.
    product = rows[Product(256, 512, 128, 1, "fp32")]
    assert not product.alone
    assert 400e-6 < product.seconds < 510e-6
    assert Attention(2, 4, 4, 64, 64, 32, 0, True, False, "fp32") in rows
    assert Attention(2, 4, 4, 64, 64, 32, 0, True, True, "fp32") in rows
    assert Stream(2 * 256 * 512 * 4) in rows  # GELU reads and writes


def test_a_trace_with_device_kernels_takes_their_time(tmp_path):
    operator = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "dur": 9.0, "args": {
        "External id": 7, "Input Dims": [[64, 32], [32, 16]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}}  # fmt: skip
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "dur": 3.0, "args": {"External id": 7}}
    sizes = {"In msg nelems": 1024, "Out msg nelems": 1024, "Group size": 8, "dtype": "BFloat16"}
    nccl = {
        "ph": "X",
        "cat": "kernel",
        "name": "ncclDevKernel",
        "dur": 50.0,
        "args": {"Collective name": "allreduce", **sizes},
    }
    path = written(tmp_path, json.dumps({"traceEvents": [operator, kernel, nccl]}), "trace.json")
    rows = {row.work: row.seconds for row in read_measurements(path)}
    assert rows == {
        Product(64, 16, 32, 1, "bf16"): pytest.approx(3e-6),
        Message("all_reduce", 8, 8, 2048): pytest.approx(50e-6),
    }


def test_a_profilers_table():
    rows = {row.work: row.seconds for row in read_measurements(SAMPLES / "profiler_table.txt", "fp32")}
    # aten::addmm, [512], [256, 128], [128, 512]: 769.875 µs of two calls; aten::mm [256, 512], [512, 128] and addmm of the same.
    assert rows[Product(256, 512, 128, 1, "fp32")] == pytest.approx((769.875 + 765.809) / 4 * 1e-6, rel=1e-3)
    with pytest.raises(SpecError, match="does not name dtypes"):
        read_measurements(SAMPLES / "profiler_table.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("m,n,k,dtype,latency_ms\n1,2,3,bf16,nan\n", r"rows.csv:2: latency_ms is 'nan'"),
        ("m,n,k,dtype,latency_ms\n1,2,3,bf16,\n", r"rows.csv:2: latency_ms is ''"),
        ("m,n,k,dtype,latency_ms\n1,2,-3,bf16,1\n", r"k is '-3'"),
        ("m,n,k,dtype,latency_ms\n1,2,0,bf16,1\n", r"k is '0'"),
        ("a,b\n1,2\n", "columns a, b"),
        ("m,n,k,dtype\n1,2,3,bf16\n", "columns m, n, k, dtype"),
        ("m,n,k,dtype,latency_ms\n", "holds no kernel"),
        ("", "is empty"),
        ('{ "traceEvents": [', "is not valid JSON"),
        ('{"traceEvents": []}', "holds no kernel"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "dur": "x", "args": {}}]}', "an event is malformed"),
        ("[" * 100_000 + '"traceEvents"', "is not valid JSON"),
    ],
)
def test_wrong_files_are_one_error(tmp_path, text, words):
    with pytest.raises(SpecError, match=words):
        read_measurements(written(tmp_path, text))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        read_measurements(tmp_path / "none.csv")
    with pytest.raises(SpecError, match="cannot be read"):
        read_measurements(tmp_path)


def test_neighbours_share_a_group_and_other_shapes_do_not(tmp_path):
    text = "m,n,k,dtype,latency_ms\n1000,512,512,bf16,1\n1024,512,512,fp16,1\n2048,512,512,bf16,1\n"
    one, near, far = read_measurements(written(tmp_path, text))
    assert one.group == near.group != far.group
