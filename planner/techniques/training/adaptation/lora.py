"""Low-rank adaptation (LoRA): weights are frozen, and every adapted product gains a trained one of low rank beside it.

What it does: an adapted product of (m, k) by (k, n) gains (m, k) by (k, r) and (m, r) by (r, n), whose result is scaled and added
    to its own. Nothing else is trained.
Saves: gradients, optimizer states, master weights and weight-gradient products of everything frozen, the embedding's backward,
    and the saved inputs of products that are not adapted.
Costs: two thin products per adapted one, three backward and forward passes over its output and input; the adapter's input in 16
    bits where it would have been kept in fewer.
Assumes: one adapter per operator: queries, keys and values share one, as do gate and up projection, and every expert has its own;
    the half behind a column-parallel product is cut with it, the half before a row-parallel one as well; no dropout; frozen
    weights are held in the format that they are used in.
Source: Hu et al. 2021 (arXiv:2106.09685) §4; operators and defaults: NeMo and Megatron-Bridge ``peft/lora.py`` (rank 32 on
    linear_qkv, linear_proj, linear_fc1, linear_fc2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from planner.ledger import Item, Ledger, Matmul, Resident, Stream, times
from planner.technique import Context, Detail, Figure, Knob, Technique, whole_number
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.adaptation.frozen import freeze, trained_weights

_BY = "lora"
RANK, _TARGETS = "adapter_rank", "adapter_targets"
_DEFAULT_RANK = 32
_OPERATORS = {
    "linear_qkv": ("qkv", "q", "kv", "q_up", "kv_up"),
    "linear_proj": ("output",),
    "linear_fc1": ("fc1",),
    "linear_fc2": ("fc2",),
}
"""Ends of the names of the products that each of NeMo's target modules is."""
_INPUTS = {
    "linear_qkv": "qkv_input",
    "linear_proj": "core_output",
    "linear_fc1": "fc1_input",
    "linear_fc2": "fc2_input",
}
# Passes over the adapted product's output and input: scaling (read, write) and addition (two reads, a write) forward; scaling of
# the gradient, and the sum of both input gradients, backward.
_OUTPUT_PASSES, _OUTPUT_PASSES_BACKWARD, _INPUT_PASSES_BACKWARD = 5.0, 2.0, 3.0


