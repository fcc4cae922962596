"""Devices, fabrics and stacks: planted constants come back from synthetic measurements, and the profiles read back."""

from dataclasses import replace
from datetime import date

import numpy as np
import pytest

from planner.calibration.constants import changed, constant_at
from planner.calibration.device import fit_kernels, fit_links
from planner.calibration.fabric import fit_fabric
from planner.calibration.measurements import Attention, Measurement, Message, Product, Stream
from planner.calibration.predict import kernels_s, messages_s
from planner.calibration.profile import Provenance, cluster_toml, device_toml, stack_toml
from planner.calibration.serving import fit_serving, read_served
from planner.calibration.stack import fit_memory, fit_time, read_runs
from planner.errors import SpecError
from planner.specs.hardware import load_cluster, load_device
from planner.specs.stack import load_stack
from planner.validation import validate
from planner.validation.serving import predict

ORIGIN = Provenance(("synthetic.csv",), date(2026, 11, 21), "a test")
NOISE = 0.03


def measured(works, predict, spec, seed=0):
    """The works with the seconds that a spec predicts for them, 3 % noise."""
    blank = [Measurement("synthetic", work, 1.0) for work in works]
    noise = np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(works)))
    seconds = predict(blank)(spec) * noise
    return [replace(row, seconds=float(s)) for row, s in zip(blank, seconds, strict=True)]


def kernels():
    sizes = (256, 1024, 4096, 8192)
    products = [Product(m, n, k, 1.0, "bf16") for m in (16, 128, 1024, 8192) for n in sizes for k in sizes]
    lengths = (512, 1024, 2048, 4096, 8192)
    attention = [
        Attention(batch, 32, 8, q, q, 128, 0.0, True, backward, "bf16")
        for batch in (1, 2, 4, 8, 16) for q in lengths for backward in (False, True)
    ]  # fmt: skip
    return products + attention + [Stream(2.0**power) for power in np.arange(14.0, 32.0, 0.5)]


def test_a_device_gets_its_planted_constants_back(tmp_path):
    base = load_device("h100-sxm")
    planted = {
        "efficiency.matmul": 0.55,
        "efficiency.memory": 0.66,
        "launch_s": 6e-6,
        "efficiency.attention": 0.43,
    }
    truth = changed(base, planted)
    fitted, found = fit_kernels(base, measured(kernels(), kernels_s, truth))
    for path, value in planted.items():
        assert constant_at(fitted, path) == pytest.approx(value, rel=0.06), path
    assert found.left_out.median < 2.0 * NOISE
    assert found.before.median > 2.0 * found.left_out.median
    path = tmp_path / "mine.toml"
    path.write_text(device_toml("h100-sxm", "mine", [found], ORIGIN))
    loaded = load_device(path)
    assert loaded.name == "mine"
    assert loaded.efficiency.matmul.kind == "fitted"
    assert "synthetic.csv (a test)" in loaded.efficiency.matmul.source
    for constant in found.fitted:  # four digits are written
        assert constant_at(loaded, constant.name) == pytest.approx(constant.value, rel=1e-3)
    assert loaded.scale_up == base.scale_up
    assert loaded.peak_flop_per_s == base.peak_flop_per_s


def test_constants_without_rows_keep_the_bases_values():
    base = load_device("h100-sxm")
    products = [work for work in kernels() if isinstance(work, Product)]
    fitted, found = fit_kernels(base, measured(products, kernels_s, base))
    assert fitted.efficiency.attention == base.efficiency.attention
    reasons = {c.name: c.reason for c in found.kept}
    assert reasons["efficiency.attention"] == "no row depends on it"
    assert len(found.fitted) <= len(products) // 20


