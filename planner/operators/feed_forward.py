"""Feed-forward networks: two or three matrices around an activation, and mixtures of them.

Sources: Korthikanti et al. 2022 (arXiv:2205.05198) §4.1; grouped experts behind a permutation, MegaBlocks (arXiv:2211.15841)
§3; a shared expert, DeepSeekMoE (arXiv:2401.06066) §3.2, and its gate, Megatron-LM ``moe/shared_experts.py``; experts' biases,
``moe/experts.py`` there (``_apply_bias``, in NeMo Automodel as well); experts of latent width, Nemotron-3 Super as released.
"""

from __future__ import annotations

from planner.ledger import times
from planner.operators.graph import Graph
from planner.specs.model import Mlp, Moe

__all__ = ["mlp", "moe"]


def mlp(graph: Graph, spec: Mlp, region: str, axis: str, keeps_input: bool) -> None:
    """Emits a dense network; its width is the axis ``axis``, its items' names begin with ``region``."""
    wide = _network(graph, spec, region, axis, keeps_input)
    # Most is held behind the activation's backward: the gradient of its output has taken the output's place.
    graph.gradient(f"{region}.act_input", wide)


def _network(graph: Graph, spec: Mlp, region: str, axis: str, keeps_input: bool) -> str:
    """Its items but for gradients of activations; returns the size of the activation's input."""
    ffn = graph.axis(axis, spec.ffn)
    wide = f"2*{ffn}" if spec.gated else ffn
    graph.matmul(f"{region}.fc1", graph.rows, wide, "hidden", {region, "column"})
    graph.weight(f"{wide}*hidden", f"{ffn}*hidden")
    if spec.bias:
        graph.weight(wide, "hidden")
    if keeps_input:
        graph.save(f"{region}.fc1_input", graph.residual, "norm", "linear_input")
    graph.save(f"{region}.act_input", f"{wide}*{graph.rows}", region)
    _activation(graph, region, f"{graph.rows}*{ffn}", gated=spec.gated)
    graph.matmul(f"{region}.fc2", graph.rows, "hidden", ffn, {region, "row"})
    return f"{wide}*{graph.rows}"


def moe(graph: Graph, spec: Moe, keeps_input: bool) -> None:
    """Emits a router, permutation, grouped expert networks and weighted combination; a shared expert beside them.

    Routed experts may work at a ``latent`` width, between two projections that every token passes once.
    """
    experts, ffn = graph.axis("experts", spec.experts), graph.axis("expert_ffn", spec.expert_ffn)
    all_experts, top_k = graph.axis("router_experts", spec.experts), graph.axis("top_k", spec.top_k)
    tokens, expert_rows = graph.tokens, graph.axis("expert_rows", 1.0)
    width = graph.axis("moe_latent", spec.latent) if spec.latent else "hidden"
    per_expert = f"{tokens}*{top_k}*{expert_rows}/{all_experts}"
    routed = times(per_expert, experts)
    wide = f"2*{ffn}" if spec.gated else ffn
    graph.matmul("moe.router", tokens, all_experts, "hidden", {"router", "replicated"})
    graph.weight(f"hidden*{all_experts}")
    if spec.router_bias:
        graph.weight(all_experts)
    if keeps_input:
        graph.save("moe.input", graph.residual, "norm")
    if spec.latent:
        graph.matmul("moe.latent_down", tokens, width, "hidden", {"moe", "replicated"})
    _exchange(graph, "moe.permute", f"{tokens}*{top_k}*{width}", "dispatch")
    graph.save("moe.fc1_input", times(routed, width), "dispatch", "moe", "linear_input")
    graph.matmul("moe.fc1", per_expert, wide, width, {"moe", "expert"}, experts, grouped=True)
    graph.save("moe.act_input", times(routed, wide), "moe")
    _activation(graph, "moe", times(routed, ffn), gated=spec.gated)
    graph.matmul("moe.fc2", per_expert, width, ffn, {"moe", "expert"}, experts, grouped=True)
    if spec.bias and graph.training:
        # Output biases, times the probabilities in fp32, expert by expert: product, sum, concatenation, cast; backward also both
        # factors' gradients, each a product and a sum.
        calls = (f"2*{experts} + 2", f"6*{experts} + 2")
        graph.stream("moe.bias", times(routed, width), 14.0, 20.0, tags={"moe"}, calls=calls)
    if spec.gated and spec.expert_ffn >= (spec.latent or graph.model.hidden):
        graph.gradient("moe.act_input", times(routed, wide))
    else:  # most is held before, behind the second product's backward
        graph.gradient("moe.fc2_output", times(routed, width))
        graph.gradient("moe.fc2_input", times(routed, ffn))
    _exchange(graph, "moe.unpermute", f"{tokens}*{top_k}*{width}", "combine")
    graph.weight(f"{wide}*{experts}*{width}", f"{experts}*{ffn}*{width}", mesh="expert")
    if spec.bias:
        graph.weight(f"{wide}*{experts}", f"{experts}*{width}", mesh="expert")
    if spec.latent:
        graph.save("moe.combined", f"{tokens}*{width}", "combine", "moe", "linear_input")
        graph.matmul("moe.latent_up", tokens, "hidden", width, {"moe", "replicated"})
        graph.weight(f"2*hidden*{width}")
    if spec.shared_ffn:
        shared = Mlp(spec.shared_ffn, spec.gated, spec.bias)
        _network(graph, shared, "shared_expert", "shared_ffn", keeps_input=False)
        if spec.shared_gate:
            _shared_gate(graph)


def _shared_gate(graph: Graph) -> None:
    """One sigmoid per token scales the shared expert's output."""
    tags = {"shared_expert", "router", "replicated"}
    graph.matmul("shared_expert.gate", graph.tokens, "1", "hidden", tags)
    graph.weight("hidden")
    graph.save("shared_expert.output", graph.residual, "shared_expert")
    graph.stream("shared_expert.scale", graph.residual, 2.0, 3.0, tags={"shared_expert"})


def _activation(graph: Graph, region: str, size: str, *, gated: bool) -> None:
    """The activation, times the gate's other half if there is one, and what the second product keeps of it."""
    forward, backward = (3.0, 5.0) if gated else (2.0, 3.0)
    graph.stream(f"{region}.act", size, forward, backward, tags={region, f"{region}_act"})
    graph.save(f"{region}.fc2_input", size, f"{region}_act", region, "linear_input")


def _exchange(graph: Graph, what: str, size: str, region: str) -> None:
    """Copies tokens to the order of their experts, or back."""
    graph.stream(what, size, 2.0, 2.0, tags={"moe", region}, launches=(2.0, 2.0))
