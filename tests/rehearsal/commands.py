"""What the making of the rehearsal runs programs and shares files with."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

LIMIT_S = 900


class RehearsalError(RuntimeError):
    """The rehearsal cannot be made or changed; the text says why."""


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> str:
    """Run a program; returns its stdout. Raises RehearsalError with the end of what it said."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **(env or {})},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise RehearsalError(f"the rehearsal needs the program {words[0]}") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise RehearsalError(f"{' '.join(words)[:300]} exited with {done.returncode}:\n{tail}")
    return done.stdout


def link(old: Path, new: Path) -> None:
    """The same file at another place; a copy where that is another file system."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)
