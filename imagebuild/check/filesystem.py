"""Checks of the tree as bootc installs it: the rules of `bootc container lint`, for every base.

A check has the name that bootc gives the rule, where it is the same rule. /var is more than a warning
here: an image promises that it has nothing in /var but what tmpfiles.d makes again.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from configparser import Error as ConfigError
from dataclasses import dataclass
from pathlib import Path

from imagebuild.check.table import LABEL_BOOTC, Problem, Subject, check, some

# --- what must be there, and what must not ------------------------------------------------------------

_BASE_DIRS = ("dev", "proc", "run", "sys", "tmp", "var")
_OSTREE_LINK = "sysroot/ostree"
# Where bootc's own package keeps a copy of what a base image needs: it must hold there too.
_BOOTC_COPY = "usr/share/doc/bootc/baseimage/base"


@check(
    "api-base-directories",
    severity="fatal",
    reason="systemd mounts on these folders before anything could make them",
    fix="make the folder when the image is built, in the script that installs the kernel",
)
def _api_base_directories(subject: Subject) -> Iterator[Problem | str]:
    # Whatever deploys an image with a kernel mounts the physical root on /sysroot.
    for name in (*_BASE_DIRS, *(["sysroot"] if subject.tier > 1 else [])):
        if not _is_dir(subject.root / name):
            yield f"/{name} is {'no folder' if os.path.lexists(subject.root / name) else 'missing'}"


def _is_dir(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _roots(subject: Subject) -> Iterator[Path]:
    """The roots that must look like that of a bootc image; none for another image."""
    if subject.labels.get(LABEL_BOOTC) == "1":
        yield subject.root
        copy = subject.path(_BOOTC_COPY)
        if copy.is_dir():
            yield copy


@check(
    "baseimage-root",
    severity="fatal",
    reason="OSTree finds its deployments through /ostree, and bootc refuses an image without it",
    fix=f"make the folder /sysroot, and /ostree a link to {_OSTREE_LINK}",
)
def _baseimage_root(subject: Subject) -> Iterator[Problem | str]:
    for root in _roots(subject):
        where = subject.inner(root).rstrip("/.")
        link = root / "ostree"
        if not _is_dir(root / "sysroot"):
            yield f"{where}/sysroot is no folder"
        if not link.is_symlink() or str(link.readlink()) != _OSTREE_LINK:
            yield f"{where}/ostree is no link to {_OSTREE_LINK}"


@check(
    "baseimage-composefs",
    severity="warning",
    reason="with composefs a host's root is read-only and verified; without, a mistake can write to it",
    fix="write `[composefs]` and `enabled = true` into /usr/lib/ostree/prepare-root.conf",
)
def _baseimage_composefs(subject: Subject) -> Iterator[Problem | str]:
    for root in _roots(subject):
        places = (root / place / "ostree/prepare-root.conf" for place in ("etc", "usr/lib"))
        file = next((place for place in places if place.is_file()), None)
        config = ConfigParser(delimiters="=", interpolation=None, strict=False)
        try:
            config.read_string(file.read_text("utf-8", "replace") if file else "")
        except ConfigError as error:
            yield f"{subject.inner(file or root)} cannot be read: {error.message}"
            continue
        on = config.get("composefs", "enabled", fallback="no")
        if on not in _ENABLED and config.get("root", "transient", fallback="no") not in _ENABLED[:2]:
            yield f"{subject.inner(file) if file else 'no prepare-root.conf'} does not enable composefs"


_ENABLED = ("true", "1", "yes", "maybe", "signed", "verity")


@check(
    "etc-usretc",
    severity="fatal",
    reason="/usr/etc is where a deployed host keeps the image's /etc: both in an image contradict each other",
    fix="ship configuration in /etc, or defaults elsewhere in /usr",
)
def _etc_usretc(subject: Subject) -> Iterator[Problem | str]:
    if all(os.path.lexists(subject.root / name) for name in ("etc", "usr/etc")):
        yield "there is /usr/etc beside /etc"


@check(
    "var-run",
    severity="fatal",
    reason="programs that use the old path must find what others put into /run",
    fix="make /var/run a link to ../run",
)
def _var_run(subject: Subject) -> Iterator[Problem | str]:
    path = subject.entry("var/run")
    if path.is_symlink() and subject.path("var/run") != subject.root / "run":
        yield f"/var/run leads to {path.readlink()}, not to /run"
    elif not path.is_symlink() and os.path.lexists(path):
        yield "/var/run is no link"


@check(
    "buildah-injected",
    severity="warning",
    reason="an empty file keeps the host from writing its own",
    fix="remove it after the last RUN step, or ship one with content",
)
def _buildah_injected(subject: Subject) -> Iterator[Problem | str]:
    # /etc/hosts is not among bootc's, and comes the same way.
    for name in ("hostname", "hosts", "resolv.conf"):
        path = subject.entry(f"etc/{name}")
        if path.is_file() and not path.is_symlink() and path.stat().st_size == 0:
            yield f"/etc/{name} is empty: a tool that builds containers mounted its own there"


@check(
    "nonempty-boot",
    severity="warning",
    reason="a host mounts its own /boot over the image's: what the image has there is never seen",
    fix="empty /boot; kernel and initramfs belong into /usr/lib/modules/RELEASE",
)
def _nonempty_boot(subject: Subject) -> Iterator[Problem | str]:
    boot = subject.root / "boot"
    if not _is_dir(boot):
        yield "/boot is missing"
        return
    # EFI is bootc's own: unified kernel images lie there (composefs-rs#131).
    names = sorted(entry.name for entry in boot.iterdir() if entry.name != "EFI")
    if names:
        yield f"/boot is not empty: {some(names)}"


@check(
    "nonempty-run-tmp",
    severity="warning",
    reason="/run and /tmp are empty at every boot: what the image has there is never seen",
    fix="remove it in the RUN step that made it; what a host needs there, tmpfiles.d makes",
)
def _nonempty_run_tmp(subject: Subject) -> Iterator[Problem | str]:
    for name in ("run", "tmp"):
        found = [inner for inner, _ in _below(subject, name)]
        if found:
            yield f"/{name} is not empty: {some(found)}"


def _below(subject: Subject, folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder of the image, by its path there, sorted; links are not followed."""
    top = subject.root / folder
    for where, folders, files in os.walk(top, onerror=_raise) if _is_dir(top) else []:
        folders.sort()
        for name in sorted([*folders, *files]):
            path = Path(where, name)
            yield subject.inner(path), path.lstat()


