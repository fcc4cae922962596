"""Trains small GPT-2-like transformers on a CPU and writes what was measured as rows of the training form.

``python benchmarks/cpu_train.py -o runs.csv``, with PyTorch. Every run is fp32 in eager mode: fused attention
(scaled_dot_product_attention), fused AdamW with gradient clipping, DistributedDataParallel over gloo where there are two
processes of one thread each, ``torch.utils.checkpoint`` around every block where recompute is full: as it comes, which stops
once the last tensor that the backward needs is there (``full``), and to the end of the block (``whole``).

One process is timed by the processor time of a step, which stands still while others have its core. Two processes are timed
by the clock, in steps during which they hardly had to wait for a core. Every run gives two rows: its time with the largest
resident set of a process (VmHWM), and what PyTorch's profiler saw allocated at most.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve()
VOCAB = 8192
# layers, hidden, heads, tokens per sequence, sequences per process
MODELS = (
    (4, 256, 4, 256, 8),
    (6, 384, 6, 256, 8),
    (4, 512, 8, 512, 4),
    (8, 512, 8, 256, 8),
    (6, 768, 12, 256, 4),
    (4, 1024, 16, 512, 2),
)
FLAGS = "attention-backend=sdpa"
STEPS, PATIENCE = 4, 12  # undisturbed steps that suffice, steps at most
REST = 1.0  # lengths of a step that others have the machine for after one that went before them
DISTURBED = 0.05  # share of a step that a process's threads waited for a core
COLUMNS = (
    "row_id", "source", "model", "family", "n_layers", "hidden", "ffn_hidden", "n_heads", "n_kv_heads", "vocab", "seq_len", "mlp",
    "tied_embeddings", "accelerator", "n_devices", "devices_per_node", "dp", "tp", "pp", "zero_stage", "micro_batch",
    "global_batch", "recompute", "dtype", "other_flags", "step_time_s", "peak_memory_gb", "peak_memory_unit",
    "peak_memory_kind", "oom", "framework", "framework_version", "measured_date", "score_for", "notes",
)  # fmt: skip

sys.path.insert(0, str(HERE.parents[1]))
from planner.calibration.stopwatch import waited_s  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", default="runs.csv")
    parser.add_argument("--only", default="", help="row_ids to run again, joined by commas")
    parser.add_argument(
        "--accelerator", default="epyc-genoa-core", help="what the rows call a core of this machine"
    )
    parser.add_argument(
        "--first",
        action="store_true",
        help="two processes go before all others, and rest after each step (root)",
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return
    if arguments.first:
        go_first()
    path = Path(arguments.out)
    rows = {row["row_id"]: row for row in csv.DictReader(path.open())} if path.exists() else {}
    only = set(filter(None, arguments.only.split(",")))
    for shape, processes, recompute in product(MODELS, (1, 2), ("none", "full", "whole")):
        job = dict(zip(("layers", "hidden", "heads", "seq", "batch"), shape, strict=True))
        job |= {"processes": processes, "recompute": recompute, "first": arguments.first and processes > 1}
        row_id = f"cpu-{job['layers']}x{job['hidden']}-s{job['seq']}-p{processes}-{recompute}"
        if (only and row_id not in only) or (not only and row_id in rows):
            continue
        found = run(job)
        rows[row_id] = row(row_id, job, found, arguments.accelerator)
        rows[f"{row_id}-allocated"] = allocated_row(rows[row_id], found)
        print(row_id, found, flush=True)
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))


def go_first() -> None:
    """Has this process and all that it starts go before the other sessions of the machine (Linux groups tasks by session)."""
    if os.fork():
        os.wait()
        sys.exit()
    os.setsid()
    os.nice(-20)
    Path("/proc/self/autogroup").write_text("-20")


def run(job: dict) -> dict:
    """Starts the processes and returns what the first one found."""
    # The C library keeps freed memory, as the caching allocators of accelerators do.
    quiet = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "2147483647",
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            subprocess.Popen(
                [sys.executable, str(HERE), "--worker", json.dumps(job | {"rank": rank, "folder": folder})],
                env=os.environ | quiet,
            )
            for rank in range(job["processes"])
        ]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise SystemExit(f"a process failed: {codes}")
        return json.loads((Path(folder) / "found.json").read_text())


def worker(job: dict) -> None:
    """One process: builds the model, takes steps until enough of them were undisturbed."""
    import torch
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{job['folder']}/store", rank=job["rank"], world_size=job["processes"]
    )
    idle_bytes = loaded_bytes(torch, job)
    model = build(job)
    if job["processes"] > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(VOCAB, (job["batch"], job["seq"] + 1))

    def step() -> None:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step()  # the first one builds states and buckets
    step()
    times, every = [], []
    while len(times) < STEPS and len(every) < PATIENCE:
        seconds, others = timed(step, dist, torch, job["processes"])
        if job["first"]:
            time.sleep(REST * seconds)
        every.append((others, seconds))
        if others <= DISTURBED:
            times.append(seconds)
    kept = sorted(times) or sorted(seconds for _, seconds in sorted(every)[: max(len(every) // 3, 1)])
    peak = torch.tensor([resident_bytes("VmHWM"), idle_bytes], dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    allocated = allocated_bytes(step, torch, model)
    if job["rank"] == 0:
        found = {
            "step_time_s": kept[len(kept) // 2], "least_s": kept[0], "most_s": kept[-1], "quiet_steps": len(times),
            "steps": len(every), "peak_bytes": float(peak[0]), "idle_bytes": float(peak[1]),
            "allocated_bytes": allocated, "torch": torch.__version__,
        }  # fmt: skip
        (Path(job["folder"]) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def loaded_bytes(torch, job: dict) -> float:
    """Resident bytes of a process that has trained a model of next to no size: what the libraries take once they are in use."""
    tiny = build(job | {"layers": 1, "hidden": 8 * job["heads"], "seq": 8})
    optimizer = torch.optim.AdamW(tiny.parameters(), fused=True)
    tokens = torch.randint(VOCAB, (1, 9))
    tiny(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    weights = sum(p.numel() for p in tiny.parameters()) * 16.0
    return resident_bytes("VmRSS") - weights


def allocated_bytes(step, torch, model) -> float:
    """The most bytes that PyTorch had allocated at once in a step: weights, gradients, two moments, and what the step adds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return sum(p.numel() for p in model.parameters()) * 16.0 + max(totals)


