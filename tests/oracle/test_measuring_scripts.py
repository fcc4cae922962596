"""Measuring scripts of exported folders train a small model on two processes: what a parser of files cannot tell.

Accelerate and the Trainer shard on accelerators alone; the wrapper lets them take two CPUs (gloo) for such. Needs the extra
``launchers``; skipped where it is not installed, which is never in .ci/run.
"""

import json
import os
import re
import subprocess
import sys

import pytest

import planner
from planner.export import export

# Accelerate chooses its kind of distribution by the device: here every device is a CPU, and counts as an accelerator.
WRAPPER = """
import runpy, sys
import accelerate.state
import torch
import transformers.training_args
from accelerate.utils import DistributedType

make = accelerate.state.PartialState.__init__

def made(self, cpu=False, **settings):
    first = not self._shared_state
    settings.pop("backend", None)
    make(self, cpu=True, backend="gloo", **settings)
    if first:
        self.distributed_type = DistributedType.MULTI_GPU

accelerate.state.PartialState.__init__ = made
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
torch.set_num_threads(1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 256,
}  # fmt: skip
CHOICES = {
    "zero_stage": "fsdp", "sequence_parallel": "false", "elementwise_kernel": "eager", "loss_kernel": "log_softmax",
    "recompute": "full",
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "transformers"])
def test_sharded_weights_are_trained(launcher, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra launchers)")
    pytest.importorskip("transformers", reason="transformers is not installed (extra launchers)")
    job = planner.TrainWorkload(global_batch_size=4, seq_len=64)
    model = planner.load_model("llama3.2-1b")
    problem = planner.Problem(
        model, planner.load_cluster("h100-sxm:1x2"), job, planner.load_stack(), fixed=CHOICES
    )
    files = export(planner.estimate(problem), launcher)
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **SMALL})
    for name, text in {**files, "on_cpus.py": WRAPPER}.items():
        (tmp_path / name).write_text(text)
    environment, arguments = started(launcher, tmp_path, files)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "on_cpus.py", *arguments],
        cwd=tmp_path, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # One process prints, as measure.py reads it.
    assert re.findall(r"^step (\d+): [\d.]+ s, peak", done.stdout, re.MULTILINE) == ["1", "2"]


def started(launcher, folder, files):
    """What ``accelerate launch`` puts into the environment (utils/launch.py, 1.15), and the script with its arguments."""
    if launcher == "transformers":
        settings = json.loads(files["training_arguments.json"])
        (folder / "training_arguments.json").write_text(json.dumps({**settings, "max_steps": 2}))
        return {}, ["train.py", "training_arguments.json"]
    assert "fsdp_reshard_after_forward: true" in files["accelerate.yaml"]
    environment = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    }  # fmt: skip
    told = files["run.sh"].partition("    train.py")[2].replace("\\\n", " ").replace('"$@"', "").split()
    return environment, ["train.py", *told, "--max_steps", "2"]
