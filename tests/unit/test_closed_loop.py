"""Clients that replace every answer: the closed form of a pool's steady state against the simulator, request by request."""

from types import SimpleNamespace

import numpy as np
import pytest

from planner.costs.queueing import clients_wait_s
from planner.load.iteration_time import Affine
from planner.load.requests import Requests
from planner.load.scheduler import scheduler
from planner.load.simulator import simulate
from planner.mesh import Mesh
from planner.serving.aggregated import steady
from planner.specs.traffic import Traffic

ONE, BUDGET, PER_CLIENT = np.ones(1), 8192, 10
TIME = Affine(
    8e-3, 2e-5, 1e-8, 6e-5
)  # of the size of a 70B model on two H100: 8 ms a step, 60 us a prompt token


class Engine:
    """As much of an engine as the steady state asks for, with the simulator's iteration time."""

    def __init__(self, prompts):
        self.software = SimpleNamespace(prompts=prompts, admitted_s=lambda tokens: 0.0)
        self.ctx = SimpleNamespace(mesh=Mesh(ONE, ONE, ONE, ONE, ONE, ONE))

    step_tokens = accepted = 1.0  # no speculation

    def steps(self, osl):
        return osl - 1.0

    def __call__(self, decodes, context, prefill, keys):
        return np.asarray(TIME(decodes, context, prefill, np.asarray(prefill) * np.asarray(keys)))


def simulated(policy, clients, prompt, answer, shortest):
    random = np.random.default_rng(0)
    count = clients * PER_CLIENT
    none = np.zeros(count, dtype=np.int64)
    prompts = random.integers(int(shortest * prompt), prompt + 1, count)
    answers = random.integers(int(shortest * answer), answer + 1, count)
    run = simulate(
        Requests(np.zeros(count), prompts, answers, none, none),
        TIME,
        scheduler(policy, 4096, BUDGET),
        concurrency=clients,
    )
    ttft_s = run.first_token_s - run.requests.arrival_s
    tpot_s = (run.finish_s - run.first_token_s) / (answers - 1)
    return float(ttft_s.mean()), float(tpot_s.mean())


@pytest.mark.parametrize("clients", [1, 4, 16, 64])
@pytest.mark.parametrize(("prompt", "answer"), [(1024, 1024), (8192, 1024), (4096, 512)])
@pytest.mark.parametrize(
    ("policy", "prompts", "shortest"),
    [("sarathi", "beside", 0.8), ("vllm", "first", 0.8), ("vllm", "first", 1.0)],
)
def test_closed_form_is_what_the_simulator_gives(policy, prompts, shortest, clients, prompt, answer):
    """Ten requests per client, the first of all at once; lengths uniform, or equal, so that the clients stay in step."""
    ttft_s, tpot_s = simulated(policy, clients, prompt, answer, shortest)
    mean = (1.0 + shortest) / 2.0
    traffic = Traffic(
        round(prompt * mean), round(answer * mean), concurrency=clients, requests_per_client=PER_CLIENT,
        length_scv=(1.0 - shortest) ** 2 / 12.0 / mean**2,
    )  # fmt: skip
    state = steady(Engine(prompts), traffic, np.array([float(clients)]), np.array([float(BUDGET)]))
    assert float(state.ttft_s[0]) == pytest.approx(ttft_s, rel=0.13)
    assert float(state.tpot_s[0]) == pytest.approx(tpot_s, rel=0.08)


@pytest.mark.parametrize(("clients", "load"), [(20, 0.3), (20, 0.9), (200, 0.6), (200, 1.0)])
def test_wait_among_clients_of_one_window(clients, load):
    """Against the queue itself: arrivals uniform over a period that repeats, services of equal length."""
    random = np.random.default_rng(1)
    service_s = load / clients
    waits = []
    for _ in range(300):
        arrivals = np.sort(random.random(clients))
        wait = 0.0
        for _ in range(4):  # the first rounds fill the queue
            gaps = np.diff(arrivals, append=arrivals[0] + 1.0)
            last = []
            for gap in gaps:
                last.append(wait)
                wait = max(wait + service_s - gap, 0.0)
        waits.append(np.mean(last))
    assert float(clients_wait_s(clients - 1, service_s, load)) == pytest.approx(np.mean(waits), rel=0.25)
