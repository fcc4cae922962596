"""Full recomputation (activation checkpointing): keep a block's input, run its forward again in the backward.

What it does: ``full`` recomputes every block; ``block`` only ``recompute_layers`` blocks of each stage.
Saves: all activations of a recomputed block but its input (2sbh bytes of 16-bit activations).
Costs: one more forward of every recomputed block, its activation collectives included; the activations of one block while it
    is at work. Weights that are sharded are gathered for the backward anyway.
Assumes: the checkpointed region is the whole block, as launchers do it.
Source: Chen et al. 2016 (arXiv:1604.06174); Megatron ``--recompute-granularity full``.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.recompute.again import recompute


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Copies each block's forward, and keeps its activations only while it is at work."""
    return recompute(ledger, lambda item: True, lambda item: "input" in item.tags, "chen_ckpt")


def _share(subject: Pass) -> float:
    """Activations of GPT-3 175B, t = 8, in per cent of those without recomputation."""
    ledger, _ = figures.run(
        "recompute", subject, model="gpt3-175b", seq=2048, tp=8, precision="fp16", recompute="full"
    )
    whole, _ = figures.run(
        "recompute", lambda plain, ctx: plain, model="gpt3-175b", seq=2048, tp=8, precision="fp16"
    )
    return 100 * figures.saved_bytes(ledger) / figures.saved_bytes(whole)


def _work(subject: Pass) -> float:
    """FLOP of a layer's step relative to forward and backward alone."""
    ledger, _ = figures.run("recompute", subject, model="gpt3-175b", seq=2048, recompute="full")
    again = figures.flop(ledger, "recompute")
    return 1 + again / figures.flop(ledger, "forward", "backward", "weight")


TECHNIQUE = Technique(
    key="chen_ckpt",
    name="Full recomputation (activation checkpointing)",
    slot="recompute",
    choices=("full", "block"),
    source="arXiv:1604.06174",
    summary="Blocks keep their input only and run forward again",
    knobs=(
        Knob(
            "recompute",
            "what is recomputed in the backward",
            (
                "none",
                "selective",
                "norm",
                "act",
                "norm+act",
                "but_attention",
                "norm+mla_up",
                "mlp",
                "modules",
                "full",
                "partitioned",
                "per_op",
                "block",
            ),
            "none",
        ),
        Knob("recompute_layers", "layers recomputed per stage (recompute=block)"),
    ),
    figures=(
        Figure(
            "activations of GPT-3 175B, t = 8, % of tensor parallelism alone",
            8.71,
            2e-3,
            "Korthikanti et al. 2022 (arXiv:2205.05198), Figure 7",
            _share,
        ),
        Figure(
            "FLOP of a layer relative to no recomputation: 96 to 72 in bsh²(1 + s/6h)",
            96 / 72,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), appendix",
            _work,
        ),
    ),
    apply=apply,
)
