"""What was measured beside what was predicted, from the log of a run: ``python measure.py train.log``.

Steps of the first third are left out (compilation, warm-up); the median of the others counts. Writes ``measured.csv``, a row
that ``planner validate`` and ``planner calibrate stack`` read, unless the plan's layers differ. Needs Python alone.
"""

import csv
import datetime
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = json.loads("{}")


def numbers(pattern: str, text: str, unit: float) -> list[float]:
    """Every number that the pattern finds in the log, in the base unit."""
    return [float(found.replace(",", "")) * unit for found in re.findall(pattern, text)] if pattern else []


def main(paths: list[str]) -> int:
    """Reads the logs, prints the comparison, writes the row."""
    text = "".join(Path(path).read_text(encoding="utf-8", errors="replace") for path in paths)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    log = SETTINGS["log"]
    steps = numbers(log["step"], text, log["step_unit_s"])
    steps = steps or [
        SETTINGS["tokens_per_device"] / rate for rate in numbers(log["tokens"], text, 1.0) if rate > 0
    ]
    if not steps:
        print("no step was timed in the log: did the run start, and does it log every step?", file=sys.stderr)
        return 1
    kept = steps[len(steps) // 3 :]
    measured_s = statistics.median(kept)
    peaks = numbers(log["peak"], text, log["peak_unit_bytes"])
    print(f"{len(kept)} of {len(steps)} steps count; {min(kept):.4g} to {max(kept):.4g} s")
    print(f"{'':14} {'predicted':>12} {'measured':>12} {'measured/predicted':>20}")
    predicted_s = SETTINGS["step_time_s"]
    print(f"{'step, s':14} {predicted_s:12.4g} {measured_s:12.4g} {measured_s / predicted_s:20.3f}")
    per_device = SETTINGS["tokens_per_device"]
    print(f"{'tokens/s/device':14} {per_device / predicted_s:11,.0f} {per_device / measured_s:12,.0f}")
    if peaks:
        predicted, peak = SETTINGS["peak_bytes"] / 2**30, max(peaks) / 2**30
        print(
            f"{'peak, GiB':14} {predicted:12.1f} {peak:12.1f} {peak / predicted:20.3f}  ({log['peak_kind']})"
        )
    interval = SETTINGS["step_interval_s"]
    if interval and not interval[0] <= measured_s <= interval[1]:
        low, high = (f"{value:.4g}" for value in interval)
        print(
            f"outside the 80 % interval of {low} to {high} s: planner explain plan.json --measured {measured_s:.4g}s"
        )
    if SETTINGS["row"] is None:
        print(
            f"layers differ, so no row for planner validate: planner explain plan.json --measured {measured_s:.4g}s"
        )
        return 0
    row = {**SETTINGS["row"], "step_time_s": f"{measured_s:.6g}", "oom": "false"}
    row["tokens_per_s_per_device"] = f"{per_device / measured_s:.6g}"
    row["measured_date"] = datetime.date.today().isoformat()
    if peaks:
        row |= {
            "peak_memory_gb": f"{max(peaks) / 1e9:.6g}",
            "peak_memory_unit": "GB",
            "peak_memory_kind": log["peak_kind"],
        }
    with open("measured.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        writer.writeheader()
        writer.writerow(row)
    print("wrote measured.csv")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python measure.py train.log [another.log …]")
    sys.exit(main(sys.argv[1:]))
