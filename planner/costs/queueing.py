"""Waiting in queues: closed forms of one server, many servers, batches, and iteration-level batching.

Symbols: ``λ`` arrivals per second, ``S`` mean service time, ``c²`` squared coefficient of variation (0 for
fixed, 1 for exponential times), ``c`` servers, ``ρ = λS/c``. At ``ρ ≥ 1`` a mean is infinite, not an error:
a search compares rates.

Sources: L. Kleinrock, "Queueing Systems", vol. 1 and 2, 1975–76 (M/M/1, M/G/1, priorities, processor sharing);
A. K. Erlang, 1917 (B and C); J. F. C. Kingman, "The single server queue in heavy traffic", 1961, and "Some
inequalities for the queue GI/G/1", 1962; G. P. Cosmetatos, "Some approximate equilibrium results for the
multi-server queue (M/G/r)", 1976; A. O. Allen, "Probability, Statistics, and Queueing Theory", 1990
(Allen–Cunneen); Y. Inoue, "Queueing analysis of GPU-based inference servers with dynamic batching: A
closed-form characterization", 2021, arXiv:1912.06322; Y. Zhong et al., "DistServe", OSDI 2024, arXiv:2401.09670
(tandem); H. Sakasegawa, "An approximation formula L_q ≈ αρ^β/(1 − ρ)", 1977 (many servers).
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "batch_response_s",
    "clients_wait_s",
    "erlang_b",
    "erlang_c",
    "gg1_wait_bound_s",
    "ggc_wait_s",
    "iteration_batching_s",
    "many_servers_wait",
    "mg1_wait_s",
    "mmc_wait_s",
    "priority_wait_s",
    "processor_sharing_s",
    "static_batch_occupancy",
    "tandem_response_s",
    "wait_quantile_s",
]


def mg1_wait_s(rate_per_s: Real, service_s: Real, service_cv2: Real = 1.0) -> Real:
    """Mean wait in an M/G/1 queue, first come first served: ``λE[S²]/(2(1 − ρ))`` (Pollaczek–Khinchine).

    Exact for Poisson arrivals. M/M/1 has ``service_cv2`` 1, M/D/1 has 0.

    >>> float(mg1_wait_s(0.5, 1.0))  # M/M/1: ρ/(μ − λ)
    1.0
    >>> float(mg1_wait_s(0.5, 1.0, 0.0))  # M/D/1: half of it
    0.5
    """
    load = np.multiply(rate_per_s, service_s)
    second_moment_s2 = np.square(service_s) * (1.0 + service_cv2)
    return _while_stable(load, 0.5 * rate_per_s * second_moment_s2)


def gg1_wait_bound_s(
    rate_per_s: Real, service_s: Real, arrival_cv2: Real = 1.0, service_cv2: Real = 1.0
) -> Real:
    """Upper bound on the mean wait in a GI/G/1 queue: ``λ(σa² + σs²)/(2(1 − ρ))`` (Kingman 1962).

    Independent interarrival times of any law; tight as ``ρ → 1``. Bursts have ``arrival_cv2`` above 1.

    >>> float(gg1_wait_bound_s(0.5, 1.0))  # M/M/1 waits 1.0
    2.5
    """
    load = np.multiply(rate_per_s, service_s)
    variance_s2 = arrival_cv2 * np.square(np.divide(1.0, rate_per_s)) + service_cv2 * np.square(service_s)
    return _while_stable(load, 0.5 * rate_per_s * variance_s2)


def priority_wait_s(rate_per_s: Real, service_s: Real, service_cv2: Real = 1.0) -> Real:
    """Mean wait of every class (first axis, most urgent first) in an M/G/1 queue that never interrupts.

    ``W0/((1 − σ_{i−1})(1 − σ_i))``, ``W0 = Σ λE[S²]/2``, ``σ_i`` the load of classes up to ``i`` (Cobham 1954;
    Kleinrock, vol. 2, section 3.3). Exact.

    >>> priority_wait_s(np.array([0.25, 0.25]), np.ones(2)).round(4).tolist()  # W0 = 0.5
    [0.6667, 1.3333]
    """
    second_moment_s2 = np.square(service_s) * (1.0 + service_cv2)
    residual_s = 0.5 * np.sum(rate_per_s * second_moment_s2, axis=0)
    load = np.cumsum(np.multiply(rate_per_s, service_s), axis=0)
    above = load - np.multiply(rate_per_s, service_s)
    return _while_stable(load, residual_s / np.maximum(1.0 - above, np.finfo(float).tiny))


def processor_sharing_s(rate_per_s: Real, service_s: Real, size_s: Real | None = None) -> Real:
    """Mean response in M/G/1 processor sharing of a job of ``size_s`` (a mean one by default): ``x/(1 − ρ)``.

    Exact whatever the law of service times. It holds for *pure* sharing: with a cap on the jobs that share,
    and a queue in front of it, the law matters again.

    >>> float(processor_sharing_s(0.5, 1.0))
    2.0
    """
    return _while_stable(np.multiply(rate_per_s, service_s), service_s if size_s is None else size_s)


def erlang_b(servers: Real, offered: Real) -> Real:
    """Fraction of arrivals that find all servers of M/G/c/c busy, ``offered = λS``; exact.

    ``B_0 = 1``, ``B_c = aB_{c−1}/(c + aB_{c−1})``.

    >>> round(float(erlang_b(2, 1.0)), 4)  # (1/2)/(1 + 1 + 1/2)
    0.2
    """
    wanted, load = np.broadcast_arrays(np.asarray(servers, dtype=float), np.asarray(offered, dtype=float))
    blocked = np.ones(wanted.shape)
    for c in range(1, int(np.max(wanted, initial=0.0)) + 1):
        blocked = np.where(wanted >= c, load * blocked / (c + load * blocked), blocked)
    fraction: Real = blocked[()]
    return fraction


def erlang_c(servers: Real, offered: Real) -> Real:
    """Fraction of arrivals that wait in M/M/c, 1 at or beyond full load: ``cB/(c − a(1 − B))``; exact.

    >>> round(float(erlang_c(2, 1.0)), 4)  # ρ = 1/2: 2ρ²/(1 + ρ)
    0.3333
    """
    blocked = erlang_b(servers, offered)
    spare = np.maximum(servers - np.multiply(offered, 1.0 - blocked), np.finfo(float).tiny)
    fraction: Real = np.where(np.less(offered, servers), servers * blocked / spare, 1.0)[()]
    return fraction


def mmc_wait_s(rate_per_s: Real, service_s: Real, servers: Real) -> Real:
    """Mean wait in M/M/c: ``C/(cμ − λ)``; exact.

    >>> round(float(mmc_wait_s(1.0, 1.0, 2.0)), 4)
    0.3333
    """
    offered = np.multiply(rate_per_s, service_s)
    return _while_stable(np.divide(offered, servers), erlang_c(servers, offered) * service_s / servers)


def ggc_wait_s(
    rate_per_s: Real, service_s: Real, servers: Real, arrival_cv2: Real = 1.0, service_cv2: Real = 1.0
) -> Real:
    """Mean wait in GI/G/c: M/M/c and M/D/c, mixed by ``service_cv2``, times ``(ca² + cs²)/(1 + cs²)``.

    M/D/c is Cosmetatos' ``½(1 + (1 − ρ)(c − 1)(√(4 + 5c) − 2)/(16ρc))`` of M/M/c, within 2 % for ``ρ ≥ 0.3``.
    Exact for M/M/c and M/G/1; for M/G/c with ``cs² ≤ 4`` a few percent at ``ρ ≥ 0.5``; where arrivals are
    bursty it is Allen–Cunneen's, within 20 % near full load and unsafe at ``ρ`` below 0.5.

    >>> float(ggc_wait_s(0.5, 1.0, 1.0, service_cv2=0.0))  # M/D/1
    0.5
    """
    exponential_s = mmc_wait_s(rate_per_s, service_s, servers)
    load = np.maximum(np.divide(np.multiply(rate_per_s, service_s), servers), np.finfo(float).tiny)
    crowding = (1.0 - load) * (servers - 1.0) * (np.sqrt(4.0 + np.multiply(5.0, servers)) - 2.0)
    fixed = 0.5 * (1.0 + np.minimum(np.maximum(crowding, 0.0) / (16.0 * load * servers), 1.0))
    poisson_s = exponential_s * (service_cv2 + (1.0 - service_cv2) * fixed)
    return poisson_s * (np.add(arrival_cv2, service_cv2) / np.add(1.0, service_cv2))


def clients_wait_s(others: Real, service_s: Real, load: Real) -> Real:
    """Mean wait of one of ``others + 1`` clients that each ask once in a window, for services of equal length.

    The queue ``N·D/D/1`` (Roberts and Virtamo 1991, IEEE Transactions on Communications 39(2)): the share ``ρ`` of requests that
    finds others at work sees a backlog of ``x`` services with probability ``exp(−2x(x/N + 1 − ρ))``, whose integral is
    ``√(πN/8)·erfcx((1 − ρ)√(N/2))``. With many clients it is the wait of M/D/1; at ``ρ = 1`` it stays finite.

    Args:
        others: clients besides the own.
        service_s: time of one service.
        load: fraction of the window that services take, up to 1.

    >>> round(float(clients_wait_s(1e6, 1.0, 0.5)), 3), round(float(mg1_wait_s(0.5, 1.0, 0.0)), 3)
    (0.5, 0.5)
    """
    few = np.sqrt(np.pi * np.asarray(others, dtype=np.float64) / 8.0)
    return load * service_s * few * _erfcx((1.0 - np.asarray(load)) * np.sqrt(np.asarray(others) / 2.0))


def _erfcx(x: Real) -> Real:
    """``exp(x²)·erfc(x)`` for x ≥ 0, to 1.2e-7 of itself (Press et al., "Numerical Recipes", 1992, ``erfcc``).

    >>> round(float(_erfcx(1.0)), 6), round(float(_erfcx(100.0)), 8)
    (0.427584, 0.00564161)
    """
    t = 1.0 / (1.0 + 0.5 * np.asarray(x, dtype=np.float64))
    power = np.zeros_like(t)
    for coefficient in _ERFCC:
        power = power * t + coefficient
    return t * np.exp(power)


_ERFCC = (
    0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223,
)  # fmt: skip


def many_servers_wait(load: Real, servers: Real, pace_s: Real, service_cv2: Real = 1.0) -> tuple[Real, Real]:
    """Chance and mean (seconds) of a wait in M/G/c, without a recursion: ``p = ρ^(√(2(c + 1)) − 1)``, ``p·S/(c(1 − ρ))``.

    ``pace_s`` is ``S/c``; the mean is scaled by ``(1 + cs²)/2``. Exact for one server, within a few per cent of Erlang-C's
    above ``ρ = 0.8`` (Sakasegawa 1977).

    >>> waits, wait_s = many_servers_wait(0.5, 1.0, 1.0)  # M/M/1
    >>> float(waits), float(wait_s)
    (0.5, 1.0)
    >>> round(float(many_servers_wait(0.9, 16.0, 1.0 / 16.0)[1]), 2)  # Erlang-C: 0.35
    0.38
    """
    waits = np.power(load, np.sqrt(2.0 * (np.asarray(servers) + 1.0)) - 1.0)
    return waits, _while_stable(load, 0.5 * (1.0 + service_cv2) * waits * pace_s)


def wait_quantile_s(quantile: Real, waits: Real, wait_s: Real) -> Real:
    """Quantile of a wait whose mean is ``wait_s`` and which is positive with probability ``waits``.

    ``(W/p)·ln(p/(1 − q))``, 0 up to ``q = 1 − p``: exact for M/M/1 (``p = ρ``) and M/M/c (``p = C``), the
    heavy-traffic limit elsewhere (Kingman 1961).

    >>> round(float(wait_quantile_s(0.99, 0.5, 1.0)), 4)  # M/M/1 at ρ = 1/2: 2 ln 50
    7.824
    """
    chance = np.maximum(waits, np.finfo(float).tiny)
    return wait_s / chance * np.log(np.maximum(chance / (1.0 - np.asarray(quantile)), 1.0))


def batch_response_s(rate_per_s: Real, per_job_s: Real, setup_s: Real) -> Real:
    """Upper bound on the mean response of a server that takes all that wait as one batch of ``αb + t0`` seconds.

    ``min(φ0, φ1)``, ``φ0 = (α + t0)/(2(1 − λα))·(1 + 2λt0 + (1 − λt0)/(1 + λα))``,
    ``φ1 = 1.5t0/(1 − λα) + (α/2)(λα + 2)/(1 − λ²α²)`` (Inoue, Theorem 2). Poisson arrivals, no limit on the
    batch; tight enough to serve as the estimate.

    >>> round(float(batch_response_s(5.0, 0.1, 1.0)), 3)  # 3.162 by simulation
    3.167
    """
    load = np.multiply(rate_per_s, per_job_s)
    setup_load = np.multiply(rate_per_s, setup_s)
    light_s = 0.5 * np.add(per_job_s, setup_s) * (1.0 + 2.0 * setup_load + (1.0 - setup_load) / (1.0 + load))
    heavy_s = 1.5 * np.asarray(setup_s) + np.multiply(0.5, per_job_s) * (load + 2.0) / (1.0 + load)
    return _while_stable(load, np.minimum(light_s, heavy_s))


def tandem_response_s(rate_per_s: Real, latency_s: Real, slowest_s: Real) -> Real:
    """Mean response of Poisson arrivals through stages of fixed times: ``D + λD_m²/(2(1 − λD_m))``.

    ``latency_s`` is the sum of the stages, ``slowest_s`` the longest: only that one queues (DistServe, section
    3.2, for prefill over pipeline stages). Exact for jobs of equal size.

    >>> float(tandem_response_s(0.5, 2.0, 1.0))
    2.5
    """
    return latency_s + mg1_wait_s(rate_per_s, slowest_s, 0.0)


def static_batch_occupancy(batch: Real) -> Real:
    """Fraction of slots that do useful decodes in a static batch of exponential lengths: ``1/H_b``.

    A batch runs until its longest output ends, and the mean of the longest of ``b`` is ``H_b`` means (the
    harmonic number; Kleinrock, vol. 1, section 2.3: the maximum as a sum of exponential gaps).

    >>> round(float(static_batch_occupancy(32)), 4)
    0.2464
    """
    count = np.asarray(batch)
    harmonic = np.cumsum(1.0 / np.arange(1, int(np.max(count)) + 1))
    fraction: Real = 1.0 / harmonic[np.asarray(count, dtype=int) - 1]
    return fraction


def iteration_batching_s(
    rate_per_s: Real,
    base_s: Real,
    per_decode_s: Real,
    per_prefill_token_s: Real,
    prompt_tokens: Real,
    output_tokens: Real,
) -> Real:
    """Mean iteration time ``τ`` of iteration-level batching: ``a/(1 − λ(cP + bO))``, infinite beyond that.

    An iteration of ``n`` decodes and ``m`` prefill tokens takes ``a + bn + cm``; by Little's law it holds ``n
    = λOτ`` decodes, and it absorbs ``m = λτP`` tokens (G. Yu et al., "Orca", OSDI 2022, section 3, for the
    batching; the balance is Little's). Holds without limits on ``n`` and ``m``.

    >>> rates = np.array([2.0, 4.0, 6.0])  # simulated: 15.3, 20.7 and 32.1 ms
    >>> (1e3 * iteration_batching_s(rates, 12e-3, 60e-6, 90e-6, 1000, 200)).round(1).tolist()
    [15.1, 20.3, 30.9]
    """
    work_s = np.multiply(per_prefill_token_s, prompt_tokens) + np.multiply(per_decode_s, output_tokens)
    return _while_stable(np.multiply(rate_per_s, work_s), base_s)


def _while_stable(load: Real, value: Real) -> Real:
    """``value/(1 − load)``, infinite at full load and beyond."""
    spare = 1.0 - np.asarray(load, dtype=float)
    result: Real = np.where(spare > 0.0, value / np.where(spare > 0.0, spare, 1.0), np.inf)[()]
    return result
