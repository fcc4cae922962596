"""Fits the constants of kernels to published measurements, and says how well they carry to what was left out.

    python benchmarks/fit_kernels.py FOLDER            # fit on everything, leave out GPUs and libraries, print the errors
    python benchmarks/fit_kernels.py FOLDER --write    # fit on everything and write the constants into hardware_profiles
    python benchmarks/fit_kernels.py FOLDER --write --libraries    # the libraries' alone; the devices keep what they have

FOLDER holds tables that ``planner validate --operators`` understands. Constants of a generation go to its file, constants of a
kernel library to ``kernel_libraries.toml``. How they are fitted is in ``kernel_fit.py``; one that the rows tell less of than its
prior does is written as an assumed one.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # two processes share the cores; asked before numpy loads its threads

import numpy as np
from kernel_fit import IN_TRAINING, Fit, as_any_library, fit_all, fit_few

from planner.specs.device import Sourced
from planner.specs.kernel_library import KernelLibrary, library_for
from planner.specs.library import hardware_folder
from planner.validation.kernel_tables import Batch, batches
from planner.validation.operators import contradictions
from planner.validation.table import read_table

# GeForce parts multiply with fp32 accumulation at half of what their matrix units could: they are not held back by their power,
# as the professional parts of their generation are.
HEADROOM = {("ampere-ga102", "matmul"): "rtx-3090"}
WORKERS = 2  # processes
FEW = 12  # calls of each kernel and number format that describe a library to whoever never saw it
SOURCES = {"attention_backward": "published-attention"}  # of what nothing else tells


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


Errors = dict[str, np.ndarray]  # by metric
_shared: list[
    tuple[Sequence[Batch], Fit]
] = []  # what a worker process was given: all calls, and the fit on all of them


def report(data: Sequence[Batch], everything: Fit) -> None:
    """Errors in sample, with GPUs and whole generations left out, and with libraries left out."""
    print(HEADER.format("in sample"))
    for name in sorted({batch.device.name for batch in data}):
        print(line(name, errors(everything, [b for b in data if b.device.name == name])))
    print(line("all", errors(everything, data)))
    by_generation: dict[str, set[str]] = defaultdict(set)
    for batch in data:
        by_generation[batch.device.generation].add(batch.device.name)
    gpus = sorted(name for names in by_generation.values() if len(names) > 1 for name in names)
    generations = sorted(by_generation)
    pairs = sorted({(framework(b), b.device.generation) for b in data})
    with ProcessPoolExecutor(
        WORKERS, get_context("fork"), initializer=_shared.append, initargs=((data, everything),)
    ) as pool:
        of_gpus, of_generations = pool.map(without_gpu, gpus), pool.map(without_generation, generations)
        of_libraries = pool.map(without_library, pairs)
        print("\n" + HEADER.format("GPU left out"))
        for name, found in zip(gpus, of_gpus, strict=True):
            print(line(name, found))
        print_left_out(
            (
                "generation left out",
                f"generation left out, libraries told by {FEW} calls",
                f"generation left out, libraries and devices told by {FEW} calls",
            ),
            list(zip(generations, of_generations, strict=True)),
        )
        print_left_out(
            ("library left out", f"left out but for {FEW} calls of each kernel"),
            [(name, found) for (name, _), found in zip(pairs, of_libraries, strict=True) if found],
        )


def print_left_out(titles: Sequence[str], found: Sequence[tuple[str, Sequence[Errors]]]) -> None:
    """A table per title, of errors by what was left out."""
    for index, title in enumerate(titles):
        print("\n" + HEADER.format(title))
        for name in [*dict.fromkeys(name for name, _ in found), "all"]:
            if rows := joined([each[index] for own, each in found if name in (own, "all")]):
                print(line(name, rows))


def without_gpu(name: str) -> Errors:
    """Errors on a GPU's kernels of constants that the others' were fitted to."""
    data, _ = _shared[0]
    found = fit_all([b for b in data if b.device.name != name])
    return errors(found, [b for b in data if b.device.name == name])


def without_generation(generation: str) -> tuple[Errors, Errors, Errors]:
    """Errors on a generation of which nothing was fitted: unheard of, its libraries told by a few calls, and its devices as well.

    What is expected of its devices is the geometric mean of the other generations' constants.
    """
    data, _ = _shared[0]
    mine, rest = ([b for b in data if (b.device.generation == generation) is same] for same in (True, False))
    found = fit_all(rest)
    logs: dict[str, list[float]] = defaultdict(list)
    for own, library, name in found.told:
        if own and not library:
            logs[name].append(np.log(found.values[own, library, name]))
    here = {(generation, "", name): float(np.exp(np.mean(values))) for name, values in logs.items()}
    carried = Fit({**found.values, **here})
    devices = {key: value for key, value in carried.values.items() if not key[1]}
    unheard = errors(carried, [replace(b, library=stranger(b, rest, carried)) for b in mine])
    few, left = few_of_each(mine)
    own_told = fit_few(few, {key: value for key, value in devices.items() if key not in here}, devices=True)
    return unheard, errors(fit_few(few, devices), left), errors(own_told, left)


def without_library(pair: tuple[str, str]) -> tuple[Errors, Errors] | None:
    """Errors on a framework's kernels of constants that others' of their generation tell: unheard of, and after a few calls.

    None: no one else's kernels tell the constants of this generation.
    """
    (name, generation), (data, everything) = pair, _shared[0]
    here = [b for b in data if b.device.generation == generation]
    mine, rest = ([b for b in here if (framework(b) == name) is same] for same in (True, False))
    if not {b.metric for b in mine} & {b.metric for b in rest}:
        return None
    calibrated = fit_all(rest)
    others = [b for b in data if framework(b) != name]
    known = Fit({**everything.values, **calibrated.values})
    unheard = errors(known, [replace(b, library=stranger(b, others, known)) for b in mine])
    devices = {key: value for key, value in calibrated.values.items() if not key[1]}
    few, left = few_of_each(mine)
    return unheard, errors(fit_few(few, devices), left)


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Errors of several groups of rows as one, by metric."""
    return {m: np.concatenate([p[m] for p in parts if m in p]) for m in {m for p in parts for m in p}}


def few_of_each(data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """A few calls of every kernel and number format, and the others; see :func:`few_calls`."""
    parts = [few_calls(as_any_library(b)) for b in data if len(b.rows) > 2 * FEW]
    return [few for few, _ in parts], [left for _, left in parts]


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
