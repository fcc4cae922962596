"""Compiles the cases given as JSON on stdin for virtual CPU devices; prints what XLA made of each as JSON.

Input: ``{"models": {name: dims}, "batch": of one data-parallel rank, "seq": ..., "cases": {name: case}}``, a case being
``{"model", "dp", "tp", "sequence_parallel", "zero_stage", "recompute", "automatic"}``. Output, per case: what :mod:`hlo` reads,
``argument_bytes`` (XLA's memory analysis), and ``error``, the largest relative difference of the executed step from the same
step on one device.
"""

import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from . import hlo
from .automatic import POOLS, automatic, plain
from .block import empty_weights
from .explicit import explicit


def measure(case, models, batch, seq):
    """Compiles one case, reads the partitioned module, and runs it beside the step on one device."""
    model = models[case["model"]]
    devices = np.array(jax.devices()[: case["dp"] * case["tp"]]).reshape(case["dp"], case["tp"])
    mesh = jax.sharding.Mesh(devices, ("dp", "tp"))
    state, x, dy = arguments(model, (batch * case["dp"], seq, model["hidden"]))
    if case["automatic"]:
        step, shardings = automatic(model, case, mesh)
        lay_out = lambda tree: tree  # noqa: E731
    else:
        step, lay_out, shardings = explicit(model, case, mesh)
    given = jax.device_put((lay_out(state), x, dy), shardings)
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = step.lower(*given).compile(compiler_options=dump)
        (text,) = (path.read_text() for path in Path(folder).glob("*.after_spmd-partitioning.*.txt"))
    new, *rest = one_device(tuple(model.items()))(state, x, dy)
    return hlo.read(text) | {
        "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
        "error": difference(compiled(*given), (lay_out(new), *rest)),
    }


@cache
def one_device(model):
    """The compiled step of a model on one device."""
    return jax.jit(plain(dict(model)))


def arguments(model, shape):
    """A state of whole arrays, an input and an output gradient, all random."""
    random = np.random.default_rng(0)
    normal = lambda shape: random.normal(size=shape, scale=0.05).astype(np.float32)  # noqa: E731
    state = {pool: jax.tree.map(lambda weight: normal(weight.shape), empty_weights(model)) for pool in POOLS}
    state["moment2"] = jax.tree.map(lambda moment: 1.0 + moment**2, state["moment2"])  # a smooth update
    return state, normal(shape), normal(shape)


def difference(found, expected):
    """Largest difference of any pair of leaves, relative to the expected leaf's largest element."""
    leaves = (map(np.asarray, jax.tree.leaves(tree)) for tree in (found, expected))
    return max(float(np.abs(f - e).max() / (np.abs(e).max() or 1.0)) for f, e in zip(*leaves, strict=True))


if __name__ == "__main__":
    job = json.load(sys.stdin)
    cases = job.pop("cases")
    json.dump({name: measure(case, **job) for name, case in cases.items()}, sys.stdout)
