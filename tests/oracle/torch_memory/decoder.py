"""A small decoder in PyTorch: Llama-like (RMSNorm, rotary embedding, SwiGLU) or GPT-like (LayerNorm, GELU, biases, dropout).

``kernels`` says what its element-wise operators are. ``eager``: those of the models' reference code, one PyTorch operator after
the other (Llama: arXiv:2302.13971 as released, which computes norms and rotations in fp32). ``fused``: functions that keep what
the fused kernels of Megatron-LM, TransformerEngine and PyTorch on CUDA keep (``aten::_fused_rms_norm``: input and 1/RMS; SwiGLU:
both inputs; the rotation: nothing).

A model is a dict: ``hidden heads kv_heads head_dim ffn vocab layers seq dropout llama qk_norm``.
"""

import torch
from torch import nn
from torch.nn import functional

EPS = 1e-5


class RmsNorm(nn.Module):
    """Norm by the root mean square, with a gain."""

    def __init__(self, width, kernels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.fused = kernels == "fused"

    def forward(self, x):
        if self.fused:
            return FusedRmsNorm.apply(x, self.weight)
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * self.weight


class FusedRmsNorm(torch.autograd.Function):
    """One kernel forward and one backward: keeps its input and one fp32 number per token."""

    @staticmethod
    def forward(ctx, x, weight):
        one_per_row = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        ctx.save_for_backward(x, weight, one_per_row)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FusedSwiGlu(torch.autograd.Function):
    """silu(gate)·up in one kernel: keeps both inputs."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return torch.empty_like(gate), torch.empty_like(up)


class FusedRotation(torch.autograd.Function):
    """A rotation of queries or keys in one kernel: keeps nothing."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.empty_like(dy)


def rotate(x, angles):
    """Pairs of neighbouring elements of (batch, sequence, heads, width), as complex fp32 numbers."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles[:, None, :]).flatten(3).type_as(x)


class Attention(nn.Module):
    """Causal attention through ``scaled_dot_product_attention``, with as many heads as its weights have."""

    def __init__(self, model, kernels):
        super().__init__()
        hidden, width, bias = model["hidden"], model["head_dim"], not model["llama"]
        self.width, self.rotary, self.fused = width, model["llama"], kernels == "fused"
        self.q = nn.Linear(hidden, model["heads"] * width, bias=bias)
        self.k = nn.Linear(hidden, model["kv_heads"] * width, bias=bias)
        self.v = nn.Linear(hidden, model["kv_heads"] * width, bias=bias)
        self.output = nn.Linear(model["heads"] * width, hidden, bias=bias)
        if model["qk_norm"]:
            self.q_norm, self.k_norm = RmsNorm(width, kernels), RmsNorm(width, kernels)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, angles):
        q, k, v = (product(x).unflatten(-1, (-1, self.width)) for product in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = (FusedRotation.apply(t) if self.fused else rotate(t, angles) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.output(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU, or GELU between two biased products."""

    def __init__(self, model, kernels):
        super().__init__()
        hidden, ffn, self.gated = model["hidden"], model["ffn"], model["llama"]
        self.fused = kernels == "fused"
        self.fc1 = nn.Linear(hidden, ffn, bias=not self.gated)
        if self.gated:
            self.up = nn.Linear(hidden, ffn, bias=False)
        self.fc2 = nn.Linear(ffn, hidden, bias=not self.gated)

    def forward(self, x):
        if not self.gated:
            return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        gate, up = self.fc1(x), self.up(x)
        return self.fc2(FusedSwiGlu.apply(gate, up) if self.fused else functional.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and network."""

    def __init__(self, model, kernels):
        super().__init__()
        self.norm1, self.norm2 = norm(model, kernels), norm(model, kernels)
        self.attention, self.mlp = Attention(model, kernels), Mlp(model, kernels)
        self.p = model["dropout"]

    def forward(self, x, angles):
        x = x + dropout(self.attention(self.norm1(x), angles), self.p)
        return x + dropout(self.mlp(self.norm2(x)), self.p)


def dropout(x, p):
    """The kernel that ``functional.dropout`` takes on CUDA: keeps a mask of one byte per element."""
    return torch.native_dropout(x, p, True)[0] if p else x


class Head(nn.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, model, kernels):
        super().__init__()
        self.norm = norm(model, kernels)
        self.logits = nn.Linear(model["hidden"], model["vocab"], bias=False)

    def forward(self, x):
        return self.logits(self.norm(x))


class Decoder(nn.Module):
    """Embedding, layers, head; ``between`` has what each layer has put out."""

    def __init__(self, model, kernels):
        super().__init__()
        self.llama, self.p = model["llama"], model["dropout"]
        self.embedding = nn.Embedding(model["vocab"], model["hidden"])
        if not self.llama:
            self.positions = nn.Embedding(model["seq"], model["hidden"])
        self.layers = nn.ModuleList(Block(model, kernels) for _ in range(model["layers"]))
        self.head, self.between = Head(model, kernels), []

    def forward(self, tokens, angles):
        x = self.embedding(tokens)
        if not self.llama:
            x = dropout(x + self.positions(angles), self.p)
        for layer in self.layers:
            x = layer(x, angles)
            self.between.append(x)
        return self.head(x)


def norm(model, kernels):
    """The family's norm."""
    if model["llama"]:
        return RmsNorm(model["hidden"], kernels)
    return nn.LayerNorm(model["hidden"], eps=EPS)