def test_links_inside_a_node(tmp_path):
    base = load_device("h100-sxm")
    truth = changed(base, {"scale_up.efficiency": 0.6, "scale_up.latency_s": 2e-6})
    works = [
        Message(kind, ranks, ranks, 2.0**power)
        for kind in ("all_gather", "reduce_scatter", "all_to_all") for ranks in (2, 4, 8) for power in range(9, 30, 2)
    ]  # fmt: skip

    def predict(rows):
        seconds = messages_s(rows)
        return lambda device: seconds(load_node(device))

    fitted, found = fit_links(base, measured(works, predict, truth))
    assert constant_at(fitted, "scale_up.efficiency") == pytest.approx(0.6, rel=0.1)
    assert found.left_out.median < 2.0 * NOISE
    path = tmp_path / "linked.toml"
    path.write_text(device_toml("h100-sxm", "linked", [found], ORIGIN))
    assert load_device(path).scale_up.efficiency.value == pytest.approx(
        fitted.scale_up.efficiency.value, rel=1e-3
    )


def load_node(device):
    from planner.specs.cluster_file import build_cluster

    return build_cluster(device, 1, 8)


def test_a_fabric_between_nodes(tmp_path):
    cluster = load_cluster("v100-sxm2-16gb:4x8")
    tiers = {tier.name: tier for tier in cluster.tiers}
    slow = changed(tiers, {"nic.efficiency": 0.5, "nic.latency_s": 3e-5})
    truth = replace(cluster, tiers=tuple(slow.values()))
    works = [
        Message(kind, ranks, per_node, 2.0**power)
        for kind in ("all_reduce", "all_gather") for ranks, per_node in ((16, 8), (32, 8), (4, 1)) for power in range(10, 30, 2)
    ]  # fmt: skip
    works.append(Message("all_reduce", 64, 8, 1e6))  # more nodes than there are
    fitted, found, unplaced = fit_fabric(
        cluster, [*measured(works[:-1], messages_s, truth), Measurement("", works[-1], 1.0)]
    )
    assert unplaced == 1
    nic = fitted.tiers[-1]
    assert nic.effective_bytes_per_s == pytest.approx(truth.tiers[-1].effective_bytes_per_s, rel=0.05)
    path = tmp_path / "fabric.toml"
    path.write_text(cluster_toml(fitted, "fabric", found, ORIGIN))
    loaded = load_cluster(path)
    assert [tier.name for tier in loaded.tiers] == [tier.name for tier in cluster.tiers]
    assert loaded.tiers[-1].effective_bytes_per_s == pytest.approx(nic.effective_bytes_per_s, rel=1e-3)
    for tier, kept in zip(loaded.tiers, fitted.tiers, strict=True):
        assert (tier.transport is None) == (kept.transport is None)


def test_a_fabric_whose_ranks_fit_nowhere_is_an_error():
    with pytest.raises(SpecError, match="none of which fits"):
        fit_fabric(load_cluster("h100-sxm:1x8"), [Measurement("", Message("all_reduce", 64, 8, 1e6), 1.0)])


HEADER = "row_id,model,n_layers,hidden,n_heads,vocab,seq_len,mlp,accelerator,n_devices,tp,pp,zero_stage,micro_batch,global_batch,"
HEADER += (
    "recompute,dtype,step_time_s,peak_memory_gb,peak_memory_unit,peak_memory_kind,oom,framework,score_for\n"
)


def training_table(tmp_path, stack, accelerator="A100-SXM-80GB"):
    """Runs of four models on eight devices, with the times and peaks that a stack predicts."""
    tmp_path.mkdir(exist_ok=True)
    shapes = [(layers, hidden, mb, seq) for layers, hidden in ((12, 1024), (16, 1536), (24, 2048), (8, 4096))
              for mb in (1, 2, 4) for seq in (2048,)]  # fmt: skip
    shapes = [(*shape, recompute) for shape in shapes for recompute in ("none", "full")]
    blank = [
        f"r{i},m{layers}x{hidden},{layers},{hidden},{hidden // 64},32000,{seq},gelu,{accelerator},8,1,1,0,{mb},{mb * 8},"
        f"{recompute},bf16,{{}},{{}},GB,smi,false,PyTorch DDP,time+memory\n"
        for i, (layers, hidden, mb, seq, recompute) in enumerate(shapes)
    ]
    path = tmp_path / "runs.csv"
    path.write_text(HEADER + "".join(row.format(1.0, 1.0) for row in blank))
    rows = []
    for text, run in zip(blank, read_runs([path]).runs, strict=True):
        predicted = run.estimate(stack)
        rows.append(text.format(predicted.step_time_s, run.held_bytes(stack) / 1e9))
    path.write_text(HEADER + "".join(rows))
    return path


