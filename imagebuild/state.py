"""What imgbuild keeps between runs: verified downloads, a journal of builds, logs, and who owns what.

STATE/store/ab/abcd…      downloads and packages, named by their SHA-256
STATE/journal/NAME.json   the inputs each node was last built from
STATE/logs/NAME.log       the full output of each node's last build
STATE/locks/…             one file lock per node key and per store
STATE/work/OWNER/…        what a running imgbuild is making; swept when OWNER is dead
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from imagebuild.errors import ImgbuildError

_OWNER = re.compile(r"imgbuild-([0-9]+)-([0-9]+)-([0-9a-f]{8})([0-9a-f]+)?")


def default_state_dir() -> Path:
    """$IMGBUILD_STATE_DIR, else /var/lib/imgbuild for root, else the user's state folder (XDG)."""
    named = os.environ.get("IMGBUILD_STATE_DIR")
    if named:
        return Path(named).absolute()  # programs that we start have other current folders
    if os.geteuid() == 0:
        return Path("/var/lib/imgbuild")
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(home) / "imgbuild"


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def _namespace() -> str:
    """The PID namespace, in hexadecimal: a pid of another container says nothing here."""
    try:
        return f"{Path('/proc/self/ns/pid').stat().st_ino:x}"
    except OSError:
        return "0"


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot (proc(5), field 22), None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def owner() -> str:
    """A name for this process that no later process can have: pid, start time, boot and PID namespace."""
    return f"imgbuild-{os.getpid()}-{_started(os.getpid())}-{_boot()}{_namespace()}"


def is_dead(name: str) -> bool:
    """Tell whether `name` is an owner whose process is gone.

    False for anything that is no owner, and for one in another PID namespace: containers may share
    a state folder, and cannot see each other's processes.
    """
    match = _OWNER.fullmatch(name)
    if match is None:
        return False
    pid, started, boot, namespace = match.groups()
    if boot != _boot():
        return True
    return namespace in (None, _namespace()) and _started(int(pid)) != started


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _known_sha256(path: Path, inode: int, size: int, changed_ns: int) -> str:
    return sha256_of(path)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    # A name that nobody can guess, and never a file or link that is there already.
    part = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            file.write(raw)
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ImgbuildError(f"cannot write `{path}`: {error.strerror}") from None
        raise


@dataclass(frozen=True)
class State:
    """The state folder. Folders in it are made when they are needed."""

    root: Path

    @property
    def logs(self) -> Path:
        """Where the full output of each node's build lies."""
        return self.root / "logs"

    def stored(self, sha256: str) -> Path:
        """Where the file with this SHA-256 lies, whether it is there or not."""
        return self.root / "store" / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Tell whether the store holds this file, and that it still is what its name says.

        Read again in each run: a crash, a bad disk or another user of the folder may have changed it.
        """
        place = self.stored(sha256)
        try:
            status = place.lstat()
            if not stat.S_ISREG(status.st_mode):
                return False
            return _known_sha256(place, status.st_ino, status.st_size, status.st_mtime_ns) == sha256
        except OSError:
            return False

    def add(self, path: Path, sha256: str) -> Path:
        """Move a file into the store after checking what it is.

        Raises:
            ImgbuildError: its SHA-256 is another.
        """
        found = sha256_of(path)
        if found != sha256:
            path.unlink(missing_ok=True)
            raise ImgbuildError(f"SHA-256 is {found}, expected {sha256}")
        place = self.stored(sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o444)
        path.replace(place)
        return place

    def keep(self, path: Path, sha256: str) -> None:
        """Copy a file into the store; raises ImgbuildError if it is not what `sha256` says."""
        if self.has(sha256):
            return
        with self.work("keep") as folder:
            copy = folder / sha256
            shutil.copyfile(path, copy)
            self.add(copy, sha256)

    @contextmanager
    def work(self, name: str) -> Iterator[Path]:
        """A folder of this process, removed afterwards; a dead process's folders are swept."""
        folder = self.root / "work" / owner() / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                folder.parent.rmdir()

    def sweep(self) -> list[str]:
        """Remove what dead imgbuild processes left in the work folder; returns their names."""
        base = self.root / "work"
        dead = [p for p in base.iterdir() if is_dead(p.name)] if base.is_dir() else []
        for folder in dead:
            shutil.rmtree(folder, ignore_errors=True)
        return [folder.name for folder in dead]

    def journal(self, name: str) -> dict[str, Any]:
        """What is remembered under `name`; empty when there is nothing, or nothing readable."""
        try:
            data = json.loads((self.root / "journal" / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def remember(self, name: str, data: dict[str, Any]) -> None:
        """Write a journal entry."""
        write_whole(self.root / "journal" / f"{name}.json", json.dumps(data, indent=1, sort_keys=True))

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[str], None] = lambda _: None) -> Iterator[bool]:
        """Hold the lock `name`; yields True if another process held it first and was waited for.

        `on_wait` is told so before the waiting begins.
        """
        from filelock import FileLock, Timeout

        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        waited = False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            on_wait("waiting: another imgbuild is at it")
            lock.acquire()
        try:
            yield waited
        finally:
            lock.release()
