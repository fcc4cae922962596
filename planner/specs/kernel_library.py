"""Kernel libraries: what a vendor's or a serving engine's kernels add to the device's own constants.

A device's constants describe the kernels that run best on it. ``hardware_profiles/kernel_libraries.toml`` says how the kernels of
others differ, rule by rule::

    [[gemm]]
    name = "cutlass-fp8"
    match = ["sgl_kernel"]           # parts of "framework kernel", any of them; left out: every kernel
    dtypes = ["fp8"]                 # number formats, or operators of streaming kernels; left out: any
    generations = ["hopper"]         # of devices; left out: any
    call_s = { value = 2e-6, kind = "assumed", source = "…" }

The first rule that fits decides; what it leaves out is :data:`DEFAULTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from planner.specs.device import Sourced
from planner.specs.library import hardware_folder
from planner.specs.reader import Reader, read_file
from planner.specs.sourced import read_optional

__all__ = ["DEFAULTS", "OPERATIONS", "KernelLibrary", "kernel_libraries", "library_for"]

OPERATIONS = ("gemm", "attention", "moe", "stream")
DEFAULTS: Mapping[str, float] = {
    "launch": 1.0,  # share of the device's launch time that is counted; less where a profiler's durations leave gaps out
    "call_s": 0.0,  # kernels of a call beside its main ones: quantisation, permutation, writing of the cache
    "decode_call_s": 0.0,  # the same of an attention call with one query per sequence
    "cast_s": 0.0,  # more of it where the cache is narrower than the queries
    "rate": 1.0,  # of the rate that the device's constants give
    "tile": 0.0,  # edge of its output tiles, elements, where it pads to other ones than the device's constants say
    "quantise_bytes": 0.0,  # traffic before the call, per element of its input
    "row_s": 0.0,  # of a quantised product, per row of its input: the kernel that quantises starts a block for each
    "unsplit": 0.0,  # 1: the contraction of a product is never split, so that few tiles take as long as a wave of them
    "byte_s": 0.0,  # that a multiprocessor takes per byte of weights where few rows are multiplied; 0: as the memory delivers
    "weight_bytes": 0.0,  # per element of the weights as the kernel reads them; 0: as they are stored
    "split_s": 0.0,  # of an attention over few queries, where its splitting is not the device's; 0: it is
    "splits": 0.0,  # among how many multiprocessors at most it splits a walk over keys; 0: as many as there are
    "prefill_tile": 1.0,  # of an attention: what a tile costs relative to the device's constant
    "decode_tile": 1.0,  # the same with one query per sequence
    "walk": 1.0,  # of an attention: how long the longest tile's walk over its keys is relative to the device's constant
    "wide_head": 0.0,  # the rate falls with (128 / width of a head) to this power beyond 128
    "window_s": 0.0,  # more of call_s with a sliding window
    "decode_window_s": 0.0,  # more of decode_call_s with one
    "unskipped_window": 0.0,  # 1: a prefill computes the scores that a sliding window masks
    "all_choices": 0.0,  # 1: of experts spread over ranks, the streaming kernels go over the choices of other ranks' too
    "passes": 1.0,  # how often a streaming kernel goes over its tensors
}


@dataclass(frozen=True, slots=True)
class KernelLibrary:
    """One rule: for which kernels it is, and its constants."""

    name: str
    operation: str
    match: tuple[str, ...]
    dtypes: tuple[str, ...]
    generations: tuple[str, ...]
    constants: Mapping[str, Sourced]

    def __getitem__(self, constant: str) -> float:
        found = self.constants.get(constant)
        return DEFAULTS[constant] if found is None else found.value

    def fits(self, operation: str, kernel: str, dtype: str, generation: str) -> bool:
        """Whether the rule is for this kernel, ``framework kernel`` in lower case, on a device of this generation."""
        return (
            operation == self.operation
            and (not self.generations or generation in self.generations)
            and (not self.match or any(part in kernel for part in self.match))
            and (not self.dtypes or dtype in self.dtypes)
        )


def library_for(operation: str, kernel: str, dtype: str, generation: str) -> KernelLibrary:
    """The first shipped rule for a kernel; one without constants where none fits.

    >>> library_for("gemm", "nobody's kernel", "bf16", "hopper")["rate"]
    1.0
    """
    kernel = kernel.lower()
    for library in kernel_libraries():
        if library.fits(operation, kernel, dtype, generation):
            return library
    return KernelLibrary("", operation, (), (), (), {})


@cache
def kernel_libraries() -> tuple[KernelLibrary, ...]:
    """All shipped rules, in order.

    Raises:
        SpecError: the file is wrong.
    """
    return read_libraries(hardware_folder() / "kernel_libraries.toml")


def read_libraries(path: Path) -> tuple[KernelLibrary, ...]:
    """The rules of a file, in order.

    Raises:
        SpecError: the file is wrong.
    """
    reader = Reader(read_file(path), str(path))
    found = tuple(
        _library(operation, rule) for operation in OPERATIONS for rule in reader.tables(operation, [])
    )
    reader.finish()
    reader.raise_if_any()
    return found


def _library(operation: str, reader: Reader) -> KernelLibrary:
    constants = {name: read_optional(reader, name, maximum=1e3) for name in DEFAULTS}
    library = KernelLibrary(
        name=reader.text("name"),
        operation=operation,
        match=tuple(part.lower() for part in reader.texts("match", ())),
        dtypes=reader.texts("dtypes", ()),
        generations=reader.texts("generations", ()),
        constants={name: number for name, number in constants.items() if number is not None},
    )
    reader.finish()
    return library
