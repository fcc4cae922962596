"""The step of :mod:`automatic` as a ``shard_map`` program in Megatron's style: every collective stands where it is written."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .automatic import POOLS, update
from .block import block, empty_weights, weights


def explicit(model, case, mesh):
    """The step, the function that lays out a state of whole arrays for it, and the arguments' shardings.

    Every pool is one flat buffer per device (the weights that tensor ranks replicate, then those that they split), whole on
    every data-parallel rank or cut among them, as the ZeRO stage says.
    """
    zero, tp = case["zero_stage"], case["tp"]
    local = partial(local_weights, model=model, tp=tp)
    cut = {pool: zero >= stage for pool, stage in zip(POOLS, (3, 2, 1, 1), strict=True)}

    forward = _forward(model, case, local(empty_weights(model), rank=0))

    def step(state, x, dy):
        y, pullback = jax.vjp(forward, state["parameters"], x)
        gradients, dx = pullback(dy)
        if zero == 2:
            gradients = lax.psum_scatter(gradients, "dp", tiled=True)
        gradients = gradients + state["gradients"]
        if zero == 1:
            gradients = lax.psum_scatter(gradients, "dp", tiled=True)
        if zero == 0:
            gradients = lax.psum(gradients, "dp")
        parameters = _own_part(state["parameters"]) if zero in (1, 2) else state["parameters"]
        parameters, *moments = update(parameters, gradients, state["moment1"], state["moment2"])
        if zero in (1, 2):
            parameters = lax.all_gather(parameters, "dp", tiled=True)
        no_gradients = jnp.zeros_like(state["gradients"])
        return dict(zip(POOLS, (parameters, no_gradients, *moments), strict=True)), y, dx

    def lay_out(state):
        flat = {pool: _ravel([local(tree, rank=rank) for rank in range(tp)]) for pool, tree in state.items()}
        if not cut["gradients"]:  # every rank has accumulated its own part of the sum
            flat["gradients"] = flat["gradients"] / case["dp"]
        return flat

    layout = {pool: P(("tp", "dp")) if cut[pool] else P("tp") for pool in POOLS}
    residual = P("dp", "tp") if case["sequence_parallel"] else P("dp")
    specs = (layout, residual, residual)
    step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return jax.jit(step), lay_out, jax.tree.map(partial(NamedSharding, mesh), specs)


def _forward(model, case, like):
    """The block on one rank, from its flat buffer of weights shaped ``like``."""
    n_replicated = sum(leaf.size for leaf in like["replicated"].values())

    def forward(flat, x):
        if case["zero_stage"] == 3:
            flat = lax.all_gather(flat, "dp", tiled=True)
        if case["sequence_parallel"]:
            # Each rank sees its part of the sequence: gradients of replicated weights are summed.
            flat = jnp.concatenate([_enter(flat[:n_replicated], None), flat[n_replicated:]])
        params = _unravel(flat, like)
        if case["tp"] > model["kv_heads"]:
            qkv = params["split"]["qkv"]
            kv = _enter(qkv[..., -2:, :], _sharers_of_kv_heads(model, case["tp"]))
            params["split"]["qkv"] = jnp.concatenate([qkv[..., :-2, :], kv], axis=-2)
        return block(params, x, model, *_tensor_region(case["sequence_parallel"]))

    if case["recompute"] == "full":
        return jax.checkpoint(forward)
    gathers = case["zero_stage"] == 3 or case["sequence_parallel"] is True
    return jax.checkpoint(forward, policy=_all_but_gathered) if gathers else forward


def _all_but_gathered(primitive, *_, **__):
    """Keep what products and reductions yield for the backward; gather anew what was gathered."""
    return primitive.name in ("dot_general", "psum", "reduce_scatter")


# -- tensor-parallel regions -----------------------------------------------------------------------------------------


def _tensor_region(sequence_parallel):
    """How activations enter and leave a tensor-parallel region."""
    if not sequence_parallel:
        return lambda x: _enter(x, None), _leave
    return (
        lambda x: lax.all_gather(x, "tp", axis=1, tiled=True),
        lambda x: lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True),
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x, groups):
    """Nothing forward; backward, the sum of the gradients that the ranks (of each group) have in part."""
    return x


def _sum_backward(groups, _, dy):
    return (lax.psum(dy, "tp", axis_index_groups=groups),)


_enter.defvjp(lambda x, groups: (x, None), _sum_backward)


@jax.custom_vjp
def _leave(x):
    """The sum of what the ranks have in part; nothing backward."""
    return lax.psum(x, "tp")


_leave.defvjp(lambda x: (lax.psum(x, "tp"), None), lambda _, dy: (dy,))


def _sharers_of_kv_heads(model, tp):
    width = tp // model["kv_heads"]
    return tuple(tuple(range(start, start + width)) for start in range(0, tp, width))


# -- layout of the state ---------------------------------------------------------------------------------------------


def local_weights(params, *, model, rank, tp):
    """What one tensor rank holds of whole arrays; a KV head serves several ranks where there are fewer heads than ranks."""

    def cut(array, axis, parts, part):
        width = array.shape[axis] // parts
        return array[(slice(None),) * axis + (slice(part * width, (part + 1) * width),)]

    def local(name, axis):
        sharing = max(tp // model["kv_heads"], 1) if name == "qkv" else 1
        array = cut(params["split"][name], axis, tp // sharing, rank // sharing)
        if sharing == 1:
            return array
        queries = cut(array[..., :-2, :], 2, sharing, rank % sharing)
        return np.concatenate([queries, array[..., -2:, :]], axis=2)

    split = {name: local(name, axis) for name, (_, axis) in weights(model)["split"].items()}
    return {"replicated": params["replicated"], "split": split}


def _ravel(tree):
    """All leaves as one vector."""
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def _unravel(flat, like):
    """A vector as leaves of the shapes of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    parts = jnp.split(flat, list(itertools.accumulate(leaf.size for leaf in leaves[:-1])))
    return structure.unflatten(part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True))


def _own_part(flat):
    """The part of a whole buffer that this data-parallel rank updates."""
    width = flat.shape[0] // lax.axis_size("dp")
    return lax.dynamic_slice_in_dim(flat, lax.axis_index("dp") * width, width)
