"""``planner calibrate``: constants of a device, a fabric or a software stack from a user's own measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from planner.cli.options import Json, flag, option
from planner.cli.values import attempt, raise_if_any, whole_number

if TYPE_CHECKING:
    from planner.calibration.measurements import Measurement
    from planner.calibration.profile import Provenance
    from planner.calibration.robust_fit import Fit
    from planner.errors import Problem

_T = TypeVar("_T")
_Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE…",
        help="Measurements: CSV, nccl-tests output, profiler table or trace.",
        show_default=False,
    ),
]
_Out = Annotated[str, option("-o", "--out", metavar="FILE.toml", text="The profile to write.")]
_Name = Annotated[str | None, option("--name", metavar="NAME", text="Its name [the file's].")]
_Folds = Annotated[str, option("--folds", metavar="K", text="Parts for the left-out error [5].")]
_Conditions = Annotated[
    str,
    option(
        "--conditions",
        metavar="TEXT",
        text="What it was measured with; goes into the profile.",
    ),
]
_Dtype = Annotated[
    str | None,
    option("--dtype", metavar="DTYPE", text="Of a profiler's table, which does not say."),
]
_Only = Annotated[
    str,
    option(
        "--only",
        metavar="LIST",
        text="Families to fit to, such as product,all_reduce [all].",
    ),
]
_Accelerator = Annotated[
    str | None,
    option(
        "--accelerator",
        metavar="NAME",
        text="Rows of this one, where a table has several.",
    ),
]


def device(
    files: _Files,
    base: Annotated[
        str,
        option("--base", metavar="DEVICE", text="A device or file: all that is not fitted."),
    ],
    out: _Out,
    name: _Name = None,
    folds: _Folds = "5",
    conditions: _Conditions = "",
    dtype: _Dtype = None,
    only: _Only = "",
    accelerator: _Accelerator = None,
    as_json: Json = False,
) -> None:
    """Fit kernel efficiencies, launch time and the links inside a node; writes a device profile.

    Kernels determine the efficiencies, collectives of one node the link. A constant that too few rows depend on keeps the value
    of --base, and the report says so.
    """
    from planner.calibration.device import fit_kernels, fit_links
    from planner.calibration.measurements import Message
    from planner.calibration.profile import device_toml
    from planner.cli.output import OutputFile
    from planner.specs.device_file import load_device

    parts = _folds(folds)
    start = _named("--base", load_device, base)
    with OutputFile(_toml(out)) as file:
        measurements = _read(files, dtype, only, accelerator)
        fits = {}
        kernels = [m for m in measurements if not isinstance(m.work, Message)]
        messages = [m for m in measurements if isinstance(m.work, Message)]
        if kernels:
            fits["kernels"] = fit_kernels(start, kernels, folds=parts)[1]
        if messages:
            fits["links"] = fit_links(start, messages, folds=parts)[1]
        text = device_toml(base, name or _stem(out), list(fits.values()), _provenance(files, conditions))
        file.write(text)
    load_device(out)
    _report(fits, out, as_json)


def fabric(
    files: _Files,
    cluster: Annotated[
        str,
        option("--cluster", metavar="CLUSTER", text="A cluster: all that is not fitted."),
    ],
    out: _Out,
    name: _Name = None,
    folds: _Folds = "5",
    conditions: _Conditions = "",
    only: _Only = "",
    accelerator: _Accelerator = None,
    as_json: Json = False,
) -> None:
    """Fit latency and bandwidth of a cluster's tiers to collectives inside and between nodes; writes a cluster profile."""
    from planner.calibration.fabric import fit_fabric
    from planner.calibration.profile import cluster_toml
    from planner.cli.output import OutputFile
    from planner.specs.hardware import load_cluster

    parts = _folds(folds)
    start = _named("--cluster", load_cluster, cluster)
    with OutputFile(_toml(out)) as file:
        fitted, found, unplaced = fit_fabric(start, _read(files, None, only, accelerator), folds=parts)
        file.write(cluster_toml(fitted, name or _stem(out), found, _provenance(files, conditions)))
    load_cluster(out)
    notes = [f"{unplaced} messages do not fit into {start.name} and were left out"] if unplaced else []
    _report({"tiers": found}, out, as_json, notes)


