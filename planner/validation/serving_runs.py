"""A serving row as a run: what was served, where, by which engine, and how it was driven."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from planner.errors import PlannerError
from planner.specs.cluster import Cluster
from planner.specs.cluster_file import build_cluster
from planner.specs.device_file import load_device
from planner.specs.model import Attention, Block, Mlp, Model
from planner.specs.models import load_model
from planner.specs.stack import Stack, load_stack, stack_for
from planner.specs.tiers import Network
from planner.validation.benchmark_suites import DEFAULTS, Launch, Suite, suite_of
from planner.validation.table import Row, Unsupported

__all__ = ["DRIVERS", "ServedRun", "served_run"]

DRIVERS = ("concurrency", "offline", "burst", "static", "rate", "pools")
"""How a run was driven: clients that replace every answer, all requests at once (a ``burst`` where their latencies are told or
their lengths vary), one batch, arrivals, or clients of a deployment with pools of their own for prompts and generation."""

_WEIGHTS = {
    "fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16", "f16": "fp16", "fp8": "fp8", "fp8_block": "fp8_block", "fp4": "nvfp4",
    "nvfp4": "nvfp4", "mxfp4": "w4a16_mxfp4", "int8": "int8_wo", "int4": "int4_wo", "q4_k_m": "q4_k_m", "": "bf16",
}  # fmt: skip
_NEEDS_FP8 = ("fp8", "fp8_block")
_ANY_ENGINE = "serving"
"""The stack of a continuous-batching engine of no particular make, for those that no stack describes."""
_TOLD, _CUT = re.compile(r"(\d+) requests"), re.compile(r"at most (\d+) tokens")


@dataclass(frozen=True, slots=True)
class ServedRun:
    """One row.

    Attributes:
        row: the row.
        model, cluster, stack: what was served, on what, by what.
        weights, cache: number formats.
        degrees: tp, pp, dp, ep of one replica.
        isl, osl: lengths.
        driver: one of :data:`DRIVERS`; ``load`` its number: requests in flight, sequences of the batch, or requests per second.
        cap: sequences that the engine was allowed, where arrivals drove the run; None: its default.
        requests: that the run had in all; infinite: not stated.
        workers: of the pools for prompts and generation, where they are two.
        prefill: tp, pp, dp, ep of a worker for prompts, and prompts that it runs at once.
        launch: options of the engine that the benchmark's scripts state.
        frontend_s: seconds that a frontend before the engine adds to the first token.
        requests_per_client: requests of every client, the first of all at once; None: not known.
        length_scv: squared coefficient of variation of answers' lengths.
        longest_answer: at which answers are cut; infinite: they are not.
        may_speculate: whether multi-token prediction was on is not stated, and both were run.
        compiles: first tokens may have waited for kernels to be compiled.
    """

    row: Row
    model: Model
    cluster: Cluster
    stack: Stack
    weights: str
    cache: str
    degrees: tuple[int, int, int, int]
    isl: int
    osl: int
    driver: str
    load: float
    cap: float | None = None
    requests: float = math.inf
    workers: tuple[float, float] | None = None
    prefill: tuple[int, int, int, int, float] | None = None
    launch: Launch = DEFAULTS
    frontend_s: float = 0.0
    requests_per_client: float | None = None
    length_scv: float = 0.0
    longest_answer: float = math.inf
    may_speculate: bool = False
    compiles: bool = False

    @property
    def experts(self) -> bool:
        """Whether the model has any."""
        return any(block.moe is not None for block in self.model.blocks.values())

    @property
    def exchanged(self) -> bool:
        """Whether tokens travel to experts one by one: attention ranks of their own, whole experts on every rank."""
        tp, _, dp, ep = self.degrees
        gathered = self.driver == "offline" and self.stack.knobs.get("experts") == "gathered"
        return dp > 1 and ep == tp * dp and not gathered

    @property
    def group(self) -> tuple[object, ...]:
        """What runs that are priced together share."""
        formats = self.weights, self.cache
        return (
            self.model.name,
            self.cluster.name,
            self.stack.name,
            *formats,
            self.isl,
            self.osl,
            self.driver,
            self.cap,
            self.requests,
            self.exchanged,
            self.launch,
            self.frontend_s,
            self.requests_per_client,
            self.length_scv,
            self.longest_answer,
            self.compiles,
        )


def served_run(row: Row, defaults: Counter[str]) -> ServedRun:
    """The run that a row describes; columns whose default was taken are counted.

    Raises:
        Unsupported: the row cannot be priced, and why.
    """
    stated = _degrees(row)
    model = _model(row)
    cluster = _cluster(row.text("accelerator"), math.prod(stated[:3]))
    suite = suite_of(row)
    date = row.text("measured_date") or suite.measured_date
    stack = stack_for(row.text("engine"), row.text("engine_version"), date)
    if stack.serving is None:
        defaults["engine"] += 1
        stack = load_stack(_ANY_ENGINE)
    weights = _weights(row, model, defaults)
    if weights in _NEEDS_FP8 and not cluster.device.supports("fp8"):
        weights = "int8_wo"  # engines unpack such weights for 16-bit products (Marlin kernels): as many bytes as int8 ones
    driver, load = _driver(row, suite)
    told = _told(row, model, cluster, stated) | {
        "stack": stack.name, "date": date, "weights": weights, "pools": driver == "pools",
    }  # fmt: skip
    launch = suite.launch(told)
    isl, osl = (round(_length(row, column) * suite.mean_length) for column in ("input_len", "output_len"))
    if isl == 0 and osl == 0:
        raise Unsupported("no tokens")
    workers, prefill = _pools(row) if driver == "pools" else (None, None)
    degrees, prefill = _launched(stated, prefill, launch)
    return ServedRun(
        row, model, cluster, stack, weights, _cache(row, stack, weights, launch, defaults), degrees, max(isl, 1), max(osl, 1),
        driver, load,
        cap=row.number("concurrency") if driver == "rate" else None,
        requests=_requests(row, suite),
        workers=workers,
        prefill=prefill,
        launch=launch,
        # Benchmarks of pools send requests before those that count.
        compiles=bool(date) and driver != "pools" and suite.compiles(row.text("engine").lower(), date),
        frontend_s=suite.frontend_s,
        requests_per_client=suite.per_client(told) or _per_client(row, driver, load),
        length_scv=suite.length_scv,
        longest_answer=_longest(row),
        may_speculate=suite.may_speculate(
            row.text("engine").lower(), weights, row.text("measured_date"), model
        ),
    )  # fmt: skip


def _told(
    row: Row, model: Model, cluster: Cluster, degrees: tuple[int, int, int, int]
) -> dict[str, str | bool | float]:
    """What a row says of itself, by the names of a suite's conditions."""
    return {
        "engine": row.text("engine").lower(),
        "engine_version": row.text("engine_version"),
        "memory_gb": float(cluster.device.memory_bytes) / 1e9,
        "device": cluster.device.name,
        "generation": cluster.device.generation,
        "experts": any(block.moe is not None for block in model.blocks.values()),
        "attention_ranks": degrees[2] > 1,
        "input_len": row.number("input_len") or 0.0,
        "output_len": row.number("output_len") or 0.0,
        "tp": float(degrees[0]),
        "concurrency": row.number("concurrency") or 0.0,
    }


