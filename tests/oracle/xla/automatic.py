"""A training step of one block on one device, and the same step sharded by its arguments alone.

A step is the last micro-batch of an optimizer step: it takes the state (parameters, accumulated gradients, Adam's moments),
the block's input and its output's gradient, and returns the new state, the output and the input's gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .block import block, weights

POOLS = ("parameters", "gradients", "moment1", "moment2")


def plain(model, recompute="none"):
    """The step on whole arrays, as for one device."""
    forward = partial(block, model=model)
    forward = jax.checkpoint(forward) if recompute == "full" else forward

    def step(state, x, dy):
        y, pullback = jax.vjp(forward, state["parameters"], x)
        gradients, dx = pullback(dy)
        gradients = jax.tree.map(jnp.add, gradients, state["gradients"])
        new = jax.tree.map(update, state["parameters"], gradients, state["moment1"], state["moment2"])
        triple = jax.tree.structure((0, 0, 0))
        parameters, *moments = jax.tree.transpose(jax.tree.structure(gradients), triple, new)
        no_gradients = jax.tree.map(jnp.zeros_like, gradients)
        return dict(zip(POOLS, (parameters, no_gradients, *moments), strict=True)), y, dx

    return step


def automatic(model, case, mesh):
    """The plain step, sharded by its arguments alone, and the arguments' shardings; the partitioner does the rest."""

    def spec(shape, tensor_axis=None):
        names = ["tp" if axis == tensor_axis and case["tp"] > 1 else None for axis in range(len(shape))]
        if case["zero_stage"] == 3:
            names[next(i for i, n in enumerate(shape) if names[i] is None and n % case["dp"] == 0)] = "dp"
        return P(*names)

    layout = {part: {n: spec(*cut) for n, cut in shapes.items()} for part, shapes in weights(model).items()}
    shardings = jax.tree.map(partial(NamedSharding, mesh), (dict.fromkeys(POOLS, layout), P("dp"), P("dp")))
    step = plain(model, case["recompute"])
    return jax.jit(step, in_shardings=shardings, out_shardings=shardings), shardings


def update(parameters, gradients, moment1, moment2):
    """Adam without bias correction (which would add a step counter): new parameters and moments."""
    moment1 = 0.9 * moment1 + 0.1 * gradients
    moment2 = 0.95 * moment2 + 0.05 * gradients**2
    return parameters - 1e-3 * moment1 / (jnp.sqrt(moment2) + 1e-8), moment1, moment2
