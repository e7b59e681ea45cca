"""Checks of drivers and their userland: modules, firmware, libraries and tools fit together.

What belongs to which driver is in the image's labels, out of definitions: nothing here knows a vendor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from imagebuild.check.packages import installed_versions
from imagebuild.check.table import (
    LABEL_CDI_GENERATOR,
    LABEL_KMODS,
    LABEL_RIVALS,
    LABEL_SAME_VERSION,
    Problem,
    Subject,
    check,
)
from imagebuild.errors import ImgbuildError

_LIBRARY_DIRS = ("usr/lib", "usr/lib64")
_NO_LIBRARIES = ("modules", "firmware", "debug")


@check(
    "same-driver-version",
    severity="fatal",
    reason="a driver's modules, firmware and libraries only work with exactly their own version",
    fix="lock all packages of the driver to the version of the modules",
)
def _same_driver_version(subject: Subject) -> Iterator[Problem | str]:
    declared = subject.json_label(LABEL_SAME_VERSION)
    kmods = {}
    for word in subject.labels.get(LABEL_KMODS, "").split():
        name, equals, version = word.partition("=")
        if not equals:
            raise ImgbuildError(f"label {LABEL_KMODS} is not a list of NAME=VERSION: `{word}`")
        kmods[name] = version
    kmods |= {name: str(entry["version"]) for name, entry in declared.items() if "version" in entry}
    modules = subject.tree.out_of_tree
    for kmod, version in sorted(kmods.items()):
        own = [m for m in modules if m.name == _name(kmod) or m.name.startswith(_name(kmod) + "_")]
        if not own:
            yield f"there is no module of {kmod} {version}"
        for module in own:
            # OpenZFS says 2.3.9-1 where the release is 2.3.9.
            if module.version and module.version != version and not module.version.startswith(f"{version}-"):
                yield f"{module.path} is of version {module.version}, {kmod} is {version}"
    for name, entry in sorted(declared.items()):
        folder = entry.get("firmware")
        if folder and not any(subject.path(folder).glob("*")):
            yield f"firmware is missing: /{folder}"
        for path, version in _libraries(subject, entry.get("libraries") or []):
            if version != kmods.get(name):
                yield f"/{path} is of version {version}, {name} is {kmods.get(name)}"
        yield from _other_packages(subject, name, entry.get("packages") or {})


def _name(kmod: str) -> str:
    return kmod.replace("-", "_")


def _libraries(subject: Subject, names: Sequence[str]) -> Iterator[tuple[PurePosixPath, str]]:
    """Every library of these names that carries a driver's version: it has more parts than an ABI's."""
    wanted = re.compile(rf"(?:{'|'.join(map(re.escape, names))})\.so\.(?P<version>\d+\.\d+(?:\.\d+)*)")
    folders = [PurePosixPath(place) for place in _LIBRARY_DIRS if not (subject.root / place).is_symlink()]
    while names and folders:
        folder = folders.pop()
        here = subject.root / folder
        for entry in sorted(here.iterdir()) if here.is_dir() else []:
            if entry.is_dir() and not entry.is_symlink():
                if entry.name not in _NO_LIBRARIES:
                    folders.append(folder / entry.name)
            elif match := wanted.fullmatch(entry.name):
                yield folder / entry.name, match["version"]


def _other_packages(subject: Subject, kmod: str, wanted: Mapping[str, str]) -> Iterator[str]:
    installed = installed_versions(subject) if wanted else {}
    for package, version in sorted(wanted.items()):
        have = installed.get(package)
        if have is None:
            yield f"package {package}, which belongs to {kmod}, is not installed"
        elif version not in (have, have.partition(":")[2]):  # with or without epoch
            yield f"package {package} is {have}, {kmod} was locked with {version}"


@check(
    "rival-driver",
    severity="fatal",
    reason="of two drivers for one card the first takes it, and udev loads every driver it finds",
    fix="put `blacklist NAME` into a file of /usr/lib/modprobe.d",
)
def _rival_driver(subject: Subject) -> Iterator[Problem | str]:
    lines = [
        _name(line)
        for path in subject.config("modprobe.d").values()
        for line in path.read_text("utf-8", "replace").splitlines()
    ]
    there = {module.name for module in subject.tree.modules}
    for rival in map(_name, subject.labels.get(LABEL_RIVALS, "").split()):
        blocked = re.compile(rf"\s*(?:blacklist\s+{rival}|install\s+{rival}\s+\S*/(?:false|true))\s*")
        if rival in there and not any(map(blocked.fullmatch, lines)):
            yield f"nothing keeps {rival} from loading, and it would take the cards"


@check(
    "cdi-generator",
    severity="notice",
    reason="containers reach the cards through a CDI specification that something has to write",
    fix="add the layer that brings the generator",
)
def _cdi_generator(subject: Subject) -> Iterator[Problem | str]:
    for path in subject.labels.get(LABEL_CDI_GENERATOR, "").split():
        if not subject.path(path).is_file():
            yield f"no CDI generator: /{path} is not there, containers will not see the cards"
