"""Kernels that others measured: how rows are read, and how far the model is from a committed sample of them."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner.engine.kernels import Kernels
from planner.specs.device import Sourced
from planner.specs.device_file import load_device
from planner.specs.kernel_library import DEFAULTS, kernel_libraries, library_for
from planner.validation.kernel_work import Attention, Experts, Product, power_law_loads
from planner.validation.operators import METRICS, score_kernels

DATA = Path(__file__).resolve().parents[1] / "data"
GEMM = "source,accelerator,framework,version,kernel_source,dtype,m,n,k,latency_ms,power_w\n"
ATTENTION = (
    "source,accelerator,framework,version,kernel_source,phase,batch_size,q_len,past_kv_len,kv_len_total,num_heads,"
    "num_key_value_heads,head_dim,window_size,attn_dtype,kv_cache_dtype,latency_ms\n"
)


def score(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return score_kernels(path)


# Medians of absolute errors that the fit reached on these rows, and a sixth more.
BOUNDS = {
    ("aic_gemm_a100_sxm.csv", "gemm"): 0.12,
    ("aic_gemm_h100_sxm.csv", "gemm"): 0.09,
    ("aic_gemm_b200_sxm.csv", "gemm"): 0.09,
    ("aic_attention_prefill_h100_sxm.csv", "attention_prefill"): 0.10,
    ("aic_attention_prefill_a100_sxm.csv", "attention_prefill"): 0.12,
    ("aic_attention_decode_h100_sxm.csv", "attention_decode"): 0.12,
    ("aic_mla_attention.csv", "attention_prefill"): 0.16,
    ("aic_mla_attention.csv", "attention_decode"): 0.20,
    ("aic_moe_h100_sxm.csv", "moe"): 0.10,
    ("aic_moe_b200_sxm.csv", "moe"): 0.14,
    ("vidur_linear_a100.csv", "gemm"): 0.09,
    ("vidur_linear_a100.csv", "elementwise"): 0.14,
    ("llmservingsim_layers.csv", "gemm"): 0.08,
    ("llmservingsim_layers.csv", "elementwise"): 0.28,
    ("llmservingsim_attention_mixed.csv", "attention_prefill"): 0.15,
    ("llmservingsim_attention_mixed.csv", "attention_decode"): 0.10,
    ("published_attention.csv", "attention_prefill"): 0.10,
}


def test_errors_stay_within_what_the_fit_reached():
    errors = defaultdict(list)
    for path in (*sorted((DATA / "kernels").glob("*.csv")), DATA / "published_attention.csv"):
        for row in score_kernels(path):
            assert row.metric in METRICS
            if row.status == "scored":
                errors[row.file, row.metric].append(abs(row.error))
            else:
                assert row.reason, row
    medians = {where: float(np.median(found)) for where, found in errors.items()}
    assert medians.keys() == BOUNDS.keys()
    worse = {where: median for where, median in medians.items() if median > BOUNDS[where]}
    assert not worse


def test_what_cannot_be_priced_says_why(tmp_path):
    rows = score(
        tmp_path,
        GEMM + "a,Abacus-9,x,1,y,bfloat16,8,8,8,0.1,\n"
        "a,H100,x,1,y,unary,8,8,8,0.1,\n"
        "a,H100,x,1,y,bfloat16,8,8,8,,\n"
        "a,H100,x,1,y,bfloat16,0,8,8,1,\n"
        "a,H100,x,1,y,bfloat16,many,8,8,1,\n",
    )
    assert [row.status for row in rows] == ["unsupported"] * 5
    for row, part in zip(rows, ("Abacus-9", "unary", "no time", "no m", "many"), strict=True):
        assert part in row.reason


def test_a_read_faster_than_the_memory_is_no_measurement(tmp_path):
    # 8·65536·8·128·2·2 = 2.1 GB of keys and values: 0.64 ms at 3.35 TB/s
    row = "a,H100-SXM5-80GB,x,1,fa3,decode,8,1,65535,65536,64,8,128,0,bfloat16,bfloat16,"
    fast, slow = score(tmp_path, ATTENTION + f"{row}0.3\n{row}0.8\n")
    assert (fast.status, slow.status) == ("excluded", "scored")
    assert "2.1 times" in fast.reason
    assert fast.predicted == slow.predicted


def test_a_kernel_of_which_most_reads_are_impossible_was_not_timed(tmp_path):
    # As above; the third call is small enough for the second-level cache, and would count beside credible ones.
    large = "a,H100-SXM5-80GB,x,1,fa3,decode,8,1,65535,65536,64,8,128,0,bfloat16,bfloat16,"
    small = "a,H100-SXM5-80GB,x,1,fa3,decode,8,1,63,64,64,8,128,0,bfloat16,bfloat16,0.01\n"
    rows = score(tmp_path, ATTENTION + f"{large}0.3\n{large}0.4\n{small}")
    assert [row.status for row in rows] == ["excluded"] * 3
    assert "2 of this kernel's 2 large calls" in rows[2].reason
    assert [row.status for row in score(tmp_path, ATTENTION + f"{large}0.3\n{large}0.8\n{small}")][
        2
    ] == "scored"


def test_latent_attention_reads_its_values_with_its_keys():
    # DeepSeek-V3: 512 + 64 elements of a token, of which the first 512 are its value
    one, width = np.array([1.0]), np.array([576.0])
    shape = (64.0 * one, 128.0 * one, one, one, 8192.0 * one, width, 512.0 * one, np.inf * one)
    latent = Attention("bf16", "bf16", True, True, 1.0, True, True, *shape)
    assert latent.read_bytes() == 64 * 8192 * 576 * 2
    kernels, library = Kernels(load_device("a100")), library_for("attention", "", "bf16", "ampere")
    assert latent.seconds(kernels, library) < replace(latent, latent=False).seconds(kernels, library)


def test_the_whole_units_of_time_are_known(tmp_path):
    header = "source,accelerator,dtype,m,n,k,{}\n"
    measured = [
        score(tmp_path, header.format(column) + f"a,V100-PCIE-16GB,half,64,64,64,{value}\n")[0].measured
        for column, value in (
            ("latency_ms", 0.02),
            ("latency_us", 20),
            ("latency_ns", 20000),
            ("time_us", 20),
        )
    ]
    assert measured == pytest.approx([2e-5] * 4)


def test_kernels_alone_are_the_engines_kernels():
    # A large product read from memory at sustained clocks: alone or in a step, the same time.
    device = load_device("h100")
    steady = replace(device, efficiency=replace(device.efficiency, matmul_burst=Sourced(1.0, "assumed", "")))
    shape = (8192.0, 65536.0, 8192.0, 1.0, Kernels(steady).product_flop_per_s("bf16"), 2.0, 2.0)
    alone, step = (Kernels(steady, alone=flag).matmul_s(*shape) for flag in (True, False))
    assert alone == pytest.approx(step, rel=1e-3)
    # A small one is faster alone: it comes from the cache.
    small = (64.0, 1024.0, 1024.0, *shape[3:])
    assert Kernels(steady, alone=True).matmul_s(*small) < Kernels(steady).matmul_s(*small)


def test_narrow_formats_run_at_their_own_rate_or_the_next_wider():
    hopper, ampere = Kernels(load_device("h100")), Kernels(load_device("a100"))
    assert hopper.product_flop_per_s("fp8") > 1.3 * hopper.product_flop_per_s("bf16")
    assert ampere.product_flop_per_s("fp8") == ampere.product_flop_per_s("bf16")
    # no fp4 matrix unit: as fp8
    assert hopper.product_flop_per_s("fp4") == hopper.product_flop_per_s("fp8")


@pytest.mark.parametrize("exponent", [1.01, 1.2])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 8, 256), (16, 8, 256), (4096, 8, 256), (1024, 2, 8)]
)
def test_power_law_loads_are_choices_of_tokens(tokens, top_k, experts, exponent):
    loads = power_law_loads(float(tokens), float(top_k), experts, 1, exponent)
    assert loads.sum() == tokens * top_k
    assert loads.max() <= tokens  # nobody chooses an expert twice
    assert loads.min() >= 0


def test_a_token_touches_as_many_experts_as_it_chooses():
    assert np.count_nonzero(power_law_loads(1.0, 8.0, 256, 1, 1.2)) == 8


def test_imbalance_costs_time():
    kernels, library = Kernels(load_device("h100")), library_for("moe", "", "bfloat16", "hopper")
    even = np.full((8, 1), 1024.0)
    uneven = np.array([[8185.0], *[[1.0]] * 7])
    one = np.array([1.0])
    seconds = [
        Experts("bf16", "bf16", "bf16", 2.0, 4096 * one, 4096 * one, 14336 * one, 8192 * one, loads).seconds(
            kernels, library
        )[0]
        for loads in (even, uneven)
    ]
    assert seconds[1] > seconds[0]


def test_more_of_anything_is_never_faster():
    kernels = Kernels(load_device("b200"), alone=True)
    library = library_for("gemm", "", "bfloat16", "blackwell")
    sizes = np.array([1.0, 8, 64, 512, 4096, 32768])
    fixed = np.full_like(sizes, 4096.0)
    for shape in ((sizes, fixed, fixed), (fixed, sizes, fixed), (fixed, fixed, sizes)):
        seconds = Product("bf16", "bf16", "bf16", np.inf, *shape).seconds(kernels, library)
        assert (np.diff(seconds) >= 0).all()
    rule = library_for("attention", "fa3", "bf16", "hopper")
    ones = np.ones_like(sizes)
    for decode in (True, False):
        queries = ones if decode else sizes
        shape = (8 * ones, 32 * ones, 8 * ones, queries, sizes, 128 * ones, 128 * ones, np.inf * ones)
        seconds = Attention("bf16", "bf16", decode, True, 1.0, True, False, *shape).seconds(kernels, rule)
        assert (np.diff(seconds) >= 0).all()


def alone_s(device: str, work: Product | Attention, kernel: str, dtype: str) -> np.ndarray:
    """Seconds of a work of a library's kernels, timed alone."""
    operation = "gemm" if isinstance(work, Product) else "attention"
    found = load_device(device)
    return work.seconds(Kernels(found, alone=True), library_for(operation, kernel, dtype, found.generation))


