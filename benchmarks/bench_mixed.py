"""Mixed clusters: how fast is a pipeline over node groups found, how sure, and what does it gain?

Each job is planned four ways, all priced by the same engine: on each node group alone; on all devices treated alike (the least
of each kind of part); as a homogeneous split, a pipeline over the groups with the same degrees and as many layers on every stage
(of the fastest members of each class); and as a pipeline whose stages have degrees and layers of their own. CPU seconds
are of one cold search each; the machine may be busy.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search
from planner.errors import Infeasible
from planner.solve.mixed.bounds import Bounds
from planner.solve.mixed.members import Option
from planner.solve.mixed.search import MixedSearch
from planner.solve.mixed.settle import Settler
from planner.solve.mixed.shapes import Shape, shapes
from planner.solve.mixed.stretch import TOGETHER

# (model, node groups, precision, global batch, tokens per sequence)
JOBS = (
    ("llama2-13b", "a100-sxm-80gb:8x8+v100-sxm2-32gb:8x8", "fp16", 512, 4096),
    ("llama2-13b", "h100-sxm:4x8+a100-sxm-80gb:4x8+l4:8x8", "bf16", 512, 4096),
    ("llama2-70b", "a100-sxm-80gb:8x8+v100-sxm2-32gb:8x8", "fp16", 1024, 4096),
    ("llama3-70b", "h100-sxm:8x8+a100-sxm-80gb:8x8", "bf16", 1024, 8192),
)


def step_s(problem: Problem) -> float:
    """The best plan's step that treats all devices alike; infinite where none fits."""
    try:
        return search(problem, 1).best.estimate.step_time_s
    except Infeasible:
        return np.inf


class Alike(Settler):
    """Plans of a shape whose stages all have one mesh and the same choices."""

    def __init__(self, bounds: Bounds, key: tuple[object, ...]) -> None:
        super().__init__(bounds)
        self.key = key

    def options(self, stage: int, a: int, b: int) -> list[tuple[float, Option]]:
        """The member that cuts a stage so."""
        return [found for found in super().options(stage, a, b) if way_of(found[1]) == self.key]


def way_of(option: Option) -> tuple[object, ...]:
    """Degrees, micro-batch size and choices."""
    return (*option.mesh.row.items(), *(choice.value for choice in option.mesh.recipe.values()))


def even_split_s(run: MixedSearch, below_s: float) -> float:
    """The best pipeline over the groups with one mesh for all stages and as many layers on each (but for one)."""
    ground, best_s = run.ground, below_s
    layers = np.array([float(ground.order.count(kind)) for kind in ground.kinds[:-3]])
    for shape in sorted(shapes(ground.groups, layers, None), key=Shape.rank):
        ranks = {ground.class_of(shape, group)[2] for group in shape.order}
        small, longer = divmod(len(ground.order), shape.pp)
        if len(ranks) > 1 or shape.bound_s >= best_s or not small:
            continue
        bounds = Bounds(shape, ground)
        bounds.level = TOGETHER
        settler = Settler(bounds)
        for key in {way_of(option) for _, option in settler.options(0, 0, small)}:
            start = (shape.pp - longer) // 2
            sizes = tuple(small + (start <= stage < start + longer) for stage in range(shape.pp))
            for found in Alike(bounds, key).priced([sizes], best_s):
                best_s = min(best_s, found.step_s)
    return best_s


def main(jobs: tuple[tuple[str, str, str, int, int], ...] = JOBS) -> None:
    print(
        "model, groups | each alone s; alike s; homogeneous split s | mixed s, gap | gain on the best of them | CPU s (wall s)"
    )
    for model, groups, precision, batch, seq in jobs:
        workload = TrainWorkload(batch, seq, precisions=(precision,))
        problem = Problem(load_model(model), load_cluster(groups), workload, load_stack(), max_oom_risk=1.0)
        alone = [step_s(replace(problem, cluster=part)) for part in problem.cluster.parts]
        alike = step_s(problem)
        start, begun = time.perf_counter(), time.process_time()
        run = MixedSearch(problem, alike if np.isfinite(alike) else 1e9, "auto")
        run.go()
        cpu_s, wall_s = time.process_time() - begun, time.perf_counter() - start
        certificate = run.finished()
        split = even_split_s(run, alike)
        best = run.best_s
        others = min(*alone, alike, split)
        print(
            f"{model}, {groups} | {', '.join(f'{x:.2f}' for x in alone)}; {alike:.2f}; {split:.2f} | {best:.3f}, "
            f"{100 * (1 - certificate.bound_s / best):.2f} % | {100 * (others / best - 1):.1f} % | {cpu_s:.1f} ({wall_s:.1f})"
        )
        if run.best is not None:
            stages = zip(run.best.sizes, run.best.assignment.stage_places(), strict=True)
            for n, (place, *_) in stages:
                degrees = " ".join(
                    f"{name} {int(v)}" for name, v in place.row.items() if v > 1 and name != "pp"
                )
                print(f"    {n} layers on {place.ranks} × {place.problem.cluster.device.name}: {degrees}")


if __name__ == "__main__":
    names = sys.argv[1:]
    main(tuple(job for job in JOBS if not names or any(name in job[1] for name in names)))