def _launched(
    degrees: tuple[int, int, int, int], prefill: tuple[int, int, int, int, float] | None, launch: Launch
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int, float] | None]:
    """Degrees of a replica and of a worker for prompts as the scripts had them, where rows do not know."""
    tp, pp, dp, ep = degrees
    if launch.ranks_attend and dp == 1:
        tp, dp, ep = 1, tp, tp
    if launch.experts_spread:
        ep = tp * dp
    if launch.prompt_ranks_attend and prefill and prefill[2] == 1:
        prefill = (1, prefill[1], prefill[0], prefill[0], prefill[4])
    if launch.ranks_share and prefill:
        tp, dp, ep = tp * dp, 1, 1
        prefill = (prefill[0] * prefill[2], prefill[1], 1, 1, prefill[4])
    return (tp, pp, dp, ep), prefill


def _degrees(row: Row) -> tuple[int, int, int, int]:
    columns = ("tp", "pp", "dp", "ep")
    if row.text("prefill_tp_size"):
        columns = ("decode_tp_size", "decode_pp_size", "decode_attention_dp_size", "decode_moe_ep_size")
    tp, pp, dp, ep = (row.whole(name) for name in columns)
    if tp is None or tp < 1:
        raise Unsupported("the parallel layout is not stated")
    return tp, pp or 1, dp or 1, _experts(columns, tp, dp or 1, ep or 1)


def _experts(columns: tuple[str, ...], tp: int, dp: int, ep: int) -> int:
    """Ranks that experts are spread over; in pools, attention ranks hold them whole, whatever the flag for experts says.

    SGLang's ``--moe-a2a-backend deepep`` spreads experts over all ranks without a word about ``ep_size``.
    """
    return tp * dp if columns[0] != "tp" and dp > 1 and ep == 1 else ep


def _pools(row: Row) -> tuple[tuple[float, float], tuple[int, int, int, int, float]]:
    """Workers of both pools, and the layout and batch of those for prompts."""
    workers = row.number("prefill_num_workers"), row.number("decode_num_workers")
    if not (workers[0] and workers[1]):
        raise Unsupported("how many workers a pool has is not stated")
    columns = ("prefill_tp_size", "prefill_pp_size", "prefill_attention_dp_size", "prefill_moe_ep_size")
    tp, pp, dp, ep = (row.whole(column) or 1 for column in columns)
    ep = _experts(columns, tp, dp, ep)
    return (workers[0], workers[1]), (tp, pp, dp, ep, row.number("prefill_batch_size") or 1.0)


def _length(row: Row, column: str) -> int:
    value = row.number(column)
    value = row.number(f"mean_{column}") if value is None else value
    if value is None:
        raise Unsupported(f"no {column} is given")
    return round(value)


