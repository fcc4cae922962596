"""Launchers' own judgement of exported files: one class per launcher, each for an environment that has the launcher.

``refusal(files, plan)`` says why a launcher refuses an exported plan, or what it takes it for; empty where it means the plan. No
accelerator is needed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

from planner.export.torchtitan import SCHEDULES
from planner.plans.plan import Plan


def knobs_of(plan: Plan) -> dict[str, str]:
    """The plan's choices as text."""
    return {name: str(value).lower() for name, value in plan.knobs.items()}


_LAYER_DTYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


class Accelerate:
    """``accelerate launch``'s parser, with the defaults that it takes from the YAML, and ``ParallelismConfig``."""

    def __init__(self) -> None:
        import accelerate
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser
        from accelerate.parallelism_config import ParallelismConfig

        self.version = accelerate.__version__
        self.parser, self.validate, self.mesh = (
            launch_command_parser(),
            _validate_launch_command,
            ParallelismConfig,
        )

    def refusal(self, files: dict[str, str], plan: Plan) -> str:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder) / "accelerate.yaml"
            path.write_text(files["accelerate.yaml"])
            try:
                # The type of the devices is asked of the machine: say that there are some.
                args, *_ = self.validate(self.parser.parse_args(["--config_file", str(path), "train.py"]))
            except (Exception, SystemExit) as error:
                return f"{type(error).__name__}: {error}"
        sharded = knobs_of(plan)["zero_stage"] != "0"
        taken: dict[str, Any] = {
            "processes": int(args.num_processes),
            "precision": args.mixed_precision,
            "fsdp": bool(args.use_fsdp),
        }
        meant: dict[str, Any] = {
            "processes": plan.devices,
            "precision": _LAYER_DTYPES[plan.knobs["precision"]],
            "fsdp": sharded,
        }
        if sharded:
            sizes = {
                name: int(getattr(args, f"parallelism_config_{name}_size"))
                for name in ("dp_replicate", "dp_shard", "tp", "cp")
            }
            try:
                mesh = self.mesh(**{f"{name}_size": size for name, size in sizes.items()})
            except (ValueError, TypeError) as error:
                return f"{type(error).__name__}: {error}"
            taken |= {"world": mesh.total_size, "tp": sizes["tp"], "cp": sizes["cp"]}
            taken |= {
                "reshard": str(args.fsdp_reshard_after_forward).lower(),
                "version": int(args.fsdp_version),
            }
            meant |= {"world": plan.devices, "tp": plan.mesh["tp"], "cp": plan.mesh["cp"], "version": 2}
            meant |= {"reshard": str(knobs_of(plan)["zero_stage"] != "2").lower()}
        return "" if taken == meant else f"taken for {taken}, meant {meant}"


class DeepSpeed:
    """``DeepSpeedConfig`` with a stand-in for the groups of ranks, as it asks for the data-parallel size."""

    def __init__(self) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        import deepspeed.runtime.config as config

        config.dist.get_rank = lambda *_: 0
        self.version, self.config = deepspeed.__version__, config.DeepSpeedConfig

    def refusal(self, files: dict[str, str], plan: Plan) -> str:
        replicas = plan.mesh["dp"]

        class Groups:
            def get_data_parallel_world_size(self) -> int:
                return replicas

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                taken = self.config(json.loads(files["deepspeed.json"]), mpu=Groups())
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        zero = taken.zero_config
        found = (
            taken.gradient_accumulation_steps, taken.train_micro_batch_size_per_gpu, taken.train_batch_size, int(zero.stage),
            bool(zero.offload_optimizer and zero.offload_optimizer.device == "cpu"),
            bool(zero.offload_param and zero.offload_param.device == "cpu"),
            taken.tensor_parallel_config.autotp_size or 1, taken.expert_parallel_config.autoep_size or 1,
            taken.bfloat16_config.enabled, taken.float16_config.enabled, taken.grad_accum_dtype,
        )  # fmt: skip
        knobs = knobs_of(plan)
        meant = (
            plan.micro_batches, plan.knobs["micro_batch_size"], plan.workload["global_batch_size"], int(knobs["zero_stage"]),
            knobs["optimizer_offload"].startswith("cpu"), knobs["parameter_offload"] == "cpu", plan.mesh["tp"], plan.mesh["ep"],
            knobs["precision"] == "bf16", knobs["precision"] == "fp16", knobs["gradient_dtype"],
        )  # fmt: skip
        return "" if found == meant else f"taken for {found}, meant {meant}"


