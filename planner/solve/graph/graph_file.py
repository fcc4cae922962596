"""Operator graphs from JSON: products as Einstein sums, element-wise kernels, and who reads whom.

::

    {"sizes": {"b": 32, "s": 2048, "h": 4096, "f": 16384}, "precision": "bf16",
     "operators": [
       {"name": "fc1", "einsum": "bsh,hf->bsf", "reads": ["input", "weight"]},
       {"name": "act", "elementwise": "bsf", "reads": ["fc1"], "passes": 2},
       {"name": "fc2", "einsum": "bsf,fh->bsh", "reads": ["act", "weight"]}]}

Every letter is a dimension that can be split. An element-wise kernel moves ``passes`` tensors forward and one more
backward, and keeps what it reads unless ``kept`` is false; ``whole`` lists dimensions that it cannot split. What tools
such as ``jax.make_jaxpr`` print as ``dot_general`` is the Einstein sum of its dimension numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.costs.optimizer import optimizer_state_bytes
from planner.costs.precision import dtype_bytes
from planner.ledger import Axes, Item, Matmul, Phase, Resident, Stream
from planner.solve.graph.operators import Operator, OperatorGraph, Read
from planner.specs.formats import FORMATS, Format
from planner.specs.reader import Reader, read_file

__all__ = ["read_graph"]

_INPUT, _WEIGHT = "input", "weight"
_MOST_OPERATORS = 10_000


def read_graph(path: str) -> OperatorGraph:
    """The graph in a JSON file.

    Raises:
        SpecError: everything that is wrong with it.
    """
    reader = Reader(read_file(path), path)
    table = reader.table("sizes")
    sizes = {name: table.integer(name) for name in table.keys()}  # noqa: SIM118
    for name in sizes:
        if len(name) != 1 or not name.isalpha():
            table.problem(name, "is no single letter", "dimensions of one letter each")
    formats = FORMATS.get(reader.text("precision", "bf16", choices=FORMATS), FORMATS["bf16"])
    entries = reader.tables("operators")
    if not 0 < len(entries) <= _MOST_OPERATORS:
        reader.problem("operators", f"{len(entries)} operators", f"1 to {_MOST_OPERATORS:,}")
    operators: list[Operator] = []
    for entry in entries:
        operator = _operator(entry, operators, sizes, formats)
        entry.finish()
        if operator is not None:
            operators.append(operator)
    reader.finish()
    reader.raise_if_any()
    dims = {name: name for name in sizes}
    master = dtype_bytes("fp32") if formats.master else 0.0
    axes = Axes({name: float(size) for name, size in sizes.items()})
    states = float(optimizer_state_bytes("adamw", master_bytes=master))
    return OperatorGraph(
        tuple(operators),
        axes,
        dims,
        frozenset(),
        dtype_bytes(formats.activation),
        dtype_bytes(formats.gradient),
        states,
    )


def _operator(
    entry: Reader, before: Sequence[Operator], sizes: dict[str, int], formats: Format
) -> Operator | None:  # fmt: skip
    """One operator; None where its fields do not add up to one, with the problems noted."""
    name = entry.text("name")
    if any(operator.name == name for operator in before):
        entry.problem("name", repr(name), "a name of its own")
    sums, tensor = entry.text("einsum", None), entry.text("elementwise", None)
    passes, kept = entry.number("passes", 2.0, positive=True, maximum=1e3), entry.boolean("kept", True)
    names = list(entry.texts("reads"))
    whole = frozenset("".join(entry.texts("whole", [])))
    if (sums is None) == (tensor is None):
        entry.problem("einsum", "both or neither of einsum and elementwise", "one of them")
        return None
    text = sums if sums is not None else tensor
    strange = sorted(set(text) - set(sizes) - set(",->"))
    if strange:
        entry.problem(
            "einsum" if sums is not None else "elementwise",
            f"no size of {', '.join(strange)}",
            "letters of sizes",
        )
        return None
    if sums is None:
        inputs, output = [tensor] * len(names), tensor
    else:
        left, arrow, output = sums.partition("->")
        inputs = left.split(",")
        if not arrow or len(inputs) != 2 or len(names) != 2:
            entry.problem("einsum", repr(sums), "two operands and a result, and two names in reads")
            return None
    numbers = {operator.name: index for index, operator in enumerate(before)}
    unknown = [n for n in names if n not in numbers and n not in (_INPUT, _WEIGHT)]
    if unknown:
        entry.problem(
            "reads", f"{unknown[0]!r} is no operator before {name!r}", "earlier operators, input or weight"
        )
        return None
    if sums is None and _WEIGHT in names:
        entry.problem("reads", "a weight of an element-wise kernel", "earlier operators, or input")
        return None
    width = dtype_bytes(formats.activation)
    read = tuple(
        Read(numbers[n], _product(letters), width)
        for n, letters in zip(names, inputs, strict=True)
        if n in numbers
    )
    if sums is None:
        kernels = _streams(name, _product(tensor), passes, width)
        held = tuple(_kept(name, tensor, width) for _ in names) if kept else ()
        return Operator(name, kernels, read, _product(tensor), width, "", held, whole)
    found = _matmuls(entry, name, inputs, output, names, formats)
    if found is None:
        return None
    weight = _product(inputs[names.index(_WEIGHT)]) if _WEIGHT in names else ""
    held = tuple(
        _kept(name, letters, width) for n, letters in zip(names, inputs, strict=True) if n != _WEIGHT
    )
    return Operator(name, found, read, _product(output), width, weight, held, whole)


def _streams(name: str, size: str, passes: float, width: float) -> tuple[Item, ...]:
    phases: list[tuple[Phase, float]] = [("forward", passes), ("backward", passes + 1.0)]
    return tuple(
        Stream(what=name, block="graph", phase=phase, size=size, bytes_per_element=count * width)
        for phase, count in phases
    )


def _matmuls(
    entry: Reader, name: str, inputs: Sequence[str], output: str, names: Sequence[str], formats: Format
) -> tuple[Item, ...] | None:
    """The product and its backward products; None where the sum is no product of matrices, with the problem noted."""
    a, b, c = (set(letters) for letters in (*inputs, output))
    if a - b - c or b - a - c or c - a - b or any(len(set(x)) != len(x) for x in (*inputs, output)):
        entry.problem(
            "einsum", repr(entry.data["einsum"]), "every letter in two of the three tensors, or in all"
        )
        return None
    groups, m, n, k = a & b & c, a & c - b, b & c - a, a & b - c
    sides = {
        side: _product("".join(sorted(letters)))
        for side, letters in zip("mnkg", (m, n, k, groups), strict=True)
    }
    first, second = names[0] == _WEIGHT, names[1] == _WEIGHT
    products: list[tuple[Phase, str]] = [("forward", "mnk")]
    products.append(("weight" if first else "backward", "mkn"))
    products.append(("weight" if second else "backward", "knm"))
    return tuple(
        Matmul(
            what=name, block="graph", phase=phase, dtype=formats.matmul if first or second else formats.core,
            m=sides[order[0]], n=sides[order[1]], k=sides[order[2]], groups=sides["g"],
        )
        for phase, order in products
    )  # fmt: skip


def _kept(name: str, letters: str, width: float) -> Resident:
    return Resident(
        what=f"{name}.input", block="graph", size=_product(letters), bytes_per_element=width, pool="activations",
        lifetime="micro_batch",
    )  # fmt: skip


def _product(letters: str) -> str:
    """``bsf`` as the size ``b*s*f``."""
    return "*".join(letters) if letters else "1"