def test_a_stack_gets_its_planted_constants_back(tmp_path):
    base = load_stack()
    planted = {"matmul_slowdown": 1.6, "framework_bytes": 3.4e9}
    path = training_table(tmp_path, changed(base, planted))
    runs = read_runs([path]).runs
    timed, times = fit_time(base, runs, folds=4)
    assert constant_at(timed, "matmul_slowdown") == pytest.approx(1.6, rel=0.03)
    assert times.groups == 4  # runs of one model are left out together
    assert times.left_out.p90 < 0.03
    held, peaks = fit_memory(base, runs, folds=4)
    assert constant_at(held, "framework_bytes") == pytest.approx(3.4e9, rel=0.03)
    out = tmp_path / "mine.toml"
    out.write_text(stack_toml("default", "mine", [times, peaks], ORIGIN))
    loaded = load_stack(out)
    assert loaded.on_generation("ampere").matmul_slowdown.value == pytest.approx(1.6, rel=0.03)
    assert loaded.framework_bytes.kind == "fitted"
    assert loaded.gradient_bucket_bytes == base.gradient_bucket_bytes


def test_a_fit_starts_where_the_stack_is_on_the_rows_generation(tmp_path):
    # pytorch-fsdp's attention is another on Hopper; runs as it predicts them leave nothing to fit
    stack = load_stack("pytorch-fsdp")
    assert stack.on["hopper"]["attention_slowdown"].value != stack.attention_slowdown.value
    path = training_table(tmp_path, stack, "H100-SXM")
    fitted, times = fit_time(stack, read_runs([path]).runs, folds=4)
    assert times.before.p90 < 1e-3
    assert constant_at(fitted, "attention_slowdown") == pytest.approx(
        stack.on["hopper"]["attention_slowdown"].value, rel=0.05
    )


def test_constants_of_one_generation_alone_are_kept_where_rows_are_of_several(tmp_path):
    stack = load_stack("pytorch-fsdp")
    both = [training_table(tmp_path / name, stack, name) for name in ("A100-SXM-80GB", "H100-SXM")]
    _, times = fit_time(stack, read_runs(both).runs, folds=4)
    assert times.before.p90 < 1e-3
    kept = {constant.name: constant.reason for constant in times.kept}
    assert kept["attention_slowdown"] == "the base has another on hopper: fit one generation alone"


SERVED = (
    "row_id,engine,engine_version,model,accelerator,n_devices,tp,pp,ep,dp,weight_dtype,kv_dtype,input_len,output_len,"
    "concurrency,features,ttft_ms,tpot_ms\n"
)


def serving_table(tmp_path, stack):
    """Deployments of four models with the times that a stack predicts."""
    shapes = [
        (model, tp, clients)
        for model, tp in (("llama3.1-8b", 1), ("llama3.1-70b", 4), ("qwen3-32b", 2), ("qwen3-8b", 1))
        for clients in (1, 4, 16, 64)
    ]
    blank = [
        f"r{i},vLLM,0.11,{model},H100-SXM-80GB,{tp},{tp},1,1,1,bf16,bf16,1000,200,{clients},continuous batching,{{}},{{}}\n"
        for i, (model, tp, clients) in enumerate(shapes)
    ]
    path = tmp_path / "served.csv"
    path.write_text(SERVED + "".join(row.format(1.0, 1.0) for row in blank))
    runs = [replace(run, stack=stack) for run, _ in read_served([path]).runs]
    found = predict(runs, {stack.name: stack})
    rows = [text.format(1e3 * one["ttft"], 1e3 * one["tpot"]) for text, one in zip(blank, found, strict=True)]
    path.write_text(SERVED + "".join(rows))
    return path


