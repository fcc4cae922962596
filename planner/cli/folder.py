"""A folder of files that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from planner.errors import Problem, SpecError

__all__ = ["write_folder"]


def write_folder(path: str, files: Mapping[str, str], flag: str = "-o") -> list[str]:
    """Writes the files; shell scripts may be executed.

    All are written beside their place first. A new folder then appears in one step; in an existing one the files take their
    places one by one, and what else lies there is left alone.

    Args:
        path: the folder; made if it is not there.
        files: name (with ``/`` between folders) → content.
        flag: the option that problems name.

    Returns:
        The paths that were written.

    Raises:
        SpecError: the folder cannot be written; nothing of it is left behind.
    """
    where = f"{flag} {path}"
    try:
        folder = Path(os.path.realpath(Path(path).expanduser()))
        if folder.exists() and not folder.is_dir():
            raise SpecError(Problem(where, "is a file", "a folder, or a name for a new one"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(
            Problem(where, f"is no folder ({_reason(error)})", "a folder that can be made")
        ) from None
    try:
        for name, text in files.items():
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            file.chmod(0o755 if name.endswith((".sh", ".sbatch")) else 0o644)
        _check(folder, files, where)
        _place(draft, folder, files)
    except OSError as error:
        raise SpecError(
            Problem(where, f"cannot be written ({_reason(error)})", "a folder that can be written")
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [str(Path(path).expanduser() / name) for name in files]


def _check(folder: Path, files: Mapping[str, str], where: str) -> None:
    """Raises SpecError where a folder stands in the place of a file."""
    taken = [name for name in files if (folder / name).is_dir()]
    if taken:
        raise SpecError(
            [Problem(where, f"{name} is a folder", "a file, or nothing, in its place") for name in taken]
        )


def _place(draft: Path, folder: Path, files: Mapping[str, str]) -> None:
    if not folder.exists():
        draft.chmod(0o755)
        draft.rename(folder)
        return
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / name, folder / name)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
