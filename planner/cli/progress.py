"""A progress bar for people who wait: on a terminal only, and only after the first second."""

from __future__ import annotations

import sys
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["Progress"]

_PATIENCE_S = 1.0


class Progress:
    """Callable as ``on_progress(done, total)``; draws on stderr, and leaves nothing behind."""

    def __init__(self, enabled: bool = True, doing: str = "searching") -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._doing = doing
        self._start_s = perf_counter()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Shows how far the work is."""
        if not self._enabled or perf_counter() - self._start_s < _PATIENCE_S:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self._doing, total=total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
