"""Cells of a training row, and what an empty one means: every default, with its reason; they are printed with the scores."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from planner.specs.device import Device
from planner.validation.table import Row, Unsupported

__all__ = ["DEFAULTS", "MANDATORY", "MANDATORY_OF_EXPERTS", "WHERE_SILENT", "Cells", "Default", "note_units"]

MANDATORY = (
    "n_layers",
    "hidden",
    "n_heads",
    "seq_len",
    "n_devices",
    "tp",
    "pp",
    "micro_batch",
    "global_batch",
)
MANDATORY_OF_EXPERTS = ("top_k", "expert_ffn_hidden")
_NEVER_NONE = ("cp", "ep", "etp", "vpp", "n_kv_heads", "head_dim", "ffn_hidden", "vocab")

WHERE_SILENT = ("none", "norm+act", "full")
"""Recompute of a row that does not say."""

# Far beyond any real run: they keep a slip in a cell from running for ever.
_MOST = {"n_layers": 10_000, "n_devices": 10_000_000, "vpp": 10_000}
_MOST_OF_ANYTHING = 10**9

_MONTH = re.compile(r"(?<=[_-])(20\d\d)-?(0[1-9]|1[0-2])(?=[_.-])")  # in a file's name
# Frameworks that train GPT models with dropout unless they are told otherwise.
_WITH_DROPOUT = ("megatron-lm", "megatron-deepspeed", "deepspeed", "hf trainer")
_WITH_HYBRID_EP = "25.11"
_REDUCES_AS_COMPUTED = "pytorch fsdp1"  # MixedPrecision.reduce_dtype is param_dtype where it is not given
_MAKES_SHARED_TENSORS = ("megatron-core", "pytorch fsdp2")
_BY_WRAPPER = {  # products of PyTorch's wrappers, by the wrapper that they train with
    "torchtitan": "pytorch fsdp2",
    "nemo automodel": "pytorch fsdp2",
    "prime-rl": "pytorch fsdp2",
    "fms-fsdp": "pytorch fsdp1",
    "llm-foundry": "composer fsdp1",
}
_FORMATS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}  # by PyTorch's names


@dataclass(frozen=True, slots=True)
class Default:
    """What an empty cell means.

    Attributes:
        column: the column, or a name in brackets for what no column tells.
        meaning: the value, in words.
        why: where it comes from.
        value: the value, from the row's other cells.
    """

    column: str
    meaning: str
    why: str
    value: Callable[[Cells], Any]


@dataclass(slots=True)
class Cells:
    """Typed cells of one row; ``used`` collects the columns whose default was taken.

    ``device`` is the accelerator's profile, which some defaults come from.
    """

    row: Row
    device: Device
    used: dict[str, None] = field(default_factory=dict)

    def check_mandatory(self) -> None:
        """Raises Unsupported if a cell is empty that no default can fill, or is 0 and must not be."""
        wanted = MANDATORY + (MANDATORY_OF_EXPERTS if self.row.whole("n_experts") else ())
        missing = [column for column in wanted if not self.row.text(column)]
        if missing:
            raise Unsupported(f"mandatory cells are empty: {', '.join(missing)}")
        zero = [column for column in (*wanted, *_NEVER_NONE) if self.row.whole(column) == 0]
        if zero:
            raise Unsupported(f"must not be 0: {', '.join(zero)}")

    def whole(self, column: str) -> int:
        """A whole number, or the column's default."""
        found = self.row.whole(column)
        if found is not None and found > _MOST.get(column, _MOST_OF_ANYTHING):
            raise Unsupported(f"{column} is {found:,}, more than {_MOST.get(column, _MOST_OF_ANYTHING):,}")
        return self.default(column) if found is None else found

    def truth(self, column: str) -> bool:
        """True or false, or the column's default."""
        found = self.row.truth(column)
        return self.default(column) if found is None else found

    def text(self, column: str) -> str:
        """Text in lower case, or the column's default."""
        return self.row.text(column).lower() or str(self.default(column))

    def default(self, column: str) -> Any:
        """The column's default; noted as used."""
        self.used[column] = None
        return _BY_COLUMN[column].value(self)

    @property
    def dtype(self) -> str:
        """Format of matrix products."""
        name = self.text("dtype")
        return _FORMATS.get(name, name)

    @property
    def zero_stage(self) -> int:
        """What is sharded: optimizer, gradients, weights. ``fsdp…`` and ``hsdp…`` are 3, or 2 where only gradients are."""
        text = self.row.text("zero_stage").lower()
        if not text.startswith(("fsdp", "hsdp")):
            return self.whole("zero_stage")
        return 2 if re.search(r"grad[_-]?op|zero-?2", text) else 3

    @property
    def gated(self) -> bool:
        """Whether the feed-forward networks have three matrices."""
        return self.text("mlp") in ("swiglu", "geglu")

    @property
    def of_container(self) -> bool:
        """Whether the run was one of NeMo's, whose containers have a year and a month for their version."""
        version = re.match(r"2\d\.(0[1-9]|1[0-2])", self.row.text("framework_version"))
        return version is not None and self.framework.startswith(("megatron-core", "nemo"))

    @property
    def since(self) -> str:
        """Year and month, ``2025-06``, where the name of the row's document has them; else ``measured_date``, maybe a year."""
        named = _MONTH.search(self.row.text("source").partition("@")[0])
        return f"{named[1]}-{named[2]}" if named else self.row.text("measured_date")

    @property
    def framework(self) -> str:
        """The framework's name in lower case; of a product, that of the wrapper that it trains with."""
        name = self.row.text("framework").lower()
        return next((wrapper for product, wrapper in _BY_WRAPPER.items() if name.startswith(product)), name)


