"""Checks of the system as it will boot: it carries no machine's identity, and its units hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from imagebuild.check.table import LABEL_UNITS, Problem, Subject, check, some
from imagebuild.errors import ImgbuildError
from imagebuild.run import run


@check(
    "machine-identity",
    severity="fatal",
    reason="what identifies one machine must not be the same on all of them",
    fix="remove the file when the image is built; it is made at first boot (machine-id: leave it empty)",
)
def _machine_identity(subject: Subject) -> Iterator[Problem | str]:
    for name in ("etc/machine-id", "var/lib/dbus/machine-id"):
        machine_id = subject.path(name)
        if machine_id.is_file() and machine_id.read_text("ascii", "replace").strip() not in (
            "",
            "uninitialized",
        ):
            yield f"/{name} is set"
    ssh = subject.path("etc/ssh")
    keys = sorted(ssh.glob("ssh_host_*_key")) if ssh.is_dir() else []
    if keys:
        yield f"SSH host keys: {some(key.name for key in keys)}"
    for name in ("etc/hostid", "var/lib/systemd/random-seed"):
        if subject.path(name).exists():
            yield f"/{name} is there"


_UNIT_DIRS = ("etc/systemd/system", "usr/lib/systemd/system")


@check(
    "units-verify",
    severity="fatal",
    reason="a unit that is not enabled, or that systemd does not understand, fails silently at boot",
    fix="mend the unit, or what enables it, in the layer it comes from",
)
def _units_verify(subject: Subject) -> Iterator[Problem | str]:
    declared = subject.json_label(LABEL_UNITS)
    enabled: Sequence[str] = declared.get("enable") or []
    for unit in enabled:
        if not _is_enabled(subject, unit):
            yield f"{unit} is not enabled"
    for unit in declared.get("disable") or []:
        if _is_enabled(subject, unit, _UNIT_DIRS[:1]):
            yield f"{unit} is enabled, and should not be"
    for unit in declared.get("mask") or []:
        link = subject.path(_UNIT_DIRS[0]) / unit
        if not link.is_symlink() or str(link.readlink()) != "/dev/null":
            yield f"{unit} is not masked"
    if enabled:
        yield from _verified(subject, enabled)


def _is_enabled(subject: Subject, unit: str, places: Sequence[str] = _UNIT_DIRS) -> bool:
    """Whether something pulls the unit in by a link, or an alias points to it."""
    for place in places:
        folder = subject.path(place)
        for entry in folder.iterdir() if folder.is_dir() else []:
            if entry.suffix in (".wants", ".requires", ".upholds"):
                if (entry / unit).is_symlink() or (entry / unit).exists():
                    return True
            elif entry.is_symlink() and entry.name != unit and entry.readlink().name == unit:
                return True
    return False


def _verified(subject: Subject, units: Sequence[str]) -> Iterator[Problem | str]:
    """What this machine's systemd says of the image's units.

    It may be older than the image's. Then what it says it ignores is only what it does not know yet:
    such lines do not count, and a notice says so.
    """
    theirs = _systemd_version(subject)
    version = re.match(r"systemd (\d+)", run(["systemd-analyze", "--version"]).stdout)
    if version is None:
        raise ImgbuildError("cannot tell the version of systemd-analyze")
    ours = int(version[1])
    older = theirs is None or ours < theirs
    for unit in units:
        result = run(
            [
                *("systemd-analyze", "verify", "--man=no", "--generators=no", "--recursive-errors=no"),
                *(f"--root={subject.root}", unit),
            ],
            check=False,
            env={"SYSTEMD_LOG_LEVEL": "warning", "SYSTEMD_COLORS": "0"},
        )
        said = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        names = {unit, re.sub(r"@.*\.", "@.", unit)}
        about = [line for line in said if any(name in line for name in names)]
        counts = [line for line in about if not (older and ", ignoring" in line)]
        for line in counts:
            yield f"{unit}: {line.replace(str(subject.root), '')}"
        if result.returncode != 0 and not about:
            yield f"{unit}: systemd-analyze exited with {result.returncode}: {some(said[-2:])}"
    if older:
        yield Problem(
            f"units were verified by systemd {ours}, the image has {theirs or 'an unknown version'}:"
            " settings unknown to the older one were not judged",
            "notice",
            f"run the check where systemd is {theirs or ours} or newer",
        )


def _systemd_version(subject: Subject) -> int | None:
    """Major version of the image's systemd, from the name of its private library."""
    for place in ("usr/lib/systemd", "usr/lib/x86_64-linux-gnu/systemd", "usr/lib64/systemd"):
        folder = subject.path(place)
        for file in folder.glob("libsystemd-shared-*.so") if folder.is_dir() else []:
            if match := re.match(r"libsystemd-shared-(\d+)", file.name):
                return int(match[1])
    return None