def timed(step, dist, torch, processes: int) -> tuple[float, float]:
    """Seconds of a step on the slowest process, and the share of it that a process's threads waited for a core."""
    dist.barrier()
    wall, cpu, waited = time.perf_counter(), time.process_time(), waited_s()
    step()
    wall, cpu, waited = time.perf_counter() - wall, time.process_time() - cpu, waited_s() - waited
    if (
        processes == 1
    ):  # it never waits for another: its processor time is what a step takes on a core of its own
        return cpu, 0.0
    slowest = torch.tensor([wall, waited / wall], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest[0]), float(slowest[1])


def resident_bytes(field: str) -> float:
    """A line of /proc/self/status in bytes."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return float(line.split()[1]) * 1024.0


def build(job: dict):
    """A GPT-2-like decoder: learned positions, biases, GELU, tied embeddings, no dropout; returns the loss."""
    from torch import nn
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    hidden, heads = job["hidden"], job["heads"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.qkv, self.output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
            self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

        def forward(self, x):
            batch, seq, _ = x.shape
            q, k, v = (
                self.qkv(self.norm1(x)).view(batch, seq, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
            )
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.output(y.transpose(1, 2).reshape(batch, seq, hidden))
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCAB, hidden), nn.Embedding(job["seq"], hidden)
            self.blocks = nn.ModuleList(Block() for _ in range(job["layers"]))
            self.norm = nn.LayerNorm(hidden)
            for weights in (self.tokens, self.positions):
                nn.init.normal_(weights.weight, std=0.02)

        def forward(self, inputs, targets):
            x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
            with set_checkpoint_early_stop(job["recompute"] != "whole"):
                for block in self.blocks:
                    x = block(x) if job["recompute"] == "none" else checkpoint(block, x, use_reentrant=False)
            logits = functional.linear(self.norm(x), self.tokens.weight)
            return functional.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))

    return Transformer()


def row(row_id: str, job: dict, found: dict, accelerator: str) -> dict[str, object]:
    """The run as a row of the training form."""
    return {
        "row_id": row_id, "source": "benchmarks/cpu_train.py", "model": f"gpt2-like-{job['layers']}x{job['hidden']}",
        "family": "cpu-small", "n_layers": job["layers"], "hidden": job["hidden"], "ffn_hidden": 4 * job["hidden"],
        "n_heads": job["heads"], "n_kv_heads": job["heads"], "vocab": VOCAB, "seq_len": job["seq"], "mlp": "gelu",
        "tied_embeddings": "true", "accelerator": accelerator, "n_devices": job["processes"],
        "devices_per_node": job["processes"], "dp": job["processes"], "tp": 1, "pp": 1, "zero_stage": 0,
        "micro_batch": job["batch"], "global_batch": job["batch"] * job["processes"],
        "recompute": "none" if job["recompute"] == "none" else "full",
        "dtype": "fp32", "other_flags": FLAGS + "; checkpoint-early-stop=false" * (job["recompute"] == "whole"),
        "step_time_s": f"{found['step_time_s']:.4f}",
        "peak_memory_gb": f"{found['peak_bytes'] / 1e9:.4f}", "peak_memory_unit": "GB", "peak_memory_kind": "smi",
        "oom": "false", "framework": "PyTorch DDP", "framework_version": f"torch {found['torch']}",
        "measured_date": datetime.now(UTC).date().isoformat(), "score_for": "time+memory",
        "notes": f"{found['quiet_steps']} undisturbed of {found['steps']} steps, {found['least_s']:.4f} to "
        f"{found['most_s']:.4f} s; {found['idle_bytes'] / 1e9:.3f} GB resident once the libraries are in use",
    }  # fmt: skip


def allocated_row(timed_row: dict, found: dict) -> dict[str, object]:
    """The same run as a row of what PyTorch had allocated."""
    return timed_row | {
        "row_id": f"{timed_row['row_id']}-allocated", "step_time_s": "", "peak_memory_kind": "allocated",
        "peak_memory_gb": f"{found['allocated_bytes'] / 1e9:.4f}", "score_for": "memory",
        "notes": "largest total of the profiler's memory events, and 16 bytes per parameter",
    }  # fmt: skip


if __name__ == "__main__":
    main()
