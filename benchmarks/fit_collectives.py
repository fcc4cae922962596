"""Fits the constants of ``hardware_profiles/links`` to published measurements of collectives, and tests them on what is left out.

    python benchmarks/fit_collectives.py FOLDER [--write]

FOLDER holds tables of collectives as ``planner validate --operators`` reads them. Every link that a table's devices have is
fitted by least squares (soft L1) of the logarithm of time, over calls inside one node, each file with the same weight. Three
errors are printed: in sample; with all rows of one GPU left out (constants from the other GPUs on the link or, where it has
none, from other links: :func:`carried_over`); with all rows of one source left out. ``--write`` puts the constants that were
fitted on everything into the link files.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from planner.costs.collectives import Level, Transport, group_members
from planner.errors import PlannerError
from planner.specs.device import Device
from planner.specs.device_file import load_device, merged_profile
from planner.specs.library import hardware_folder
from planner.specs.links import link_table
from planner.validation.call_machine import Machine, cluster_of, device_name
from planner.validation.collectives import SMALL_BYTES, Call, call_s, calls

# Links in the order of fitting: those that are met inside others come first; and those of its kind, which its rates and the
# hops over its wires fall back on.
LINKS = {
    "nvlink-3": ("nvlink-4", "nvlink-5"),
    "nvlink-4": ("nvlink-3", "nvlink-5"),
    "nvlink-5": ("nvlink-3", "nvlink-4"),
    "nvlink-bridge": ("nvlink-3",),
    "pcie": ("nvlink-3", "nvlink-4", "nvlink-5"),
    "pcie-host": ("nvlink-3", "nvlink-4", "nvlink-5"),
}
# Of them, what the device does and not the wire: a link that was never measured takes it from all links.
OF_DEVICE = ("launch_s", "bulk_hop_s", "exchange_s", "bulk_exchange_s", "peer_s")
ENOUGH = 30  # calls below 64 KiB: twice as many as there are constants of a link
# fp32 lanes of a multiprocessor (NVIDIA, CUDA C++ Programming Guide, throughput of native arithmetic instructions).
LANES = {"ampere": 64, "hopper": 128, "blackwell": 128, "blackwell-rtx": 128}
Constants = dict[str, dict[str, float]]
Batch = tuple[str, Machine, str]
Place = tuple[str, int]
_TRANSPORT = frozenset(Transport._fields)
_WIDTH = 0.1  # residuals beyond 10 % count linearly
_BOUNDS = {
    "_s": (1e-7, 2e-4),
    "_fraction": (0.1, 1.3),
    "_share": (0.01, 2.0),
    "efficiency": (0.2, 1.0),
    "_bytes_per_s": (5e8, 1e11),
}


def main(arguments: Sequence[str]) -> None:
    """Fits, prints the three tables, and with ``--write`` rewrites the link files."""
    folder = next(Path(word) for word in arguments if not word.startswith("--"))
    measured = load(folder)
    start = {link: values_of(link) for link in LINKS}
    fitted = fit(measured, start)
    report("in sample", measured, {place(call): fitted for call in measured})
    gpus = sorted({gpu(call) for call in measured})
    report("GPU left out", measured, left_out(measured, start, gpu, gpus))
    sources = sorted({source(call) for call in measured})
    report("source left out", measured, left_out(measured, start, source, sources))
    constants = sum(
        number["kind"] == "fitted" for link in LINKS for number in link_table(link, link).values()
    )
    print(f"{constants} constants for {len(measured)} rows: one for {len(measured) / constants:.0f}")
    for link, values in fitted.items():
        print(link, {name: float(f"{value:.3g}") for name, value in values.items()})
        if "--write" in arguments:
            rewrite(link, values)


def load(folder: Path) -> list[Call]:
    """Calls inside one node whose links have constants, and that no host paces."""
    found: list[Call] = []
    for path in sorted(folder.glob("*.csv")):
        try:
            table, _ = calls(path)
        except PlannerError:
            continue
        found += [
            call
            for call in table
            if not call.eager and call.machine.nodes == 1 and set(path_of(call)) <= set(LINKS)
        ]
    return found


def place(call: Call) -> Place:
    """Where the call's row stands."""
    return call.row.file, call.row.line


def gpu(call: Call) -> str:
    """The profile of the call's device."""
    return device_of(call.machine).name


@cache
def device_of(machine: Machine) -> Device:
    """The profile of a machine's devices."""
    return load_device(device_name(machine))