def read_targets(text: str) -> str:
    """Names of target modules joined by ``+``, in NeMo's order and without repetition.

    Raises:
        ValueError: a name is none of NeMo's.

    >>> read_targets("linear_fc1+linear_qkv")
    'linear_qkv+linear_fc1'
    """
    names = set(text.split("+"))
    if not names <= _OPERATORS.keys():
        raise ValueError(text)
    return "+".join(name for name in _OPERATORS if name in names)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Freezes every weight, and adds the adapters."""
    rank = ctx.knobs.get(RANK, _DEFAULT_RANK)
    targets = str(ctx.knobs.get(_TARGETS, "+".join(_OPERATORS))).split("+")
    adapted = [
        item
        for item in ledger.of(Matmul, phase="forward")
        if any(_ends(item, _OPERATORS[target]) for target in targets)
        and item.block not in ("embedding", "head")
    ]
    axes = {_rank_axis(item): float(rank) for item in adapted}
    inputs = tuple(_INPUTS[target] for target in targets)
    added = [new for item in adapted for new in _adapter(item)]
    return freeze(ledger, inputs).set_axes(**axes).add(added)


def _ends(item: Item, names: tuple[str, ...]) -> bool:
    return item.what.rpartition(".")[2] in names


def _rank_axis(item: Item) -> str:
    return f"adapter_rank@{item.block}"


def _adapter(item: Matmul) -> Iterator[Item]:
    """Products, weights and kernels of one adapter, forward and backward."""
    rank, tags = _rank_axis(item), item.tags | {"adapter"}
    # Down is cut as the input is, up as the output is; the other half is whole on every tensor rank.
    down, up = (
        item.but(what=f"{item.what}.adapter_down", n=rank, out_bytes=None, by=_BY, tags=tags - {"column"}),
        item.but(what=f"{item.what}.adapter_up", k=rank, out_bytes=None, by=_BY, tags=tags - {"row"}),
    )
    for half in (down, up):
        yield half
        yield replace(half, phase="backward", n=half.k, k=half.n)
        yield replace(half, phase="weight", m=half.k, k=half.m)
    mesh = "expert" if "expert" in item.tags else "dense"
    weights = " + ".join(times(times(half.n, half.k), item.groups) for half in (down, up))
    yield from trained_weights(f"{item.what}.adapter", item.block, weights, _BY, mesh)
    rows = times(item.m, item.groups)
    region = tags - {"gemm", "row", "column"}
    yield Resident(
        what=f"{item.what}.adapter_up_input", block=item.block, tags=(region & {"expert"}) | {"saved", "activation", "adapter"},
        by=_BY, size=times(rows, rank), bytes_per_element=4.0, pool="activations", lifetime="micro_batch",
    )  # fmt: skip
    output, source = times(item.n, rows), times(item.k, rows)
    for what, phase, size, passes in (
        ("add", "forward", output, _OUTPUT_PASSES),
        ("add", "backward", output, _OUTPUT_PASSES_BACKWARD),
        ("sum_gradients", "backward", source, _INPUT_PASSES_BACKWARD),
    ):
        yield Stream(
            what=f"{item.what}.adapter_{what}", block=item.block, phase=phase, tags=region | {"activation"}, by=_BY, size=size,
            bytes_per_element=4.0 * passes,
        )  # fmt: skip


def _trained(subject: Pass) -> float:
    """Trained parameters of GPT-3 175B with rank 8 on the attention's output projection."""
    ledger, _ = figures.run(
        "adaptation",
        subject,
        model="gpt3-175b",
        adaptation="lora",
        adapter_rank=8,
        adapter_targets="linear_proj",
    )
    layer = [
        item for item in ledger.of(Resident, pool="gradients") if item.block not in ("embedding", "head")
    ]
    return 96 * sum(float(ledger.axes[item.size].flat[0]) for item in layer)


def _states_gb(subject: Pass) -> float:
    """Model states of 175e9 parameters with rank 4 on the attention's output projection."""
    case: dict[str, Any] = {"model": "gpt3-175b", "precision": "fp16", "gradient_dtype": "fp16"}
    whole, _ = figures.run("adaptation", lambda ledger, ctx: ledger, **case)
    ledger, _ = figures.run(
        "adaptation", subject, adaptation="lora", adapter_rank=4, adapter_targets="linear_proj", **case
    )
    return 175 * figures.held_bytes(ledger) / figures.parameters(whole)


TECHNIQUE = Technique(
    key=_BY,
    name="Low-rank adaptation (LoRA)",
    slot="adaptation",
    choices=(_BY,),
    searched=False,  # another job than training all weights: nothing to choose for speed
    asked=True,
    source="arXiv:2106.09685",
    summary="Frozen weights, trained products of low rank beside them",
    knobs=(
        Knob(
            "adaptation",
            "what is trained: everything, or small additions to frozen weights",
            ("none", _BY, "qlora", "adapters", "prefix", "ia3", "alphatuning"),
            "none",
        ),
        Detail(
            RANK,
            f"rank of the adapters ({_DEFAULT_RANK} unless given)",
            read=whole_number,
            expected="a whole number from 1",
        ),
        Detail(
            _TARGETS,
            f"what is adapted (all unless given): any of {', '.join(_OPERATORS)}, joined by +",
            read=read_targets,
            expected=f"any of {', '.join(_OPERATORS)}, joined by +",
        ),
    ),
    figures=(
        Figure(
            "trained parameters of GPT-3 175B, rank 8 on the attention's output projections",
            18e6,
            0.05,  # printed with two digits: 96·2·12288·8 = 18.9e6
            "Hu et al. 2021 (arXiv:2106.09685), Table 5: 18M",
            _trained,
        ),
        Figure(
            "GB of model states of GPT-3 175B in training",
            350.0,
            2e-3,
            "Hu et al. 2021 (arXiv:2106.09685), section 4.2: 1.2 TB reduced to 350 GB",
            _states_gb,
        ),
    ),
    apply=apply,
)