def _driver(row: Row, suite: Suite) -> tuple[str, float]:
    """How the run was driven, and by how much."""
    features, rate = row.text("features").lower(), row.text("request_rate").lower()
    concurrency, batch = row.number("concurrency"), row.number("batch")
    if row.text("prefill_tp_size"):
        if not concurrency:
            raise Unsupported("the load is not stated")
        return "pools", concurrency
    if "static" in features or "llama-bench" in features:
        if not batch:
            raise Unsupported("no batch size is given")
        return "static", batch
    if concurrency and not rate:
        return "concurrency", concurrency
    if rate == "inf":
        told = _TOLD.search(features)
        timed = row.text("ttft_ms") or row.text("tpot_ms")
        return ("burst", float(told[1])) if told and (timed or suite.natural_lengths) else ("offline", 0.0)
    if rate:
        each = row.number("per_replica_request_rate") or row.number("request_rate")
        if each:
            return "rate", each
    raise Unsupported("the load is not stated")


def _requests(row: Row, suite: Suite) -> float:
    """Requests of the whole run."""
    said = _TOLD.search(row.text("features"))
    if said:
        return float(said[1])
    lengths = row.number("input_len") or 0.0, row.number("output_len") or 0.0
    return row.number("requests_completed") or suite.requests.get(lengths, math.inf)


def _longest(row: Row) -> float:
    """The length at which answers are cut."""
    cut = _CUT.search(row.text("features"))
    return float(cut[1]) if cut else math.inf


def _per_client(row: Row, driver: str, load: float) -> float | None:
    """Requests of every client, where a row tells those of the whole run."""
    said = _TOLD.search(row.text("features"))
    return max(float(said[1]) / load, 1.0) if said and driver in ("concurrency", "pools") else None


def _weights(row: Row, model: Model, defaults: Counter[str]) -> str:
    label = (row.text("weight_dtype") or row.text("precision_label")).lower()
    if not label:
        defaults["weight_dtype"] += 1
        if model.checkpoint:
            return model.checkpoint  # what is published in one format is served in it
    if label not in _WEIGHTS:
        raise Unsupported(f"number format {label!r}: not modelled")
    found = _WEIGHTS[label]
    if found == "fp8" and "fp8_block" in (row.text("moe_dtype").lower(), model.checkpoint):
        return "fp8_block"
    if found == "nvfp4" and model.checkpoint == "w4a16_mxfp4":
        return model.checkpoint  # the published 4-bit checkpoint of such a model
    return found


def _cache(row: Row, stack: Stack, weights: str, launch: Launch, defaults: Counter[str]) -> str:
    """The cache's format; where no one states it, that of the engine's usual checkpoints in the weights' format."""
    label = row.text("kv_dtype").lower()
    if label in ("fp8", "int8"):
        return "fp8"
    if not label and launch.cache:
        return launch.cache
    if not label:
        defaults["kv_dtype"] += 1
        if stack.knobs.get("cache") == "fp8" and weights in ("fp8", "nvfp4"):
            return "fp8"
    return "bf16"


@lru_cache(maxsize=256)
def _named_model(name: str) -> Model:
    try:
        return load_model(name)
    except PlannerError:
        raise Unsupported(f"no model {name!r}") from None


def _model(row: Row) -> Model:
    """A shipped model by its name, or GPT's layers where the columns give its shape."""
    name = row.text("model")
    hidden, layers, heads = (row.whole(c) for c in ("hidden_size", "num_layers", "num_heads"))
    try:
        found = _named_model(name)
    except Unsupported:
        if not (hidden and layers and heads and re.match(r"gpt", name, re.IGNORECASE)):
            raise
        return _gpt(name, hidden, layers, heads, row.whole("vocab_size") or 51200)
    if found.arch != "decoder":
        raise Unsupported(f"{name} is of kind {found.arch}: it does not generate")
    if hidden and found.hidden != hidden:
        return _gpt(
            name, hidden, layers or found.n_layers, heads or 1, row.whole("vocab_size") or found.vocab
        )
    return found


@lru_cache(maxsize=64)
def _gpt(name: str, hidden: int, layers: int, heads: int, vocab: int) -> Model:
    """GPT-3's layers: full attention, a network four times as wide (Brown et al. 2020, arXiv:2005.14165)."""
    attention = Attention(heads, heads, hidden // heads, qkv_bias=True, out_bias=True)
    block = Block(attention=attention, mlp=Mlp(4 * hidden, gated=False, bias=True), norm="layernorm")
    return Model(
        name=name, family="gpt", arch="decoder", hidden=hidden, vocab=vocab, max_seq_len=2048, blocks={"dense": block},
        layers=(("dense", layers),), tied_embeddings=True, learned_positions=2048, final_norm="layernorm",
    )  # fmt: skip


@lru_cache(maxsize=256)
def _cluster(name: str, devices: int) -> Cluster:
    """The accelerator's usual nodes, as many as the run needs."""
    try:
        device = load_device(name)
    except PlannerError:
        raise Unsupported(f"no profile of the accelerator {name!r}") from None
    per_node = min(device.devices_per_node, devices)
    nodes = -(-devices // per_node)
    return build_cluster(device, nodes, per_node, Network())
