"""Constants of kernels from measured calls: which family of kernels tells which, their priors, and the fit itself.

Robust least squares (soft L1) on the logarithm of time; every constant is held to its prior (:data:`PRIORS`) by the weight of
:data:`PRIOR_ROWS` rows. Constants that no call has in common are fitted apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from planner.engine.kernels import Kernels
from planner.specs.device import Device, Efficiency, Sourced
from planner.specs.kernel_library import KernelLibrary
from planner.validation.kernel_tables import Batch

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
STEADY = DATA / "training_products.csv"  # of 0.1 ms and more, timed for so long that the chip is hot
IN_TRAINING = (DATA / "published_attention.csv", STEADY)
WEIGHTS = {path.name: 5.0 for path in IN_TRAINING}  # few rows, of the shapes that training has
F_SCALE = 0.1  # log error beyond which a row counts linearly
FEW_F_SCALE = 0.03  # the same among a dozen calls, of which one at a step of a kernel's choice must not pull the others along
SWEEPS = 2  # over the families: what a later one tells goes into the earlier ones once more
PRIOR_ROWS = 4.0
FIRM_PRIOR_ROWS = {
    "softmax_flop": 25.0,
    "l2_speedup": 25.0,
    "matmul_burst": 25.0,
}  # what others can stand in for
PRIOR_WIDTH = 0.5  # log

Key = tuple[str, str, str]  # ("hopper", "", "matmul") or ("", "gemm fp8", "rate")

# What each family of kernels tells: constants of generations, and constants of libraries. Families are fitted in this order, and
# what an earlier one has told is fixed in the later ones.
FAMILIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "gemm": (
        ("gemm",),
        ("matmul", "matmul_8bit", "matmul_4bit", "matmul_burst", "overlap_loss", "split_s", "memory", "launch_s"),
        ("rate", "call_s", "launch", "row_s"),
    ),
    "elementwise": (("elementwise",), (), ("passes", "call_s", "launch")),
    "attention": (
        ("attention_prefill", "attention_decode"),
        (
            "attention", "attention_8bit", "attention_backward", "softmax_flop", "attention_straggler", "attention_tile_s",
            "l2_speedup",
        ),
        (
            "rate", "call_s", "decode_call_s", "cast_s", "window_s", "decode_window_s", "split_s", "splits", "prefill_tile",
            "decode_tile", "walk", "wide_head",
        ),
    ),
    "moe": (("moe",), ("grouped_matmul",), ("rate", "call_s")),
}  # fmt: skip
ANY_LIBRARY: Mapping[str, Mapping[str, float]] = {
    "gemm": {"rate": 1.0},
    "attention": {"rate": 1.0, "walk": 1.0},
    "stream": {"passes": 1.0, "call_s": 1e-6},
}  # what a dozen calls tell of any library's kernel, also where its rule holds it to be like the best one
SHARED = ("split_s",)  # constants that all generations share: one alone does not tell them
HIGHEST = {
    "matmul": 1.0, "matmul_8bit": 1.0, "matmul_4bit": 1.0, "matmul_burst": 1.6, "overlap_loss": 1.0, "split_s": 1e-6,
    "memory": 0.93, "l2_speedup": 8.0, "launch_s": 2e-5, "attention": 0.95, "attention_8bit": 0.95,
    "attention_backward": 0.95, "softmax_flop": 30.0, "attention_straggler": 4.0, "attention_tile_s": 3e-5,
    "grouped_matmul": 1.0, "rate": 1.5, "launch": 1.5, "call_s": 1e-3, "decode_call_s": 1e-3, "cast_s": 3e-5,
    "wide_head": 4.0, "decode_tile": 3.0, "walk": 5.0, "prefill_tile": 20.0, "passes": 20.0, "row_s": 1e-7, "window_s": 5e-5,
    "decode_window_s": 5e-5, "splits": 1e3,
}  # fmt: skip
PRIORS = {
    "matmul": 0.75, "matmul_8bit": 0.65, "matmul_4bit": 0.5, "matmul_burst": 1.1, "overlap_loss": 0.2, "split_s": 5e-8,
    "memory": 0.88, "l2_speedup": 2.5, "launch_s": 2.5e-6, "attention": 0.65, "attention_8bit": 0.4, "attention_backward": 0.55,
    "softmax_flop": 5.0, "attention_straggler": 1.3, "attention_tile_s": 2.5e-6, "grouped_matmul": 0.85, "rate": 0.85,
    "launch": 0.8, "call_s": 1e-5, "decode_call_s": 6e-6, "cast_s": 2e-6, "prefill_tile": 2.0, "decode_tile": 0.5, "walk": 1.0,
    "wide_head": 1.2, "passes": 2.0, "row_s": 5e-10, "window_s": 4e-6, "decode_window_s": 4e-6, "splits": 16.0,
}  # fmt: skip
OWN_PRIORS = {("gemm", "call_s"): 2e-6, ("moe", "call_s"): 3e-5, ("stream", "call_s"): 2e-6}
LOWEST = {"matmul_burst": 1.0, "l2_speedup": 1.0, "overlap_loss": 0.02, "split_s": 5e-9}

_EFFICIENCIES = frozenset(field.name for field in fields(Efficiency))
_STEP = 1e-4  # of a logarithm, for slopes


@dataclass
class Fit:
    """Constants over what the profiles hold: by generation or library, and name.

    Attributes:
        told: those that the rows tell more of than their priors do.
        moved: those that they tell a tenth as much of, or more.
    """

    values: dict[Key, float]
    told: frozenset[Key] = frozenset()
    moved: frozenset[Key] = frozenset()
    _own: dict[tuple[str, str], dict[str, Sourced]] = field(default_factory=dict, repr=False)
    _kernels: dict[tuple[str, bool], Kernels] = field(default_factory=dict, repr=False)
    _libraries: dict[int, tuple[KernelLibrary, KernelLibrary]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self._own:
            for (generation, library, name), value in self.values.items():
                self._own.setdefault((generation, library), {})[name] = Sourced(value, "fitted", "")

    def nudged(self, key: Key, by: float) -> Fit:
        """The same with one constant ``exp(by)`` times as large."""
        _, library, name = key
        value = self.values[key] * float(np.exp(by))
        own = {**self._own, key[:2]: {**self._own[key[:2]], name: Sourced(value, "fitted", "")}}
        kernels = self._kernels if library else {}
        libraries = {n: pair for n, pair in self._libraries.items() if library_key(pair[0]) != library}
        return Fit({**self.values, key: value}, _own=own, _kernels=kernels, _libraries=libraries)

    def device(self, device: Device) -> Device:
        """The device with its generation's constants."""
        own = {**self._own.get((device.generation, ""), {}), **self._own.get(("", ""), {})}
        inside = {name: value for name, value in own.items() if name in _EFFICIENCIES}
        outside = {name: value for name, value in own.items() if name not in _EFFICIENCIES}
        return replace(device, efficiency=replace(device.efficiency, **inside), **outside)

    def library(self, library: KernelLibrary) -> KernelLibrary:
        """The library with its constants."""
        if id(library) not in self._libraries:
            own = self._own.get(("", library_key(library)), {})
            self._libraries[id(library)] = library, replace(library, constants={**library.constants, **own})
        return self._libraries[id(library)][1]

    def kernels(self, device: Device, alone: bool) -> Kernels:
        """Prices on the device with its generation's constants."""
        if (device.name, alone) not in self._kernels:
            self._kernels[device.name, alone] = Kernels(self.device(device), alone=alone)
        return self._kernels[device.name, alone]

    def seconds(self, batch: Batch) -> np.ndarray:
        """Predicted seconds of a batch."""
        kernels = self.kernels(batch.device, batch.rows[0].file != STEADY.name)
        return np.asarray(batch.work.seconds(kernels, self.library(batch.library)))


