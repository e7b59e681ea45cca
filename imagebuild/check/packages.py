"""Checks against the image's own package database: what packages brought is as they brought it.

The databases are read as data, dpkg's by hand and rpm's by this machine's rpm: nothing of the image runs.
"""

from __future__ import annotations

import hashlib
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from imagebuild.check.table import LABEL_FILES, Problem, Severity, Subject, check, some
from imagebuild.errors import ImgbuildError
from imagebuild.kernel_modules import MODULE_SUFFIXES, MODULES, module_files
from imagebuild.run import run

_DPKG_PLACES = ("usr/lib/sysimage/dpkg", "var/lib/dpkg")
_RPM_PLACES = ("usr/lib/sysimage/rpm", "usr/share/rpm", "var/lib/rpm")


@dataclass(frozen=True)
class PackagedFile:
    """One path as its package brought it. What is None is not recorded, or not to be judged."""

    package: str
    path: str
    kind: int | None = None
    """The file type bits of its mode."""
    digest: str | None = None
    link: str | None = None
    mode: int | None = None
    """Permissions of a regular file."""


@dataclass(frozen=True)
class Database:
    """What one package manager knows: versions by package, and files."""

    versions: Mapping[str, str]
    files: tuple[PackagedFile, ...]
    missing: Severity
    """How bad it is that a file is gone."""


def databases(subject: Subject) -> tuple[Database, ...]:
    """The package databases of the image. Raises ImgbuildError if there is none."""
    found = []
    for places, file, read in (
        (_DPKG_PLACES, "status", _dpkg),
        (_RPM_PLACES, "rpmdb.sqlite", _rpm),
    ):
        there = [place for place in places if subject.path(f"{place}/{file}").is_file()]
        if there:
            found.append(read(subject, subject.path(there[0])))
    if not found:
        raise ImgbuildError("the image has neither dpkg's nor rpm's package database")
    return tuple(found)


def installed_versions(subject: Subject) -> dict[str, str]:
    """Every installed package and its version. Raises ImgbuildError."""
    return {name: version for data in subject.once(databases) for name, version in data.versions.items()}


# --- dpkg -------------------------------------------------------------------------------------------


def _dpkg(subject: Subject, folder: Path) -> Database:
    versions = {}
    names = {}
    for paragraph in (folder / "status").read_text("utf-8", "replace").split("\n\n"):
        fields = dict(
            re.findall(r"^(Package|Version|Status|Architecture|Multi-Arch): (.*)$", paragraph, re.MULTILINE)
        )
        if fields.get("Status", "").endswith(" installed"):
            name = fields["Package"]
            versions[name] = fields.get("Version", "")
            arch = f":{fields.get('Architecture', '')}" if fields.get("Multi-Arch") == "same" else ""
            names[name + arch] = name
    excluded = _dpkg_filter(subject)
    diversions = _dpkg_diversions(folder)
    files = []
    for stem, name in sorted(names.items()):
        digests = {
            f"/{path}": digest
            for digest, _, path in (line.partition("  ") for line in _lines(folder / f"info/{stem}.md5sums"))
        }
        for path in _lines(folder / f"info/{stem}.list"):
            if path == "/." or excluded(path):
                continue
            digest = digests.get(path)
            place, owner = diversions.get(path, (path, name))
            kind = stat.S_IFREG if digest else None
            files.append(PackagedFile(name, path if owner == name else place, kind, digest))
    return Database(versions, tuple(files), "fatal")


def _lines(file: Path) -> list[str]:
    text = file.read_text("utf-8", "surrogateescape") if file.is_file() else ""
    return [line for line in text.split("\n") if line]


def _dpkg_filter(subject: Subject) -> Callable[[str], bool]:
    """Which paths dpkg was told not to install (path-exclude, path-include: the last match wins)."""
    folder = subject.path("etc/dpkg/dpkg.cfg.d")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    rules = []
    for file in (*(folder / name for name in names), subject.path("etc/dpkg/dpkg.cfg")):
        for line in _lines(file):
            if match := re.fullmatch(r"\s*path-(exclude|include)\s*[=\s]\s*(\S.*?)\s*", line):
                rules.append((match[1] == "exclude", match[2].strip("'\"")))
    rules.reverse()
    return lambda path: next((gone for gone, pattern in rules if fnmatchcase(path, pattern)), False)


def _dpkg_diversions(folder: Path) -> dict[str, tuple[str, str]]:
    """Where dpkg-divert(1) put a path of any package but the one that asked for it."""
    lines = iter(_lines(folder / "diversions"))
    return {path: (place, owner) for path, place, owner in zip(lines, lines, lines, strict=False)}


# --- rpm --------------------------------------------------------------------------------------------

_RPM_QUERY = (
    r"P\t%{NAME}\t%{EVR}\n"
    r"[F\t%{=NAME}\t%{FILEFLAGS}\t%{FILESTATES}\t%{FILEVERIFYFLAGS}\t%{FILEMODES}"
    r"\t%{FILEDIGESTS}\t%{FILELINKTOS}\t%{FILENAMES}\n]"
)
# rpmfiles.h and rpmvf.h: flags of a file, and what of it is to be verified.
_CONFIG, _MISSING_OK, _GHOST = 1 << 0, 1 << 3, 1 << 6
_VERIFY_DIGEST, _VERIFY_LINK, _VERIFY_MODE = 1 << 0, 1 << 2, 1 << 6


