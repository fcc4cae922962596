"""A step as a picture: one row per rank of the pipeline, time to the right.

A row has three bands: operations with their micro-batch's number (later chunks in paler colours, the recomputed part of a
backward darker), what is sent and moved beside them, and the activations that the rank holds. Hovering tells what a slice
is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from planner.report.step_trace import STREAMS, Slice, StepTrace
from planner.units import format_bytes, format_seconds

__all__ = ["timeline_svg"]

_WIDTH, _LEFT, _RIGHT, _TOP = 1480.0, 128.0, 96.0, 92.0
_COMPUTE, _BESIDE, _HELD, _GAP = 26.0, 6.0, 14.0, 12.0  # heights of the bands, and between rows
_PLOT = _WIDTH - _LEFT - _RIGHT

_COLOURS = {
    "forward": "#3b7dd8",
    "backward": "#2f9e6e",
    "weight gradient": "#e0a12f",
    "recompute": "#1d6b49",
    "update": "#7a5bb8",
    "gradients": "#c4507a",
    "weights": "#d98aa8",
    "transfers": "#8a7358",
    "communication": "#b9445f",
}
_LEGEND = (
    "forward", "backward", "recompute", "weight gradient", "update", "communication", "gradients", "weights", "transfers",
)  # fmt: skip
_PALEST = 0.55  # how far the last chunk's colour is on its way to white
_NARROWEST_TEXT = 13.0

_STYLE = """
text{font:11px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#2b3036}
.title{font-size:17px;font-weight:600}.sub{fill:#5b646e;font-size:12px}.tick{fill:#77808a}
.n{font-size:10px;fill:#fff;text-anchor:middle;pointer-events:none}.d{fill:#23303d}
.idle{fill:#f0f2f4}.grid{stroke:#d9dee3;stroke-width:1}.end{stroke:#2b3036;stroke-width:1.5;stroke-dasharray:4 3}
.held{fill:#a9b8c8;opacity:.55}.held-line{fill:none;stroke:#6d8196;stroke-width:1}
rect.op{stroke:#fff;stroke-width:.6}
"""


def timeline_svg(trace: StepTrace) -> str:
    """The picture as SVG text."""
    row = _COMPUTE + _BESIDE * len(_beside(trace)) + (_HELD if trace.held else 0.0) + _GAP
    height = _TOP + row * len(trace.devices) + 64.0
    scale = _PLOT / max(trace.end_s, trace.step_s)
    body = [
        *_heading(trace),
        *_axis(trace, scale, height - 64.0),
        *(
            line
            for device in range(len(trace.devices))
            for line in _row(trace, device, _TOP + row * device, scale)
        ),
        *_legend(trace, height - 26.0),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH:g}" height="{height:g}" viewBox="0 0 {_WIDTH:g} {height:g}">\n'
        f"<style>{_STYLE}</style>\n"
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _heading(trace: StepTrace) -> Iterator[str]:
    plan, assembly = trace.assembly.plan, trace.assembly
    mesh = " · ".join(f"{name} {degree}" for name, degree in plan.mesh.items() if degree > 1) or "one device"
    idle = plan.estimate.breakdown_s.get("pipeline_bubble", 0.0) / trace.step_s
    ends = "" if assembly.order.barrier else " · no barrier: the next step begins before this one has ended"
    yield f'<text class="title" x="{_LEFT:g}" y="34">{escape(plan.model)} on {escape(plan.cluster)}</text>'
    yield (
        f'<text class="sub" x="{_LEFT:g}" y="54">schedule {escape(str(plan.knobs["schedule"]))} · {assembly.micro_batches} '
        f"micro-batches · {mesh} · step {format_seconds(trace.step_s)} · busiest rank idle {idle:.1%}{ends}</text>"
    )


def _axis(trace: StepTrace, scale: float, bottom: float) -> Iterator[str]:
    span_s = max(trace.end_s, trace.step_s)
    tick_s = _round_step(span_s / 8.0)
    for number in range(math.floor(span_s / tick_s + 1e-9) + 1):
        x = _LEFT + number * tick_s * scale
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8:g}" y2="{bottom:.1f}"/>'
        label = format_seconds(number * tick_s) if number else "0"
        yield f'<text class="tick" x="{x:.1f}" y="{_TOP - 14:g}" text-anchor="middle">{label}</text>'
    if trace.held:
        yield f'<text class="tick" x="{_LEFT + _PLOT + 10:g}" y="{_TOP - 30:g}">activations</text>'
    x = _LEFT + trace.step_s * scale
    yield f'<line class="end" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8:g}" y2="{bottom:.1f}"/>'


def _row(trace: StepTrace, device: int, top: float, scale: float) -> Iterator[str]:
    """One rank: its name, bands and peak."""
    yield f'<text x="{_LEFT - 12:g}" y="{top + 17:.1f}" text-anchor="end">{escape(trace.devices[device])}</text>'
    yield f'<rect class="idle" x="{_LEFT:g}" y="{top:.1f}" width="{_PLOT:g}" height="{_COMPUTE:g}"/>'
    chunks, beside, cramped = (
        max(trace.assembly.layout.virtual_stages, 1),
        _beside(trace),
        _cramped(trace, scale),
    )
    for s in trace.slices:
        if s.device != device or s.duration_s <= 0.0:
            continue
        x, width = _LEFT + s.start_s * scale, s.duration_s * scale
        if s.stream == "compute":
            yield from _operation(s, x, top, width, chunks, named=s.kind not in cramped)
        else:
            colour = _COLOURS.get(s.kind, _COLOURS[s.stream])
            y = top + _COMPUTE + 1.0 + _BESIDE * beside.index(s.stream)
            yield _rect(x, y, width, _BESIDE - 1.0, colour, s)
    if trace.held:
        yield from _activations(trace, device, top + _COMPUTE + _BESIDE * len(beside) + 2.0, scale)


def _beside(trace: StepTrace) -> list[str]:
    """Streams beside compute on which anything happens."""
    used = {s.stream for s in trace.slices}
    return [stream for stream in STREAMS[1:] if stream in used]


def _cramped(trace: StepTrace, scale: float) -> set[str]:
    """Kinds of work of which some have no room for a number: none of them is numbered then."""
    passes = [s for s in trace.slices if "micro_batch" in s.details and s.duration_s > 0.0]
    most = max((int(s.details["micro_batch"]) for s in passes), default=0)
    return {s.kind for s in passes if s.duration_s * scale < _text_width(str(most))}


def _text_width(text: str) -> float:
    """Room that a slice needs to say something."""
    return max(_NARROWEST_TEXT, 6.2 * len(text) + 3.0)


def _operation(s: Slice, x: float, top: float, width: float, chunks: int, *, named: bool) -> Iterator[str]:
    chunk = int(s.details.get("chunk", 0))
    colour = _paler(_COLOURS[s.kind], _PALEST * chunk / max(chunks - 1, 1))
    yield _rect(x, top, width, _COMPUTE, colour, s)
    again = s.details.get("recompute_s", 0.0) / s.duration_s * width
    if again > 0.5:
        yield f'<rect x="{x:.2f}" y="{top:.1f}" width="{again:.2f}" height="4" fill="{_COLOURS["recompute"]}"/>'
    number = s.details.get("micro_batch")
    text = s.name if number is None else str(number)
    if named and width >= _text_width(text):
        dark = " d" if chunk and chunks > 1 and chunk / (chunks - 1) > 0.6 else ""
        yield f'<text class="n{dark}" x="{x + width / 2:.1f}" y="{top + _COMPUTE / 2 + 3.6:.1f}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, colour: str, s: Slice) -> str:
    where = (
        f", micro-batch {s.details['micro_batch']}, stage {s.details['stage']}"
        if "stage" in s.details
        else ""
    )
    tip = f"{s.kind.replace('_', ' ')}{where}: {format_seconds(s.duration_s)} at {format_seconds(max(s.start_s, 0.0))}"
    css = ' class="op"' if width > 2.0 else ""
    return (
        f'<rect{css} x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.3):.2f}" height="{height:g}" fill="{colour}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def _activations(trace: StepTrace, device: int, top: float, scale: float) -> Iterator[str]:
    """What the rank holds, as high as the fullest rank holds most."""
    most = max(max((held for _, held in curve), default=0.0) for curve in trace.held) or 1.0
    bottom, points, last = top + _HELD, [], 0.0
    for when_s, held in trace.held[device]:
        x = _LEFT + when_s * scale
        points += [
            f"{x:.1f},{bottom - last / most * _HELD:.1f}",
            f"{x:.1f},{bottom - held / most * _HELD:.1f}",
        ]
        last = held
    if not points:
        return
    end = _LEFT + trace.held[device][-1][0] * scale
    line = " ".join(points)
    yield f'<polygon class="held" points="{_LEFT:g},{bottom:.1f} {line} {end:.1f},{bottom:.1f}"/>'
    yield f'<polyline class="held-line" points="{line}"/>'
    peak = max(held for _, held in trace.held[device])
    yield f'<text x="{_LEFT + _PLOT + 10:g}" y="{bottom:.1f}">{format_bytes(peak)}</text>'


def _legend(trace: StepTrace, y: float) -> Iterator[str]:
    kinds = {s.kind if s.kind in _COLOURS else s.stream for s in trace.slices}
    if any(s.details.get("recompute_s") for s in trace.slices):
        kinds.add("recompute")
    x = _LEFT
    for kind in _LEGEND:
        if kind in kinds:
            yield f'<rect x="{x:g}" y="{y - 10:g}" width="12" height="12" rx="2" fill="{_COLOURS[kind]}"/>'
            yield f'<text x="{x + 18:g}" y="{y:g}">{kind}</text>'
            x += 40.0 + 6.6 * len(kind)
    if trace.held:
        yield f'<rect class="held" x="{x:g}" y="{y - 10:g}" width="12" height="12" rx="2"/>'
        yield f'<text x="{x + 18:g}" y="{y:g}">activations held</text>'


def _paler(colour: str, by: float) -> str:
    """A colour on its way to white.

    >>> _paler("#000000", 0.5)
    '#808080'
    """
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * by):02x}" for part in parts)


def _round_step(at_least: float) -> float:
    """The least of 1, 2, 5, 10, … times a power of ten that is no less.

    >>> _round_step(0.013), _round_step(3.1)
    (0.02, 5.0)
    """
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= at_least * (1 - 1e-9))