def _raise(error: OSError) -> None:
    raise error


@check(
    "utf8",
    severity="fatal",
    reason="bootc stores an image in OSTree, which takes no name that is not UTF-8",
    fix="rename the file, or make the link again",
)
def _utf8(subject: Subject) -> Iterator[Problem | str]:
    wrong = []
    for path, status in _below(subject, ""):
        if not _is_utf8(path.rpartition("/")[2]):
            wrong.append(path)
        elif stat.S_ISLNK(status.st_mode) and not _is_utf8(str((subject.root / path[1:]).readlink())):
            wrong.append(f"where {path} leads")
    if wrong:
        yield f"not UTF-8: {some(wrong)}"


def _is_utf8(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)  # what Python makes of other bytes


# --- kernel arguments -----------------------------------------------------------------------------------

_KARGS_PLACE = "usr/lib/bootc/kargs.d"
# Architectures that bootc exists for, as Rust calls them (std::env::consts::ARCH).
_RUST_ARCHES = ("x86_64", "aarch64", "powerpc64", "s390x", "riscv64", "loongarch64", "x86", "arm")


@check(
    "bootc-kargs",
    severity="fatal",
    reason="bootc refuses an image whose kernel arguments it cannot read",
    fix='write `kargs = ["…"]`, and `match-architectures = ["x86_64"]` where it is not for all',
)
def _bootc_kargs(subject: Subject) -> Iterator[Problem | str]:
    folder = subject.path(_KARGS_PLACE)
    for file in sorted(folder.glob("*.toml")) if folder.is_dir() else []:
        where = subject.inner(file)
        try:
            found = tomllib.loads(file.read_bytes().decode())
        except ValueError as error:
            yield f"{where} is not TOML: {error}"
            continue
        unknown = found.keys() - {"kargs", "match-architectures"}
        if unknown:
            yield f"{where} has keys that bootc does not know: {some(sorted(unknown))}"
        if "kargs" not in found:
            yield f"{where} has no `kargs`"
        for key, value in found.items():
            if key not in unknown and not (
                isinstance(value, list) and all(isinstance(word, str) for word in value)
            ):
                yield f"{where}: `{key}` is no list of texts"
            elif key == "match-architectures" and not set(value) & set(_RUST_ARCHES):
                yield Problem(
                    f"{where} is for no architecture there is: {some(value)}",
                    "warning",
                    f"use Rust's names: {some(_RUST_ARCHES)}",
                )


# --- /var -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """One line of a file of tmpfiles.d or sysusers.d."""

    file: str
    kind: str
    words: tuple[str, ...]