class Transformers:
    """``TrainingArguments``, and Accelerate's ``ParallelismConfig`` that it takes."""

    def __init__(self) -> None:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        import transformers
        from accelerate.parallelism_config import ParallelismConfig

        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        self.version, self.arguments, self.mesh = (
            transformers.__version__,
            transformers.TrainingArguments,
            ParallelismConfig,
        )

    def refusal(self, files: dict[str, str], plan: Plan) -> str:
        settings = json.loads(files["training_arguments.json"])
        del settings["measuring_run"]
        sizes = settings.pop("parallelism_config", None)
        # Liger and bitsandbytes are looked for when a run starts; there is none of them without an accelerator.
        settings |= {"use_cpu": True, "bf16": False, "fp16": False}
        try:
            mesh = None if sizes is None else self.mesh(**sizes)
            with tempfile.TemporaryDirectory() as folder:
                taken = self.arguments(**{**settings, "output_dir": folder, "parallelism_config": mesh})
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        sharded = knobs_of(plan)["zero_stage"] != "0"
        found = [
            taken.per_device_train_batch_size, taken.gradient_accumulation_steps, bool(taken.fsdp),
            mesh.total_size if mesh is not None else plan.devices,
        ]  # fmt: skip
        meant = [plan.knobs["micro_batch_size"], plan.micro_batches, sharded, plan.devices]
        if sharded:
            plugin = taken.fsdp_plugin_args
            found += [
                plugin["reshard_after_forward"],
                plugin["activation_checkpointing"],
                plugin.get("cpu_offload", False),
            ]
            found += [mesh.tp_size, mesh.cp_size]
            knobs = knobs_of(plan)
            meant += [
                knobs["zero_stage"] != "2",
                knobs["recompute"] == "full",
                knobs["parameter_offload"] == "cpu",
            ]
            meant += [plan.mesh["tp"], plan.mesh["cp"]]
        else:
            found.append(bool(taken.activation_checkpointing))
            meant.append(plan.knobs["recompute"] == "full")
        return "" if found == meant else f"taken for {found}, meant {meant}"


