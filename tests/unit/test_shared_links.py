"""Exchanges of experts beside traffic that lies in every micro-batch, by hand.

Fair shares of one link, as in planner/engine/shared_links.py: an exchange of A seconds among B seconds of a pass meets R seconds
for a share R/B of its time, and takes twice as long then.
"""

import numpy as np
import pytest

from planner.engine.shared_links import waits_in_pass
from planner.ledger import Axes, Collective, Group, Item, Stream

_AXES = Axes({"bytes": 1024.0})
_NEAR, _FAR = (
    Group(name, np.array([8.0]), np.array([stride])) for name, stride in (("near", 1.0), ("far", 8.0))
)


def _pass(phase: str, work_s: float, exchange_s: float, traffic_s: float, group: Group = _FAR):
    items: list[tuple[Item, float]] = [
        (Stream(what="work", block="layer", phase=phase, size="bytes", bytes_per_element=1.0), work_s),
        (
            Collective(
                what="tokens", block="layer", phase=phase, kind="all_to_all", group=_FAR, size="bytes", messages="1"
            ),
            exchange_s,
        ),
        (
            Collective(
                what="weights", block="layer", phase=phase, kind="all_gather", group=group, size="bytes", track="weights",
                tags=frozenset({"data_parallel", "parameters"}),
            ),
            traffic_s,
        ),
    ]  # fmt: skip
    return [(item, np.array([seconds])) for item, seconds in items if seconds]


def _waited_s(*passes) -> float:
    def outermost(group: Group) -> np.ndarray:
        return np.array([1 if group is _FAR else 0])

    return sum(float(s[0]) for _, s in waits_in_pass(passes, outermost, _AXES))


@pytest.mark.parametrize(
    ("work_s", "exchange_s", "traffic_s", "expected_s"),
    [
        (
            6.0,
            2.0,
            4.0,
            2.0 * 4.0 / 8.0,
        ),  # half of the pass has traffic beside it: half of the exchange doubles
        (6.0, 2.0, 8.0, 2.0),  # traffic fills the pass: the link carries both, one after the other
        (6.0, 2.0, 20.0, 2.0),  # and longer traffic is exposed by itself, the exchange on top of it
        (6.0, 2.0, 0.0, 0.0),
        (6.0, 0.0, 4.0, 0.0),
    ],
)
def test_an_exchange_doubles_where_gathers_of_weights_meet_it(
    work_s: float, exchange_s: float, traffic_s: float, expected_s: float
):
    assert _waited_s(_pass("forward", work_s, exchange_s, traffic_s)) == pytest.approx(expected_s)


def test_other_links_do_not_wait_for_each_other():
    assert _waited_s(_pass("forward", 6.0, 2.0, 4.0, _NEAR)) == 0.0


def test_traffic_of_a_backward_is_spread_over_its_weight_gradients_and_recomputation():
    backward, weight = _pass("backward", 6.0, 2.0, 4.0), _pass("weight", 8.0, 0.0, 0.0)
    assert _waited_s(backward, weight) == pytest.approx(2.0 * 4.0 / 16.0)
    # What runs again takes 8 s more, of which 2 s are exchanges: 4 s of them in 24 s, less what the backward waits anyhow.
    again = _pass("recompute", 6.0, 2.0, 0.0)
    assert _waited_s(again, backward, weight) == pytest.approx(4.0 * 4.0 / 24.0 - 0.5)
