"""Iterations in which generating sequences check drafted tokens: the same ledger with several tokens per sequence, and a draft's.

A step of ``γ`` drafted tokens passes ``γ + 1`` tokens per sequence through the model, which shares weights and caches among them.
It follows on ``γ`` steps of the draft, and a sequence gains ``Ω = (1 − α^(γ + 1))/(1 − α)`` tokens on average. Gains shrink by
themselves where batches grow: the tokens to check fill the matrix units, and touch more experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from planner.costs.speculation import accepted_tokens
from planner.engine.pricer import Pricer
from planner.ledger import Array, Ledger, Matmul, Resident
from planner.serving.composition import Composition
from planner.serving.iteration import Footprint, Iterations
from planner.specs.model import Model
from planner.specs.speculation import Speculation
from planner.technique import ServingContext

__all__ = ["Speculating"]

_BYTES = 2.0  # of an element of the draft head's own product


class Speculating(Iterations):
    """Iterations of a recipe with ``drafted`` tokens a step.

    Assumes: the draft lies on the ranks of the model, cut as far as its heads allow, and whole on one stage; it reads the prompts
    too; its steps follow each other without the scheduler.
    """

    def __init__(self, ctx: ServingContext, pricer: Pricer, speculation: Speculation, drafted: int) -> None:
        super().__init__(ctx, pricer)
        self.drafted = float(drafted)
        self.step_tokens = self.drafted + 1.0
        self.accepted = float(accepted_tokens(speculation.acceptance, drafted))
        self._own_ends = speculation.method == "draft"
        made = {"mtp": _module, "eagle": _head}.get(speculation.method)
        model = made(ctx.model) if made is not None else speculation.model
        self._draft = None if model is None else _drafting(ctx, model, self.pricer)
        if self._draft is not None and speculation.method == "eagle":
            self._draft.widen(_joins)

    def seconds(self, batch: Composition) -> Array:
        """Seconds per row: the model's check, behind the draft's steps."""
        return np.asarray(super().seconds(replace(batch, step_tokens=self.step_tokens)) + self.draft_s(batch))

    def sized(self, batch: Composition, *, captured: bool = True) -> Ledger:
        """The ledger of a batch: the model's part."""
        return super().sized(replace(batch, step_tokens=self.step_tokens), captured=captured)

    def draft_s(self, batch: Composition) -> Array:
        """Seconds of the draft: prompts and the first token together, then a token at a time."""
        if self._draft is None:
            return np.zeros_like(batch.decodes)
        first_s = self._draft.seconds(batch)
        if self.drafted <= 1.0:
            return first_s
        zero = np.zeros_like(batch.decodes)
        later = replace(batch, prefill_tokens=zero, prefill_context=zero)
        return np.asarray(first_s + (self.drafted - 1.0) * self._draft.seconds(later))

    def footprint(self) -> Footprint:
        """The model's and the draft's bytes; the draft's cache holds the same tokens."""
        own = super().footprint()
        if self._draft is None:
            return own
        more = self._draft.footprint()
        weights = more.weights_bytes if self._own_ends else more.weights_bytes - _ends_bytes(self._draft)
        window = dict(own.window_bytes)
        for length, each in more.window_bytes.items():
            window[length] = window[length] + each if length in window else each
        return Footprint(
            own.weights_bytes + weights, own.token_bytes + more.token_bytes, window,
            own.sequence_bytes + more.sequence_bytes, own.copies,
        )  # fmt: skip


def _module(model: Model) -> Model:
    """A prediction module: a layer as the last, between the model's own ends (DeepSeek-V3, section 2.2)."""
    name = model.layers[-1][0]
    return replace(
        model, name=f"{model.name} prediction module", layers=((name, 1),), blocks={name: model.blocks[name]}
    )


def _head(model: Model) -> Model:
    """A layer like the model's last dense one, between the model's own ends (EAGLE, arXiv:2401.15077, section 4.1)."""
    name = next(name for name, _ in reversed(model.layers) if model.blocks[name].moe is None)
    return replace(
        model, name=f"{model.name} draft head", layers=((name, 1),), blocks={name: model.blocks[name]}
    )


def _joins(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """The product in front of a draft head's layer: a token's embedding and the model's hidden state, whole on every rank."""
    block, dtype = ctx.model.layers[0][0], ctx.format.activation
    common: dict[str, Any] = {
        "what": "draft.join",
        "block": block,
        "by": "eagle",
        "source": "arXiv:2401.15077",
    }
    return ledger.add(
        [
            Matmul(
                m="batch*seq", n="hidden", k="2*hidden", dtype=dtype, out_bytes=_BYTES,
                format="float16" if dtype == "fp16" else "bfloat16", **common,
            ),
            Resident(size="2*hidden*hidden", bytes_per_element=_BYTES, pool="parameters", lifetime="always", **common),
        ]
    )  # fmt: skip


def _drafting(ctx: ServingContext, model: Model, pricer: Pricer) -> Iterations:
    mesh = ctx.mesh
    heads = [block.attention.heads for block in model.blocks.values() if block.attention]
    whole = np.all([h % mesh.tp == 0 for h in heads], axis=0) if heads else np.ones_like(mesh.tp, dtype=bool)
    one = np.ones_like(mesh.tp)
    tp = np.where(whole, mesh.tp, 1.0)
    mixture = any(block.moe for block in model.blocks.values())
    ep, etp = (mesh.ep, mesh.etp) if mixture else (one, tp * mesh.dp)
    smaller = replace(mesh, tp=tp, pp=one, ep=ep, etp=etp)
    plain = replace(ctx.traffic, adapters=None, adapter_rank=None)  # adapters are the model's own
    drafting = Iterations(replace(ctx, model=model, mesh=smaller, traffic=plain), pricer)
    free = {
        name: replace(getattr(drafting.software, name), value=0.0) for name in ("iteration_s", "sequence_s")
    }
    drafting.software = replace(drafting.software, **free)
    return drafting


def _ends_bytes(iterations: Iterations) -> Array:
    """Bytes of embedding and output projection, which a module shares with its model."""
    found = np.zeros_like(iterations.ctx.mesh.tp)
    for item in iterations._eager.of(Resident, pool="parameters"):
        if item.block in ("embedding", "head"):
            found = found + iterations._eager.axes[item.size] * item.bytes_per_element
    return found
