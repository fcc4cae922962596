"""Holds exported Megatron-LM arguments against Megatron-LM's own parser, validator and transformer configuration.

No device is needed, but an environment with megatron-core 0.19.2 (its wheel ships ``megatron/training/arguments.py``):

    python3.11 -m venv /tmp/megatron
    /tmp/megatron/bin/pip install torch==2.13.0 triton einops absl-py pyyaml transformers numpy typing_extensions
    /tmp/megatron/bin/pip install --ignore-requires-python --no-deps megatron-core==0.19.2
    PYTHONPATH=. /tmp/megatron/bin/python benchmarks/megatron_arguments.py

Each line is a plan; the exit code is the number of plans that Megatron-LM refuses or understands otherwise (data-parallel
size, virtual stages, layers on every stage), and of controls that it should refuse and does not. Transformer Engine cannot
be installed without CUDA: checks of its version are answered with yes, and its fused rotary embedding is taken to be there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import typing
import warnings
from pathlib import Path

import planner

PLANS = Path(__file__).parents[1] / "tests" / "data" / "megatron_plans.json"


def plan_of(model: str, cluster: str, fixed: dict[str, object]) -> planner.Plan:
    """The plan that these choices name; sequences as long as the model was made for, at most 8192 tokens."""
    loaded = planner.load_model(model)
    seq_len, precision = min(loaded.max_seq_len, 8192), str(fixed.get("precision", "bf16"))
    optimizer = str(fixed.get("optimizer", "adamw"))
    workload = planner.TrainWorkload(768, seq_len, optimizer=optimizer, precisions=(precision,))
    return planner.estimate(
        planner.Problem(loaded, planner.load_cluster(cluster), workload, planner.load_stack(), fixed=fixed)
    )


class Validator:
    """Megatron-LM's own judgement of an argument list."""

    def __init__(self) -> None:
        import torch
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]  # Python 3.11 lacks it
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            import megatron.core.models.common.embeddings.rope_utils as rope
            import megatron.core.transformer.transformer_config as config
            from megatron.core.transformer.transformer_block import get_num_layers_to_build
            from megatron.training import argument_utils, arguments

        rope.fused_apply_rotary_pos_emb = rope.fused_apply_rotary_pos_emb or (lambda *_: None)
        for module in (arguments, config):
            module.is_te_min_version = lambda *_, **__: True
        torch.cuda.get_device_capability = lambda *_: (9, 0)
        self.arguments, self.config_of = arguments, argument_utils.core_transformer_config_from_args
        self.layers_of = get_num_layers_to_build

    def refusal(self, words: list[str], plan: planner.Plan, script: str) -> str:
        """Why the arguments are refused, or what they are taken for; empty where they mean the plan."""
        queues = "CUDA_DEVICE_MAX_CONNECTIONS"
        os.environ.update(WORLD_SIZE=str(plan.devices), RANK="0", LOCAL_RANK="0")
        os.environ.pop(queues, None)
        if f"export {queues}=1" in script:
            os.environ[queues] = "1"
        self.arguments.get_device_arch_version = lambda: 10 if "b200" in script else 9
        run = ["--train-iters", "50", "--lr", "1e-5", "--mock-data", "--tokenizer-type", "NullTokenizer"]
        sys.argv = ["pretrain_gpt.py", *words, *run]
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                args = self.arguments.validate_args(self.arguments.parse_args())
                config = self.config_of(args)
                chunks = args.virtual_pipeline_model_parallel_size or 1
                stages = [
                    self._layers(config, rank, chunk, chunks)
                    for chunk in range(chunks)
                    for rank in range(plan.mesh["pp"])
                ]
        except (Exception, SystemExit) as error:
            tail = output.getvalue().strip().splitlines()[-1:] if isinstance(error, SystemExit) else []
            return f"{type(error).__name__}: {error} {' '.join(tail)}"
        meant = (plan.mesh["dp"], plan.knobs["virtual_stages"], list(plan.stages))
        taken = (args.data_parallel_size, chunks, stages)
        return "" if taken == meant else f"taken for dp, chunks, stages = {taken}, meant {meant}"

    def _layers(self, config: typing.Any, rank: int, chunk: int, chunks: int) -> int:
        """Transformer layers that Megatron-LM builds on one virtual stage."""
        layout = config.pipeline_model_parallel_layout
        if layout is None:
            return int(self.layers_of(config, vp_stage=chunk if chunks > 1 else None, pp_rank=rank))
        return sum(layer.name == "decoder" for layer in layout.layout[rank][chunk])


class MegatronFiles(Validator):
    """The same judgement of exported files, by the interface of :mod:`benchmarks.launcher_validators`."""

    version = "0.19.2"

    def refusal(self, files: dict[str, str], plan: planner.Plan) -> str:  # type: ignore[override]
        return super().refusal(shlex.split(files["args.txt"]), plan, files["run.sh"])


def main() -> int:
    """Prints one line per plan."""
    from planner.export import export

    try:
        validator = Validator()
    except ImportError as error:
        print(f"skipped: Megatron-LM cannot be imported here ({error})")
        return 0
    refused = 0
    for case in json.loads(PLANS.read_text()):
        plan = plan_of(**case)
        files = export(plan, "megatron")
        words = shlex.split(files["args.txt"])
        why = validator.refusal(words, plan, files["run.sh"])
        if not validator.refusal([*words, "--bf16", "--fp16"], plan, files["run.sh"]):
            why += " (and so would be bf16 and fp16 at once)"
        refused += bool(why)
        print(f"{'refused' if why else 'accepted'}  {' '.join(map(str, case.values()))} {why}", flush=True)
    return refused


if __name__ == "__main__":
    raise SystemExit(main())
