"""Prompts that wait for their prefill beside a given number of decodes: a Markov chain seen at the starts of iterations.

An iteration takes the ``m`` oldest of the ``W`` prompt tokens that wait (all, up to the budget) and lasts ``s(m)``; meanwhile
prompts come as a Poisson stream, and the next one starts with ``W − m + Y(s)``. Tokens lie on a grid of which the budget is a
whole number of steps. What a policy differs in is ``s``, and whether decodes advance in iterations that hold prompts.

An arrival meets an iteration with a probability in proportion to its length, at a uniform moment of it; it waits for the rest,
for the tokens ahead of it, and for the iterations that its own are in, which those behind it fill up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.load.balance import Balance
from planner.load.iteration_time import Array
from planner.load.length_law import LengthLaw

__all__ = ["FirstToken", "PrefillQueue"]

_CELLS, _FIXED_CELLS = 112, 64  # of the grid; fixed prompts reach less far
_MOMENTS = (np.arange(4) + 0.5) / 4
_RESTS = 16
_NEGLIGIBLE = 1e-6
_WIDE = 1e12
_HEAVIEST = 0.95


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What arrivals meet.

    Attributes:
        seconds, chances: outcomes of the time to the first token.
        cycle_s: mean seconds from one decode iteration to the next.
        pause_s: how much longer than its cycles a request decodes, since it begins when prompts are about.
        longest_s: mean of the longest iteration since the engine was idle, up to an arrival's own.
    """

    seconds: Array
    chances: Array
    cycle_s: float
    pause_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class PrefillQueue:
    """The queue beside ``decodes`` requests; 0 of them: iterations end when nothing waits."""

    balance: Balance
    rate_per_s: float
    decodes: float
    prompts: LengthLaw

    def first_token(self) -> FirstToken:
        """Solves the chain, and follows an arrival through it."""
        chain = self._chain()
        seen, pause_of = self._seen(chain), np.zeros(self._cells)
        cycle_s = after_s = 0.0
        if self.decodes:
            advances = chain.iterations if self.balance.rules.mixed else (np.arange(self._cells) == 0.0) * 1.0
            per_start = max(
                float(chain.chance @ advances), 1e-9
            )  # decodes hardly ever run where prompts always wait
            cycle_s = float(chain.chance @ chain.seconds / per_start)
            gain_s = chain.seconds - cycle_s * advances
            bias_s = np.linalg.solve(np.eye(self._cells) - chain.moves + chain.chance, gain_s)
            pause_of = chain.moves @ bias_s
            after_s = float((chain.chance * advances) @ pause_of / per_start)
        seconds, chances, backlog = self._outcomes(chain, *seen)
        pause_s = (
            float(np.sum(chances * np.interp(backlog, chain.tokens, pause_of)) / np.sum(chances)) - after_s
        )
        law = chances.ravel() / np.sum(chances)
        return FirstToken(seconds.ravel(), law, cycle_s, pause_s, _longest_s(chain))

    def alone(self) -> tuple[Array, Array]:
        """Seconds from a free slot to the first token, for the law of prompts, with nobody ahead."""
        prompt, chances = self.prompts.nodes()
        full = np.floor((prompt - 1e-6) / self._room)
        return full * self._full_s + self._prefill_s(prompt - full * self._room, prompt), chances

    # -- the chain -------------------------------------------------------------------------------------------------------

    @property
    def _cells(self) -> int:
        return _CELLS if self.prompts.cv2 else _FIXED_CELLS

    @property
    def _budget(self) -> float:
        return min(float(self.balance.room(np.asarray(self.decodes))), _WIDE)

    @property
    def _room(self) -> float:
        """Prompt tokens of a full iteration."""
        if self.balance.rules.chunked:
            return self._budget
        return float(self.balance.together(np.asarray(self._budget))) * self.prompts.mean

    @property
    def _full_s(self) -> float:
        return float(self._prefill_s(np.array(self._room))) if self._room < _WIDE else 0.0

    def _prefill_s(self, tokens: Array, own: Array | float = 0.0) -> Array:
        """An iteration with so many prompt tokens; the own prompt among them attends as its length says, others as on average."""
        balance, lengths = self.balance, self.balance.lengths
        beside = np.full(np.shape(tokens), self.decodes if balance.rules.mixed else 0.0)
        typical = float(lengths.prefill_context_tokens / lengths.computed_tokens)
        hit = float(lengths.prefix_hit)
        attended = own * (own * hit / max(1.0 - hit, 1e-9) + 0.5 * (own + 1.0)) - typical * own
        at_least_one = np.maximum(tokens, 1.0)
        return balance.price(
            beside,
            beside * lengths.context_tokens,
            at_least_one,
            np.maximum(at_least_one * typical + attended, 0.0),
        )

    def _chain(self) -> _Chain:
        p, room, rate = self.prompts.mean, self._room, self.rate_per_s
        decode_s = float(self.balance.decode_s(np.array(self.decodes))) if self.decodes else 0.0
        least_s, many = float(self._prefill_s(np.array(1.0))), min(room, 50.0 * p)
        overhead_s = least_s if room > many else 0.0
        load = min(rate * p * (float(self._prefill_s(np.array(many))) - overhead_s) / many, _HEAVIEST)
        spread = 7.0 * (1.0 + self.prompts.cv2) + 2.0 * rate * max(decode_s, least_s)
        step = p * (spread / (1.0 - load) + 3.0) / self._cells
        # Several full iterations count as one where the grid is coarser than the budget.
        reach = room * max(np.ceil(step / room), 1.0)
        if reach < step * self._cells:
            step = reach / np.ceil(reach / step)
        tokens = np.arange(self._cells) * step
        taken = np.minimum(tokens, reach)
        full = np.floor(np.maximum(taken - 1e-6 * step, 0.0) / room)
        seconds = full * self._full_s + self._prefill_s(taken - full * room)
        seconds[0] = decode_s
        left = np.rint((tokens - taken) / step).astype(int)
        law = self.prompts.on_grid(step, self._cells)
        wave = np.fft.rfft(law, 2 * self._cells)
        moves = _shifted(self._arrivals(wave, seconds), left)
        if not self.decodes:
            moves[0] = law  # idle until a prompt comes
        moves[:, -1] += 1.0 - np.sum(moves, axis=1)
        balance = moves.T - np.eye(self._cells)
        balance[-1] = 1.0
        chance = np.maximum(np.linalg.solve(balance, np.eye(self._cells)[-1]), 0.0)
        return _Chain(tokens, step, seconds, full + 1.0, left, wave, moves, chance / np.sum(chance))

    def _arrivals(self, wave: Array, seconds: Array) -> Array:
        """(…, cells): laws of the tokens that come within ``seconds`` (…): compound Poisson, by Fourier transform."""
        shape = np.exp(self.rate_per_s * seconds[..., None] * (wave - 1.0))
        return np.maximum(np.fft.irfft(shape, 2 * self._cells)[..., : self._cells], 0.0)

    # -- what an arrival meets ---------------------------------------------------------------------------------------------

    def _seen(self, chain: _Chain) -> tuple[Array, Array, Array]:
        """Rest of the iteration, tokens ahead at its end, and their chance: a law of pairs as three arrays."""
        lasting_s = chain.seconds.copy()
        if not self.decodes:
            lasting_s[0] = 1.0 / self.rate_per_s
        met = chain.chance * lasting_s
        met = met / np.sum(met)
        states = np.flatnonzero(met > 10.0 * _NEGLIGIBLE)
        rest_s = (1.0 - _MOMENTS) * chain.seconds[states, None]
        ahead = self._arrivals(chain.wave, _MOMENTS * chain.seconds[states, None])
        ahead *= met[states, None, None] / len(_MOMENTS)
        slot = np.minimum((rest_s / max(np.max(rest_s), 1e-12) * _RESTS).astype(int), _RESTS - 1)
        start = np.broadcast_to(chain.left[states, None], slot.shape)
        where = slot[..., None] * 2 * self._cells + start[..., None] + np.arange(self._cells)
        joint = np.bincount(where.ravel(), ahead.ravel(), minlength=2 * self._cells * _RESTS).reshape(
            _RESTS, -1
        )
        weight = np.broadcast_to(met[states, None], slot.shape).ravel()
        total = np.bincount(slot.ravel(), weight, minlength=_RESTS)
        mean_s = np.bincount(slot.ravel(), weight * rest_s.ravel(), minlength=_RESTS) / np.maximum(
            total, 1e-300
        )
        rests, cells = np.nonzero(joint > _NEGLIGIBLE)
        return mean_s[rests], cells * chain.step, joint[rests, cells]

    def _outcomes(
        self, chain: _Chain, rest_s: Array, ahead: Array, chance: Array
    ) -> tuple[Array, Array, Array]:
        """Seconds to the first token, their chances, and the tokens that wait when the last iteration before it starts."""
        rest_s, ahead = rest_s[:, None], ahead[:, None]
        own, weight = self.prompts.nodes()
        room, full_s = self._room, self._full_s
        if self.balance.rules.chunked:
            full = np.floor(np.maximum(ahead + own - 1e-6, 0.0) / room)
            last = ahead + own - full * room
            before_s, limit = full * full_s, np.asarray(room)
        else:
            full = np.floor(ahead / room)
            others = ahead - full * room
            joins = (others + own <= self._budget) | (others <= 0.0)
            last = np.where(joins, others + own, own)
            before_s = full * full_s + np.where(joins, 0.0, self._prefill_s(others))
            limit = np.maximum(self._budget, last)
        behind = self.rate_per_s * self.prompts.mean * (rest_s + before_s)
        seconds = rest_s + before_s + self._prefill_s(np.minimum(last + behind, limit), own)
        return seconds, chance[:, None] * weight, last + behind


