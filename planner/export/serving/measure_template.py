"""What was measured beside what was predicted: ``python measure.py http://HOST:PORT …``; of several addresses, in turn.

Sends requests of the plan's lengths at the plan's load to an OpenAI-compatible server, and times every answer. Those of the
first quarter are left out (warm-up). Writes ``measured.csv``, a row that ``planner validate`` reads. Needs Python alone.
"""

import argparse
import asyncio
import csv
import datetime
import itertools
import json
import random
import statistics
import sys
import time
import urllib.parse
from typing import Any

SETTINGS: dict[str, Any] = json.loads("{}")


class Answer:
    """One request: when it was sent, when its first and its last token came, in seconds of one clock."""

    def __init__(self) -> None:
        self.sent, self.first, self.last, self.tokens = time.perf_counter(), 0.0, 0.0, 0


async def ask(url: str, model: str, rng: random.Random) -> Answer:
    """Sends one request of random tokens and reads its answer as it comes."""
    parts = urllib.parse.urlsplit(url)
    prompt = [rng.randrange(1000, SETTINGS["vocab"] - 1000) for _ in range(SETTINGS["isl"])]
    body = {"model": model, "prompt": prompt, "max_tokens": SETTINGS["osl"], "min_tokens": SETTINGS["osl"]}
    body |= {"ignore_eos": True, "temperature": 0.0, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    answer = Answer()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=2**24)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()
        status = (await reader.readline()).decode().strip()
        if " 200 " not in f"{status} ":
            raise RuntimeError(
                f"{status}: {(await reader.read(2000)).decode(errors='replace').strip()[-400:]}"
            )
        while line := await reader.readline():
            if line.startswith(b"data:") and b'"choices"' in line:
                answer.last = time.perf_counter()
                answer.first = answer.first or answer.last
                answer.tokens += 1
    finally:
        writer.close()
    if not answer.first:
        raise RuntimeError(f"{url} answered without a token")
    return answer


async def drive(urls: list[str], model: str, requests: int, concurrency: int, rate: float) -> list[Answer]:
    """All answers, in the order in which they were sent: ``concurrency`` at a time, or ``rate`` per second."""
    rng, addresses, answers = random.Random(0), itertools.cycle(urls), []
    if concurrency:
        free = asyncio.Semaphore(concurrency)

        async def one() -> Answer:
            async with free:
                return await ask(next(addresses), model, rng)

        return list(await asyncio.gather(*(one() for _ in range(requests))))
    for _ in range(requests):
        answers.append(asyncio.create_task(ask(next(addresses), model, rng)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*answers))


def measured(answers: list[Answer]) -> dict[str, float]:
    """Means in seconds, requests per second, and requests in flight, without the first quarter."""
    kept = answers[len(answers) // 4 :]
    steps = max(SETTINGS["osl"] - 1, 1)
    start, end = min(a.sent for a in kept), max(a.last for a in kept)
    # While the last requests run out, fewer are in flight: the rate is taken until the last one was sent.
    full = max(a.sent for a in kept)
    done = sum(a.last <= full for a in answers if a.last >= start)
    rate = done / (full - start) if full > start and done else len(kept) / (end - start)
    ttft = [a.first - a.sent for a in kept]
    found = {
        "ttft_s": statistics.mean(ttft),
        "ttft_p99_s": sorted(ttft)[min(int(len(ttft) * 0.99), len(ttft) - 1)],
    }
    found["tpot_s"] = statistics.mean((a.last - a.first) / steps for a in kept)
    found["e2e_s"] = statistics.mean(a.last - a.sent for a in kept)
    return found | {"requests_per_s": rate}


def write_row(found: dict[str, float], concurrency: int) -> None:
    """``measured.csv``: a row of one replica where they do not know of each other, else of the deployment."""
    row, replicas = dict(SETTINGS["row"]), SETTINGS["replicas"]
    rate = found["requests_per_s"] / replicas
    in_flight = (concurrency or found["requests_per_s"] * found["e2e_s"]) / replicas
    closed = concurrency or "disaggregated" in row["features"]
    row |= {"concurrency": f"{in_flight:.6g}"} if closed else {"request_rate": f"{rate:.6g}"}
    row |= {f"{name}_ms": f"{found[f'{name}_s'] * 1e3:.6g}" for name in ("ttft", "tpot")}
    row |= {"latency_ms": f"{found['e2e_s'] * 1e3:.6g}", "requests_per_s": f"{rate:.6g}"}
    row["output_tokens_per_s"] = f"{rate * SETTINGS['osl']:.6g}"
    row["measured_date"] = datetime.date.today().isoformat()
    with open("measured.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        writer.writeheader()
        writer.writerow(row)
    print("wrote measured.csv")


def main() -> int:
    """Drives the load, prints the comparison, writes the row."""
    parser = argparse.ArgumentParser(description="Measures a deployment beside its plan.")
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--model", default=SETTINGS["model"], help="as the server names it [%(default)s]")
    parser.add_argument("--requests", type=int, default=SETTINGS["requests"], help="[%(default)s]")
    parser.add_argument(
        "--concurrency", type=int, default=SETTINGS["concurrency"], help="in flight, instead of a rate"
    )
    parser.add_argument(
        "--rate", type=float, default=SETTINGS["rate_per_s"], help="requests per second [%(default).4g]"
    )
    parser.add_argument(
        "--share",
        type=int,
        default=1,
        metavar="N",
        help="this client is one of N that drive the load at once",
    )
    args = parser.parse_args()
    urls, share = [url.rstrip("/") for url in args.urls], max(args.share, 1)
    own = (-(-args.requests // share), -(-args.concurrency // share), args.rate / share)
    try:
        answers = asyncio.run(drive(urls, args.model, *own))
    except (OSError, RuntimeError) as error:
        print(f"no answer: {error}", file=sys.stderr)
        return 1
    found = measured(answers)
    found["requests_per_s"] *= share  # the other clients see as many
    load = f"{args.concurrency} in flight" if args.concurrency else f"{args.rate:.4g} requests/s offered"
    some = f", 1/{share} of all," if share > 1 else ""
    print(f"{len(answers)} requests{some} of {SETTINGS['isl']} in, {SETTINGS['osl']} out, {load}")
    predicted = SETTINGS["predicted"]
    print(f"{'':22} {'predicted':>12} {'measured':>12} {'measured/predicted':>20}")
    for name, unit, scale in (
        ("ttft", "ms", 1e3),
        ("ttft_p99", "ms", 1e3),
        ("tpot", "ms", 1e3),
        ("e2e", "ms", 1e3),
    ):
        was, now = predicted[f"{name}_s"] * scale, found[f"{name}_s"] * scale
        print(f"{f'{name}, {unit}':22} {was:12.4g} {now:12.4g} {now / was:20.3f}")
    was, now = predicted["requests_per_s"], found["requests_per_s"]
    print(f"{'requests/s':22} {was:12.4g} {now:12.4g} {now / was:20.3f}")
    each = SETTINGS["osl"] / SETTINGS["devices"]
    print(f"{'output tokens/s/device':22} {was * each:12.4g} {now * each:12.4g} {now / was:20.3f}")
    short = [a for a in answers if a.tokens < SETTINGS["osl"] // 2]
    if short:
        print(
            f"{len(short)} answers came in few pieces: the server joins tokens, or stops early; times per token are off."
        )
    write_row(found, args.concurrency)
    return 0


if __name__ == "__main__":
    sys.exit(main())
