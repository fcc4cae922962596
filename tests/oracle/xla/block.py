"""One transformer block in jax: pre-norm attention and feed-forward network, written once for one device and for many.

``enter`` and ``leave`` stand where a tensor-parallel region begins and ends; on one device they do nothing. A model is a
dict: ``hidden heads kv_heads head_dim ffn`` and ``llama`` (RMSNorm, rotary embedding, SwiGLU, no biases) or not (LayerNorm,
GELU, biases).
"""

import jax
import jax.numpy as jnp
import numpy as np


def weights(model):
    """All weights as ``{"replicated" | "split": {name: (shape, axis that tensor ranks cut, or None)}}``.

    Queries, keys and values are one matrix, ordered by KV head: its queries, its key, its value.
    """
    hidden, ffn, head_dim = model["hidden"], model["ffn"], model["head_dim"]
    group = (model["kv_heads"], model["heads"] // model["kv_heads"] + 2, head_dim)
    vectors = ["norm1_gain", "norm2_gain"]
    split = {
        "qkv": ((hidden, *group), 1),
        "output": ((model["heads"], head_dim, hidden), 0),
        "fc1": ((hidden, 2 if model["llama"] else 1, ffn), 2),
        "fc2": ((ffn, hidden), 0),
    }
    if not model["llama"]:
        vectors += ["norm1_bias", "norm2_bias", "output_bias", "fc2_bias"]
        split |= {"qkv_bias": (group, 0), "fc1_bias": ((1, ffn), 1)}
    return {"replicated": dict.fromkeys(vectors, ((hidden,), None)), "split": split}


def empty_weights(model):
    """All weights as whole arrays, their values undefined."""
    return {
        part: {name: np.empty(shape, np.float32) for name, (shape, _) in shapes.items()}
        for part, shapes in weights(model).items()
    }


def block(params, x, model, enter=lambda x: x, leave=lambda x: x):
    """Output of the block for ``x`` (batch, sequence, hidden); products carry the names of the ledger's operators."""
    w = params["replicated"] | params["split"]
    x = x + leave(_attention(enter(_norm(x, w, "norm1")), w, model)) + w.get("output_bias", 0.0)
    return x + leave(_mlp(enter(_norm(x, w, "norm2")), w, model)) + w.get("fc2_bias", 0.0)


def _attention(x, w, model):
    qkv = _product("attention.qkv", "bsh,hkgd->bskgd", x, w["qkv"]) + w.get("qkv_bias", 0.0)
    group = qkv.shape[3] - 2
    q, k, v = qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]
    if model["llama"]:
        q, k = _rotate(q), _rotate(k)
    q = q.reshape(*q.shape[:2], -1, model["head_dim"])
    k, v = (jnp.repeat(t, group, axis=2) for t in (k, v))
    scores = _product("attention.scores", "bqad,bkad->baqk", q, k) / model["head_dim"] ** 0.5
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    probabilities = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    context = _product("attention.context", "baqk,bkad->bqad", probabilities, v)
    return _product("attention.output", "bsad,adh->bsh", context, w["output"])


def _mlp(x, w, model):
    wide = _product("mlp.fc1", "bsh,hgf->gbsf", x, w["fc1"])
    if model["llama"]:
        gate, up = wide
        return _product("mlp.fc2", "bsf,fh->bsh", jax.nn.silu(gate) * up, w["fc2"])
    return _product("mlp.fc2", "bsf,fh->bsh", jax.nn.gelu(wide[0] + w["fc1_bias"][0]), w["fc2"])


def _product(name, equation, *operands):
    with jax.named_scope(name):
        return jnp.einsum(equation, *operands)


def _norm(x, w, name):
    if f"{name}_bias" in w:
        x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}_gain"] + w.get(f"{name}_bias", 0.0)


def _rotate(x):
    half = x.shape[-1] // 2
    angle = jnp.outer(jnp.arange(x.shape[1]), 10000.0 ** (-jnp.arange(half) / half))
    angle = jnp.expand_dims(angle, range(1, x.ndim - 2))
    a, b, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