def stack(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="RUNS.csv…", help="Training runs, or serving runs of one engine.", show_default=False
        ),
    ],
    out: _Out,
    base: Annotated[
        str | None,
        option(
            "--base",
            metavar="STACK",
            text="A stack or file: all that is not fitted [default; the engine's, of serving runs].",
        ),
    ] = None,
    device: Annotated[
        str | None,
        option("--device", metavar="DEVICE", text="Instead of the rows' accelerator."),
    ] = None,
    name: _Name = None,
    folds: _Folds = "5",
    conditions: _Conditions = "",
    as_json: Json = False,
) -> None:
    """Fit what a framework costs to measured runs: kernels, overlap, host and memory; writes a stack.

    Of training runs or of deployments, as the files' columns say. Rows of one model are left out together.
    """
    from planner.calibration.profile import stack_toml
    from planner.cli.output import OutputFile
    from planner.specs.stack import load_stack

    parts = _folds(folds)
    if base is not None:
        _named("--base", load_stack, base)
    with OutputFile(_toml(out)) as file:
        start, fits, left_out = (_serving if _of_serving(files) else _training)(files, base, device, parts)
        file.write(stack_toml(start, name or _stem(out), list(fits.values()), _provenance(files, conditions)))
    load_stack(out)
    _report(fits, out, as_json, [f"{row}: {reason}" for row, reason in left_out.items()])


def measure(
    out: Annotated[
        str,
        option("-o", "--out", metavar="FOLDER", text="Folder for the CSV files."),
    ],
    what: Annotated[
        str,
        option(
            "--what",
            metavar="LIST",
            text="Of gemm, attention, stream, collectives; all if left out.",
        ),
    ] = "",
    on: Annotated[str, typer.Option("--on", metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="fp32, bf16 or fp16.")] = "fp32",
    processes: Annotated[str, typer.Option("--processes", metavar="N", help="Of collectives.")] = "2",
    threads: Annotated[str, typer.Option("--threads", metavar="N", help="Of a process on a CPU.")] = "1",
    quick: Annotated[bool, flag("--quick", "A coarse grid: a minute.")] = False,
    as_json: Json = False,
) -> None:
    """Run microbenchmarks with PyTorch and write them as operators CSV files.

    Products, attention forward and backward, copies and sums; collectives over gloo (cpu) or NCCL (cuda). Needs the extra
    ``measure`` (torch). Each number is the median of repeats that were not disturbed by other processes.
    """
    from planner.calibration.measure import FAMILIES, Setting, measure_families, table_text
    from planner.cli.output import OutputFile, print_json

    chosen = _chosen("--what", what, FAMILIES)
    setting = Setting(
        on=on,
        dtype=dtype,
        processes=whole_number("--processes", processes),
        threads=whole_number("--threads", threads),
        quick=quick,
    )
    setting.check()
    folder = _folder(out)
    with ExitStack() as stack:
        paths = {family: str(folder / f"{family}.csv") for family in chosen}
        opened = {family: stack.enter_context(OutputFile(path)) for family, path in paths.items()}
        tables = measure_families(chosen, setting)
        for family, rows in tables.items():
            opened[family].write(table_text(rows))
    if as_json:
        print_json(
            {"files": {family: {"path": paths[family], "rows": len(rows)} for family, rows in tables.items()}}
        )
    else:
        for family, rows in tables.items():
            print(f"{paths[family]}: {len(rows)} rows")


VERBS = {"device": device, "fabric": fabric, "stack": stack, "measure": measure}


# -- what the verbs share ------------------------------------------------------------------------------------------------------


def _of_serving(files: Sequence[str]) -> bool:
    """Whether the files hold deployments; both kinds beside each other are a mistake."""
    from planner.errors import Problem, SpecError
    from planner.validation.table import read_table

    kinds = {path: read_table(path).kind for path in files}
    serving = [path for path, kind in kinds.items() if kind == "serving"]
    if serving and len(serving) < len(kinds):
        other = next(path for path in kinds if path not in serving)
        raise SpecError(Problem(other, f"holds {kinds[other]} rows", f"serving rows, as {serving[0]} does"))
    return bool(serving)


def _training(
    files: Sequence[str], base: str | None, device: str | None, parts: int
) -> tuple[str, dict[str, Fit], Mapping[str, str]]:
    from planner.calibration.stack import fit_memory, fit_time, read_runs
    from planner.specs.stack import load_stack

    name = base or "default"
    start, read = load_stack(name), read_runs(files, device)
    fits = {}
    if any(run.step_time_s is not None for run in read.runs):
        fits["time"] = fit_time(start, read.runs, folds=parts)[1]
    if any(run.peak_bytes is not None for run in read.runs):
        fits["memory"] = fit_memory(start, read.runs, folds=parts)[1]
    return name, fits, read.left_out


