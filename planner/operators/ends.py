"""What stands before and behind the layers: lookups, final norms, projection to the vocabulary, cross-entropy."""

from __future__ import annotations

from planner.operators.graph import Graph
from planner.specs.model import Model

__all__ = ["embedding", "head"]


def embedding(graph: Graph, model: Model) -> None:
    """Token and position lookup, for the encoder's tokens as well where it has any."""
    if model.vocab:
        graph.weight("vocab*hidden")
    if model.learned_positions:
        graph.weight(f"{model.learned_positions}*hidden")
    if model.extra_embedding_parameters:
        graph.weight(f"{model.extra_embedding_parameters}")
    lookups = 2.0 + bool(model.learned_positions)
    looked_up = [("embedding", graph.residual)]
    if model.encoder_layers and model.encoder_tokens:
        looked_up.append(("encoder_embedding", "batch*encoder_residual_seq*hidden"))
    for what, size in looked_up:
        graph.stream(what, size, lookups, 2.0, tags={"embedding"})
        if model.dropout:
            graph.save(f"{what}.dropout_mask", size, "embedding", mask=True)


def head(graph: Graph, model: Model) -> None:
    """Final norms, projection to the vocabulary, cross-entropy; logits live only while the head is at work.

    An encoder's final norm is counted here as well, where both stacks have ended.
    """
    if model.final_norm != "none":
        graph.norm("final_norm", model.final_norm, "residual")
        if model.encoder_layers:
            size = "batch*encoder_residual_seq*hidden"
            graph.norm("encoder_final_norm", model.final_norm, "residual", size=size)
    if not model.head:
        return
    if model.head_bias:
        graph.weight("vocab")
    if not model.vocab:
        return
    graph.matmul("head.logits", "batch*logit_seq", "vocab", "hidden", {"head", "column"}, out_bytes=4.0)
    graph.save("head.input", graph.residual, "norm")
    if model.tied_embeddings:
        graph.weight("tied_copy*vocab*hidden", mesh="tied")
    else:
        graph.weight("vocab*hidden")
    if not graph.training:
        return
    # Eager cross-entropy keeps the logits and a separate gradient in fp32 (softmax, then its backward).
    logits = "batch*seq*vocab"
    graph.stream("head.cross_entropy", logits, 3.0, 3.0, tags={"loss"}, launches=3.0, kind="fp32")
    for what in ("head.logits", "head.logits_gradient"):
        graph.transient(what, logits, "logits", "loss", "fp32")