def _rpm(subject: Subject, folder: Path) -> Database:
    # A copy: sqlite wants to write beside the database even when it only reads.
    with tempfile.TemporaryDirectory(prefix="imgbuild-check-") as name:
        for file in folder.glob("rpmdb.sqlite*"):
            Path(name, file.name).write_bytes(file.read_bytes())
        lines = run(["rpm", "--dbpath", name, "-qa", "--qf", _RPM_QUERY]).stdout.split("\n")
    versions = {}
    files = []
    for line in lines:
        kind, *words = line.split("\t", 8)
        if kind == "P" and len(words) == 2:
            versions[words[0]] = words[1]
        elif kind == "F" and len(words) == 8:
            files.append(_rpm_file(*words))
    if not versions:
        raise ImgbuildError("rpm reads no package from the image's database")
    # Upstream composes take files out of packages on purpose (boot loader, toplevel folders).
    return Database(versions, tuple(file for file in files if file), "warning")


def _rpm_file(
    package: str, flags: str, state: str, verify: str, mode: str, digest: str, link: str, path: str
) -> PackagedFile | None:
    """One line of the query; None for what was not installed, or need not stay as it was."""
    if state not in ("0", "(none)") or int(flags) & (_CONFIG | _MISSING_OK | _GHOST):
        return None
    bits, wanted = int(mode), int(verify)
    regular = stat.S_ISREG(bits)
    return PackagedFile(
        package,
        path,
        stat.S_IFMT(bits),
        digest if regular and digest and wanted & _VERIFY_DIGEST else None,
        link if stat.S_ISLNK(bits) and wanted & _VERIFY_LINK else None,
        stat.S_IMODE(bits) if regular and wanted & _VERIFY_MODE else None,
    )


# --- checks -----------------------------------------------------------------------------------------

# What another rule judges, or what is there to be changed.
_NOT_JUDGED = re.compile(
    r"/(?:etc|var|run|tmp|dev|proc|sys|boot)(?:/.*)?"
    # depmod's work: depmod-current
    r"|(?:/usr)?/lib/modules/[^/]+/modules\.(?:alias|dep|devname|softdep|symbols|weakdep|builtin)[^/]*"
)
# An image has its kernel where bootc looks for it, and nothing in /boot.
_KERNEL_FILE = re.compile(r"/boot/(vmlinuz|config|System\.map)-(?P<release>[^/]+)")

_GONE = "packages brought it, and it is gone"
_OTHER_KIND = "is no longer the kind of file its package brought"


@check(
    "package-files",
    severity="fatal",
    reason="a file that is not as its package brought it stands in no list: nobody knows what it does",
    fix="change it through files/ of a layer or configuration in /etc; else find out which step did it",
)
def _package_files(subject: Subject) -> Iterator[Problem | str]:
    replaced = set(subject.json_list(LABEL_FILES))
    for data in subject.once(databases):
        judged = []
        for file in data.files:
            path = _KERNEL_FILE.sub(rf"/{MODULES}/\g<release>/\1", file.path)
            if path not in replaced and not _NOT_JUDGED.fullmatch(path):
                judged.append((file, subject.entry(path)))
        with ThreadPoolExecutor(2) as pool:
            verdicts = list(pool.map(lambda pair: _verdict(*pair), judged))
        found: dict[str, set[str]] = {}
        for (file, place), verdict in zip(judged, verdicts, strict=True):
            if verdict:
                found.setdefault(verdict, set()).add(f"{subject.inner(place)} ({file.package})")
        for verdict, names in sorted(found.items()):
            severity = data.missing if verdict in (_GONE, _OTHER_KIND) else None
            yield Problem(f"{verdict}: {some(sorted(names))}", severity)


def _verdict(file: PackagedFile, place: Path) -> str:
    """What is wrong with an installed file; empty if nothing is."""
    try:
        status = place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _GONE
    if file.kind is not None and stat.S_IFMT(status.st_mode) != file.kind:
        # A folder behind a link is still there for all who use it.
        return "" if stat.S_ISDIR(file.kind) and stat.S_ISLNK(status.st_mode) else _OTHER_KIND
    if file.link is not None and str(place.readlink()) != file.link:
        return "its link leads elsewhere than its package made it"
    if file.mode is not None and status.st_mode & ~file.mode & (stat.S_ISUID | stat.S_ISGID):
        return "runs with other rights than its package gave it"
    if file.digest is not None and _digest(place, len(file.digest)) != file.digest:
        return "was changed since its package brought it"
    return ""


_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}


def _digest(file: Path, length: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, _ALGORITHMS[length]).hexdigest()


@check(
    "modules-owned",
    severity="fatal",
    reason="a module that no package owns was put there by hand: nobody can tell its version or origin",
    fix="let a kmod stage compile it: that leaves a package",
)
def _modules_owned(subject: Subject) -> Iterator[Problem | str]:
    folder = subject.path(MODULES)
    there = [
        release / path
        for release in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if release.is_dir()
        for path in module_files(release)
    ]
    if there:
        owned = {
            subject.entry(file.path)
            for data in subject.once(databases)
            for file in data.files
            if file.path.endswith(MODULE_SUFFIXES)
        }
        strange = [subject.inner(path) for path in there if path not in owned]
        if strange:
            yield f"no package owns: {some(strange)}"
