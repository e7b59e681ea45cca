"""What this machine has and lacks for building images."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from imagebuild import images
from imagebuild.errors import ImgbuildError, UnavailableError
from imagebuild.report import size
from imagebuild.run import PACKAGES, available, run
from imagebuild.state import State

TESTED = {("debian", "12"), ("debian", "13")}
PROGRAMS = (
    "apt-ftparchive",
    "buildah",
    "crun",
    "mmdebstrap",
    "modprobe",
    "skopeo",
    "systemd-analyze",
    "unshare",
)
ENOUGH_DISK = 10_000_000_000


@dataclass(frozen=True)
class Item:
    """One thing looked at. `needed`: builds fail without it. `package`: what brings it on Debian."""

    name: str
    ok: bool
    needed: bool
    detail: str
    package: str = ""


def examine(state: State) -> list[Item]:
    """Look at programs, rights, storage, isolation and disk. Changes nothing."""
    found = [_system(), _architecture(), _root()]
    for program in PROGRAMS:
        there = available(program)
        package = PACKAGES[program]
        found.append(Item(program, there, True, "there" if there else f"package {package}", package))
    found += [_python_apt(), _netavark()]
    if available("buildah") and os.geteuid() == 0:
        found += _storage(state)
    return found


def install_command(found: list[Item]) -> str:
    """The one command that installs all that is missing; empty when nothing is."""
    packages = sorted({item.package for item in found if item.package and not item.ok})
    return f"apt-get update && apt-get install -y {' '.join(packages)}" if packages else ""


def _system() -> Item:
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    name = release.get("PRETTY_NAME", "unknown")
    tested = (release.get("ID", ""), release.get("VERSION_ID", "")) in TESTED
    return Item(
        "system", tested, False, name if tested else f"{name} (untested: Debian 12 and 13 are tested)"
    )


def _architecture() -> Item:
    machine = platform.machine()
    return Item("architecture", machine == "x86_64", True, machine)


def _root() -> Item:
    root = os.geteuid() == 0
    return Item(
        "root",
        root,
        True,
        "yes" if root else "no: building mounts file systems; use sudo or a root container",
    )


def _python_apt() -> Item:
    there = Path("/usr/bin/python3").exists() and (
        run(["/usr/bin/python3", "-I", "-c", "import apt_pkg"], check=False).returncode == 0
    )
    return Item("python-apt", there, True, "there" if there else "package python3-apt", "python3-apt")


def _netavark() -> Item:
    """Newer buildah looks for it even where no network is made."""
    folders = ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/lib/podman", "/usr/local/libexec/podman")
    there = any((Path(folder) / "netavark").exists() for folder in folders)
    needed = available("buildah") and images.buildah_version() >= (1, 33)
    return Item("netavark", there or not needed, needed, "there" if there else "package netavark", "netavark")


def _storage(state: State) -> list[Item]:
    found = []
    try:
        info = images.storage_info()["store"]
        driver, root = info["GraphDriverName"], Path(info["GraphRoot"])
        slow = driver == "vfs"
        found.append(Item("storage", not slow, False, f"{driver} in {root}" + (": slow" if slow else "")))
        isolation, why = images.isolation(state)
        found.append(Item("isolation", True, False, f"{isolation} ({why})"))
        status = os.statvfs(root if root.exists() else "/")
        free = status.f_bavail * status.f_frsize
        found.append(Item("disk", free >= ENOUGH_DISK, False, f"{size(free)} free in {root}"))
    except (ImgbuildError, UnavailableError) as error:
        found.append(Item("storage", False, True, error.what))
    return found
