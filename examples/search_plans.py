"""Ranks the plans of one training job, and says how much of the space each reason ruled out."""

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search

problem = Problem(
    model=load_model("llama3.1-8b"),
    cluster=load_cluster("h100-sxm:8x8"),
    workload=TrainWorkload(global_batch_size=512, seq_len=8192),
    stack=load_stack(),
    forbidden=("optimizer_offload", "recompute=full"),
)
result = search(problem, top=3)

for plan in result.plans:
    mesh = " ".join(f"{axis}={degree}" for axis, degree in plan.mesh.items() if degree > 1)
    memory_gb = plan.estimate.memory_bytes["peak"] / 1e9
    print(
        f"{plan.estimate.step_time_s:.3f} s  {plan.estimate.mfu:.1%} MFU  {memory_gb:.1f} GB  {mesh}  ({plan.optimality.status})"
    )

counts = result.search
print(
    f"{counts.candidates:,} candidates, {counts.scored:,} scored, {counts.repriced:,} priced by the schedule engine"
)
for reason, count in sorted(
    {**counts.excluded_by_bound, **counts.rejected}.items(), key=lambda item: -item[1]
):
    print(f"{count:>12,}  {reason}")
