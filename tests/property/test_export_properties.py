"""Laws of exports: a plan either breaks a rule that is named, or its arguments mean the same plan again."""

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from planner.errors import ExportError, InvalidPlan
from planner.export import export
from planner.export.flags import FlagReader, parse_flags
from planner.export.launchers import launcher
from planner.export.target import Target

JOBS = {
    "dense": ("llama3-8b", "h100-sxm:8x8", 256, 8192),
    "experts": ("mixtral-8x7b", "h100-sxm:8x8", 256, 4096),
}


def problem(job, **fixed):
    model, cluster, batch, seq_len = JOBS[job]
    workload = planner.TrainWorkload(batch, seq_len)
    return planner.Problem(
        planner.load_model(model), planner.load_cluster(cluster), workload, planner.load_stack(), fixed=fixed
    )


CHOICES = {
    "tp": st.sampled_from([1, 2, 4, 8]),
    "cp": st.sampled_from([1, 2]),
    "pp": st.sampled_from([1, 2, 4]),
    "ep": st.sampled_from([1, 4]),
    "zero_stage": st.sampled_from([0, 1, 2, 3]),
    "zero_group": st.sampled_from(["full", "node"]),
    "recompute": st.sampled_from(["none", "selective", "norm", "act", "mlp", "full", "block"]),
    "recompute_layers": st.sampled_from([1, 2, 3]),
    "optimizer_offload": st.sampled_from(["none", "cpu"]),
    "context": st.sampled_from(["p2p", "all_gather", "a2a"]),
    "virtual_stages": st.sampled_from([1, 2]),
    "gradient_dtype": st.sampled_from(["fp32", "bf16"]),
}


@settings(max_examples=50)
@given(st.sampled_from(["dense", "experts"]), st.fixed_dictionaries(CHOICES))
def test_exported_or_refused_and_read_back(job, choices):
    """A plan either breaks a rule that is named, or its arguments mean the same plan again."""
    if job == "dense":
        choices["ep"] = 1
    try:
        plan = planner.estimate(problem(job, **choices))
    except InvalidPlan:
        return
    broken = Target.of(plan).refused(launcher("megatron"))
    if broken:
        with pytest.raises(ExportError) as error:
            export(plan, "megatron")
        assert error.value.problems == tuple(broken)
        return
    flags = FlagReader(parse_flags(shlex.split(export(plan, "megatron")["args.txt"])), "args.txt")
    degrees = {"tp": "tensor-model", "pp": "pipeline-model", "cp": "context"}
    assert {name: flags.integer(f"--{flag}-parallel-size") for name, flag in degrees.items()} == {
        name: plan.mesh[name] for name in degrees
    }
    assert ("--use-megatron-fsdp" in flags.flags) == (plan.knobs["zero_stage"] in (2, 3))
