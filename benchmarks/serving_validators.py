"""Serving launchers' own judgement of exported files, or that of their published schemas; one class per launcher.

``refusal(files, plan)`` says why a launcher refuses an exported plan, or what it takes it for; empty where it means the plan.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import planner
from benchmarks.serving_plans import ARCHITECTURES
from planner.export.hf_model import hf_model
from planner.export.serving.target import ServingTarget
from planner.serving.plan import Pool, ServePlan

__all__ = ["Dynamo", "LeaderWorkerSets", "LlmD", "Sglang", "TensorRtLlm", "Vllm"]


@contextlib.contextmanager
def checkpoint(plan: ServePlan) -> Iterator[str]:
    """A folder with the model's ``config.json``, without weights."""
    shape = hf_model(planner.load_model(plan.model))
    assert shape is not None
    config = {
        **shape.config,
        "architectures": [ARCHITECTURES[shape.config["model_type"]]],
        "torch_dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


def _context(plan: ServePlan) -> int:
    model = planner.load_model(plan.model)
    asked = int(plan.traffic["isl"]) + int(plan.traffic["osl"])
    return max(min(asked + 256, model.max_seq_len), asked)


class Vllm:
    """The parser of ``vllm serve`` with the exported ``--config``, and ``create_engine_config``, on a replica's first node."""

    def __init__(self) -> None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.version, self.arguments = vllm.__version__.partition("+")[0], AsyncEngineArgs
        self.parser = make_arg_parser(FlexibleArgumentParser())

    def refusal(self, files: Mapping[str, str], plan: ServePlan) -> str:
        with checkpoint(plan) as folder:
            found = [self.judged(files, plan, pool, folder) for pool in plan.pools]
        return "; ".join(filter(None, found))

    def judged(self, files: Mapping[str, str], plan: ServePlan, pool: Pool, folder: str) -> str:
        config = Path(folder) / "vllm.yaml"
        config.write_text(files[f"vllm{ServingTarget(plan).suffix(pool)}.yaml"])
        more = re.findall(r"--nnodes \d+", files[f"serve{ServingTarget(plan).suffix(pool)}.sh"])
        words = [word for option in more for word in option.split()] + (["--node-rank", "0"] if more else [])
        return self.taken(["--config", str(config), *words], plan, pool, folder)

    def taken(self, words: list[str], plan: ServePlan, pool: Pool, folder: str) -> str:
        """What vLLM makes of a command line, where that is not the pool."""
        own = ["--model", folder, "--skip-tokenizer-init", "--load-format", "dummy"]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                parsed = self.parser.parse_args([*own, *words])
                config = self.arguments.from_cli_args(parsed).create_engine_config()
        except (Exception, SystemExit) as error:
            return f"{pool.role}: {type(error).__name__}: {str(error)[:300]}"
        parallel, scheduler = config.parallel_config, config.scheduler_config
        found = [parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size]
        found += [parallel.enable_expert_parallel, str(config.cache_config.cache_dtype).startswith("fp8")]
        found += [config.model_config.max_model_len, config.kv_transfer_config is not None]
        mesh = pool.mesh
        found.append(parallel.prefill_context_parallel_size)
        meant = [
            mesh["tp"],
            mesh["pp"],
            mesh["dp"],
            mesh["ep"] > 1,
            pool.knobs["cache"] == "fp8",
            _context(plan),
        ]
        meant += [pool.role != "aggregated", mesh.get("cp", 1)]
        found.append(config.speculative_config and config.speculative_config.num_speculative_tokens)
        meant.append(pool.knobs.get("draft_tokens"))
        if "max_sequences" in pool.knobs:
            found.append(scheduler.max_num_seqs)
            meant.append(-(-pool.knobs["max_sequences"] // mesh["dp"]))
        if "chunk_tokens" in pool.knobs:
            # As it was parsed: on a CPU, vLLM lowers it for latent attention.
            found.append(parsed.max_num_batched_tokens)
            meant.append(
                max(pool.knobs["chunk_tokens"], -(-pool.knobs.get("max_sequences", 1) // mesh["dp"]))
            )
        return "" if found == meant else f"{pool.role}: taken for {found}, meant {meant}"


class Sglang:
    """``prepare_server_args``: SGLang's parser with the exported ``--config``, and ``ServerArgs``, which settles the rest."""

    def __init__(self) -> None:
        os.environ |= {"HF_HUB_OFFLINE": "1"}
        from importlib.metadata import version

        import torch

        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            # The registry's is built for CUDA: beside PyTorch for CPUs it declares no operators, and asks for these.
            self.operators = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self.operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from sglang.srt.server_args import prepare_server_args

        self.version, self.prepare = version("sglang"), prepare_server_args

    def refusal(self, files: Mapping[str, str], plan: ServePlan) -> str:
        with checkpoint(plan) as folder:
            found = [self._judged(files, plan, pool, folder) for pool in plan.pools]
        return "; ".join(filter(None, found))

    def _judged(self, files: Mapping[str, str], plan: ServePlan, pool: Pool, folder: str) -> str:
        config = Path(folder) / "sglang.yaml"
        config.write_text(files[f"sglang{ServingTarget(plan).suffix(pool)}.yaml"])
        own = ["--model-path", folder, "--device", "cpu", "--load-format", "dummy", "--skip-tokenizer-init"]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                args = self.prepare([*own, "--config", str(config)])
                copy.deepcopy(args).resolve_once()
        except (Exception, SystemExit) as error:
            return f"{pool.role}: {type(error).__name__}: {str(error)[:300]}"
        mesh, shared = pool.mesh, pool.mesh.get("cp", 1)
        ranks = mesh["tp"] * mesh["dp"] * shared
        found = [
            args.tp_size,
            args.pp_size,
            args.attn_dp_size,
            args.ep_size,
            args.context_length,
            args.disaggregation_mode,
        ]
        found += [args.kv_cache_dtype, args.moe_a2a_backend == "deepep"]
        meant = [ranks, mesh["pp"], mesh["dp"], mesh["ep"], _context(plan)]
        meant += [
            "null" if pool.role == "aggregated" else pool.role,
            "fp8_e4m3" if pool.knobs["cache"] == "fp8" else "auto",
        ]
        meant += [pool.knobs["experts"] == "exchanged", shared]
        found.append(args.attn_cp_size)
        found.append(args.speculative_num_draft_tokens)
        meant.append(pool.knobs["draft_tokens"] + 1 if "draft_tokens" in pool.knobs else None)
        if "chunk_tokens" in pool.knobs:
            found.append(args.chunked_prefill_size)
            meant.append(pool.knobs["chunk_tokens"] * mesh["dp"])
        return "" if found == meant else f"{pool.role}: taken for {found}, meant {meant}"


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _published(variable: str, name: str) -> str:
    """A file of the folder that a variable of the environment leads to.

    Raises:
        ImportError: it does not.
    """
    path = Path(os.environ.get(variable, "/nowhere")) / name
    found = sorted(path.parent.glob(path.name))
    if not found:
        raise ImportError(f"{variable}, a folder with {name}")
    return found[-1].read_text(encoding="utf-8")


class TensorRtLlm:
    """Keys against what the wheel aiconfigurator writes and reads of LLM arguments of TensorRT-LLM 1.2, and the pool's sizes.

    Its template for them has drafts by a model's own modules; those of other kinds are what its reader of deployments asks for.
    """

    version = "1.2"

    def __init__(self) -> None:
        template = _published(
            "AICONFIGURATOR",
            "aiconfigurator/generator/config/backend_templates/trtllm/extra_engine_args.1.2.0rc6.post2.yaml.j2",
        )
        read = _published("AICONFIGURATOR", "aiconfigurator/sdk/config_adapter/dynamo.py")
        self.known = set(re.findall(r"^\s*(\w+):", template, re.MULTILINE))
        self.known |= set(re.findall(r'speculative_config\.get\("(\w+)"\)', read))

    def refusal(self, files: Mapping[str, str], plan: ServePlan) -> str:
        wrong = []
        for pool in plan.pools:
            settings = yaml.safe_load(files[f"trtllm{ServingTarget(plan).suffix(pool)}.yaml"])
            wrong += sorted(set(_keys(settings)) - self.known)
            ranks = pool.mesh["tp"] * pool.mesh["dp"]
            found = (settings.get("tensor_parallel_size"), settings.get("pipeline_parallel_size"))
            if found != (ranks, pool.mesh["pp"]):
                wrong.append(f"{pool.role}: {found}")
        return ", ".join(wrong)


class LeaderWorkerSets:
    """Manifests against the custom resource's own schema, and against Kubernetes' with ``kubernetes-validate --strict``."""

    def __init__(self) -> None:
        import kubernetes_validate

        resource = yaml.safe_load(_published("SCHEMAS", "leaderworkerset.yaml"))
        self.schema = resource["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        self.version = resource["spec"]["versions"][0]["name"]
        self.validate = kubernetes_validate.validate

    def refusal(self, files: Mapping[str, str], plan: ServePlan) -> str:
        wrong, groups = [], []
        for document in yaml.safe_load_all(files["leaderworkerset.yaml"]):
            if document["kind"] == "LeaderWorkerSet":
                wrong += list(_against(document, self.schema, ""))
                template = document["spec"]["leaderWorkerTemplate"]
                limits = (
                    template.get("workerTemplate", {})
                    .get("spec", {})
                    .get("containers", [{}])[0]
                    .get("resources", {})
                )
                each = int(next(iter(limits.get("limits", {"": 0}).values())))
                groups.append((document["spec"]["replicas"], template.get("size", 0) * each))
            else:
                try:
                    self.validate(document, "1.33", strict=True)
                except Exception as error:
                    wrong.append(str(error)[:200])
        meant = [(pool.replicas, pool.devices // pool.replicas) for pool in plan.pools]
        return ", ".join(wrong) or ("" if groups == meant else f"taken for {groups}, meant {meant}")


def _against(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """Keys that a schema does not have, and values that are not of its type."""
    kinds = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        return
    if kind in kinds and not isinstance(value, kinds[kind]):
        yield f"{where}: no {kind}"
        return
    if isinstance(value, list):
        for item in value:
            yield from _against(item, schema.get("items", {}), where)
    if isinstance(value, Mapping) and "properties" in schema:
        for key, item in value.items():
            if key in schema["properties"]:
                yield from _against(item, schema["properties"][key], f"{where}.{key}")
            elif not where.endswith("metadata"):
                yield f"{where}.{key}: unknown"


_DYNAMO_KEYS = frozenset({
    "apiVersion", "kind", "metadata", "name", "spec", "backendFramework", "components", "type", "replicas", "podTemplate",
    "containers", "image", "command", "args", "envFrom", "secretRef", "resources", "limits", "multinode", "nodeCount",
    "volumeMounts", "mountPath", "readOnly", "volumes", "configMap", "nvidia.com/gpu",
})  # fmt: skip
"""Of the manifests examples/backends/*/deploy/v1beta1/*.yaml in ai-dynamo/dynamo."""


class Dynamo:
    """Keys of the manifest against Dynamo's published ones, its workers' flags against its wheel, vLLM's by vLLM's parser."""

    def __init__(self) -> None:
        self.flags = "".join(
            _published("DYNAMO", f"dynamo/{engine}/{name}.py")
            for engine, name in (("vllm", "backend_args"), ("trtllm", "backend_args"), ("sglang", "args"))
        )
        self.version = Path(os.environ["DYNAMO"]).joinpath("version").read_text().strip()
        self.vllm = Vllm()

    def refusal(self, files: Mapping[str, str], plan: ServePlan) -> str:
        manifest = yaml.safe_load(files["dynamo.yaml"])
        wrong = sorted(set(_keys(manifest)) - _DYNAMO_KEYS)
        components = {found["name"]: found for found in manifest["spec"].get("components", [])}
        for pool in plan.pools:
            found = components.get(pool.role)
            if found is None or found["replicas"] != pool.replicas:
                wrong.append(f"{pool.role}: {found}")
                continue
            container = found["podTemplate"]["spec"]["containers"][0]
            each = int(container["resources"]["limits"]["nvidia.com/gpu"]) * found.get("multinode", {}).get(
                "nodeCount", 1
            )
            if each != pool.devices // pool.replicas:
                wrong.append(f"{pool.role}: {each} devices")
            wrong.append(self._words(container, plan, pool))
        return ", ".join(filter(None, wrong))

    def _words(self, container: Mapping[str, Any], plan: ServePlan, pool: Pool) -> str:
        words = list(container["args"])
        if "--disaggregation-mode" in words and "dynamo.sglang" not in container["command"]:
            at = words.index("--disaggregation-mode")
            if words[at + 1] != pool.role:
                return f"--disaggregation-mode {words[at + 1]}"
            del words[at : at + 2]
        if "dynamo.trtllm" in container["command"]:
            unknown = [word for word in words if word.startswith("--") and word not in self.flags]
            return ", ".join(unknown)
        if "dynamo.vllm" not in container["command"]:
            return ""  # SGLang's own flags: its own judge tries them
        with checkpoint(plan) as folder:
            return self.vllm.taken(words[2:], plan, pool, folder)


class LlmD:
    """Values against the chart's schema, every key against its ``values.yaml``, and vLLM's flags by vLLM's parser."""

    def __init__(self) -> None:
        import jsonschema

        self.schema = json.loads(_published("SCHEMAS", "values.schema.json"))
        self.known = yaml.safe_load(_published("SCHEMAS", "values.yaml"))
        self.version, self.check, self.vllm = "0.4.12", jsonschema.Draft7Validator(self.schema), Vllm()

    def refusal(self, files: Mapping[str, str], plan: ServePlan) -> str:
        values = yaml.safe_load(files["values.yaml"])
        wrong = [
            f"{'.'.join(map(str, error.path))}: {error.message[:120]}"
            for error in self.check.iter_errors(values)
        ]
        wrong += list(_unknown(values, self.known, ""))
        for pool in plan.pools:
            found = values["prefill" if pool.role == "prefill" else "decode"]
            container = found["containers"][0]
            if found["replicas"] != pool.replicas:
                wrong.append(f"{pool.role}: {found['replicas']} replicas")
            if container["modelCommand"] == "vllmServe":
                parallel = found.get("parallelism", {})
                chart = [
                    "--tensor-parallel-size",
                    str(parallel.get("tensor")),
                    "--data-parallel-size",
                    str(parallel.get("data")),
                ]
                words = [*chart, *container["args"]]
            else:
                line = container["args"][0].partition(" --nnodes")[0]
                words = [word for word in shlex.split(line)[3:] if word]
            with checkpoint(plan) as folder:
                wrong.append(self.vllm.taken(words, plan, pool, folder))
        return ", ".join(filter(None, wrong))


_FREE = frozenset({"labels", "env", "ports", "limits", "requests", "volumeMounts", "volumes"})


def _unknown(values: Any, known: Any, where: str) -> Iterator[str]:
    """Keys of values that the chart's own have not; containers are held against the first one."""
    if isinstance(values, list) and isinstance(known, list) and known:
        for item in values:
            yield from _unknown(item, known[0], where)
    if not isinstance(values, Mapping) or not isinstance(known, Mapping):
        return
    for key, item in values.items():
        if key not in known:
            yield f"{where}.{key}: not in the chart"
        elif key not in _FREE:
            yield from _unknown(item, known[key], f"{where}.{key}")
