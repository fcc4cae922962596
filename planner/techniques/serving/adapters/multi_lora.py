"""Low-rank adapters of many customers beside one model: every slot holds one, and a batch runs through all of them.

What it does: each linear layer of attention and dense network has slots for adapters, two narrow factors each; tokens go through
    those of their own adapter. Engines keep as many slots as may run at once, at the largest rank.
Saves: a copy of the model per customer.
Costs: memory of the slots, which the cache lacks; their reads and two launches per layer and product, in every iteration.
Assumes: every slot's adapter is in the batch; factors over a product's inner width are whole on every tensor rank where the
    product is cut by columns, and the others where it is cut by rows (vLLM without ``--fully-sharded-loras``); arithmetic, a
    hundredth of the model's, hides behind the reads; experts, router and both ends have none.
Source: Hu et al. 2021 (LoRA, arXiv:2106.09685); Sheng et al. 2024 (S-LoRA, MLSys, arXiv:2311.03285); vLLM, docs/features/lora.md.
"""

from __future__ import annotations

from typing import Any

from planner.ledger import Item, Ledger, Matmul, Resident, Stream, times
from planner.specs.traffic import ADAPTER_RANK
from planner.technique import Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass

_SLOTS, _RANK = "lora_slots", "lora_rank"
_BYTES = 2.0
_ADAPTED = {"column", "row", "qkv"}
_NEVER = {"router", "expert", "head"}


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Adds slots and their reads to every adapted product; nothing where no adapters are asked for."""
    slots = ctx.traffic.adapters
    if not slots:
        return ledger
    added: list[Item] = []
    for product in ledger.of(Matmul, phase="forward"):
        if not product.tags & _ADAPTED or product.tags & _NEVER:
            continue
        size = times(times(_elements(product), _RANK), _SLOTS)
        common: dict[str, Any] = {
            "what": f"{product.what}.lora", "block": product.block, "tags": frozenset({"lora"}), "by": TECHNIQUE.key,
            "source": TECHNIQUE.source, "size": size, "bytes_per_element": _BYTES,
        }  # fmt: skip
        added += [Resident(pool="parameters", lifetime="always", **common), Stream(launches=2.0, **common)]
    rank = float(ctx.traffic.adapter_rank or ADAPTER_RANK)
    return ledger.set_axes(**{_SLOTS: float(slots), _RANK: rank}).add(added)


def _elements(product: Matmul) -> str:
    """Elements of both factors per unit of rank; matrices that are multiplied together have a first one each."""
    factors = [term.partition("*")[0] for term in product.n.split(" + ")]
    joined = sum(int(factor) if factor.isdigit() else 1 for factor in factors)
    return f"{joined}*{product.k} + {product.n}"


def _parameters(subject: Pass) -> float:
    """Parameters of an adapter of rank 16 for all linear layers of Llama 2 7B."""
    asked: list[dict[str, Any]] = [{"adapters": 1, "adapter_rank": 16}, {}]
    with_one, without = (
        runs.parameter_bytes(runs.run("adapters", subject, model="llama2-7b", **more), layers_only=True)
        for more in asked
    )
    return (with_one - without) / _BYTES


TECHNIQUE = Technique(
    key="multi_lora",
    name="Multi-LoRA (S-LoRA, Punica, vLLM)",
    slot="adapters",
    job="serving",
    choices=("slots",),
    default=True,
    source="arXiv:2311.03285",
    summary="Slots for low-rank adapters, where the traffic asks for them",
    knobs=(Knob("adapters", "how adapters run beside the model", ("slots",)),),
    figures=(
        Figure(
            "parameters of an adapter, Llama 2 7B, rank 16, all linear layers",
            39976960.0,
            1e-9,
            "Hugging Face PEFT, print_trainable_parameters: 39,976,960 of 6,778,392,576",
            _parameters,
        ),
    ),
    apply=apply,
)
