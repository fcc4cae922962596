"""The simulator that skips from event to event against one that steps through every iteration and every request."""

import numpy as np
import pytest

from planner.errors import Infeasible, SpecError
from planner.load.iteration_time import Affine, Sampled
from planner.load.requests import Lengths, Requests, draw
from planner.load.scheduler import SCHEDULERS, KvPool, Scheduler, scheduler
from planner.load.simulator import simulate


class Job:
    def __init__(self, index, requests):
        self.index = index
        self.arrival = float(requests.arrival_s[index])
        self.prompt = int(requests.prompt_tokens[index])
        self.output = int(requests.output_tokens[index])
        self.cached = int(requests.cached_tokens[index])
        self.priority = int(requests.priority[index])
        self.computed = self.cached
        self.made = self.stored = self.blocks = self.gave_way = 0
        self.swapped = self.over = False
        self.first = self.finish = None

    @property
    def missing(self):
        return self.prompt + self.made - self.computed


def step_by_step(requests, tau, rules, pool, concurrency=None):
    """The same rules, an iteration at a time, on lists: slow and plain."""
    jobs = [Job(i, requests) for i in range(len(requests))]
    future = list(jobs)
    if concurrency is not None:
        for job in jobs:
            job.arrival = 0.0 if job.index < concurrency else np.inf
    urgent = (lambda job: (job.priority, job.index)) if rules.order == "priority" else (lambda job: job.index)
    worse = (lambda a, b: a.priority > b.priority) if rules.order == "priority" else (lambda a, b: False)
    now, swap, waiting, prefilling, decoding = 0.0, 0.0, [], [], []
    ceil = lambda tokens: -(-tokens // pool.block_tokens)  # noqa: E731
    free = pool.blocks

    def entering():
        if rules.reserve == "whole":
            return []
        return [job for job in decoding if job.stored % pool.block_tokens == 0]

    def give_way(job):
        nonlocal free, swap
        job.gave_way += 1
        job.computed = job.cached
        free += job.blocks
        if job in decoding:
            decoding.remove(job)
            job.swapped = rules.preemption == "swap"
            swap += job.blocks * pool.swap_s_per_block if job.swapped else 0.0
        else:
            prefilling.remove(job)
        waiting.append(job)

    def make_room():
        gave = False
        while len(entering()) > free:
            give_way(max(decoding + prefilling, key=urgent))
            gave = True
        return gave

    def admissible(job):
        need = ceil(job.prompt + (job.output if rules.reserve == "whole" else job.made))
        while True:
            margin = pool.watermark_blocks + (len(entering()) if rules.mixed else 0)
            if len(decoding) + len(prefilling) < rules.max_requests and free - need >= margin:
                return True
            victim = max(decoding + prefilling, key=urgent, default=None)
            if victim is None or not worse(victim, job):
                return False
            give_way(victim)

    while not all(job.over for job in jobs):
        while future and future[0].arrival <= now:
            waiting.append(future.pop(0))
        if not (waiting or prefilling or decoding):
            now = future[0].arrival
            continue
        gave = make_room() if rules.mixed else False
        chunks = []
        room = rules.token_budget - (len(decoding) if rules.mixed else 0)
        for job in prefilling:
            if room > 0:
                chunks.append((job, min(job.missing, room)))
                room -= chunks[-1][1]
        open_ = not gave and not (rules.gated and decoding)
        while open_ and waiting and room > 0:
            job = min(waiting, key=urgent)
            if not rules.chunked and chunks and not job.swapped and job.missing > room:
                break
            if not admissible(job):
                break
            waiting.remove(job)
            if job.swapped:
                job.swapped = False
                free -= job.blocks
                swap += job.blocks * pool.swap_s_per_block
                decoding.append(job)
                room -= 1 if rules.mixed else 0
                continue
            job.blocks = ceil(job.prompt + (job.output if rules.reserve == "whole" else job.made))
            free -= job.blocks
            tokens = min(job.missing, room) if rules.chunked else job.missing
            prefilling.append(job)
            chunks.append((job, tokens))
            room -= tokens
        chunks = [(job, tokens) for job, tokens in chunks if job in prefilling]
        if not chunks:
            make_room()
        batch = list(decoding) if rules.mixed or not chunks else []
        longest = max((tokens for _, tokens in chunks), default=0)
        sizes = [(longest if rules.gated else tokens, job.computed) for job, tokens in chunks]
        now += swap + float(
            tau(
                len(batch),
                sum(job.stored + 1 for job in batch),
                sum(tokens for tokens, _ in sizes),
                sum(tokens * (start + (tokens + 1) / 2) for tokens, start in sizes),
            )
        )
        swap = 0.0
        for job in entering() if batch else []:
            job.blocks += 1
            free -= 1
        for job in batch:
            job.stored += 1
            job.made += 1
        for job, tokens in chunks:
            job.computed += tokens
            if job.missing == 0:
                prefilling.remove(job)
                job.stored = job.prompt + job.made
                job.made += 1
                job.first = now if job.first is None else job.first
                decoding.append(job)
        ended = [job for job in decoding if job.made >= job.output]
        if rules.gated and len(ended) < len(decoding):
            ended = []
        for job in sorted(ended, key=lambda job: job.index):
            decoding.remove(job)
            free += job.blocks
            job.over, job.finish = True, now
            if concurrency is not None:
                following = next((j for j in future if j.arrival == np.inf), None)
                if following is not None:
                    following.arrival = now
    assert free == pool.blocks
    return [np.array([getattr(job, name) for job in jobs]) for name in ("first", "finish", "gave_way")]


TAU = Affine(12e-3, 60e-6, 1.3e-7, 90e-6, 1.1e-9)
NAMES = [*SCHEDULERS, "priority", "swap", "priority swap"]


def rules_of(name, **limits):
    if name in SCHEDULERS:
        return scheduler(name, **limits)
    order = "priority" if "priority" in name else "arrival"
    return Scheduler(
        order=order, preemption="swap" if "swap" in name else "recompute", mixed=name != "priority", **limits
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(8))
def test_skipping_is_stepping(name, seed):
    random = np.random.default_rng(seed)
    lengths = Lengths(
        int(random.integers(1, 300)), int(random.integers(1, 60)), *random.choice([0.0, 0.5, 3.0], 2)
    )
    asked = draw(lengths, 120, rate_per_s=float(random.uniform(2, 40)), arrival_cv2=2.0, seed=seed)
    asked = Requests(
        asked.arrival_s,
        asked.prompt_tokens,
        asked.output_tokens,
        priority=np.asarray(random.integers(0, 3, 120)),
    ).cached(float(random.choice([0.0, 0.4])))
    most = int(np.max(asked.prompt_tokens + asked.output_tokens))
    size = int(random.choice([1, 7, 16]))
    watermark = int(random.integers(0, 3))
    blocks = -(-most // size) + watermark + int(random.integers(0, 60 * 16 // size))
    pool = KvPool(blocks, size, watermark, swap_s_per_block=1e-4)
    rules = rules_of(
        name, max_requests=int(random.integers(1, 40)), token_budget=int(random.integers(16, 600))
    )
    concurrency = int(random.integers(1, 30)) if seed % 4 == 3 else None
    run = simulate(asked, TAU, rules, pool, concurrency=concurrency)
    first, finish, gave_way = step_by_step(asked, TAU, rules, pool, concurrency)
    assert run.preemptions.tolist() == gave_way.tolist()
    np.testing.assert_allclose(run.first_token_s, first, rtol=1e-9)
    np.testing.assert_allclose(run.finish_s, finish, rtol=1e-9)


def test_pools_run_out_in_these_tests():
    """The settings above are no test of preemption unless some requests give way."""
    lengths = Lengths(60, 60, output_cv2=1.0)
    asked = draw(lengths, 200, rate_per_s=100.0, seed=1)
    pool = KvPool(60, 16, 1, swap_s_per_block=1e-3)
    again = simulate(asked, TAU, rules_of("sarathi"), pool)
    swapped = simulate(asked, TAU, rules_of("swap"), pool)
    assert again.preemptions.sum() > 10
    assert swapped.preemptions.sum() > 10
    assert swapped.finish_s[-1] != again.finish_s[-1]


def test_urgent_requests_overtake():
    asked = draw(Lengths(200, 50), 300, rate_per_s=40.0, seed=3)
    urgent = Requests(asked.arrival_s, asked.prompt_tokens, asked.output_tokens, priority=np.arange(300) % 2)
    run = simulate(urgent, TAU, Scheduler(max_requests=8, order="priority"))
    wait = run.first_token_s - urgent.arrival_s
    assert np.mean(wait[::2]) < 0.2 * np.mean(wait[1::2])


def test_a_table_of_an_affine_price_is_the_price():
    random = np.random.default_rng(0)
    table = Sampled.of(TAU, 100, 5000)
    n, m = random.integers(1, 120, 50), random.integers(0, 6000, 50)
    k, a = n * random.uniform(1, 9000, 50), m * random.uniform(1, 9000, 50)
    np.testing.assert_allclose(table(n, k, m, a), TAU(n, k, m, a), rtol=1e-9)
    np.testing.assert_allclose(table.line(17, 333), TAU.line(17, 333), rtol=1e-6)


def test_a_request_larger_than_the_pool_is_named():
    with pytest.raises(Infeasible, match="the longest request needs 13"):
        simulate(draw(Lengths(150, 50), 3, rate_per_s=1.0), TAU, Scheduler(), KvPool(12, 16))


def test_the_same_seed_gives_the_same_requests():
    one, two, other = (draw(Lengths(9, 9, 1, 1), 50, rate_per_s=1.0, seed=s) for s in (1, 1, 2))
    assert one.arrival_s.tolist() == two.arrival_s.tolist() != other.arrival_s.tolist()
    assert one.output_tokens.tolist() == two.output_tokens.tolist()


def test_nonsense_is_refused():
    with pytest.raises(SpecError, match=r"rate.*above 0"):
        draw(Lengths(10, 10), 5, rate_per_s=0.0)
    with pytest.raises(SpecError, match="output_tokens"):
        Lengths(10, 0)
    with pytest.raises(SpecError, match="Did you mean sarathi"):
        scheduler("sarati")
