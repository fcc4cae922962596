"""Reads the module that XLA's partitioner leaves: products, collectives and arguments of one device, from its text.

The text is that of the module right after the pass ``spmd-partitioning``. Before it, automatic programs have no collectives;
after it, passes of the CPU compiler combine, rewrite and reorder what the partitioner made (two all-reduces become one with
two operands, products move into fusions).
"""

import math
import re

import numpy as np

_BYTES = {"f32": 4, "s32": 4, "pred": 1}
_COMPUTATION = re.compile(
    r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*?\{\n(?P<body>.*?)^\}", re.MULTILINE | re.DOTALL
)
_INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<operands>.*?)\)(?P<rest>.*)$",
    re.MULTILINE,
)
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def read(text):
    """``{"products": [...], "collectives": [...], "arguments": [...]}``: all that the entry computation runs."""
    bodies = {match["name"]: match["body"] for match in _COMPUTATION.finditer(text)}
    (entry,) = (match["name"] for match in _COMPUTATION.finditer(text) if match["entry"])
    found = list(_run(entry, bodies))
    arguments = [
        {"name": _name(i), "bytes": _bytes(i["shape"])}
        for i in map(re.Match.groupdict, _INSTRUCTION.finditer(bodies[entry]))
        if i["opcode"] == "parameter"
    ]
    return {
        "products": [item for item in found if "flop" in item],
        "collectives": [item for item in found if "kind" in item],
        "arguments": arguments,
    }


def _run(computation, bodies):
    """Products and collectives of a computation and of those that it calls, each as often as it is called."""
    instructions = [match.groupdict() for match in _INSTRUCTION.finditer(bodies[computation])]
    shapes = {i["name"]: i["shape"] for i in instructions}
    for i in instructions:
        operands = [shapes.get(name.strip().lstrip("%"), "") for name in i["operands"].split(",")]
        if i["opcode"] == "call":
            yield from _run(_first(r"to_apply=%([\w.-]+)", i["rest"]), bodies)
        elif i["opcode"] == "dot":
            yield {"name": _name(i)} | _product(i, operands[0])
        elif i["opcode"] in _COLLECTIVES:
            yield {"name": _name(i)} | _collective(i, operands[0])
        elif i["opcode"] in ("while", "conditional", "custom-call", "convolution"):
            raise ValueError(f"an instruction that this reader does not know: {i['name']}")


def _name(instruction):
    return _first(r'op_name="([^"]*)"', instruction["rest"]) or ""


def _product(instruction, left):
    """FLOP of a dot, and the length of its contraction."""
    contracted = _numbers(_first(r"lhs_contracting_dims=\{([\d,]*)\}", instruction["rest"]))
    k = math.prod(_dims(left)[axis] for axis in contracted)
    return {"flop": 2 * k * math.prod(_dims(instruction["shape"])), "k": k}


def _collective(instruction, operand):
    """Kind, group, and bytes of the full tensor: what goes into a reduce-scatter, what comes out of the others."""
    size, stride = _group(instruction["rest"])
    full = operand if instruction["opcode"] == "reduce-scatter" else instruction["shape"]
    kind = instruction["opcode"].replace("-", "_")
    return {"kind": kind, "bytes": _bytes(full), "size": size, "stride": stride}


def _group(attributes):
    """Ranks per group, and their distance, from the first group.

    Groups are written out (``{{0,1},{2,3}}``), as a reshaped and transposed iota (``[2,2]<=[2,2]T(1,0)``), or as the axes of a
    mesh along which they run (``mesh['a'=2,'b'=2] {'b'}``).
    """
    if listed := _first(r"replica_groups=\{\{([\d,]+)\}", attributes):
        ranks = _numbers(listed)
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = iota.groups()
        mesh = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
        ranks = mesh.transpose(_numbers(order) if order else None).reshape(_numbers(shape))[0].tolist()
    else:
        sizes, along = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes).groups()
        axes = dict(axis.split("=") for axis in sizes.split(","))
        mesh = np.arange(math.prod(map(int, axes.values()))).reshape([int(size) for size in axes.values()])
        ranks = mesh[tuple(slice(None) if name in along.split(",") else 0 for name in axes)].ravel().tolist()
    return len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1


def _bytes(shape):
    return _BYTES[shape[: shape.index("[")]] * math.prod(_dims(shape))


def _dims(shape):
    return _numbers(_first(r"\[([\d,]*)\]", shape))


def _numbers(text):
    return [int(n) for n in text.split(",") if n]


def _first(pattern, text):
    match = re.search(pattern, text)
    return match.group(1) if match else None