def source(call: Call) -> str:
    """Who measured it."""
    return call.row.text("source").partition("@")[0]


def path_of(call: Call) -> tuple[str, ...]:
    """Links that a call crosses, innermost first; the last is the one that its row is fitted for."""
    return links_of(call.machine)


@cache
def links_of(machine: Machine) -> tuple[str, ...]:
    """Links inside the node, as far out as the machine's devices reach."""
    profile = merged_profile(hardware_folder() / "devices" / f"{device_name(machine)}.toml")
    tables = [profile.get(key, {}) for key in ("scale_up", "within_node")]
    if "pairwise" in machine.inside.lower():
        tables = [profile["bridge"], profile["within_node"]]
    links = [str(table.get("link", "")) for table in tables if table]
    return tuple(links[:1] if machine.devices_per_node <= tables[0].get("domain", 1) else links)


@cache
def tiers_of(machine: Machine) -> tuple[tuple[float, float], ...]:
    """Members and rate, bytes/s, of each link on the way."""
    tiers = cluster_of(machine).tiers[: len(links_of(machine))]
    return tuple((float(group_members(machine.devices_per_node, 1, t.size)), t.bytes_per_s) for t in tiers)


def values_of(link: str) -> dict[str, float]:
    """The constants of a shipped link."""
    return {name: number["value"] for name, number in link_table(link, link).items()}


def seconds(batch: Batch, n_bytes: np.ndarray, constants: Constants) -> np.ndarray:
    """What the planner would say about calls of one kind on one machine if the links had these constants."""
    kind, machine, library = batch
    levels = []
    for (members, bytes_per_s), link in zip(tiers_of(machine), links_of(machine), strict=True):
        values = constants[link]
        transport = Transport(**{name: value for name, value in values.items() if name in _TRANSPORT})
        levels.append(Level(members, bytes_per_s * values["efficiency"], values["latency_s"], transport))
    return call_s(kind, n_bytes, levels, device_of(machine), library)


def batches(rows: Iterable[Call]) -> dict[Batch, list[Call]]:
    """Calls by what is priced together."""
    found: dict[Batch, list[Call]] = defaultdict(list)
    for call in rows:
        found[call.kind, call.machine, call.library].append(call)
    return found


def fit(rows: Sequence[Call], start: Constants) -> Constants:
    """Constants of every link that the rows cross, one link after the other; the others keep theirs."""
    constants = {link: dict(values) for link, values in start.items()}
    for link in LINKS:
        of_link = [call for call in rows if path_of(call)[-1] == link]
        if of_link:
            constants[link] = fit_link(link, of_link, constants)
    return constants


def fit_link(link: str, rows: Sequence[Call], constants: Constants) -> dict[str, float]:
    """The constants of one link: those that its file calls fitted."""
    grouped = [
        (
            batch,
            np.array([c.n_bytes for c in found]),
            np.log([c.measured_s for c in found]),
            weights(found, rows),
        )
        for batch, found in batches(rows).items()
    ]
    names = [name for name, number in link_table(link, link).items() if number["kind"] == "fitted"]
    first = np.log([constants[link][name] for name in names])
    low, high = np.log(
        [next(bound for end, bound in reversed(_BOUNDS.items()) if name.endswith(end)) for name in names]
    ).T

    def residuals(logs: np.ndarray) -> np.ndarray:
        trial = constants | {link: constants[link] | dict(zip(names, np.exp(logs).tolist(), strict=True))}
        return np.concatenate([w * (np.log(seconds(b, n, trial)) - t) for b, n, t, w in grouped])

    solved = least_squares(
        residuals,
        np.clip(first, low, high),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=_WIDTH,
        diff_step=1e-4,
    )
    return constants[link] | dict(zip(names, np.exp(solved.x).tolist(), strict=True))


def weights(found: Sequence[Call], rows: Sequence[Call]) -> np.ndarray:
    """So that every file has the same say about a link, however many rows it holds of it."""
    count: dict[str, int] = defaultdict(int)
    for call in rows:
        count[call.row.file] += 1
    each = len(rows) / len(count)
    return np.array([np.sqrt(each / count[call.row.file]) for call in found])