class Galvatron:
    """``config2strategy`` and ``check_hp_config`` in a world of the plan's size."""

    def __init__(self) -> None:
        from importlib.metadata import version
        from importlib.util import find_spec

        spec = find_spec("galvatron")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("galvatron")
        # Its packages import CUDA libraries when they are loaded: the two modules are loaded by themselves.
        self.folder = Path(next(iter(spec.submodule_search_locations)))
        self.version = version("hetu-galvatron")
        for name, folder in (("galvatron", self.folder), ("galvatron.utils", self.folder / "utils")):
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
        utils = _load(self.folder / "utils" / "config_utils.py", "galvatron.utils.config_utils")
        for name in ("config2strategy", "read_json_config", "str2array"):
            setattr(sys.modules["galvatron.utils"], name, getattr(utils, name))
        self.hybrid = _load(
            self.folder / "core" / "runtime" / "hybrid_parallel_config.py", "galvatron_hybrid_config"
        )

    def refusal(self, files: dict[str, str], plan: Plan) -> str:
        config = json.loads(files["galvatron.json"])
        self.hybrid.torch.distributed.get_world_size = lambda *_: plan.devices
        layers = sum(plan.stages)

        class Info:
            def layernums(self) -> list[int]:
                return [layers]

        args = _Namespace(local_rank=1, galvatron_config_path=config, chunks=0, global_train_batch_size=0)
        args.__dict__ |= {
            "pipeline_type": "",
            "default_dp_type": "",
            "embed_sdp": 0,
            "vocab_tp": 1,
            "distributed_checkpoint": False,
        }
        try:
            taken = self.hybrid.get_hybrid_parallel_configs_api(None, args, lambda *_: Info())
            self.hybrid.check_hp_config(taken, [layers])
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"
        found = (
            taken["pp_deg"], set(taken["tp_sizes_enc"]), set(taken["use_sp"]), set(taken["dp_types_enc"]),
            set(taken["checkpoint_flags_enc"]), list(taken["pp_division"]), args.chunks, args.global_train_batch_size,
        )  # fmt: skip
        mesh, knobs = plan.mesh, knobs_of(plan)
        meant = (
            mesh["pp"], {max(mesh["tp"], mesh["cp"])}, {int(mesh["cp"] > 1)}, {int(str(knobs["zero_stage"]) == "3")},
            {int(knobs["recompute"] == "full")}, list(plan.stages), plan.micro_batches, plan.workload["global_batch_size"],
        )  # fmt: skip
        return "" if found == meant else f"taken for {found}, meant {meant}"


class Torchtitan:
    """``ConfigManager``, ``ParallelDims``, and the split of layers that its pipelines make."""

    def __init__(self) -> None:
        from importlib.metadata import version

        with _silent():
            from torchtitan.config.manager import ConfigManager
            from torchtitan.distributed import pipeline_parallel
            from torchtitan.distributed.parallel_dims import ParallelDims

        self.version = version("torchtitan")
        self.manager, self.dims, self.pipeline = ConfigManager, ParallelDims, pipeline_parallel

    def refusal(self, files: dict[str, str], plan: Plan) -> str:
        try:
            with _silent():
                taken = self.manager().parse_args(shlex.split(files["flags.txt"]))
                dims = self.dims.from_config(taken.parallelism, plan.devices)
                stages = self._stages(taken, dims)
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"
        from torch.distributed.pipelining import schedules

        mesh, knobs, training = plan.mesh, knobs_of(plan), taken.training
        replicas = dims.dp_replicate * dims.dp_shard
        pieces = (
            training.local_batch_size // taken.parallelism.pipeline_parallel_microbatch_size
            if mesh["pp"] > 1
            else 1
        )
        runs = training.global_batch_size // (training.local_batch_size * replicas)
        found = (
            replicas, dims.cp, dims.tp, dims.pp, dims.ep, pieces * runs, stages, taken.compile.enable,
            schedules.get_schedule_class(taken.parallelism.pipeline_parallel_schedule) if dims.pp > 1 else None,
        )  # fmt: skip
        meant = (
            mesh["dp"], mesh["cp"], mesh["tp"], mesh["pp"], mesh["ep"], plan.micro_batches, list(plan.stages),
            knobs["elementwise_kernel"] == "fused",
            getattr(schedules, f"Schedule{SCHEDULES[knobs['schedule']]}") if mesh["pp"] > 1 else None,
        )  # fmt: skip
        return "" if found == meant else f"taken for {found}, meant {meant}"

    def _stages(self, taken: Any, dims: Any) -> list[int]:
        model = taken.model_spec.model
        if dims.pp == 1:
            return [len(model.layers)]
        stages, layers, first, last = self.pipeline._get_pipeline_metadata(dims, taken.parallelism, model)
        parts = self.pipeline._generate_llm_fqn_per_model_part(stages, layers, first, last)
        return [sum(name.startswith("layers.") for name in part) for part in parts]


class _Namespace:
    def __init__(self, **values: Any) -> None:
        self.__dict__ |= values


def _load(path: Path, name: str) -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _silent() -> Any:
    import logging

    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)
