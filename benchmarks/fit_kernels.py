"""Fits the constants of kernels to published measurements, and says how well they carry to what was left out.

    python benchmarks/fit_kernels.py FOLDER            # fit on everything, leave out GPUs and libraries, print the errors
    python benchmarks/fit_kernels.py FOLDER --write    # fit on everything and write the constants into hardware_profiles
    python benchmarks/fit_kernels.py FOLDER --write --libraries    # the libraries' alone; the devices keep what they have

FOLDER holds tables that ``planner validate --operators`` understands. Constants of a generation go to its file, constants of a
kernel library to ``kernel_libraries.toml``. Robust least squares (soft L1) on the logarithm of time; every constant is held to
its prior (:data:`PRIORS`) by the weight of :data:`PRIOR_ROWS` rows; one that the rows tell less of than its prior does is written
as an assumed one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from planner.kernels import Kernels
from planner.specs.device import Device, Efficiency, Sourced
from planner.specs.kernel_library import KernelLibrary, library_for
from planner.specs.library import hardware_folder
from planner.validation.kernel_tables import Batch, batches
from planner.validation.operators import contradictions
from planner.validation.table import read_table

# GeForce parts multiply with fp32 accumulation at half of what their matrix units could: they are not held back by their power,
# as the professional parts of their generation are.
HEADROOM = {("ampere-ga102", "matmul"): "rtx-3090"}
F_SCALE = 0.1  # log error beyond which a row counts linearly
SWEEPS = 2  # over the families: what a later one tells goes into the earlier ones once more
PRIOR_ROWS = 4.0
FIRM_PRIOR_ROWS = {
    "softmax_flop": 25.0,
    "l2_speedup": 25.0,
    "matmul_burst": 25.0,
}  # what others can stand in for
PRIOR_WIDTH = 0.5  # log
FEW = 12  # calls of each kernel and number format that describe a library to whoever never saw it

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
            "decode_tile", "wide_head",
        ),
    ),
    "moe": (("moe",), ("grouped_matmul",), ("rate", "call_s")),
}  # fmt: skip
SHARED = ("split_s",)  # constants that all generations share: one alone does not tell them
HIGHEST = {
    "matmul": 1.0, "matmul_8bit": 1.0, "matmul_4bit": 1.0, "matmul_burst": 1.6, "overlap_loss": 1.0, "split_s": 1e-6,
    "memory": 0.93, "l2_speedup": 8.0, "launch_s": 2e-5, "attention": 0.95, "attention_8bit": 0.95,
    "attention_backward": 0.95, "softmax_flop": 30.0, "attention_straggler": 4.0, "attention_tile_s": 3e-5,
    "grouped_matmul": 1.0, "rate": 1.5, "launch": 1.5, "call_s": 1e-3, "decode_call_s": 1e-3, "cast_s": 3e-5,
    "wide_head": 4.0, "decode_tile": 3.0, "prefill_tile": 20.0, "passes": 20.0, "row_s": 1e-7, "window_s": 5e-5,
    "decode_window_s": 5e-5, "splits": 1e3,
}  # fmt: skip
PRIORS = {
    "matmul": 0.75, "matmul_8bit": 0.65, "matmul_4bit": 0.5, "matmul_burst": 1.1, "overlap_loss": 0.2, "split_s": 5e-8,
    "memory": 0.88, "l2_speedup": 2.5, "launch_s": 2.5e-6, "attention": 0.65, "attention_8bit": 0.4, "attention_backward": 0.55,
    "softmax_flop": 5.0, "attention_straggler": 1.3, "attention_tile_s": 2.5e-6, "grouped_matmul": 0.85, "rate": 0.85,
    "launch": 0.8, "call_s": 1e-5, "decode_call_s": 6e-6, "cast_s": 2e-6, "prefill_tile": 2.0, "decode_tile": 0.5,
    "wide_head": 1.2, "passes": 2.0, "row_s": 5e-10, "window_s": 4e-6, "decode_window_s": 4e-6, "splits": 16.0,
}  # fmt: skip
OWN_PRIORS = {("gemm", "call_s"): 2e-6, ("moe", "call_s"): 3e-5, ("stream", "call_s"): 2e-6}
LOWEST = {"matmul_burst": 1.0, "l2_speedup": 1.0, "overlap_loss": 0.02, "split_s": 5e-9}


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

    def device(self, device: Device) -> Device:
        """The device with its generation's constants."""
        own = {
            name: value
            for (generation, library, name), value in self.values.items()
            if not library and generation in (device.generation, "")
        }
        names = {field.name for field in fields(Efficiency)}
        inside = {name: Sourced(value, "fitted", "") for name, value in own.items() if name in names}
        outside = {name: Sourced(value, "fitted", "") for name, value in own.items() if name not in names}
        return replace(device, efficiency=replace(device.efficiency, **inside), **outside)

    def library(self, library: KernelLibrary) -> KernelLibrary:
        """The library with its constants."""
        where = library_key(library)
        own = {name: value for (_, found, name), value in self.values.items() if found == where}
        return replace(
            library, constants={**library.constants, **{n: Sourced(v, "fitted", "") for n, v in own.items()}}
        )

    def seconds(self, batch: Batch) -> np.ndarray:
        """Predicted seconds of a batch."""
        kernels = Kernels(self.device(batch.device), alone=batch.rows[0].file != STEADY.name)
        return np.asarray(batch.work.seconds(kernels, self.library(batch.library)))