@dataclass(frozen=True, slots=True)
class _Chain:
    """The embedded chain: grid of waiting tokens, what an iteration from each takes and leaves, moves, stationary law."""

    tokens: Array
    step: float
    seconds: Array
    iterations: Array
    left: Array
    wave: Array
    moves: Array
    chance: Array


def _longest_s(chain: _Chain) -> float:
    """Mean of the largest of so many iterations as follow each other without an idle moment, a geometric number of them."""
    taking = chain.chance * (np.arange(len(chain.tokens)) > 0)
    again = float(np.sum((taking @ chain.moves)[1:]) / np.sum(taking))
    seconds, often = chain.seconds / chain.iterations, taking * chain.iterations
    order = np.argsort(seconds)
    law = np.cumsum(often[order]) / np.sum(often)
    largest = (1.0 - again) * law / (1.0 - again * law)
    return float(np.diff(largest, prepend=0.0) @ seconds[order])


def _shifted(laws: Array, by: Array) -> Array:
    """Row ``i`` moved right by ``by[i]``; what leaves the grid is dropped."""
    cells = laws.shape[1]
    source = np.arange(cells) - by[:, None]
    taken: Array = np.take_along_axis(laws, np.maximum(source, 0), axis=1)
    return np.where(source >= 0, taken, 0.0)