def test_a_contraction_that_is_not_split_takes_as_long_for_few_rows_as_for_many():
    # aiconfigurator@095f58a, RTX PRO 6000, SGLang 0.5.14 fp8, n 2048, k 3584: 28.9 us for 3 rows, 29.4 us for 160.
    rows = np.array([3.0, 160.0])
    work = Product("fp8", "fp8", "fp8", 6.0, rows, np.full(2, 2048.0), np.full(2, 3584.0))
    kernel = "sglang sglang_sgl_kernel_fp8_scaled_mm"
    seconds = alone_s("rtx-pro-6000-server", work, kernel, "fp8")
    assert seconds == pytest.approx([28.9e-6, 29.4e-6], rel=0.35)
    assert seconds[1] == pytest.approx(seconds[0], rel=0.05)


def test_a_quantising_kernel_starts_a_block_for_every_row():
    # The same, RTX PRO 6000, TensorRT-LLM nvfp4, n = k = 128: 1.1 ns more per row, from 17 rows to 4,352 (4.3 to 9.2 us).
    rows = np.array([17.0, 4352.0])
    work = Product("fp4", "nvfp4", "nvfp4", 6.0, rows, np.full(2, 128.0), np.full(2, 128.0))
    few, many = alone_s("rtx-pro-6000-server", work, "trtllm torch_flow", "nvfp4")
    assert (many - few) / (rows[1] - rows[0]) == pytest.approx(1.1e-9, rel=0.2)