def library_key(library: KernelLibrary) -> str:
    """How a library's constants are told apart."""
    return f"{library.operation}: {library.name}"


def prior_of(key: Key) -> float:
    """Where a constant stands before any row is seen."""
    operation = key[1].partition(":")[0]
    return OWN_PRIORS.get((operation, key[2]), PRIORS[key[2]])


def as_any_library(batch: Batch) -> Batch:
    """The batch with a library of its own that may differ from the best one in whatever any library's kernel may."""
    library, label = batch.library, batch.rows[0].text("dtype")
    free = {
        name: Sourced(value, "assumed", "kernel-fit")
        for name, value in ANY_LIBRARY.get(library.operation, {}).items()
    }
    named = library.name or f"best kernel, {label}"
    return replace(batch, library=replace(library, name=named, constants={**free, **library.constants}))


def keys_of(batch: Batch, family: str) -> list[Key]:
    """Constants that a batch's price may depend on and that its family tells."""
    _, generation, library = FAMILIES[family]
    told = [("" if name in SHARED else batch.device.generation, "", name) for name in generation]
    free = [
        name
        for name in library
        if name in batch.library.constants and batch.library.constants[name].source == "kernel-fit"
    ]
    return told + [("", library_key(batch.library), name) for name in free]


def fit(
    data: Sequence[Batch],
    family: str,
    known: Mapping[Key, float],
    devices: bool = True,
    f_scale: float = F_SCALE,
) -> Fit:
    """Constants of one family from its batches, on top of what is known; those of libraries alone unless ``devices``."""
    keys = [[key for key in keys_of(batch, family) if devices or key[1]] for batch in data]
    parts = [_fit_together(*part, known, f_scale) for part in _linked(data, keys)]
    values = {key: value for part in parts for key, value in part.values.items()}
    told, moved = (
        frozenset(key for part in parts for key in getattr(part, name)) for name in ("told", "moved")
    )
    return Fit({**known, **values}, told, moved)


