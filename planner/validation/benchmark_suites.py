"""What the scripts of published benchmarks say about their rows: lengths, clients, and how the engine was launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import TypeAlias

from planner.specs.model import Model
from planner.specs.reader import Reader, read_file
from planner.validation.table import Row

__all__ = ["DEFAULTS", "Launch", "Suite", "suite_of"]


@dataclass(frozen=True, slots=True)
class Launch:
    """Options that an engine was started with, where they are not its defaults.

    Attributes:
        cache: number format of the cache; empty: not said.
        chunk_tokens: tokens of an iteration; ``chunk_prompts`` the same in prompts of the stated length; 0: the engine's default.
        clients_beside: whether a token of every client comes on top of it.
        max_sequences: sequences in one batch; 0: the engine's default.
        held_back_iterations: iterations for which a prompt is held back, mean: until others come, or the engine looks for it.
        cache_fraction: of the memory that is left for the cache, what it was allowed; 0: the engine's default.
        ranks_attend: whether every rank attends to requests of its own and experts are spread over all, whatever ``tp`` says.
        prompt_ranks_attend: the same of workers for prompts alone, where they are another pool.
        experts_spread: whether whole experts are spread over all ranks, whatever ``ep`` says.
        ranks_share: whether all ranks of a pool's worker share every request, whatever ``dp`` says.
    """

    cache: str = ""
    chunk_tokens: int = 0
    chunk_prompts: int = 0
    clients_beside: bool = False
    max_sequences: int = 0
    held_back_iterations: int = 0
    cache_fraction: float = 0.0
    ranks_attend: bool = False
    prompt_ranks_attend: bool = False
    experts_spread: bool = False
    ranks_share: bool = False


DEFAULTS = Launch()
Conditions: TypeAlias = Mapping[str, str | bool | float]
"""What a run is, or has to be, by name."""
_ENGINES = "engines"
"""What engines do by themselves where no one says otherwise, by machine: a suite without rows."""


@dataclass(frozen=True, slots=True)
class Suite:
    """One benchmark.

    Attributes:
        name: of its table in the file; empty: of no known suite.
        upstream: how the column of that name begins in its rows.
        page: what its rows' source names, where they have no such column.
        feature: what its rows' features name, where neither tells: a data set that several benchmarks draw from.
        measured_date: when its runs were made, at the latest, where they do not say.
        shortest_length: shortest length of prompts and answers relative to the stated one; uniform in between.
        natural_lengths: squared coefficient of variation of lengths that are told by their mean; 0: they are as stated.
        requests_per_client: requests of every client, the first of all at once; 0: not said.
        frontend_s: seconds that the suite's own frontend adds to the first token.
        unwarmed: engines whose first iterations were measured, and until when.
        launches: options, with the conditions under which they hold.
        clients: requests of every client where they are others, with the conditions under which they hold.
        speculation: engines and formats that ran with and without multi-token prediction, and since when.
        requests: of a run in all, by lengths of prompts and answers.
    """

    name: str = ""
    upstream: tuple[str, ...] = ()
    page: str = ""
    feature: str = ""
    measured_date: str = ""
    shortest_length: float = 1.0
    natural_lengths: float = 0.0
    requests_per_client: int = 0
    frontend_s: float = 0.0
    unwarmed: tuple[tuple[str, str], ...] = ()
    launches: tuple[tuple[Conditions, Launch], ...] = ()
    clients: tuple[tuple[Conditions, int], ...] = ()
    speculation: tuple[tuple[str, str, str], ...] = ()
    requests: Mapping[tuple[float, float], float] = field(default_factory=dict)

    @property
    def mean_length(self) -> float:
        """Mean length relative to the stated one."""
        return (1.0 + self.shortest_length) / 2.0

    @property
    def length_scv(self) -> float:
        """Squared coefficient of variation of lengths.

        >>> round(Suite(shortest_length=0.8).length_scv, 5)
        0.00412
        """
        return float((1.0 - self.shortest_length) ** 2 / 12.0 / self.mean_length**2) + self.natural_lengths

    def launch(self, run: Conditions) -> Launch:
        """The options of a run, by what conditions ask for: the suite's, else the engine's own for such a machine."""
        for conditions, options in (*self.launches, *_suites()[_ENGINES].launches):
            if all(_holds(name, value, run) for name, value in conditions.items()):
                return options
        return DEFAULTS

    def per_client(self, run: Conditions) -> int:
        """Requests of every client of a run; 0: not said."""
        for conditions, requests in self.clients:
            if all(_holds(name, value, run) for name, value in conditions.items()):
                return requests
        return self.requests_per_client

    def compiles(self, engine: str, date: str) -> bool:
        """Whether first tokens of a row may have waited for kernels to be compiled."""
        return any(engine == name and date < until for name, until in self.unwarmed)

    def may_speculate(self, engine: str, weights: str, date: str, model: Model) -> bool:
        """Whether a row may or may not have run with the model's own multi-token prediction."""
        return model.mtp_layers > 0 and any(
            engine == name and (not form or weights == form) and date >= since
            for name, form, since in self.speculation
        )


