"""``planner solve flow``: layers to unlike nodes that serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from planner.cli.options import Json, option
from planner.cli.solve_job import Backend, Deadline, read_backend, read_deadline

if TYPE_CHECKING:
    from planner.solve.combinatorial.layer_flow import NodeKind

__all__ = ["flow"]


def flow(
    nodes: Annotated[
        list[str] | None,
        option(
            "--node",
            text="Alike nodes, NAME:COUNT:R1,R2,… with the tokens/s of one that holds 1, 2, … layers; once per kind.",
            metavar="KIND",
        ),
    ] = None,
    layers: Annotated[str | None, option("--layers", text="Of the model.", metavar="N")] = None,
    backend: Backend = "scipy",
    deadline: Deadline = "60s",
    as_json: Json = False,
) -> None:
    """Which layers every one of unlike nodes holds, for the most tokens through all of them.

    Rates are your own measurements, or a table of them; nodes bind, and not the links between them.
    """
    from planner.cli.output import print_json
    from planner.cli.values import attempt, optional_whole, raise_if_any
    from planner.errors import Problem
    from planner.report.flow import show_flow
    from planner.solve.combinatorial.layer_flow import even_stages, place_layers

    faults: list[Problem] = []
    kinds = [attempt(faults, _read_kind, text) for text in nodes or ()]
    count = optional_whole(faults, "--layers", layers)
    limit_s = attempt(faults, read_deadline, deadline)
    attempt(faults, read_backend, backend)
    if not kinds:
        faults.append(Problem("--node", "is missing", "alike nodes, such as t4:12:1804,808,539"))
    if layers is None or (count is not None and not 1 <= count <= _MOST_LAYERS):
        faults.append(Problem("--layers", layers or "is missing", f"layers of a model, 1 to {_MOST_LAYERS}"))
    raise_if_any(faults)
    given = [kind for kind in kinds if kind is not None]
    assert count is not None
    found = place_layers(given, count, backend=backend, time_limit_s=limit_s)
    content = {
        "tokens_per_s": found.tokens_per_s, "even_tokens_per_s": even_stages(given, count),
        "spans": [
            {"kind": s.kind, "first": s.first, "layers": s.layers, "nodes": s.nodes, "tokens_per_s": s.tokens_per_s}
            for s in found.spans
        ],
        "certificate": found.certificate.as_dict(),
    }  # fmt: skip
    if as_json:
        print_json(content)
    else:
        show_flow(content)


_MOST_LAYERS = 1000


def _read_kind(text: str) -> NodeKind:
    """Alike nodes in ``t4:12:1804,808``.

    Raises:
        SpecError: it is no such kind.

    >>> _read_kind("t4:12:1804, 808")
    NodeKind(name='t4', count=12, tokens_per_s=(1804.0, 808.0))
    """
    from planner.errors import Problem, SpecError
    from planner.solve.combinatorial.layer_flow import NodeKind

    try:
        name, count, rates = text.split(":")
        kind = NodeKind(name.strip(), int(count), tuple(float(rate) for rate in rates.split(",")))
        if not kind.name or not 0 < kind.count <= 10**4 or not all(0.0 < r < 1e12 for r in kind.tokens_per_s):
            raise ValueError(text)
    except ValueError:
        expected = "NAME:COUNT:R1,R2,… such as t4:12:1804,808,539"
        raise SpecError(Problem("--node", repr(text[:60]), expected)) from None
    return kind