# Words as systemd splits them: quotes and backslashes count.
_WORD = re.compile(
    r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|((?:[^\s"'\\]|\\.)(?:[^\s\\]|\\.)*))(?=\s|$)"""
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([0-7]{3})|(.))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "s": " "}


def _words(line: str, most: int) -> list[str]:
    """The first words of a line; fewer if what follows is no word."""
    words: list[str] = []
    place = 0
    while len(words) < most and (match := _WORD.match(line, place)):
        raw = next(part for part in match.groups() if part is not None)
        word = _ESCAPE.sub(_unescaped, raw)
        words.append(os.fsdecode(os.fsencode(word)))  # bytes that were escaped one by one
        place = match.end()
    return words


def _unescaped(match: re.Match[str]) -> str:
    code, octal, other = match.groups()
    if other is not None:
        return _ESCAPED.get(other, other)
    return os.fsdecode(bytes([int(code, 16) if code else int(octal, 8) & 0xFF]))


def _config_lines(subject: Subject, kind: str, most: int) -> Iterator[_Line]:
    for path in subject.config(kind).values():
        for text in path.read_text("utf-8", "surrogateescape").split("\n"):
            line = text.strip()
            if line and line[0] not in "#;":
                words = _words(line, most)
                yield _Line(subject.inner(path), words[0] if words else "", (line, *words[1:]))


def _tmpfiles(subject: Subject) -> tuple[_Line, ...]:
    return tuple(_config_lines(subject, "tmpfiles.d", 6))


# tmpfiles.d(5): a letter and what modifies it.
_TYPE = re.compile(r"[fFwdDeqQvpLcbCxXrRzZtThHaA][-+!=~^$?]*")
_MODE = re.compile(r"-|[:~]*[0-7]{1,5}")
_MAKES = "fFdDvqQpLcbC"


@check(
    "tmpfiles",
    severity="fatal",
    reason="systemd passes over a line it cannot read, and what the line should make is not there",
    fix="mend the line: TYPE PATH MODE USER GROUP AGE ARGUMENT, see tmpfiles.d(5)",
)
def _tmpfiles_lines(subject: Subject) -> Iterator[Problem | str]:
    for line in subject.once(_tmpfiles):
        text, *words = line.words
        if not _TYPE.fullmatch(line.kind):
            yield f"{line.file}: no such type of line: `{text}`"
        elif not words or not words[0].startswith(("/", "%")):
            yield f"{line.file}: no absolute path: `{text}`"
        elif len(words) > 1 and not _MODE.fullmatch(words[1]):
            yield f"{line.file}: `{words[1]}` is no mode: `{text}`"


@check(
    "var-tmpfiles",
    severity="fatal",
    reason="an update never touches /var: what the image has there comes once, and grows old",
    fix="remove it, move it to /usr, or add a line to /usr/lib/tmpfiles.d that makes it",
)
def _var_tmpfiles(subject: Subject) -> Iterator[Problem | str]:
    made, copied = set(), []
    for line in subject.once(_tmpfiles):
        if line.kind[:1] in _MAKES and len(line.words) > 1 and line.words[1].startswith("/"):
            path = subject.inner(subject.entry(line.words[1].replace("%%", "%")))
            made.add(path)
            if line.kind[0] == "C":
                copied.append(f"{path}/")
    folders, content = [], []
    for path, status in _below(subject, "var"):
        if path in made or path.startswith(tuple(copied)):
            continue
        if stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode):
            folders.append(path)
        elif not _is_log(path, status):
            content.append(path)
    if folders:
        yield f"tmpfiles.d has no line for: {some(folders)}"
    if content:
        yield f"content that no update would change: {some(content)}"


def _is_log(path: str, status: os.stat_result) -> bool:
    return path.startswith("/var/log/") and stat.S_ISREG(status.st_mode) and status.st_size > 0


@check(
    "var-log",
    severity="warning",
    reason="a log tells of the machine that built the image, and differs with every build",
    fix="remove it in the RUN step that wrote it",
)
def _var_log(subject: Subject) -> Iterator[Problem | str]:
    logs = [path for path, status in _below(subject, "var/log") if _is_log(path, status)]
    if logs:
        yield f"logs: {some(logs)}"


@check(
    "sysusers",
    severity="warning",
    reason="a host that changed its own /etc/passwd never sees the image's, and lacks users that came later",
    fix="add a line for it to a file of /usr/lib/sysusers.d",
)
def _sysusers(subject: Subject) -> Iterator[Problem | str]:
    users, groups = set(), set()
    for line in _config_lines(subject, "sysusers.d", 2):
        text, *names = line.words
        kind = line.kind.rstrip("!")
        if kind not in ("u", "g", "m", "r") or not names:
            yield Problem(f"{line.file}: cannot be read: `{text}`", "fatal", "see sysusers.d(5)")
            continue
        if kind == "u":
            users.add(names[0])
        if kind in ("u", "g"):  # a user brings a group of its name
            groups.add(names[0])
    for file, known in (("passwd", users), ("group", groups)):
        path = subject.path(f"etc/{file}")
        lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
        names = [line.partition(":")[0] for line in lines if line.strip()]
        strange = [name for name in names if name not in known and name[:1] not in "+-#"]
        if strange:
            yield f"/etc/{file} has what sysusers.d does not make: {some(strange)}"
