"""A model from a Hugging Face config.json on disk, and one plan that is named rather than searched."""

from pathlib import Path

from planner import Problem, TrainWorkload, estimate, load_cluster, load_model, load_stack

model = load_model(Path(__file__).parent / "my-llama")  # the folder of a checkpoint, or its config.json
problem = Problem(
    model=model,
    cluster=load_cluster("a100-sxm-40gb:1x8"),
    workload=TrainWorkload(global_batch_size=64, seq_len=4096),
    stack=load_stack(),
    fixed={"zero_stage": 3, "micro_batch_size": 2, "recompute": "full"},
)
plan = estimate(problem)

print(f"{model.name}: {model.n_layers} layers of width {model.hidden}")
print(f"{plan.estimate.step_time_s:.2f} s per step, {plan.estimate.mfu:.1%} MFU")
for pool, n_bytes in sorted(plan.estimate.memory_bytes.items(), key=lambda held: -held[1]):
    print(f"{n_bytes / 1e9:8.2f} GB  {pool}")
