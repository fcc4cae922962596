"""What stands before and behind the layers: lookups, final norms, projection to the vocabulary, cross-entropy.

Sources: vocabulary-parallel cross-entropy, Megatron-Core ``tensor_parallel/cross_entropy.py``; multi-token prediction,
DeepSeek-V3 (arXiv:2412.19437) §2.2, Megatron-Core ``transformer/multi_token_prediction.py``.
"""

from __future__ import annotations

from planner.operators.block import block
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
    if model.tied_embeddings:
        graph.weight("tied_copy*vocab*hidden", mesh="tied")
    else:
        graph.weight("vocab*hidden")
    _predict(graph)
    if graph.training:
        for _ in range(model.mtp_modules):
            _ahead(graph, model)


def _ahead(graph: Graph, model: Model) -> None:
    """One multi-token-prediction module, behind the last layer: predicts one more token ahead.

    It norms the hidden state and the next token's embedding, projects both together to one width, and runs one layer and the
    shared head. Its projection is whole on every tensor rank, and its layer is not recomputed.
    """
    graph.stream("mtp.embedding", graph.residual, 2.0, 2.0, tags={"embedding"})
    for what in ("mtp.hidden_norm", "mtp.embedding_norm"):
        graph.norm(what, model.final_norm, "mtp")
    graph.save("mtp.projection_input", f"2*{graph.residual}", "norm", "linear_input")
    graph.matmul("mtp.projection", graph.tokens, "hidden", "2*hidden", {"mtp", "replicated"})
    graph.weight("2*hidden*hidden")
    block(graph, model.ahead)
    graph.norm("mtp.final_norm", model.final_norm, "residual")
    _predict(graph)


def _predict(graph: Graph) -> None:
    """Logits and their cross-entropy."""
    graph.matmul("head.logits", "batch*logit_seq", "vocab", "hidden", {"head", "column"}, out_bytes=4.0)
    graph.save("head.input", graph.residual, "norm")
    if not graph.training:
        return
    # Megatron's eager cross-entropy casts the logits to fp32 and turns them into the softmax, and that into their gradient, in
    # place; beside it are the logits as the product left them, then their gradient for the product's backward.
    logits = "batch*seq*vocab"
    graph.stream("head.cross_entropy", logits, 3.0, 3.0, tags={"loss"}, launches=(3.0, 3.0), kind="fp32")
    graph.transient("head.logits", logits, "logits", "loss", "fp32")
    graph.transient("head.logits_gradient", logits, "logits", "loss", "activation")
