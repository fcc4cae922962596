"""Pipeline parallelism of an iteration: layers are cut into stages, batches follow each other through them.

What it does: a replica has as many batches under way as stages; each passes all stages per token.
Saves: weights and cache per device, divided by pp.
Costs: one message of a batch's hidden states per hop; a token takes the time of all stages.
Assumes: the stage with most layers sets the pace; under arrivals, a batch with prompt tokens holds up a round of all others,
    whose way is as long as its own; in a closed loop batches are equal.
Source: Aminabadi et al. 2022 (DeepSpeed Inference, arXiv:2207.00032) §4.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Collective, Ledger
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass

BOUNDARY = "boundary"


def valid(ctx: ServingContext) -> Iterable[Check]:
    """At least one layer per stage."""
    yield Check("more pipeline stages than layers", ctx.mesh.pp <= ctx.model.n_layers)


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Adds what one hop carries."""
    hop = Collective(
        what="boundary.activation", block=BOUNDARY, tags=frozenset({"pipeline"}), by="pp_inference", source="arXiv:2207.00032",
        kind="point_to_point", group=ctx.mesh.group("pp"), size="batch*residual_seq*hidden", dtype=ctx.format.activation,
    )  # fmt: skip
    return ledger.add([hop])


def _message(subject: Pass) -> float:
    """Elements per hop and token of GPT-3 175B."""
    ledger = runs.run("stages", subject, model="gpt3-175b", pp=8, decodes=1.0)
    return runs.sent_elements(ledger, "pp")


TECHNIQUE = Technique(
    key="pp_inference",
    name="Pipeline parallel inference",
    slot="stages",
    job="serving",
    choices=("stages",),
    default=True,
    source="arXiv:2207.00032",
    summary="Layers cut into stages, batches in flight",
    knobs=(Knob("pp", "pipeline stages"),),
    figures=(
        Figure(
            "elements between stages of GPT-3 175B per token: the hidden state",
            12288.0,
            1e-9,
            "Aminabadi et al. 2022 (arXiv:2207.00032), section 4: activations between stages",
            _message,
        ),
    ),
    valid=valid,
    apply=apply,
)
