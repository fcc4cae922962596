"""Bytes that memory-bound operators read and write and the kernels that they take, counted operator by operator."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .decoder import RmsNorm, rotate


def traffic(rows, width, vocab):
    """``{operator: {phase: [bytes per element, kernels]}}`` on bf16 inputs of ``rows`` by ``width`` (``vocab``) elements."""
    torch.set_default_dtype(torch.bfloat16)
    norms = nn.LayerNorm(width), RmsNorm(width, "eager")
    torch.set_default_dtype(torch.float32)
    angles, targets = torch.empty(rows, 4, dtype=torch.complex64), torch.zeros(rows, dtype=torch.int64)
    plain, heads, logits = (rows, width), (1, rows, width // 8, 8), (rows, vocab)
    return {
        "LayerNorm": _moved(norms[0], plain),
        "RMSNorm": _moved(norms[1], plain),
        "rotation": _moved(lambda t: rotate(t, angles), heads),
        "GELU": _moved(functional.gelu, plain),
        "SwiGLU": _moved(lambda gate, up: functional.silu(gate) * up, plain, plain),
        "loss": _moved(lambda t: functional.cross_entropy(t.float(), targets), logits),
    }


def _moved(function, *shapes):
    inputs = [torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    found = {}
    with _Kernels(inputs[0].numel()) as kernels:
        output = function(*inputs)
        found["forward"] = kernels.counted()
    gradient = torch.empty_like(output)
    with _Kernels(inputs[0].numel()) as kernels:
        output.backward(gradient)
        found["backward"] = kernels.counted()
    return found


class _Kernels(TorchDispatchMode):
    """Counts operators that are no views, and the bytes of their tensors of the input's size."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.n_bytes, self.launches = elements, 0, 0

    def counted(self):
        return [self.n_bytes / self.elements, self.launches]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.namespace == "aten" and not func.is_view and func.__name__ not in _FREE:
            self.launches += 1
            # The loss reads one log-probability per row, and its backward none.
            read = () if "nll_loss" in func.__name__ else args
            for tensor in tree_leaves((read, result)):
                n_bytes = tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
                self.n_bytes += n_bytes if n_bytes >= self.elements else 0
        return result


_FREE = ("detach.default", "empty.memory_format")
