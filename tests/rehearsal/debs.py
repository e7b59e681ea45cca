"""Debian packages as raw material: a view of one suite beside the host's own apt, and verified downloads.

Mirrors are those of the host's own apt. Nothing of the host's state is read for resolving or changed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from .commands import RehearsalError, run

SUITE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
COMPONENTS = "main contrib non-free non-free-firmware"
LISTS_AGE_S = 24 * 3600
"""Package lists are asked for anew when older than this."""


@dataclass(frozen=True)
class Deb:
    """One package file: its paragraph in the signed package lists, and where it lies here."""

    name: str
    version: str
    sha256: str
    size: int
    path: Path
    paragraph: str

    def intact(self) -> bool:
        """Tell whether the file is here and what the package lists say it is. Touches it: it is in use."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        self.path.touch()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


class DebianView:
    """The packages of SUITE as apt sees them in a folder of its own, with nothing installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.debs = folder / "debs"
        for path in ("state/lists/partial", "cache/archives/partial", "debs"):
            (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()

    def refresh(self) -> None:
        """Get the package lists, unless they are recent. An unreachable mirror does if there are old ones."""
        stamp = self.folder / "refreshed"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < LISTS_AGE_S:
            return
        sources = "".join(f"deb [signed-by={KEYRING}] {line} {COMPONENTS}\n" for line in _archives())
        (self.folder / "sources.list").write_text(sources)
        try:
            self._apt("apt-get", "-o", "APT::Update::Error-Mode=any", "update")
        except RehearsalError:
            if not stamp.exists():
                raise
            return
        stamp.touch()

    def expire(self) -> None:
        """Make the next `refresh` ask the mirror."""
        (self.folder / "refreshed").unlink(missing_ok=True)

    def fingerprint(self) -> str:
        """SHA-256 over the signed lists: packages resolve the same while it stays the same."""
        digest = hashlib.sha256()
        for path in sorted((self.folder / "state/lists").glob("*Release")):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def closure(self, packages: Sequence[str]) -> dict[str, Deb]:
        """These packages (names or apt patterns) and all they need, by name."""
        return self._known(self._apt("apt-get", "install", "--print-uris", *packages))

    def exactly(self, packages: Sequence[str]) -> dict[str, Deb]:
        """These packages alone, by name."""
        return self._known(self._apt("apt-get", "download", "--print-uris", *packages))

    def fetch(self, debs: Iterable[Deb]) -> None:
        """Have these files here, each with the size and SHA-256 of the signed lists."""
        wanted = list(debs)
        missing = self._broken(wanted)
        if not missing:
            return
        for deb in missing:
            deb.path.unlink(missing_ok=True)
        words = [f"{deb.name}={deb.version}" for deb in missing]
        run([*self._command("apt-get"), "download", *words], cwd=self.debs)
        if broken := self._broken(missing):
            raise RehearsalError(f"the mirror gave something else than {broken[0].path.name}")

    @staticmethod
    def _broken(debs: Sequence[Deb]) -> list[Deb]:
        with ThreadPoolExecutor(2) as pool:
            return [deb for deb, intact in zip(debs, pool.map(Deb.intact, debs), strict=True) if not intact]

    def _known(self, uris: str) -> dict[str, Deb]:
        """Lines of --print-uris → what the package lists say of each file."""
        files = [line.split()[1] for line in uris.splitlines() if line.startswith("'")]
        words = []
        for file in files:
            name, version, _ = file.split("_")
            words.append(f"{name}={unquote(version)}")
        found = {}
        shown = self._apt("apt-cache", "show", *words) if words else ""
        for paragraph in shown.strip().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line)
            name, version = fields["Package"], fields["Version"]
            file = f"{name}_{version.replace(':', '%3a')}_{fields['Architecture']}.deb"
            found[name] = Deb(
                name, version, fields["SHA256"], int(fields["Size"]), self.debs / file, paragraph
            )
        return found

    def _command(self, program: str) -> list[str]:
        options = {
            "Dir::Etc::sourcelist": self.folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": self.folder / "state",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder / "cache",
            # Container images switch these off; each call would parse all lists again.
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Default-Release": "",
            "APT::Install-Recommends": "false",
            # The cache may lie below a home folder, which apt's own user cannot enter.
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        argv = [program]
        for name, value in options.items():
            argv += ["-o", f"{name}={value}"]
        return [*argv, *(["-qq"] if program == "apt-get" else [])]

    def _apt(self, program: str, *words: str) -> str:
        return run([*self._command(program), *words])


def _archives() -> list[str]:
    """`URI SUITE` of the archives to use, from the host's own apt."""
    listed = run(["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Created-By: Packages"])
    places: dict[str, str] = {}
    for line in listed.splitlines():
        label, _, uri = line.partition("|")
        if uri:
            places.setdefault(label, uri.rstrip("/"))
    if "Debian" not in places:
        raise RehearsalError("the host's apt knows no Debian archive: run `apt-get update` first")
    found = [f"{places['Debian']} {SUITE}", f"{places['Debian']} {SUITE}-updates"]
    if "Debian-Security" in places:
        found.append(f"{places['Debian-Security']} {SUITE}-security")
    return found
