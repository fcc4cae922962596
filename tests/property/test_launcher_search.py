"""A search for a launcher finds plans that the launcher can run, and no others."""

import pytest

import planner
from planner.errors import Infeasible
from planner.export import export
from planner.export.launchers import LAUNCHERS, launcher
from planner.export.megatron_import import read_megatron
from planner.export.target import Target
from planner.solve.mixed.search import search_mixed

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


@pytest.mark.parametrize("fixed", [{"pp": "1"}, {"pp": "2", "zero_stage": "0"}])
def test_every_plan_found_over_degrees_keeps_galvatrons_rules(fixed):
    """Layers with degrees of their own, and a bound that no plan of the space for Galvatron is below."""
    tight = planner.Problem(
        planner.load_model("llama2-7b"), planner.load_cluster("a100-sxm-40gb:4x2"), planner.TrainWorkload(16, 2048),
        planner.load_stack(), reserve=0.1, launcher=launcher("galvatron"), fixed=fixed,
    )  # fmt: skip
    found = search_mixed(tight, 3, mixing=True, time_limit_s=6.0)
    for plan in found.plans:
        assert not Target.of(plan).refused(launcher("galvatron"))
        assert found.mixed["bound_s"] <= plan.estimate.step_time_s * (1.0 + 1e-9)