def library_key(library: KernelLibrary) -> str:
    """How a library's constants are told apart."""
    return f"{library.operation}: {library.name}"


def prior_of(key: Key) -> float:
    """Where a constant stands before any row is seen."""
    operation = key[1].partition(":")[0]
    return OWN_PRIORS.get((operation, key[2]), PRIORS[key[2]])


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


def fit(data: Sequence[Batch], family: str, known: Mapping[Key, float], devices: bool = True) -> Fit:
    """Constants of one family from its batches, on top of what is known; those of libraries alone unless ``devices``."""
    users: dict[Key, list[int]] = defaultdict(list)
    start: dict[Key, float] = {}
    for index, batch in enumerate(data):
        for key in keys_of(batch, family):
            users[key].append(index)
            start[key] = prior_of(key)
    keys = [key for key in users if devices or key[1]]
    if not keys:
        return Fit(dict(known))
    prior = np.log([start[key] for key in keys])
    begin = np.concatenate([[0], np.cumsum([len(batch.rows) for batch in data])]).astype(int)
    measured = [np.log(batch.measured_s) for batch in data]
    weight = np.array(
        [np.sqrt(FIRM_PRIOR_ROWS.get(key[2], PRIOR_ROWS)) / PRIOR_WIDTH * F_SCALE for key in keys]
    )

    def fitted(x: np.ndarray) -> Fit:
        return Fit({**known, **dict(zip(keys, np.exp(x).tolist(), strict=True))})

    weights = [np.sqrt(WEIGHTS.get(batch.rows[0].file, 1.0)) for batch in data]

    def residuals(x: np.ndarray) -> np.ndarray:
        found = fitted(x)
        errors = [
            heavy * (np.log(found.seconds(batch)) - known_s)
            for batch, known_s, heavy in zip(data, measured, weights, strict=True)
        ]
        return np.concatenate([*errors, weight * (x - prior)])

    def jacobian(x: np.ndarray) -> np.ndarray:
        matrix = np.zeros((begin[-1] + len(keys), len(keys)))
        base = fitted(x)
        values = {index: np.log(base.seconds(data[index])) for used in users.values() for index in used}
        for column, key in enumerate(keys):
            moved = x.copy()
            moved[column] += 1e-4
            other = fitted(moved)
            for index in users[key]:
                slope = (np.log(other.seconds(data[index])) - values[index]) / 1e-4
                matrix[begin[index] : begin[index + 1], column] = weights[index] * slope
            matrix[begin[-1] + column, column] = weight[column]
        return matrix

    lowest = np.log([LOWEST.get(key[2], HIGHEST[key[2]] * 1e-4) for key in keys])
    highest = np.log([HIGHEST[key[2]] for key in keys])
    x0 = np.clip(prior, lowest + 1e-6, highest - 1e-6)
    solved = least_squares(
        residuals,
        x0,
        jacobian,
        bounds=(lowest, highest),
        loss="soft_l1",
        f_scale=F_SCALE,
        max_nfev=100,
        x_scale=0.2,
    )
    told = np.sqrt((jacobian(solved.x)[: begin[-1]] ** 2).sum(axis=0)) / weight
    above = [
        frozenset(key for key, much in zip(keys, told, strict=True) if much > least) for least in (1.0, 0.3)
    ]
    return Fit(fitted(solved.x).values, *above)


def fit_all(data: Sequence[Batch], devices: bool = True, before: Mapping[Key, float] | None = None) -> Fit:
    """All families, one after another, on top of what is known before; see :func:`fit`."""
    known = dict(before or {})
    last: dict[str, Fit] = {}
    for _ in range(SWEEPS if devices else 1):
        for family, (metrics, _, _) in FAMILIES.items():
            mine = [batch for batch in data if batch.metric in metrics]
            if mine:
                last[family] = fit(mine, family, known, devices)
                known = last[family].values
    told, moved = (
        frozenset().union(*(getattr(each, name) for each in last.values())) for name in ("told", "moved")
    )
    return Fit(known, told, moved)


