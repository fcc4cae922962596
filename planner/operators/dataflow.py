"""Which operator of a layer reads which: the edges between the kernels that the other modules of this package emit.

The names are those of the kernels. What stands here is the order of computation inside a layer, which a ledger does not
need: it adds up. Graph solvers do.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["INPUT", "knows", "reads"]

INPUT = "input"
"""The layer's input, where the residual stream enters."""

# Per kernel, what it reads; of alternatives (joined by |) the first that the layer has.
_READS: dict[str, tuple[str, ...]] = {
    "embedding": (),
    "norm1": ("input",),
    "attention.qkv": ("norm1|input",),
    "attention.q": ("norm1|input",),
    "attention.q_down": ("norm1|input",),
    "attention.q_norm": ("attention.q_down",),
    "attention.q_up": ("attention.q_norm",),
    "attention.kv_down": ("norm1|input",),
    "attention.kv_norm": ("attention.kv_down",),
    "attention.kv_up": ("attention.kv_norm",),
    "attention.qk_norm": ("attention.qkv|attention.q_up|attention.q", "attention.qkv|attention.kv_up"),
    "attention.rope": (
        "attention.qk_norm|attention.qkv|attention.q_up|attention.q", "attention.qk_norm|attention.qkv|attention.kv_up",
    ),
    "attention.core": (
        "attention.rope|attention.qk_norm|attention.qkv|attention.q_up|attention.q", "attention.qkv|attention.kv_up",
    ),
    "attention.scores": ("attention.rope|attention.qk_norm|attention.qkv|attention.q_up|attention.q",),
    "attention.softmax": ("attention.scores",),
    "attention.context": ("attention.softmax", "attention.qkv|attention.kv_up"),
    "attention.gate": ("attention.core|attention.context", "attention.qkv|attention.q"),
    "attention.output": ("attention.gate|attention.core|attention.context",),
    "norm1_post": ("attention.output",),
    "mixer.add": ("norm1_post|attention.output", "input"),
    "norm2": ("mixer.add|input",),
    "mlp.fc1": ("norm2|norm1|mixer.add|input",),
    "mlp.act": ("mlp.fc1",),
    "mlp.fc2": ("mlp.act",),
    "norm2_post": ("mlp.fc2",),
    "moe.router": ("norm2|norm1|mixer.add|input",),
    "moe.latent_down": ("norm2|norm1|mixer.add|input",),
    "moe.permute": ("moe.latent_down|norm2|norm1|mixer.add|input",),
    "moe.fc1": ("moe.permute",),
    "moe.act": ("moe.fc1",),
    "moe.fc2": ("moe.act",),
    "moe.unpermute": ("moe.fc2", "moe.router"),
    "moe.latent_up": ("moe.unpermute",),
    "shared_expert.fc1": ("norm2|norm1|mixer.add|input",),
    "shared_expert.act": ("shared_expert.fc1",),
    "shared_expert.fc2": ("shared_expert.act",),
    "shared_expert.gate": ("norm2|norm1|mixer.add|input",),
    "shared_expert.scale": ("shared_expert.fc2", "shared_expert.gate"),
    "final_norm": ("input",),
    "head.logits": ("final_norm|input",),
    "head.cross_entropy": ("head.logits",),
}  # fmt: skip
# The last addition of a layer: all that no addition before it has added, and the residual stream.
_ADDED = (
    "norm2_post|mlp.fc2", "moe.latent_up|moe.unpermute", "shared_expert.scale|shared_expert.fc2",
)  # fmt: skip


def knows(kernel: str) -> bool:
    """Whether the data flow of a kernel is known: not that of state-space mixers, cross-attention, indexers and encoders."""
    return kernel in _READS or kernel == "mlp.add"


def reads(kernel: str, layer: Collection[str]) -> tuple[str, ...]:
    """The kernels whose output a kernel of a layer reads; :data:`INPUT` where that is the layer's own input.

    Args:
        kernel: its name.
        layer: names of all kernels of the layer.

    Raises:
        KeyError: the table does not know the kernel.

    >>> reads("mlp.add", {"norm1", "attention.output", "mlp.fc2", "mlp.add"})  # attention and network in parallel
    ('attention.output', 'mlp.fc2', 'input')
    """
    if kernel == "mlp.add":
        mixed = "mixer.add" in layer
        wanted = (*(() if mixed else ("norm1_post|attention.output",)), *_ADDED, "mixer.add|input")
        found = [_first(names, layer) for names in wanted]
        return tuple(name for name in found if name is not None)
    sources = [_first(names, layer) for names in _READS[kernel]]
    return tuple(dict.fromkeys(name for name in sources if name is not None))


def _first(names: str, layer: Collection[str]) -> str | None:
    return next((name for name in names.split("|") if name == INPUT or name in layer), None)
