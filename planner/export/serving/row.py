"""A serving plan as a row of a table of serving runs: the columns that ``planner validate`` reads.

One replica is a row's deployment where prompts and generation share a pool, since replicas do not know of each other; pools of
their own are one deployment with all their workers. The measuring script fills in what was measured.
"""

from __future__ import annotations

from typing import Any

from planner.export.serving.engine import Engine
from planner.export.serving.target import ServingTarget
from planner.serving.plan import Pool

__all__ = ["serving_row"]

_POOL_COLUMNS = {
    "tp": "tp_size",
    "pp": "pp_size",
    "dp": "attention_dp_size",
    "etp": "moe_tp_size",
    "ep": "moe_ep_size",
}


def serving_row(target: ServingTarget, engine: Engine, version: str) -> dict[str, Any]:
    """Cells of the plan's row, by column; cells of what is measured are left out."""
    plan, pools = target.plan, {pool.role: pool for pool in target.plan.pools}
    unlike = len(pools) < len(plan.pools)
    generating = pools.get("decode") or pools["aggregated"]
    row: dict[str, Any] = {
        "row_id": f"plan-{plan.id}", "source": "own measurement", "quality": "A", "engine": engine.title,
        "engine_version": version, "model": plan.model, "accelerator": _accelerators(target),
        "weight_dtype": generating.knobs["weights"], "kv_dtype": generating.knobs["cache"],
        "input_len": plan.traffic["isl"], "output_len": plan.traffic["osl"],
    }  # fmt: skip
    if "aggregated" in pools:
        mesh = generating.mesh
        row |= {name: mesh[name] for name in ("tp", "pp", "dp", "ep")}
        row |= {"n_devices": target.size(generating), "features": "aggregated; continuous batching"}
    else:
        row |= {"n_devices": plan.devices, "features": "disaggregated prefill/decode"}
        # A row has columns for one pool of a role: of several it says so, and no degrees.
        row["features"] += "; unlike pools of one role" * unlike
        for role, pool in pools.items() if not unlike else ():
            row |= _pool(role, pool)
    return row


def _accelerators(target: ServingTarget) -> str:
    """The devices' names, one per kind; ``planner validate`` passes rows of several kinds over, and says so."""
    return "+".join(dict.fromkeys(target.cluster(pool).device.name for pool in target.plan.pools))


def _pool(role: str, pool: Pool) -> dict[str, Any]:
    found = {f"{role}_{column}": pool.mesh[name] for name, column in _POOL_COLUMNS.items()}
    return found | {f"{role}_num_workers": pool.replicas, f"{role}_batch_size": max(pool.in_flight, 1)}