def left_out(
    rows: Sequence[Call], start: Constants, by: Callable[[Call], str], values: Sequence[str]
) -> dict[Place, Constants]:
    """Constants for every row from the rows of other groups alone."""
    found: dict[Place, Constants] = {}
    clocks = clocks_of(rows)
    # Nothing of what the left-out rows taught may stay: fits begin at what other links have.
    start = {link: carried_over(link, start, rows, clocks) for link in LINKS}
    for value in values:
        rest = [call for call in rows if by(call) != value]
        constants = fit(rest, start)
        for link in LINKS.keys() - clocks_of(rest).keys():
            constants[link] = carried_over(link, constants | {link: start[link]}, rest, clocks)
        found.update({place(call): constants for call in rows if by(call) == value})
    return found


def clocks_of(rows: Iterable[Call]) -> dict[str, float]:
    """Clock of the devices that a link was measured on, Hz: the geometric mean over its calls."""
    logs: dict[str, list[float]] = defaultdict(list)
    for call in rows:
        logs[path_of(call)[-1]].append(np.log(clock_hz(device_of(call.machine))))
    return {link: float(np.exp(np.mean(found))) for link, found in logs.items()}


def clock_hz(device: Device) -> float:
    """Highest clock of a data sheet: its fp32 rate over two operations per lane."""
    lanes = LANES[device.generation] * float(device.multiprocessors)
    return float(device.vector_flop_per_s) / (2.0 * lanes)


def carried_over(
    link: str, constants: Constants, rows: Sequence[Call], clocks: Mapping[str, float]
) -> dict[str, float]:
    """What is expected of a link that nobody has measured: geometric means over measured ones, constant by constant.

    A call's fixed costs are instructions: they last about as many cycles on one device as on another (13,500 of a launch on A100,
    11,900 on H100, 15,800 on B200 and 13,400 on RTX PRO 6000, while its seconds differ by a factor of 1.8). So seconds are
    carried over in cycles, those of the device (:data:`OF_DEVICE`) from every link with enough small calls to tell them. What
    no other link has stays its own.

    Args:
        link: which.
        constants: of the link, where its own may stay, and of others.
        rows: what was measured.
        clocks: of the devices that have each link, Hz.
    """
    known = clocks_of(rows)
    small = Counter(path_of(call)[-1] for call in rows if call.n_bytes <= SMALL_BYTES)
    found = {}
    for name, own in constants[link].items():
        links = (
            {other for other in known if small[other] >= ENOUGH} if name in OF_DEVICE else set(LINKS[link])
        )
        values = [
            constants[other][name] * (known[other] / clocks[link] if name.endswith("_s") else 1.0)
            for other in sorted(links & known.keys() - {link})
            if name in constants[other]
        ]
        found[name] = float(np.exp(np.mean(np.log(values)))) if values else own
    return found


def report(title: str, rows: Sequence[Call], constants: Mapping[Place, Constants]) -> None:
    """Median and 90th percentile of the absolute error by file and GPU, above and below 64 KiB."""
    errors: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
    for batch, found in batches(rows).items():
        by_constants: dict[int, list[Call]] = defaultdict(list)
        for call in found:
            by_constants[id(constants[place(call)])].append(call)
        for same in by_constants.values():
            predicted = seconds(batch, np.array([c.n_bytes for c in same]), constants[place(same[0])])
            for call, value in zip(same, predicted, strict=True):
                error = abs(value / call.measured_s - 1.0)
                for name in (gpu(call), "all"):
                    errors[call.row.file, name, call.n_bytes > SMALL_BYTES].append(error)
                errors["all", "all", call.n_bytes > SMALL_BYTES].append(error)
    print(
        f"\n{title}\n{'file':36} {'GPU':22} {'n':>5} {'above':>6} {'p90':>6} {'n':>5} {'below':>6} {'p90':>6}"
    )
    for file, name in sorted({(file, name) for file, name, _ in errors}):
        cells = []
        for large in (True, False):
            values = errors.get((file, name, large), [])
            median, p90 = (np.percentile(values, q) for q in (50, 90)) if values else (np.nan, np.nan)
            cells.append(f"{len(values):5} {100 * median:6.1f} {100 * p90:6.1f}")
        print(f"{file:36} {name:22} {' '.join(cells)}")


def rewrite(link: str, values: Mapping[str, float]) -> None:
    """Puts fitted values into a link's file; nothing else in it changes."""
    path = hardware_folder() / "links" / f"{link}.toml"
    text = path.read_text()
    for name, value in values.items():
        text = re.sub(rf"^({name} = {{ value = )[^,]+", rf"\g<1>{value:.3g}", text, flags=re.MULTILINE)
    path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
