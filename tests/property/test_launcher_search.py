"""A search for a launcher finds plans that the launcher can run, and no others."""

import pytest

import planner
from planner.errors import Infeasible
from planner.export import export
from planner.export.launchers import LAUNCHERS, launcher
from planner.export.megatron_import import read_megatron
from planner.export.target import Target

JOBS = {
    "dense": ("llama3-8b", "h100-sxm:8x8", 256, 8192),
    "long": ("qwen2.5-14b", "h100-sxm:4x8", 32, 65536),
    "large": ("llama3.1-405b", "h100-sxm:32x8", 512, 8192),
    "tight": ("gpt3-175b", "a100-sxm-40gb:12x8", 192, 2048),
    "experts": ("mixtral-8x7b", "a100-sxm-80gb:4x8", 256, 4096),
    "latent": ("deepseek-v2-lite", "h100-sxm:2x8", 512, 4096),
}


def problem(job, name=None, **fixed):
    model, cluster, batch, seq_len = JOBS[job]
    workload = planner.TrainWorkload(batch, seq_len)
    return planner.Problem(
        planner.load_model(model), planner.load_cluster(cluster), workload, planner.load_stack(), fixed=fixed,
        launcher=None if name is None else launcher(name),
    )  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_every_plan_found_for_megatron_exports(job, tmp_path):
    found = planner.search(problem(job, "megatron"), top=10)
    assert found.plans
    for plan in found.plans:
        files = export(plan, "megatron")
        (tmp_path / "run.sh").write_text(files["run.sh"])
        assert read_megatron(tmp_path / "run.sh").fixed["dp"] == plan.mesh["dp"]


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
@pytest.mark.parametrize("job", ["dense", "experts"])
def test_every_plan_found_for_a_launcher_keeps_its_rules(job, name):
    if job == "experts" and name in ("galvatron", "torchtitan"):
        with pytest.raises(Infeasible, match=r"only Llama's shape|no recipe"):
            planner.search(problem(job, name), top=1)
        return
    for plan in planner.search(problem(job, name), top=3).plans:
        assert not Target.of(plan).refused(launcher(name))


@pytest.mark.parametrize("job", ["dense", "experts"])
def test_a_launcher_makes_no_plan_better(job):
    free, bound = (planner.search(problem(job, name), top=1) for name in (None, "megatron"))
    assert bound.best.estimate.step_time_s >= free.best.estimate.step_time_s
    counts = bound.search
    lost = sum(counts.rejected.values()) + sum(counts.excluded_by_bound.values())
    assert counts.candidates == counts.scored + lost
