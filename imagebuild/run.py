"""The only module that starts external programs, through `sh`.

Every child dies with this process: it gets SIGKILL when the thread that started it goes
(prctl(2), PR_SET_PDEATHSIG), and `stop_all` ends every process group on Ctrl-C.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagebuild.errors import ImgbuildError, UnavailableError

# Which Debian package brings a program; `doctor` and the error for a missing program read it.
PACKAGES: Mapping[str, str] = {
    "apt-ftparchive": "apt-utils",
    "buildah": "buildah",
    "crun": "crun",
    "dpkg-deb": "dpkg",
    "mmdebstrap": "mmdebstrap",
    "modprobe": "kmod",
    "skopeo": "skopeo",
    "systemd-analyze": "systemd",
    "unshare": "util-linux",
}
TAIL_LINES = 20
MASK = "********"

_running: dict[int, Any] = {}
_running_lock = threading.Lock()
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Result:
    """What a program did: its command line, exit code and text output."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    tail: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line, quoted so that it can be pasted into a shell."""
        return shlex.join(self.argv)


def install_command(program: str) -> str:
    """The command that installs `program` on Debian."""
    return f"apt-get install -y {PACKAGES.get(program, program)}"


def available(program: str) -> bool:
    """Tell whether `program` can be found on PATH."""
    return shutil.which(program) is not None


def pasteable(argv: Sequence[str]) -> str:
    """A command line that can be pasted into a shell."""
    return shlex.join(argv)


def _die_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG, prctl(2)


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | bytes | None = None,
    check: bool = True,
    on_line: Callable[[str], None] | None = None,
    log: Path | None = None,
    secrets: Iterable[str] = (),
    merge: bool = False,
) -> Result:
    """Run one program to its end and return its output.

    Args:
        argv: program and arguments; never a shell line.
        env: variables added to this process's environment.
        stdin: what the program reads; nothing by default.
        check: raise `ImgbuildError` when the exit code is not 0.
        on_line: called with each line of output as it comes, without line end.
        log: file that receives all output as it comes.
        secrets: values that are masked in `Result`, in the log and in errors.
        merge: put stderr into stdout, in order.

    Raises:
        UnavailableError: the program is not installed.
        ImgbuildError: the program failed (with `check`); the error carries its last lines.
    """
    import sh

    words = [str(word) for word in argv]
    hidden = [secret for secret in secrets if secret]

    def masked(text: str) -> str:
        for secret in hidden:
            text = text.replace(secret, MASK)
        return text

    out: list[str] = []
    err: list[str] = []
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    lock = threading.Lock()
    sink = log.open("a", encoding="utf-8", errors="replace") if log else None

    def taker(into: list[str]) -> Callable[[str], None]:
        def take(chunk: str) -> None:
            chunk = masked(chunk)
            line = chunk.rstrip("\r\n")
            with lock:
                into.append(chunk)
                if line.strip():
                    tail.append(line)
                if sink:
                    sink.write(chunk)
                    sink.flush()
            if on_line and line.strip():
                on_line(line)

        return take

    try:
        command = sh.Command(words[0])
    except sh.CommandNotFound:
        if sink:
            sink.close()
        raise UnavailableError(
            f"`{words[0]}` is not installed", help=f"install it: {install_command(words[0])}"
        ) from None
    process = None
    try:
        process = command(
            *words[1:],
            _in=stdin if stdin is not None else None,
            _out=taker(out),
            _err=taker(out if merge else err),
            _env={**os.environ, **(env or {})},
            _cwd=str(cwd) if cwd else None,
            _tty_out=False,
            _tty_in=False,
            _new_session=True,
            _bg=True,
            _bg_exc=False,
            _return_cmd=True,
            _preexec_fn=_die_with_parent,
            _decode_errors="replace",
            _log_msg=lambda *_: "run",
        )
        with _running_lock:
            _running[id(process)] = process
        try:
            process.wait()
            code = 0
        except sh.ErrorReturnCode as error:
            code = error.exit_code
    finally:
        if process is not None:
            with _running_lock:
                _running.pop(id(process), None)
        if sink:
            sink.close()
    result = Result(tuple(masked(w) for w in words), code, "".join(out), "".join(err), tuple(tail))
    if check and code != 0:
        how = f"exited with {code}" if code > 0 else f"was ended by signal {-code}"
        raise ImgbuildError(f"{words[0]} {how}: {result.command}", lines=result.tail)
    return result


def stop_all() -> None:
    """End every running program and what it started (Ctrl-C, or a node that failed)."""
    with _running_lock:
        processes = list(_running.values())
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
