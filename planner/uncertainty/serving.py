"""How far serving predictions were off for models that no constant had seen: the intervals of a serving estimate.

``serving_residuals.json`` is written by ``benchmarks/fit_serving.py --residuals``, never by hand: the 10 % and 90 % quantiles of
measured over predicted, of runs whose model was left out of the fit of the stacks' constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from planner.specs.reader import Reader, read_file

__all__ = ["FILE", "serving_interval"]

FILE = Path(__file__).with_name("serving_residuals.json")


def serving_interval(
    experts: bool, pools: bool, predicted: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """What holds 80 % of measurements, by quantity, in the unit of the prediction.

    Args:
        experts: whether the model has any.
        pools: whether prompts and generation have pools of their own.
        predicted: means of ``tpot_s`` and ``ttft_s``, and ``output_tokens_per_s_per_device``; others are left out.

    Raises:
        SpecError: the shipped residuals are wrong.

    >>> low, high = serving_interval(False, False, {"tpot_s": 0.01})["tpot_s"]
    >>> low < 0.01 < high
    True
    """
    kind = "with experts" if experts else "dense"
    names = {
        "tpot_s": "tpot, pools" if pools else f"tpot, {kind}",
        "ttft_s": "ttft, pools" if pools else "ttft, concurrency",
        "output_tokens_per_s_per_device": "output_tokens_per_s, offline",
    }
    found = {}
    for quantity, value in predicted.items():
        if quantity in names:
            low, high = _residuals()[names[quantity]]
            found[quantity] = (value * low, value * high)
    return found


@cache
def _residuals() -> Mapping[str, tuple[float, float]]:
    reader = Reader(read_file(FILE), str(FILE))
    reader.text("about")
    found = {}
    names = reader.keys()
    for name in names:
        if name != "about":
            entry: Reader = reader.table(name)
            found[name] = (entry.number("low", positive=True), entry.number("high", positive=True))
            entry.ignore("rows", "models")
            entry.finish()
    reader.raise_if_any()
    return found