def suite_of(row: Row) -> Suite:
    """The suite of a row, the first that fits; one that says nothing where none is known."""
    upstream, source, features = (row.text(name) for name in ("upstream", "source", "features"))
    for suite in _suites().values():
        if (
            (upstream and upstream.startswith(suite.upstream))
            or (suite.page and suite.page in source)
            or (suite.feature and suite.feature in features)
        ):
            return suite
    return Suite()


@lru_cache(maxsize=1)
def _suites() -> Mapping[str, Suite]:
    path = str(files("planner.validation").joinpath("benchmark_suites.toml"))
    reader = Reader(read_file(path), path)
    found = {}
    names = reader.keys()
    for name in names:
        entry: Reader = reader.table(name)
        entry.text("source")
        found[name] = Suite(
            name,
            entry.texts("upstream", ()),
            entry.text("page", ""),
            entry.text("feature", ""),
            entry.text("measured_date", ""),
            entry.number("shortest_length", 1.0),
            entry.number("natural_lengths", 0.0),
            entry.integer("requests_per_client", 0, minimum=0),
            entry.number("frontend_s", 0.0),
            tuple(_unwarmed(each) for each in entry.tables("unwarmed", [])),
            tuple(_launch(each) for each in entry.tables("launch", [])),
            tuple(_clients(each) for each in entry.tables("clients", [])),
            tuple(_speculation(each) for each in entry.tables("speculation", [])),
            {
                (run.number("input_len"), run.number("output_len")): run.number("count")
                for run in entry.tables("requests", [])
            },
        )
        entry.finish()
    reader.raise_if_any()
    return found


def _holds(name: str, value: str | bool | float, run: Conditions) -> bool:
    """Whether a run keeps a condition: a value of its own, a least or a most one, a date that it has and that is earlier.

    >>> _holds("most_tp", 4.0, {"tp": 8.0}), _holds("engine", "vllm", {"engine": "vllm"})
    (False, True)
    >>> _holds("until", "2026-01-21", {"date": "2025-11-02"}), _holds("until", "2026-01-21", {"date": ""})
    (True, False)
    """
    if name == "until":
        return "" < str(run["date"]) < str(value)
    bound, _, what = name.partition("_")
    if bound == "least":
        return float(run[what]) >= float(value)
    if bound == "most":
        return float(run[what]) <= float(value)
    return run[name] == value


def _conditions(reader: Reader) -> Conditions:
    texts = ("engine", "stack", "engine_version", "device", "generation", "weights", "until")
    bounds = (
        "input_len",
        "output_len",
        "least_tp",
        "most_tp",
        "least_concurrency",
        "most_concurrency",
        "most_memory_gb",
        "least_memory_gb",
    )
    found: dict[str, str | bool | float] = {name: reader.text(name) for name in texts if reader.has(name)}
    found |= {
        name: reader.boolean(name) for name in ("experts", "attention_ranks", "pools") if reader.has(name)
    }
    return found | {name: reader.number(name) for name in bounds if reader.has(name)}


def _clients(reader: Reader) -> tuple[Conditions, int]:
    found = _conditions(reader), reader.integer("requests_per_client", minimum=1)
    reader.text("source")
    reader.finish()
    return found


def _launch(reader: Reader) -> tuple[Conditions, Launch]:
    conditions = _conditions(reader)
    options = Launch(
        reader.text("cache", ""),
        reader.integer("chunk_tokens", 0, minimum=0),
        reader.integer("chunk_prompts", 0, minimum=0),
        reader.boolean("clients_beside", False),
        reader.integer("max_sequences", 0, minimum=0),
        reader.integer("held_back_iterations", 0, minimum=0),
        reader.number("cache_fraction", 0.0, maximum=1.0),
        reader.boolean("ranks_attend", False),
        reader.boolean("prompt_ranks_attend", False),
        reader.boolean("experts_spread", False),
        reader.boolean("ranks_share", False),
    )
    reader.text("source")
    reader.finish()
    return conditions, options


def _unwarmed(reader: Reader) -> tuple[str, str]:
    found = reader.text("engine"), reader.text("until")
    reader.text("source")
    reader.finish()
    return found


def _speculation(reader: Reader) -> tuple[str, str, str]:
    found = reader.text("engine"), reader.text("weights", ""), reader.text("since")
    reader.text("source")
    reader.finish()
    return found