def note_units(cells: Cells) -> None:
    """Notes the defaults that what a row measured rests on."""
    row = cells.row
    rates = (
        f"{name}{how}" for name in ("tokens_per_s_per_device", "step_time_s") for how in ("", "_derived")
    )
    if row.text("tflops_per_device") and not any(
        row.text(column) for column in (*rates, "tflops_convention")
    ):
        cells.default("tflops_convention")
    if row.text("peak_memory_gb"):
        for column in ("peak_memory_unit", "peak_memory_kind"):
            if not row.text(column):
                cells.default(column)


def _feed_forward(cells: Cells) -> int:
    hidden = cells.whole("hidden")
    return int(4 * hidden * 2 / 3 / 64) * 64 if cells.gated else 4 * hidden


def _expert_ranks(cells: Cells) -> int:
    if not re.search(r"deepep|hybridep", cells.row.text("other_flags"), re.IGNORECASE):
        return 1
    experts = cells.row.whole("n_experts") or 1
    return math.gcd(experts, cells.whole("n_devices") // cells.whole("pp"))


def _gradients(cells: Cells) -> str:
    dtype = cells.dtype
    if cells.framework.startswith(_REDUCES_AS_COMPUTED):
        return dtype if dtype in ("fp16", "bf16") else "fp32"
    sharded = cells.zero_stage in (2, 3)  # without, BF16_Optimizer adds up in fp32
    narrow = ("fp16", "bf16") if "deepspeed" in cells.framework and sharded else ("fp16",)
    return dtype if dtype in narrow and cells.framework.startswith(_WITH_DROPOUT) else "fp32"


def _expert_tensor(cells: Cells) -> int:
    tp, ranks = cells.whole("tp"), cells.whole("n_devices") // max(cells.whole("pp"), 1)
    return 1 if ranks % (tp * (cells.row.whole("ep") or 1)) else tp


def _dispatch(cells: Cells) -> str | None:
    """None: what the stack says. A row that tells what is recomputed was read beside its recipe, which names a dispatcher."""
    read = cells.row.text("recompute") or cells.row.text("other_flags")
    by_recipe = cells.of_container and cells.row.text("framework_version") >= _WITH_HYBRID_EP
    across_nodes = cells.device.scale_up.domain > cells.device.devices_per_node
    return "fused" if by_recipe and across_nodes and not read else None


def _virtual_stages(cells: Cells) -> int:
    stages, left = divmod(cells.whole("n_layers"), cells.whole("pp"))
    schedule = cells.row.text("schedule").lower()
    if cells.whole("pp") == 1 or left:
        return 1
    if (
        not schedule
        and cells.of_container
        and not re.search(r"\blora\b", cells.row.text("other_flags"), re.I)
    ):
        return stages
    if not schedule.startswith("interleaved"):
        return 1
    return next((chunks for chunks in range(2, stages + 1) if stages % chunks == 0), 1)


DEFAULTS = (
    Default(
        "ffn_hidden", "4·hidden; with a gated activation ⅔ of it, in multiples of 64", "Megatron-LM arguments", _feed_forward
    ),
    Default("n_kv_heads", "n_heads", "multi-head attention", lambda c: c.whole("n_heads")),
    Default("head_dim", "hidden / n_heads", "Vaswani et al. 2017", lambda c: max(c.whole("hidden") // c.whole("n_heads"), 1)),
    Default("vocab", "50257", "the byte-pair vocabulary of GPT-2", lambda c: 50257),
    Default("mlp", "gelu", "two matrices, as in GPT", lambda c: "gelu"),
    Default("tied_embeddings", "tied with gelu, untied with gated activations", "GPT-2; Llama", lambda c: not c.gated),
    Default("moe_layers", "all layers", "a model without dense layers", lambda c: c.whole("n_layers")),
    Default("n_shared_experts", "0", "no shared expert", lambda c: 0),
    Default(
        "devices_per_node", "the device profile's", "the node that the part is sold in", lambda c: c.device.devices_per_node
    ),
    Default("intra_node_link", "the device profile's", "the links of the part", lambda c: ""),
    Default("inter_node_link", "the device profile's", "the usual network around the part", lambda c: ""),
    Default("cp", "1", "off", lambda c: 1),
    Default(
        "ep",
        "1; with DeepEP or HybridEP named, the ranks that share the experts evenly",
        "a dispatcher moves tokens between ranks that hold different experts",
        _expert_ranks,
    ),
    Default(
        "etp",
        "tp; 1 where a stage has not that many ranks for its experts",
        "Megatron-Core: as the attention, unless set",
        _expert_tensor,
    ),
    Default(
        "vpp",
        "1; under an interleaved schedule the fewest chunks above 1 that divide a stage's layers; in a NeMo container that names "
        "no schedule, and trains all weights, as many as a stage has layers",
        "no interleaving unless the schedule says so; NeMo-Framework-Launcher examples/peft/llama/h100 @8f797426",
        _virtual_stages,
    ),
    Default("zero_stage", "1", "the distributed optimizer", lambda c: 1),
    Default("shard_group", "all data-parallel ranks", "what every framework does unless told", lambda c: ""),
    Default(
        "sequence_parallel",
        "true where tp > 1 under Megatron-Core and FSDP2, false elsewhere",
        "recipes of Megatron-Bridge and torchtitan; others turn it on by a flag",
        lambda c: c.framework.startswith(_MAKES_SHARED_TENSORS),
    ),
    Default(
        "recompute",
        f"the first of {', '.join(WHERE_SILENT)} that fits in memory",
        "runs that are published have run; launchers recompute no more than they must. So do PyTorch's wrappers with selective, "
        "which is a quarter of the layers or more there",
        lambda c: WHERE_SILENT[0],
    ),
    Default("offload", "none", "off unless asked for", lambda c: "none"),
    Default(
        "dtype",
        "bf16, or fp16 on a device without it",
        "mixed precision",
        lambda c: "bf16" if c.device.supports("bf16") else "fp16",
    ),
    Default(
        "(gradients)",
        "what the stack says; else the weights' 16 bits under FSDP1, under Megatron-LM and DeepSpeed with fp16 weights, and "
        "under DeepSpeed where ZeRO shards gradients; else fp32",
        "ZeRO counts 2 bytes (arXiv:1910.02054); FSDP1 reduces in MixedPrecision.param_dtype unless told otherwise; Megatron-LM "
        "and DeepSpeed's BF16_Optimizer add gradients of bf16 weights up in fp32, of fp16 ones if asked",
        _gradients,
    ),
    Default(
        "(loss)",
        "what the stack says; else eager cross-entropy, unless a fused one is named",
        "Megatron-LM's --cross-entropy-loss-fusion and PyTorch's fused losses are asked for",
        lambda c: "eager",
    ),
    Default(
        "(compiled loss)",
        "fused under FSDP2 where torch.compile is named and the vocabulary is whole, from April 2025 on",
        "torchtitan compiles the loss with the model since commit bbb1b616e; what a compiler makes of it reads 16-bit logits and "
        "writes their 16-bit gradient",
        lambda c: "fused",
    ),
    Default(
        "(optimizer)",
        "AdamW; on 16-bit weights where a NeMo container of 2024 fine-tunes them all",
        "NeMo-Framework-Launcher launcher_scripts/conf/peft/llama/sft.yaml @8f797426: distributed_fused_adam, dtype bf16",
        lambda c: "adamw_16bit",
    ),
    Default(
        "(elementwise)",
        "eager under FSDP2 where neither torch.compile nor what needs or replaces it is named",
        "torchtitan train_configs/*.toml @1ea476e9f: compile = false",
        lambda c: "eager",
    ),
    Default("framework", "the stack 'default'", "constants of no framework in particular", lambda c: ""),
    Default(
        "tflops_convention",
        "model FLOP",
        "utilisation is of these, unless a table says otherwise (Narayanan et al. 2021, arXiv:2104.04473)",
        lambda c: "model_flops",
    ),
    Default("peak_memory_unit", "GB", "as nvidia-smi's readings are printed", lambda c: "GB"),
    Default("peak_memory_kind", "all that the process holds", "what a device must have room for", lambda c: ""),
    Default(
        "(dispatch)",
        "what the stack says; HybridEP where a NeMo container of 25.11 or later ran on NVLink domains of several nodes, and the "
        "row tells neither flags nor recompute",
        "Megatron-Bridge scripts/performance/configs @v0.2.0: recipes of mixtures on GB200 and GB300, but for GPT-OSS",
        _dispatch,
    ),
    Default(
        "(adapters)",
        "on linear_qkv under Megatron-Core, on every linear layer elsewhere",
        "LoRA in NeMo and in Megatron-Bridge's performance recipes; NeMo Automodel's match_all_linear",
        lambda c: "linear_qkv" if c.framework.startswith("megatron-core") else "",
    ),
    Default(
        "(dropout)",
        "active in gelu models under Megatron and DeepSpeed",
        "their arguments' default of 0.1; off elsewhere",
        lambda c: c.text("mlp") == "gelu" and c.framework.startswith((*_WITH_DROPOUT, "megatron-core")),
    ),
    Default(
        "(biases)",
        "linear layers and norms have biases with gelu, none with gated activations",
        "GPT-2; Llama. The printed parameter count decides where it has the digits",
        lambda c: not c.gated,
    ),
    Default(
        "(positions)", "learned with gelu, rotary with gated activations", "GPT-2; Llama", lambda c: not c.gated
    ),
)  # fmt: skip
_BY_COLUMN = {default.column: default for default in DEFAULTS}