def _serving(
    files: Sequence[str], base: str | None, device: str | None, parts: int
) -> tuple[str, dict[str, Fit], Mapping[str, str]]:
    from planner.calibration.serving import fit_serving, read_served

    served = read_served(files, device)
    name = base or served.engine
    return name, {"times and rates": fit_serving(name, served, folds=parts)[1]}, served.left_out


def _read(files: Sequence[str], dtype: str | None, only: str, accelerator: str | None) -> list[Measurement]:
    from planner.calibration.measurements import dtype_named, read_measurements
    from planner.errors import Problem, SpecError

    if dtype is not None and dtype_named(dtype) is None:
        raise SpecError(Problem("--dtype", repr(dtype[:40]), "fp32, tf32, bf16, fp16, fp8 or int8"))
    named = None if dtype is None else dtype_named(dtype)
    found = [measurement for path in files for measurement in read_measurements(path, named)]
    found = _of_one(found, accelerator)
    families = list(dict.fromkeys(measurement.family for measurement in found))
    chosen = _chosen("--only", only, families)
    return [measurement for measurement in found if measurement.family in chosen]


def _of_one(found: list[Measurement], accelerator: str | None) -> list[Measurement]:
    """The measurements of one accelerator: the one that is named, or the only one that there is."""
    from planner.errors import Problem, SpecError, did_you_mean

    names = list(dict.fromkeys(m.accelerator for m in found if m.accelerator))
    if accelerator is None:
        if len(names) > 1:
            hint = f"Name one with --accelerator, such as --accelerator {names[0]}."
            raise SpecError(
                Problem("measurements", f"of {', '.join(names)[:200]}", "of one accelerator", hint)
            )
        return found
    if accelerator not in names:
        expected = f"one of {', '.join(names)[:200]}" if names else "files that name their accelerator"
        raise SpecError(
            Problem("--accelerator", repr(accelerator[:40]), expected, did_you_mean(accelerator, names))
        )
    return [m for m in found if m.accelerator == accelerator]


def _named(flag: str, load: Callable[[str], _T], text: str) -> _T:
    """What an option names; what is wrong with it is said of the option."""
    faults: list[Problem] = []
    found = attempt(faults, load, text, flags=dict.fromkeys(("device", "stack", "cluster"), flag))
    raise_if_any(faults)
    assert found is not None
    return found


def _folds(text: str) -> int:
    from planner.errors import Problem, SpecError

    parts = whole_number("--folds", text)
    if not 2 <= parts <= 100:
        raise SpecError(Problem("--folds", text, "2 to 100 parts"))
    return parts


def _chosen(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """The words of a list, all of them known; all known ones where the list is empty."""
    from planner.errors import Problem, SpecError, did_you_mean

    chosen = [word.strip() for word in text.split(",") if word.strip()] or list(known)
    wrong = [word for word in chosen if word not in known]
    if wrong:
        raise SpecError(
            [Problem(flag, repr(w[:40]), f"of {', '.join(known)}", did_you_mean(w, known)) for w in wrong]
        )
    return list(dict.fromkeys(chosen))


def _toml(path: str) -> str:
    """The path of a profile, which loaders know by its ending."""
    from planner.errors import Problem, SpecError

    if not path.endswith(".toml"):
        raise SpecError(Problem(f"-o {path!r}", "is no .toml file", "a name that ends in .toml"))
    return path


def _folder(path: str) -> Any:
    from pathlib import Path

    from planner.errors import Problem, SpecError

    folder = Path(path)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise SpecError(
            Problem(f"-o {path!r}", f"is no folder to write ({error.strerror})", "a folder")
        ) from None
    return folder


def _stem(path: str) -> str:
    from pathlib import Path

    return Path(path).stem


def _provenance(files: Sequence[str], conditions: str) -> Provenance:
    from datetime import UTC, datetime
    from pathlib import Path

    from planner.calibration.profile import Provenance

    today = datetime.now(UTC).date()
    return Provenance(tuple(dict.fromkeys(Path(path).name for path in files)), today, conditions)


def _report(fits: dict[str, Fit], out: str, as_json: bool, notes: Sequence[str] = ()) -> None:
    if as_json:
        from dataclasses import asdict

        from planner.cli.output import print_json

        shown = {
            name: {k: v for k, v in asdict(f).items() if "predicted" not in k} for name, f in fits.items()
        }
        print_json({"profile": out, "fits": shown, "notes": list(notes)})
        return
    from planner.calibration.screen import show_fits

    show_fits(fits, out, notes)