SOURCES = {"attention_backward": "published-attention"}  # of what nothing else tells
DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
STEADY = DATA / "training_products.csv"  # of 0.1 ms and more, timed for so long that the chip is hot
IN_TRAINING = (DATA / "published_attention.csv", STEADY)
WEIGHTS = {path.name: 5.0 for path in IN_TRAINING}  # few rows, of the shapes that training has


def possible(batch: Batch) -> Batch | None:
    """The batch without rows that cannot be measurements of what they say."""
    keep = np.array([not reason for reason in contradictions(batch)])
    return batch if keep.all() else batch.take(keep) if keep.any() else None


def load(folder: Path) -> list[Batch]:
    """The kernels of all tables of a folder, and published kernels of training."""
    found: list[Batch] = []
    for path in (*sorted(folder.glob("*.csv")), *IN_TRAINING):
        table = read_table(path)
        if table.kind == "kernels":
            found += [kept for batch in batches(table)[0] if (kept := possible(batch)) is not None]
    return found


def errors(found: Fit, data: Sequence[Batch]) -> dict[str, np.ndarray]:
    """Absolute fractional errors per row, by metric."""
    by_metric: dict[str, list[np.ndarray]] = defaultdict(list)
    for batch in data:
        by_metric[batch.metric].append(np.abs(found.seconds(batch) / batch.measured_s - 1.0))
    return {metric: np.concatenate(parts) for metric, parts in by_metric.items()}


def line(name: str, found: Mapping[str, np.ndarray]) -> str:
    """One row of a Markdown table: median / 90th percentile and number of rows, by metric."""
    cells = [
        f"{np.median(e):.1%} / {np.percentile(e, 90):.0%} ({len(e)})"
        if (e := found.get(m)) is not None
        else "–"
        for m in ("gemm", "attention_prefill", "attention_decode", "moe", "elementwise")
    ]
    return f"| {name} | {' | '.join(cells)} |"


HEADER = "| {} | GEMM | attention, prefill | attention, decode | grouped GEMM | elementwise |\n|---|---:|---:|---:|---:|---:|"


def framework(batch: Batch) -> str:
    """Whose kernels a batch holds."""
    row = batch.rows[0]
    return row.text("framework") or row.text("source").partition("@")[0]


def report(data: Sequence[Batch], everything: Fit) -> None:
    """Errors in sample, with GPUs left out, and with libraries left out."""
    print(HEADER.format("in sample"))
    for name in sorted({batch.device.name for batch in data}):
        print(line(name, errors(everything, [b for b in data if b.device.name == name])))
    print(line("all", errors(everything, data)))
    by_generation: dict[str, set[str]] = defaultdict(set)
    for batch in data:
        by_generation[batch.device.generation].add(batch.device.name)
    print("\n" + HEADER.format("GPU left out"))
    for names in by_generation.values():
        for name in sorted(names) if len(names) > 1 else ():
            found = fit_all([b for b in data if b.device.name != name])
            print(line(name, errors(found, [b for b in data if b.device.name == name])))
    report_libraries(data, everything)


