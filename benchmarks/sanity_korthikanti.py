"""Predicted against measured step times of four published runs.

The runs are the 22B and 530B rows of Table 5 of Korthikanti et al. 2022 (arXiv:2205.05198): Megatron-LM on 80 GB A100s in
fp16, full recomputation without sequence parallelism against selective recomputation with it. They predate fused
attention and fused cross-entropy: the software stack of their time has both kernels eager.

    python benchmarks/sanity_korthikanti.py
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from planner import Plan, Problem, TrainWorkload, estimate, load_cluster, load_model
from planner.specs.stack import stack_for

RUNS = Path(__file__).resolve().parents[1] / "tests" / "data" / "korthikanti2022_table5.csv"
CHOICES = ("tp", "pp", "virtual_stages", "micro_batch_size", "recompute", "sequence_parallel")


def predicted(run: Mapping[str, str]) -> Plan:
    """The plan of one run, priced."""
    fixed = {name: run[name] for name in CHOICES}
    fixed |= {"precision": "fp16", "loss_kernel": "eager", "zero_stage": "0"}
    job = TrainWorkload(int(run["global_batch_size"]), seq_len=2048, precisions=("fp16",))
    cluster = load_cluster(f"a100-sxm-80gb:{int(run['devices']) // 8}x8")
    stack = stack_for("Megatron-LM", measured_date="2022")
    return estimate(Problem(load_model(run["model"]), cluster, job, stack, fixed))


def table() -> Iterator[str]:
    """Rows of a Markdown table."""
    yield "| model | A100 | recompute | measured s | predicted s | error |"
    yield "|---|---:|---|---:|---:|---:|"
    with RUNS.open(newline="") as file:
        for run in csv.DictReader(file):
            measured_s, predicted_s = float(run["measured_step_s"]), predicted(run).estimate.step_time_s
            yield (
                f"| {run['model']} | {run['devices']} | {run['recompute']} | {measured_s:.2f} | {predicted_s:.2f} "
                f"| {predicted_s / measured_s - 1:+.1%} |"
            )


if __name__ == "__main__":
    print("\n".join(table()))
