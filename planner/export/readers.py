"""Configurations that can be read back, by the name that ``--from`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from planner.errors import Problem, SpecError, did_you_mean
from planner.export.accelerate_import import read_accelerate
from planner.export.deepspeed_import import read_deepspeed
from planner.export.galvatron_import import read_galvatron
from planner.export.launched import LaunchedRun
from planner.export.megatron_import import read_megatron
from planner.export.torchtitan_import import read_torchtitan
from planner.export.trainer_import import read_trainer

__all__ = ["READERS", "read_launched"]

READERS: Mapping[str, Callable[[str | Path], LaunchedRun]] = {
    "accelerate": read_accelerate,
    "deepspeed": read_deepspeed,
    "galvatron": read_galvatron,
    "megatron": read_megatron,
    "torchtitan": read_torchtitan,
    "transformers": read_trainer,
}


def read_launched(launcher: str, path: str | Path) -> LaunchedRun:
    """The run that a launcher's configuration describes.

    Raises:
        SpecError: no such reader, or what is wrong with the file, all at once.
    """
    if launcher not in READERS:
        known = (*READERS, "vllm", "sglang")  # those are read by planner.export.serving.readers
        raise SpecError(
            Problem("--from", repr(launcher), f"one of {', '.join(known)}", did_you_mean(launcher, known))
        )
    return READERS[launcher](path)
