"""Checks of exports whose launcher has no parser that runs here: fields of published wheels, and meshes over a fake world."""

from __future__ import annotations

import ast
import os
import types
from pathlib import Path
from typing import Any

from planner.plans.plan import Plan

_CLASSES = {
    "model": ("TransformerConfig", "ModelParallelConfig", "GPTModelProvider"),
    "train": ("TrainingConfig",),
    "validation": ("ValidationConfig",),
    "optimizer": ("OptimizerConfig",),
    "ddp": ("DistributedDataParallelConfig",),
    "dataset": ("GPTDatasetConfig", "BlendedMegatronDatasetConfig"),
    "tokenizer": ("TokenizerConfig",),
    "checkpoint": ("CheckpointConfig",),
    "logger": ("LoggerConfig",),
    "mixed_precision": ("MixedPrecisionConfig",),
}
"""Section of ``ConfigContainer`` → classes whose fields it has, with those that they extend."""


class BridgeFields:
    """Every field that a recipe sets is one of the dataclasses in the wheels of megatron-bridge and megatron-core.

    Raises:
        ImportError: the environment variable BRIDGE leads to no unpacked wheel, or megatron-core is not installed.
    """

    def __init__(self) -> None:
        import importlib.util

        core = importlib.util.find_spec("megatron.core")
        folder = Path(os.environ.get("BRIDGE", "/nowhere")) / "megatron" / "bridge"
        if core is None or core.origin is None or not folder.is_dir():
            raise ImportError("BRIDGE, an unpacked wheel of megatron-bridge, and megatron-core")
        trees = [Path(core.origin).parent.parent, folder]
        self.fields: dict[str, set[str]] = {}
        self.bases: dict[str, set[str]] = {}
        self.names: dict[str, set[str]] = {}
        for tree in trees:
            for path in tree.rglob("*.py"):
                self._collect(path, tree)
        self.version = (
            next(folder.parent.parent.glob("megatron_bridge-*.dist-info"))
            .name.split("-")[1]
            .removesuffix(".dist")
        )

    def _collect(self, path: Path, tree: Path) -> None:
        module = ".".join(
            (
                tree.name if tree.name == "megatron" else "megatron.bridge",
                *path.relative_to(tree).with_suffix("").parts,
            )
        )
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
            if isinstance(node, ast.ImportFrom):
                names = [alias.asname or alias.name for alias in node.names]
            self.names.setdefault(module.removesuffix(".__init__"), set()).update(names)
            if isinstance(node, ast.ClassDef):
                own = {
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
                self.fields.setdefault(node.name, set()).update(own)
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                # Megatron-Bridge's classes extend Megatron-Core's of the same name under another.
                self.bases.setdefault(node.name, set()).update(
                    base.removeprefix("MCore").removeprefix("MTrain") for base in bases
                )

    def _known(self, section: str) -> set[str]:
        found, open_ = set(), list(_CLASSES[section])
        seen = set()
        while open_:
            name = open_.pop()
            if name not in seen:
                seen.add(name)
                found |= self.fields.get(name, set())
                open_ += self.bases.get(name, set())
        return found

    def refusal(self, files: dict[str, str], plan: Plan) -> str:
        tree = ast.parse(files["recipe.py"])
        wrong = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
                there = self.names.get(str(node.module), set())
                wrong += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in there]
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                path = ast.unparse(node.targets[0]).removeprefix("cfg.").split(".")
                if path[0] in _CLASSES and len(path) == 2 and path[1] not in self._known(path[0]):
                    wrong.append(".".join(path))
                elif path[0] not in self.fields["ConfigContainer"]:
                    wrong.append(path[0])
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "get_mixed_precision_config":
                recipe = ast.literal_eval(node.args[0])
                if recipe not in self.names["megatron.bridge.training.mixed_precision"]:
                    wrong.append(recipe)
        return ", ".join(wrong)


class FakeWorld:
    """``mesh.py`` over PyTorch's fake process group: the mesh is built, and a layer is sharded with its arguments."""

    def __init__(self) -> None:
        import torch

        self.torch, self.version = torch, torch.__version__.partition("+")[0]

    def refusal(self, files: dict[str, str], plan: Plan) -> str:
        from torch.distributed.fsdp import fully_shard
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch: Any = self.torch
        module = types.ModuleType("mesh")
        exec(compile(files["mesh.py"], "mesh.py", "exec"), module.__dict__)
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.devices)
        try:
            mesh = module.build_mesh("cpu")
            arguments = module.fully_shard_arguments()
            if arguments is not None:
                arguments.pop("offload_policy")  # pins memory, for which there is no device here
                fully_shard(torch.nn.Linear(8, 8), mesh=module.shard_mesh(mesh), **arguments)
            found = {name: mesh[name].size() for name in ("pp", "cp", "tp")} | {"world": mesh.size()}
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            torch.distributed.destroy_process_group()
        meant = {name: plan.mesh[name] for name in ("pp", "cp", "tp")} | {"world": plan.devices}
        return "" if found == meant else f"taken for {found}, meant {meant}"
