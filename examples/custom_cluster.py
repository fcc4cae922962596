"""A cluster from a file of one's own: how the best plan changes when the network between nodes is sixteen times slower."""

from pathlib import Path

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search

HERE = Path(__file__).parent
job = TrainWorkload(global_batch_size=256, seq_len=4096)

for cluster in (load_cluster("a100-sxm-80gb:4x8"), load_cluster(HERE / "slow_network.toml")):
    best = search(Problem(load_model("llama2-7b"), cluster, job, load_stack()), top=1).best
    mesh = " ".join(f"{axis}={degree}" for axis, degree in best.mesh.items() if degree > 1)
    between_nodes = cluster.tiers[-1].effective_bytes_per_s / 1e9
    print(f"{between_nodes:.2f} GB/s per device between nodes: {best.estimate.step_time_s:.2f} s with {mesh}")