def test_a_walk_over_keys_is_split_among_a_few_blocks_only():
    # The same, RTX PRO 6000, SGLang's Triton, one head of 64: 37 us for 4 walks of 8,192 keys, 500 us for 2 of 131,072.
    keys = np.array([8192.0, 131072.0])
    one, width = np.ones(2), np.full(2, 64.0)
    shape = (np.array([4.0, 2.0]), one, one, one, keys, width, width, np.full(2, np.inf))
    work = Attention("bf16", "bf16", True, True, 1.0, False, False, *shape)
    seconds = alone_s("rtx-pro-6000-server", work, "sglang triton", "bf16")
    assert seconds == pytest.approx([37e-6, 500e-6], rel=0.35)


def test_heads_that_run_apart_read_the_keys_that_they_share_again(tmp_path):
    # LLMServingSim@5daddb2, vLLM 0.19 on RTX PRO 6000, Qwen3-32B, sequences of 16,384 tokens. 128 of them are decoded in 5.66 ms,
    # beside a chunk of 24 tokens in 43.4 ms: 8 heads share keys, and 128 blocks of one head leave 188 multiprocessors no room for
    # the next. Beside a chunk of 2,048 tokens 16 take 5.99 ms, 32 of them 7.98 ms, and 128 of them 45.2 ms.
    text = "source,accelerator,model,tp,dtype,prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
    row = "LLMServingSim@5daddb2,RTX-PRO-6000-Blackwell,Qwen/Qwen3-32B,1,bf16,"
    calls = (
        "0,0,128,16384,5656.1",
        "24,0,128,16384,43400",
        "2048,16384,16,16384,5994.28",
        "2048,16384,32,16384,7983.16",
        "2048,16384,128,16384,45154.5",
    )
    rows = score(tmp_path, text + "".join(f"{row}{call}\n" for call in calls))
    assert [found.predicted for found in rows] == pytest.approx([found.measured for found in rows], rel=0.35)


def test_library_rules_are_known_constants_and_the_first_that_fits_decides():
    rules = kernel_libraries()
    assert {name for rule in rules for name in rule.constants} <= DEFAULTS.keys()
    assert library_for("attention", "aic sglang fa3 0.5", "bf16", "hopper").name == "FlashAttention, Hopper"
    assert (
        library_for("attention", "aic sglang fa3 0.5", "fp8", "hopper").name == "FlashAttention, fp8, Hopper"
    )
    assert library_for("attention", "something else", "bf16", "hopper").name == "other"
    for rule in rules:
        kernel = rule.match[0] if rule.match else ""
        generation = rule.generations[0] if rule.generations else "nobody's"
        dtype = rule.dtypes[0] if rule.dtypes else "nothing"
        found = library_for(rule.operation, kernel, dtype, generation)
        assert found.operation == rule.operation
