"""What speculative decoding needs to be told: who drafts, how many tokens, and how often they are right."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import Problem, SpecError
from planner.specs.model import Model

__all__ = ["METHODS", "Speculation"]

METHODS = ("draft", "eagle", "mtp", "ngram")
_MOST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafted tokens that the model checks in one step.

    Attributes:
        method: ``draft`` (a smaller model), ``eagle`` (a layer trained beside the model, which reads its last hidden states),
            ``mtp`` (the model's own prediction modules, a layer and the output projection per token) or ``ngram`` (looked up in
            the prompt, at no cost).
        acceptance: probability that a drafted token is the model's, if those before it were. It depends on model, draft, text and
            temperature: it is measured, never predicted.
        tokens: numbers of drafted tokens that the search may choose from.
        model: the smaller model of ``draft``.
        head: the hub's name of the layer of ``eagle``; empty where it does not matter.

    Raises:
        SpecError: a value is out of range, or the method lacks its model (all problems at once).
    """

    method: str
    acceptance: float
    tokens: tuple[int, ...] = (1, 2, 3, 4, 5, 7)
    model: Model | None = None
    head: str = ""

    def __post_init__(self) -> None:
        faults = []
        if self.method not in METHODS:
            faults.append(Problem("method", repr(self.method), f"one of {', '.join(METHODS)}"))
        if not 0.0 <= self.acceptance <= 1.0:
            faults.append(Problem("acceptance", repr(self.acceptance), "a probability from 0 to 1"))
        if not self.tokens or not all(1 <= n <= _MOST_TOKENS for n in self.tokens):
            faults.append(Problem("tokens", repr(self.tokens), f"whole numbers from 1 to {_MOST_TOKENS}"))
        if (self.method == "draft") != (self.model is not None):
            faults.append(
                Problem(
                    "model", "is missing or too much", "a smaller model with method draft, none with others"
                )
            )
        if faults:
            raise SpecError(faults)