def test_an_engine_gets_its_planted_constants_back(tmp_path):
    base = load_stack("vllm").on_generation("hopper")
    planted = {"serving.iteration_s": 6e-3}
    served = read_served([serving_table(tmp_path, changed(base, planted))])
    assert (served.engine, served.generation) == ("vllm", "hopper")
    _, found = fit_serving("vllm", served, folds=4)
    assert found.groups == 4  # runs of one model are left out together
    assert found.values["serving.iteration_s"] == pytest.approx(6e-3, rel=0.03)
    assert found.left_out.p90 < 0.03
    out = tmp_path / "mine.toml"
    out.write_text(stack_toml("vllm", "mine", [found], ORIGIN))
    loaded = load_stack(out).on_generation("hopper").serving
    assert loaded.iteration_s.value == pytest.approx(
        6e-3, rel=0.03
    )  # though vllm's own file says it of hopper alone
    assert loaded.iteration_s.kind == "fitted"
    assert loaded.block_tokens == base.serving.block_tokens


def test_deployments_of_several_engines_are_fitted_one_by_one(tmp_path):
    path = serving_table(tmp_path, load_stack("vllm"))
    path.write_text(path.read_text().replace("r0,vLLM,0.11", "r0,SGLang,0.5"))
    with pytest.raises(SpecError, match="engines: sglang, vllm; expected one"):
        read_served([path])
    with pytest.raises(SpecError, match="is a stack that trains; expected one that serves, such as vllm"):
        fit_serving("megatron-core", read_served([serving_table(tmp_path, load_stack("vllm"))]))


def test_rows_are_fitted_to_what_they_may_be_judged_by(tmp_path):
    shape = "m,8,1024,16,32000,512,gelu,A100-SXM-80GB,8,1,1,0,1,8,none,bf16,1.0,1.0,GB,smi,false,PyTorch DDP"
    path = tmp_path / "runs.csv"
    path.write_text(
        HEADER + "".join(f"{word},{shape},{word}\n" for word in ("time", "memory", "rank", "none"))
    )
    read = read_runs([path])
    assert [(run.row_id, run.step_time_s is None, run.peak_bytes is None) for run in read.runs] == [
        ("time", False, True), ("memory", True, False),
    ]  # fmt: skip
    assert read.left_out == dict.fromkeys(("rank", "none"), "score_for names neither time nor memory")


@pytest.mark.parametrize("kind", ["allocated", "reserved", "smi", ""])
def test_peaks_are_fitted_to_what_validation_holds_them_against(tmp_path, kind):
    path = tmp_path / "runs.csv"
    path.write_text(
        HEADER
        + f"r,m,8,1024,16,32000,512,gelu,A100-SXM-80GB,8,1,2,0,1,8,none,bf16,1.0,9.0,GB,{kind},false,PyTorch FSDP1,memory\n"
    )
    (run,) = read_runs([path]).runs
    (scored,) = validate([path]).rows
    assert run.held_bytes(run.job.stack) == scored.predicted


def test_rows_that_cannot_be_priced_are_named_and_a_table_of_none_is_an_error(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(
        HEADER
        + "r1,m,,1024,16,32000,512,gelu,A100-SXM-80GB,8,1,1,0,1,8,none,bf16,1.0,1.0,GB,smi,false,PyTorch DDP,time\n"
    )
    with pytest.raises(SpecError, match="mandatory cells are empty: n_layers"):
        read_runs([path])
    path.write_text("m,n,k,dtype,latency_ms,accelerator\n1,1,1,bf16,1,H100\n")
    with pytest.raises(SpecError, match="kernels rows"):
        read_runs([path])
