"""The command line: results on stdout, progress and errors on stderr, and an exit code that says what happened.

0 done; 1 a recorded bound of ``validate`` is exceeded; 2 wrong input; 3 nothing fits; 4 a solver failed; 5 a launcher cannot
express the plan; 70 a bug of ours; 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: what follows the program's name; None takes those of the process.
    """
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # while modules are loaded, or a second time
        print("interrupted", file=sys.stderr)
        return 130


def _main(arguments: Sequence[str] | None) -> int:
    from planner.cli.output import PIPE_CLOSED

    if arguments is None:
        arguments = sys.argv[1:]
        # A search makes many objects, hardly any of them in cycles; when the process ends, a last look for these only takes time.
        gc.set_threshold(1_000_000)
        atexit.register(gc.freeze)
        # Products are small: threads would wait for them, not help.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without '·' or 'µ' shows '?' instead of failing
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `planner … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return code


def _run(arguments: Sequence[str]) -> int:
    import typer

    from planner.cli.app import command
    from planner.cli.output import BUG, INTERRUPTED, Stopped, report_bug, report_error, report_interruption
    from planner.errors import PlannerError, Problem, SpecError

    as_json = "--json" in arguments
    usage_error = typer.BadParameter.__mro__[1]
    try:
        program = command()
        code = int(program(args=list(arguments), prog_name="planner", standalone_mode=False) or 0)
        if code == INTERRUPTED:  # the parser makes this of a Ctrl-C that no command caught
            report_interruption("nothing was written", as_json)
        return code
    except Stopped as stop:
        report_interruption(stop.found, as_json and not stop.printed)
        return INTERRUPTED
    except PlannerError as error:
        report_error(error, as_json)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        report_interruption("nothing was written", as_json)
        return INTERRUPTED
    except (
        BrokenPipeError,
        SystemExit,
    ):  # the parser leaves by itself for one reason alone: nobody reads the output
        raise BrokenPipeError from None
    except Exception as error:
        if isinstance(error, usage_error):
            message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
            report_error(SpecError(Problem("arguments", message, try_=_help(error))), as_json)
            return SpecError.exit_code
        if os.environ.get("PLANNER_TRACEBACK"):
            raise
        report_bug(error, as_json)
        return BUG


def _help(error: Exception) -> str:
    """Which help to look at: that of the command that was misused."""
    context = getattr(error, "ctx", None)
    return f"See {'planner' if context is None else context.command_path} --help."
