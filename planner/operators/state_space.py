"""State-space mixers: Mamba, Mamba-2, gated DeltaNet.

Sources: Mamba (arXiv:2312.00752) §3.4; Mamba-2 (arXiv:2405.21060) §7; gated DeltaNet (arXiv:2412.06464) §3; norms inside the
mixer, Jamba (arXiv:2403.19887) §6.4. What is kept and made again: state-spaces/mamba, ``mamba_inner_fn`` and
``mamba_split_conv1d_scan_combined``, which Megatron-Core's mixer calls (``megatron/core/ssm/mamba_mixer.py``).
"""

from __future__ import annotations

from planner.costs.state_space import scan_work
from planner.ledger import times
from planner.operators.graph import NORM, NORM_BACKWARD, Graph
from planner.specs.model import Ssm

__all__ = ["state_space"]

# FLOP of the recurrence per element of state and token: step times input, decay, outer product, sum, and 2 for the output.
_SCAN_FLOP = 6.0
_DELTA_FLOP = 8.0  # and 2 to read what the state holds for the key, before it is corrected

_CHUNK = 128  # Megatron-Core mamba_mixer.py (chunk_size); config.json of Nemotron-H and Nemotron 3
_CONV, _CONV_BACKWARD = 2.0, 3.0  # x -> y; (dy, x) -> dx
_SCAN_KERNELS = (
    5.0,
    15.0,
)  # mamba_ssm ssd_combined.py: Triton kernels of forward and backward; generation runs one


def state_space(graph: Graph, spec: Ssm, keeps_input: bool) -> None:
    """Emits input projection, short convolution, selective scan, gate and output projection."""
    inner, rows = graph.axis("ssm_inner", spec.inner), graph.rows
    conv = graph.axis("ssm_conv", spec.conv_kernel)
    projected, convolved = (_selective if spec.version == 1 else _headed)(graph, spec, inner)
    again = 0.0 if spec.delta else _CONV  # the scan's backward makes its inputs again
    graph.weight(times(projected, "hidden"), times(convolved, conv), f"{inner}*hidden")
    if spec.conv_bias:
        graph.weight(convolved)
    if spec.bias:
        graph.weight(projected, "hidden")
    if keeps_input:
        graph.save("ssm.in_input", graph.residual, "norm", "linear_input")
    graph.save("ssm.projected", times(projected, rows), "ssm")
    graph.stream("ssm.conv", times(convolved, rows), _CONV, again + _CONV_BACKWARD, tags={"ssm"})
    (_recurrence if spec.version == 1 or spec.delta else _chunked_scan)(graph, spec, f"{rows}*{inner}")
    graph.save("ssm.scan_output", f"{rows}*{inner}", "ssm")
    graph.matmul("ssm.out", rows, "hidden", inner, {"ssm", "row"})
    state = graph.axis("ssm_state", spec.state_size)
    graph.cache("ssm.state", f"batch*{inner}*{state} + " + times(convolved, f"batch*{conv}"))


def _recurrence(graph: Graph, spec: Ssm, size: str) -> None:
    """Mamba and DeltaNet: one kernel, element by element of the state."""
    flop = (_DELTA_FLOP if spec.delta else _SCAN_FLOP) * spec.state_size
    graph.stream("ssm.scan", size, 4.0, 8.0, tags={"ssm"}, flop=flop)


def _chunked_scan(graph: Graph, spec: Ssm, size: str) -> None:
    """Mamba-2: products inside chunks, states between them, a kernel for every step; gate included."""
    work = scan_work(spec.inner, spec.state_size, spec.groups, _CHUNK)
    graph.stream(
        "ssm.scan", size, float(work.elements) / spec.inner, float(work.backward_elements) / spec.inner, tags={"ssm"},
        launches=_SCAN_KERNELS if graph.training else (1.0, 0.0),
        products=(float(work.flop) / spec.inner, float(work.backward_flop) / spec.inner),
    )  # fmt: skip
    if spec.gated_norm:
        graph.save("ssm.gated", size, "ssm")
        graph.save("ssm.normalised", size, "ssm", "linear_input")


def _selective(graph: Graph, spec: Ssm, inner: str) -> tuple[str, str]:
    """Mamba: step, B and C of every channel from the convolved input; returns the projected and convolved widths."""
    state, rank = graph.axis("ssm_state", spec.state_size), graph.axis("ssm_rank", spec.dt_rank)
    graph.matmul("ssm.in", graph.rows, f"2*{inner}", "hidden", {"ssm", "column"})
    small = f"{rank} + 2*{state}"
    graph.matmul("ssm.x", graph.rows, small, inner, {"ssm", "row"})
    if spec.inner_norms:
        graph.stream(
            "ssm.inner_norm", times(small, graph.rows), NORM, NORM_BACKWARD, tags={"ssm"}, launches=(3.0, 3.0)
        )
        graph.weight(small)
    graph.matmul("ssm.dt", graph.rows, inner, rank, {"ssm", "column"})
    graph.weight(times(small, inner), f"{rank}*{inner}", inner)  # the step's projection has a bias
    graph.weight(f"{inner}*{state}", inner)  # A and D
    return f"2*{inner}", inner


def _headed(graph: Graph, spec: Ssm, inner: str) -> tuple[str, str]:
    """Mamba-2 and DeltaNet: everything from one projection; A and the step's bias per head, and D or a write strength."""
    state = graph.axis("ssm_state", spec.state_size)
    heads, groups = graph.axis("ssm_heads", spec.heads), graph.axis("ssm_groups", spec.groups)
    convolved = f"{inner} + 2*{groups}*{state}"
    projected = f"2*{inner} + 2*{groups}*{state} + " + (f"2*{heads}" if spec.delta else heads)
    graph.matmul("ssm.in", graph.rows, projected, "hidden", {"ssm", "column"})
    graph.weight(f"{2 if spec.delta else 3}*{heads}")
    if spec.gated_norm:
        # DeltaNet's norm spans one head and is shared by all.
        graph.weight(graph.axis("head_dim", spec.inner // spec.heads, "ssm") if spec.delta else inner)
        graph.stream("ssm.gated_norm", f"{graph.rows}*{inner}", NORM, NORM_BACKWARD, tags={"ssm"})
    return projected, convolved