def report_libraries(data: Sequence[Batch], everything: Fit) -> None:
    """Errors on kernels of a library that the constants of its GPUs were not fitted to: unheard of, and after a few calls."""
    unheard: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    sampled: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    pairs = sorted({(framework(b), b.device.generation) for b in data})
    for name, generation in pairs:
        here = [b for b in data if b.device.generation == generation]
        mine, rest = ([b for b in here if (framework(b) == name) is same] for same in (True, False))
        if not {b.metric for b in mine} & {b.metric for b in rest}:
            continue  # no one else's kernels tell the constants of this GPU
        calibrated = fit_all(rest)
        others = [b for b in data if framework(b) != name]
        known = Fit({**everything.values, **calibrated.values})
        unheard[name].append(errors(known, [replace(b, library=stranger(b, others, known)) for b in mine]))
        parts = [few_calls(b) for b in mine if len(b.rows) > 2 * FEW]
        devices = {key: value for key, value in calibrated.values.items() if not key[1]}
        told = fit_all([few for few, _ in parts], devices=False, before=devices)
        sampled[name].append(errors(told, [left for _, left in parts]))
    for title, found in (
        ("library left out", unheard),
        (f"left out but for {FEW} calls of each kernel", sampled),
    ):
        print("\n" + HEADER.format(title))
        for name in [*found, "all"]:
            rows = joined([e for n, each in found.items() if name in (n, "all") for e in each])
            if rows:
                print(line(name, rows))


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Errors of several groups of rows as one, by metric."""
    return {m: np.concatenate([p[m] for p in parts if m in p]) for m in {m for p in parts for m in p}}


def few_calls(batch: Batch) -> tuple[Batch, Batch]:
    """A few calls of a kernel, from its shortest to its longest at even ranks, as one would measure them; and the others."""
    ranks = np.linspace(0, len(batch.rows) - 1, FEW).round().astype(int)
    mask = np.zeros(len(batch.rows), dtype=bool)
    mask[np.argsort(batch.measured_s, kind="stable")[ranks]] = True
    return batch.take(mask), batch.take(~mask)


def stranger(batch: Batch, rest: Sequence[Batch], found: Fit) -> KernelLibrary:
    """What is expected of a library that nobody has measured: the median of the others, of its generation if there are any."""
    operation, dtype = batch.library.operation, batch.rows[0].text("dtype")
    like = {b.library.name: b for b in rest if b.library.operation == operation and same_format(b, batch)}
    near = [b for b in like.values() if b.device.generation == batch.device.generation] or list(like.values())
    plain = library_for(operation, "unheard of", dtype, batch.device.generation)
    constants: dict[str, Sourced] = {}
    for name in batch.library.constants:
        known = [found.library(b.library)[name] for b in near if name in b.library.constants]
        value = float(np.median(known)) if known else plain[name]
        constants[name] = Sourced(value, "assumed", "")
    return KernelLibrary(f"stranger to {batch.library.name}", operation, (), (), (), constants)


def same_format(one: Batch, other: Batch) -> bool:
    """Whether two batches of one operation have the same number formats."""
    columns = ("dtype", "moe_dtype", "attn_dtype", "mla_dtype")
    return all(one.rows[0].text(c) == other.rows[0].text(c) for c in columns)


def write(found: Fit, generations: set[str]) -> None:
    """Writes what the rows tell into the profiles; a library's constant that they do not tell becomes an assumed one."""
    folder = hardware_folder()
    for (generation, library, name), value in found.values.items():
        if library:
            continue
        for place in [generation] if generation else sorted(generations):
            device = HEADROOM.get((place, name))
            path = folder / ("devices" if device else "generations") / f"{device or place}.toml"
            if (generation, library, name) in found.moved:
                kind = "fitted" if (generation, library, name) in found.told else "assumed"
                replace_number(path, name, value, kind, SOURCES.get(name, "kernel-fit"))
    text = (folder / "kernel_libraries.toml").read_text()
    rules = re.split(r"(?=^\[\[)", text, flags=re.M)
    for index, rule in enumerate(rules):
        operation, title = re.match(r"\[\[(\w+)\]\]", rule), re.search(r'^name = "(.*)"$', rule, re.M)
        if operation is None or title is None:
            continue
        where = f"{operation[1]}: {title[1]}"
        for (_, library, name), value in found.values.items():
            if library == where:
                kind = "fitted" if ("", library, name) in found.told else "assumed"
                entry = f'{name} = {{ value = {value:.3g}, kind = "{kind}", source = "kernel-fit" }}'
                rule = re.sub(rf"^{name} = .*$", entry, rule, flags=re.M)
        rules[index] = rule
    (folder / "kernel_libraries.toml").write_text("".join(rules))


def replace_number(path: Path, name: str, value: float, kind: str, source: str) -> None:
    """Replaces a constant in a profile; appends it where the profile has none."""
    text = path.read_text()
    entry = f'{name} = {{ value = {value:.3g}, kind = "{kind}", source = "{source}" }}'
    changed, count = re.subn(rf"^{name} = .*$", entry, text, flags=re.M)
    if not count:
        changed = f"{text.rstrip()}\n" + ("" if "[efficiency]" in text else "\n[efficiency]\n") + f"{entry}\n"
    path.write_text(changed)


def main() -> None:
    """Fits, reports, and writes if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--libraries", action="store_true", help="keep the constants of devices")
    parser.add_argument("--no-report", action="store_true")
    arguments = parser.parse_args()
    data = load(arguments.folder)
    everything = fit_all(data, devices=not arguments.libraries)
    rows = sum(len(batch.rows) for batch in data)
    for key, value in everything.values.items():
        print(f"{key[0] or key[1]}: {key[2]} = {value:.3g}", file=sys.stderr)
    if arguments.write:
        write(everything, {batch.device.generation for batch in data})
    if not arguments.no_report:
        report(data, everything)
    print(f"\n{len(everything.values)} constants on {rows} rows: one per {rows / len(everything.values):.0f}")


if __name__ == "__main__":
    main()
