"""The job: what is trained, on how much data per step, in which numeric formats."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import Problem, SpecError, did_you_mean
from planner.specs.formats import FORMATS
from planner.specs.ranges import out_of_range

__all__ = ["TrainWorkload"]

# Field → (least, most, whole number?). Far beyond any real job: they keep a slip of the keyboard from running for ever.
_LIMITS = {
    "global_batch_size": (1, 10**7, True),
    "seq_len": (1, 10**8, True),
    "encoder_seq_len": (1, 10**8, True),
    "document_len": (1, 10**8, True),
    "expert_load_factor": (1, 10**4, False),
    "expert_zipf": (0, 10, False),
    "capacity_factor": (0.01, 10**4, False),
    "tokens": (1, 10**18, False),
}


@dataclass(frozen=True, slots=True)
class TrainWorkload:
    """One training job.

    Attributes:
        global_batch_size: sequences per optimizer step.
        seq_len: tokens per sequence (the decoder's, in an encoder–decoder model).
        encoder_seq_len: tokens per sequence on the encoder's side; None means ``seq_len``.
        optimizer: key of an optimizer technique.
        precisions: formats that the search may choose from.
        document_len: mean length of the documents packed into a sequence when attention does not cross documents;
            None means that attention sees the whole sequence.
        expert_load_factor: busiest expert rank relative to the mean (1 = perfectly balanced routing).
        expert_zipf: how unlike experts are: the j-th most popular gets j^-expert_zipf of the first one's tokens (0: all alike).
        capacity_factor: tokens per expert are capped at this multiple of the mean and padded up to it; None: neither.
        tokens: length of the whole run; None leaves run totals out.

    Raises:
        SpecError: a number is out of range, or a format is unknown (all problems at once).
    """

    global_batch_size: int
    seq_len: int
    encoder_seq_len: int | None = None
    optimizer: str = "adamw"
    precisions: tuple[str, ...] = ("bf16",)
    document_len: int | None = None
    expert_load_factor: float = 1.0
    expert_zipf: float = 0.0
    capacity_factor: float | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        faults = out_of_range(self, _LIMITS)
        faults += [
            Problem(
                "precisions", repr(name), f"one of {', '.join(FORMATS)}", did_you_mean(str(name), FORMATS)
            )
            for name in self.precisions
            if name not in FORMATS
        ]
        if not self.precisions:
            faults.append(Problem("precisions", "is empty", f"one or more of {', '.join(FORMATS)}"))
        if faults:
            raise SpecError(faults)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step consumes."""
        return self.global_batch_size * self.seq_len
