"""The optimizer family: what each keeps per parameter, and what its update moves and computes.

What it does: adds moments, one update kernel per block and step, and a pass over the gradients for their global norm. Muon
    orthogonalises every matrix by five Newton–Schulz iterations; its embedding and head fall back to AdamW.
Saves: nothing.
Costs: moment bytes per parameter, and the update's traffic (read and write of weights, master weights, moments, gradients);
    LAMB and LARS read weights and updates once more for their norms; Muon 5(4m²n + 2m³) FLOP per m × n matrix.
Assumes: element-wise updates are one fused kernel at memory bandwidth; Adafactor's row and column moments are neglected; a
    matrix of Muon belongs to one of the ranks that share its update, and is orthogonalised as it is cut by tensor parallelism.
Source: AdamW arXiv:1711.05101; Adafactor arXiv:1804.04235; 8-bit Adam arXiv:2110.02861; Lion arXiv:2302.06675; LAMB
    arXiv:1904.00962; LARS arXiv:1708.03888; Muon, K. Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.costs.optimizer import KNOWN_OPTIMIZERS, optimizer_state_bytes, optimizer_touched_bytes
from planner.costs.precision import dtype_bytes
from planner.ledger import Array, Item, Ledger, Matmul, Resident, Stream, times
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.zero_stage.states import mesh_of, with_degrees

_VECTORS = ("embedding", "head")  # blocks whose weights Muon leaves to AdamW
_NORMS = {"lamb": 8.0, "lars": 8.0}  # bytes per parameter: fp32 weights and updates once more
_ITERATIONS = 5


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds moments, gradient norm and update."""
    name = ctx.knobs["optimizer"]
    gradient, weight = dtype_bytes(ctx.gradient_dtype), dtype_bytes(ctx.format.activation)
    master = dtype_bytes("fp32") if ctx.format.master else 0.0
    ledger = with_degrees(ledger, ctx)
    added: list[Item] = []
    for weights in ledger.of(Resident, pool="parameters"):
        if "frozen" in weights.tags:
            continue
        what = weights.what.removesuffix("parameters")
        tags = (weights.tags - {"parameters"}) | {"optimizer"}
        kind = "adamw" if name == "muon" and weights.block in _VECTORS else name
        moments = optimizer_state_bytes(kind, master_bytes=0.0)
        if moments:
            states = replace(
                weights, what=f"{what}moments", pool="optimizer", tags=tags, bytes_per_element=moments
            )
            added.append(replace(states, by="optimizer_bytes"))
        if beside := ctx.stack.update_bytes_per_parameter:
            size = times(weights.size, f"/zero_{mesh_of(weights)}")
            held = replace(
                weights,
                what=f"{what}update",
                tags=tags | {"update"},
                size=size,
                pool="workspace",
                lifetime="step",
            )
            added.append(replace(held, bytes_per_element=beside.value, by="optimizer_bytes"))
        # Where weights are their own masters, they are read as well as written.
        touched = optimizer_touched_bytes(moments + master, gradient, weight if master else 2 * weight)
        for kernel, n_bytes in (("update", touched + _NORMS.get(kind, 0.0)), ("gradient_norm", gradient)):
            added.append(
                Stream(
                    what=f"{what}{kernel}", block=weights.block, phase="step", tags=tags | {"update", kernel},
                    by="optimizer_bytes", size=times(weights.size, f"/zero_{mesh_of(weights)}"), bytes_per_element=float(n_bytes),
                )
            )  # fmt: skip
    if name == "muon":
        ledger, products = _newton_schulz(ledger, ctx)
        added += products
    return ledger.add(added)


def _newton_schulz(ledger: Ledger, ctx: Context) -> tuple[Ledger, list[Item]]:
    """Per iteration and m × n matrix (m ≤ n) A = XXᵀ and BX, 2m²n FLOP each, and A², 2m³."""
    axes: dict[str, Array] = {}
    added: list[Item] = []
    for product in ledger.of(Matmul, phase="weight"):
        if product.block in _VECTORS:
            continue
        short, long = f"short@{product.block}.{product.what}", f"long@{product.block}.{product.what}"
        sides = ledger.axes[product.m], ledger.axes[product.n]
        axes[short], axes[long] = np.minimum(*sides), np.maximum(*sides)
        mesh = "expert" if "expert" in product.tags else "dense"
        tags = frozenset({"optimizer", "update", "newton_schulz", mesh})
        for step, n, k, count in (
            ("gram", short, long, 2 * _ITERATIONS),
            ("square", short, short, _ITERATIONS),
        ):
            added.append(
                Matmul(
                    what=f"{product.what}.{step}", block=product.block, phase="step", tags=tags, by="optimizer_bytes", m=short,
                    n=n, k=k, groups=times(times(product.groups, str(count)), f"/zero_{mesh}"), dtype=ctx.format.activation,
                )
            )  # fmt: skip
    return ledger.set_axes(**axes), added


def _adam_bytes(subject: Pass) -> float:
    """Optimizer bytes per parameter of Adam in mixed precision."""
    ledger, _ = figures.run("optimizer", subject, model="gpt2-xl", optimizer="adamw")
    return figures.held_bytes(ledger, "optimizer") / figures.parameters(ledger)


TECHNIQUE = Technique(
    key="optimizer_bytes",
    name="Optimizer states and update",
    slot="optimizer",
    choices=tuple(KNOWN_OPTIMIZERS),
    default=True,
    source="arXiv:1711.05101",
    summary="Moments per parameter and the traffic of the update",
    knobs=(Knob("optimizer", "optimizer family", tuple(KNOWN_OPTIMIZERS), "adamw"),),
    figures=(
        Figure(
            "bytes of Adam states per parameter: fp32 master, momentum, variance",
            12.0,
            1e-6,
            "Rajbhandari et al. 2020 (arXiv:1910.02054), section 3.1",
            _adam_bytes,
        ),
    ),
    apply=apply,
)
