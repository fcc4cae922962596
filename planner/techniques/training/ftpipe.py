"""FTPipe's Mixed-pipe: a device of the pipeline may hold blocks that are not neighbours.

What it does: cuts the model into half layers, embedding and head, and deals them to devices so that the busiest one has the
    least work within its memory; ``planner solve blocks``.
Saves: the wait for the busiest stage, where runs of neighbouring blocks cannot be equally long.
Costs: a message wherever neighbouring blocks lie on different devices; a device is a stage as often as it holds a run.
Assumes: a full pipeline, which runs at the pace of its busiest device; messages hide behind other micro-batches.
Source: Eliad et al. 2021 (FTPipe, USENIX ATC 2021).
"""

from __future__ import annotations

from typing import Any

from planner.technique import Technique
from planner.techniques import figures
from planner.techniques.solvers import solver

_DEVICES = 3  # whose best three runs of neighbours take 10


def _makespan(subject: Any) -> float:
    from planner.solve.combinatorial.blocks import Block

    return float(
        subject(
            [Block(f"job {i}", float(s), 0.0) for i, s in enumerate(figures.graham_jobs(_DEVICES))], _DEVICES
        )
    )


TECHNIQUE = Technique(
    key="ftpipe",
    name="FTPipe",
    slot=None,
    kind="solver",
    source="USENIX ATC 2021 (Eliad et al.)",
    summary="Blocks of a pipeline to devices, neighbours or not",
    figures=(figures.graham_figure("seconds of the busiest device", _DEVICES, _makespan),),
    solve=solver("blocks.deal_blocks", "time_s"),
    naive=solver("blocks.contiguous", "time_s"),
)
