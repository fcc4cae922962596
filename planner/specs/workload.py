"""The job: what is trained, on how much data per step, in which numeric formats."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TrainWorkload"]


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
        capacity_factor: tokens per expert are capped at this multiple of the mean and padded up to it; None neither drops nor pads.
        tokens: length of the whole run; None leaves run totals out.
    """

    global_batch_size: int
    seq_len: int
    encoder_seq_len: int | None = None
    optimizer: str = "adamw"
    precisions: tuple[str, ...] = ("bf16",)
    document_len: int | None = None
    expert_load_factor: float = 1.0
    capacity_factor: float | None = None
    tokens: float | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step consumes."""
        return self.global_batch_size * self.seq_len