def _linked(data: Sequence[Batch], keys: Sequence[list[Key]]) -> list[tuple[list[Batch], list[list[Key]]]]:
    """Batches and their constants in groups that have none in common."""
    groups: list[tuple[set[Key], list[int]]] = []
    for index, own in enumerate(keys):
        if not own:
            continue
        met = [group for group in groups if not group[0].isdisjoint(own)]
        groups = [group for group in groups if group[0].isdisjoint(own)]
        joined = set(own).union(*(found for found, _ in met))
        groups.append((joined, [i for _, members in met for i in members] + [index]))
    return [([data[i] for i in members], [keys[i] for i in members]) for _, members in groups]


def _fit_together(
    data: list[Batch], used: list[list[Key]], known: Mapping[Key, float], f_scale: float
) -> Fit:
    """The constants of one group, and nothing else."""
    keys = list(dict.fromkeys(key for own in used for key in own))
    column = {key: index for index, key in enumerate(keys)}
    prior = np.log([prior_of(key) for key in keys])
    begin = np.concatenate([[0], np.cumsum([len(batch.rows) for batch in data])]).astype(int)
    places = [slice(*ends) for ends in pairwise(begin)]
    measured = np.log(np.concatenate([batch.measured_s for batch in data]))
    heavy = np.sqrt(np.repeat([WEIGHTS.get(b.rows[0].file, 1.0) for b in data], np.diff(begin)))
    weight = np.array(
        [np.sqrt(FIRM_PRIOR_ROWS.get(key[2], PRIOR_ROWS)) / PRIOR_WIDTH * f_scale for key in keys]
    )

    def fitted(x: np.ndarray) -> Fit:
        return Fit({**known, **dict(zip(keys, np.exp(x).tolist(), strict=True))})

    def logs(found: Fit) -> np.ndarray:
        return np.log(np.concatenate([found.seconds(batch) for batch in data]))

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([heavy * (logs(fitted(x)) - measured), weight * (x - prior)])

    def slopes(x: np.ndarray) -> np.ndarray:
        matrix = np.zeros((begin[-1], len(keys)))
        base = fitted(x)
        values = logs(base)
        nudged = {key: base.nudged(key, _STEP) for key in keys}
        for batch, place, own in zip(data, places, used, strict=True):
            for key in own:
                matrix[place, column[key]] = np.log(nudged[key].seconds(batch)) - values[place]
        return matrix * (heavy / _STEP)[:, None]

    lowest = np.log([LOWEST.get(key[2], HIGHEST[key[2]] * 1e-4) for key in keys])
    highest = np.log([HIGHEST[key[2]] for key in keys])
    solved = least_squares(
        residuals,
        np.clip(prior, lowest + 1e-6, highest - 1e-6),
        lambda x: np.vstack([slopes(x), np.diag(weight)]),
        bounds=(lowest, highest),
        loss="soft_l1",
        f_scale=f_scale,
        max_nfev=100,
        x_scale=0.2,
    )
    much = np.sqrt((slopes(solved.x) ** 2).sum(axis=0)) / weight
    told, moved = (frozenset(k for k, m in zip(keys, much, strict=True) if m > least) for least in (1.0, 0.3))
    return Fit(dict(zip(keys, np.exp(solved.x).tolist(), strict=True)), told, moved)


def fit_all(
    data: Sequence[Batch],
    devices: bool = True,
    before: Mapping[Key, float] | None = None,
    f_scale: float = F_SCALE,
) -> Fit:
    """All families, one after another, on top of what is known before; see :func:`fit`."""
    known = dict(before or {})
    last: dict[str, Fit] = {}
    for _ in range(SWEEPS if devices else 1):
        for family, (metrics, _, _) in FAMILIES.items():
            mine = [batch for batch in data if batch.metric in metrics]
            if mine:
                last[family] = fit(mine, family, known, devices, f_scale)
                known = last[family].values
    told, moved = (
        frozenset().union(*(getattr(each, name) for each in last.values())) for name in ("told", "moved")
    )
    return Fit(known, told, moved)


def fit_few(data: Sequence[Batch], before: Mapping[Key, float], devices: bool = False) -> Fit:
    """What a few calls of each kernel tell of its library, on top of what is known before; of its device too if ``devices``."""
    return fit_all(data, devices=devices, before=before, f_scale=FEW_F_SCALE)
