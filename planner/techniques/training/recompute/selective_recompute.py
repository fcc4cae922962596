"""Selective recomputation: run cheap, memory-hungry modules again in the backward.

What it does: drops the tensors that the chosen modules produce and copies those modules' forward to the backward. ``modules``
    takes any of them, in Megatron's words, from ``recompute_modules``.
Saves: ``selective``: 5as²b bytes of eager attention (nothing worth it under a fused kernel); ``norm``: the norms' outputs;
    ``act``: the input of the second feed-forward product; ``mla_up``: queries, keys and values of latent attention; ``mlp``:
    everything inside the feed-forward network or the experts.
Costs: the modules' forward, their activation collectives included.
Assumes: a module's input is kept, or produced by a module that is recomputed as well.
Source: Korthikanti et al. 2022 (arXiv:2205.05198) §5; DeepSeek-V3 (arXiv:2412.19437) §3.2.3 for ``norm+mla_up``; Megatron
    ``--recompute-modules``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.ledger import Ledger
from planner.technique import Check, Context, Detail, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.recompute.again import recompute

_ACTIVATIONS = frozenset({"mlp_act", "moe_act", "shared_expert_act"})
_OF_MEGATRON = {
    "core_attn": frozenset({"core_attn"}),
    "layernorm": frozenset({"norm"}),
    "moe_act": _ACTIVATIONS,
    "mla_up_proj": frozenset({"mla_up"}),
    "mlp": frozenset({"mlp"}),
    "moe": frozenset({"moe", "shared_expert"}),
    "shared_experts": frozenset({"shared_expert"}),
}
"""Recompute regions by their names in ``--recompute-modules``."""
_NAMES = "recompute_modules"
MODULES = {
    "selective": frozenset({"core_attn"}),
    "norm": frozenset({"norm"}),
    "act": _ACTIVATIONS,
    "norm+act": _ACTIVATIONS | {"norm"},
    "norm+mla_up": frozenset({"norm", "mla_up"}),
    "mlp": frozenset({"mlp", "moe", "shared_expert"}),
}


def read_modules(text: str) -> str:
    """Names of modules joined by ``+``, in the order of Megatron's help and without repetition.

    Raises:
        ValueError: a name is none of Megatron's.

    >>> read_modules("moe+layernorm")
    'layernorm+moe'
    """
    names = set(text.split("+"))
    if not names <= _OF_MEGATRON.keys():
        raise ValueError(text)
    return "+".join(name for name in _OF_MEGATRON if name in names)


def valid(ctx: Context) -> Iterable[Check]:
    """Modules are named."""
    yield Check(f"recompute=modules needs {_NAMES}", bool(_modules(ctx)))


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Drops what the modules produce, copies their forward."""
    modules = _modules(ctx)
    # Attention's output is the module's result, which the next product needs.
    return recompute(
        ledger,
        lambda item: not modules.isdisjoint(item.tags),
        lambda item: item.what.endswith(".core_output"),
        "selective_recompute",
    )


def _modules(ctx: Context) -> frozenset[str]:
    """Recompute regions that run again."""
    choice = ctx.knobs["recompute"]
    if choice in MODULES:
        return MODULES[choice]
    names = str(ctx.knobs.get(_NAMES, "")).split("+")
    return frozenset().union(*(_OF_MEGATRON.get(name, frozenset()) for name in names))


def _helps(ctx: Context) -> bool:
    """Whether the model and its kernels have what the modules are to drop."""
    modules = ctx.knobs["recompute"]
    blocks = ctx.model.blocks.values()
    if modules == "selective":
        return ctx.knobs.get("attention_kernel") == "eager" and any(b.attention is not None for b in blocks)
    if modules == "norm+mla_up":
        return any(b.attention is not None and b.attention.latent for b in blocks)
    return modules == "norm" or any(b.mlp is not None or b.moe is not None for b in blocks)


def _share(model: str, sequence_parallel: str, published: float, **choice: str) -> Figure:
    def compute(subject: Pass) -> float:
        case: dict[str, Any] = {"model": model, "seq": 2048, "tp": 8, "precision": "fp16"}
        whole, _ = figures.run("recompute", lambda ledger, ctx: ledger, **case)
        case |= {"sequence_parallel": sequence_parallel, "recompute": "selective", **choice}
        ledger, _ = figures.run("recompute", subject, **case)
        return 100 * figures.saved_bytes(ledger) / figures.saved_bytes(whole)

    beside = " with sequence parallelism" if sequence_parallel == "true" else ""
    what = f"activations of {model}{beside}, t = 8, % of tensor parallelism alone"
    return Figure(what, published, 3e-3, "Korthikanti et al. 2022 (arXiv:2205.05198), Figure 7", compute)


TECHNIQUES = (
    Technique(
        key="selective_recompute",
        name="Selective recomputation",
        slot="recompute",
        choices=tuple(MODULES),
        source="arXiv:2205.05198",
        summary="Chosen modules run forward again",
        figures=(
            _share("gpt3-175b", "false", 56.53),
            _share("gpt3-175b", "true", 18.49),
            _share("mt-nlg-530b", "false", 62.04),
            _share("mt-nlg-530b", "true", 20.27),
            _share("megatron-22b", "true", 16.18),
        ),
        apply=apply,
        active=_helps,
    ),
    Technique(
        key="module_recompute",
        name="Recomputation of any modules",
        slot="recompute",
        choices=("modules",),
        searched=False,  # 127 sets of modules; the named choices are those that launchers' recipes use
        asked=True,
        source="arXiv:2205.05198",
        summary="Any modules of Megatron's run forward again",
        knobs=(
            Detail(
                _NAMES,
                f"modules that run again (recompute=modules): any of {', '.join(_OF_MEGATRON)}, joined by +",
                read=read_modules,
                expected=f"any of {', '.join(_OF_MEGATRON)}, joined by +",
                needed_by="recompute=modules",
            ),
        ),
        figures=(_share("gpt3-175b", "true", 18.49, recompute="modules", recompute_modules="core_attn"),),
        valid=valid,
        apply=apply,
    ),
)
