"""Checks of drivers and their userland: modules, firmware, libraries and tools fit together."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from imagebuild.check.table import LABEL_KMODS, LABEL_SAME_VERSION, Problem, Subject, check
from imagebuild.errors import ImgbuildError
from imagebuild.run import run

_DRIVER_LIBRARY = re.compile(
    r"lib(?:cuda|cudadebugger|nvidia-(?:ml|cfg|ptxjitcompiler))\.so\.(?P<version>\d+\.\d+(?:\.\d+)*)"
)
_LIBRARY_DIRS = ("usr/lib", "usr/lib64")
_NO_LIBRARIES = ("modules", "firmware", "debug")


@check(
    "same-driver-version",
    severity="fatal",
    reason="NVIDIA's modules, firmware and libraries only work with exactly their own version",
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
    driver = next((m for m in modules if m.name == "nvidia"), None)
    nvidia = (driver.version if driver else "") or kmods.get("nvidia", "")
    firmware = {str(entry["firmware"]): "*" for entry in declared.values() if entry.get("firmware")}
    if driver is not None:
        firmware[f"usr/lib/firmware/nvidia/{nvidia}"] = "gsp_*.bin*"
    for folder, pattern in sorted(firmware.items()):
        found = subject.path(folder)
        if not found.is_dir() or not any(found.glob(pattern)):
            yield f"firmware is missing: /{folder}/{pattern}"
    for name, entry in sorted(declared.items()):
        yield from _other_packages(subject, name, entry.get("packages") or {})
    for path, version in _driver_libraries(subject):
        if not nvidia:
            yield f"/{path} is there, but no nvidia module"
        elif version != nvidia:
            yield f"/{path} is of version {version}, the nvidia modules are {nvidia}"


def _name(kmod: str) -> str:
    return kmod.replace("-", "_")


def _driver_libraries(subject: Subject) -> Iterator[tuple[PurePosixPath, str]]:
    """Every library of the NVIDIA driver that carries its version in its name."""
    folders = [PurePosixPath(place) for place in _LIBRARY_DIRS if not (subject.root / place).is_symlink()]
    while folders:
        folder = folders.pop()
        here = subject.root / folder
        for entry in sorted(here.iterdir()) if here.is_dir() else []:
            if entry.is_dir() and not entry.is_symlink():
                if entry.name not in _NO_LIBRARIES:
                    folders.append(folder / entry.name)
            elif match := _DRIVER_LIBRARY.fullmatch(entry.name):
                yield folder / entry.name, match["version"]


def _other_packages(subject: Subject, kmod: str, wanted: Mapping[str, str]) -> Iterator[str]:
    installed = _installed_packages(subject, wanted) if wanted else {}
    for package, version in sorted(wanted.items()):
        have = installed.get(package)
        if have is None:
            yield f"package {package}, which belongs to {kmod}, is not installed"
        elif version not in (have, have.partition(":")[2]):  # with or without epoch
            yield f"package {package} is {have}, {kmod} was locked with {version}"


def _installed_packages(subject: Subject, wanted: Collection[str]) -> dict[str, str]:
    """Versions of the wanted packages as the image's package database has them. Raises ImgbuildError."""
    status = subject.path("var/lib/dpkg/status")
    if status.is_file():
        found = {}
        for paragraph in status.read_text("utf-8", "replace").split("\n\n"):
            fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", paragraph, re.MULTILINE))
            if fields.get("Package") in wanted and fields.get("Status", "").endswith(" installed"):
                found[fields["Package"]] = fields.get("Version", "")
        return found
    for place in ("usr/lib/sysimage/rpm", "var/lib/rpm"):
        database = subject.path(place)
        if (database / "rpmdb.sqlite").is_file():
            # A copy: sqlite wants to write beside the database even when it only reads.
            with tempfile.TemporaryDirectory(prefix="imgbuild-check-") as name:
                for file in database.glob("rpmdb.sqlite*"):
                    Path(name, file.name).write_bytes(file.read_bytes())
                argv = ["rpm", "--dbpath", name, "-q", "--qf", r"%{NAME}\t%{EVR}\n", *wanted]
                lines = run(argv, check=False).stdout.splitlines()
            pairs = [line.partition("\t") for line in lines if "\t" in line]
            return {package: version for package, _, version in pairs}
    raise ImgbuildError("the image has neither dpkg's nor rpm's package database")


@check(
    "cdi-generator",
    severity="notice",
    reason="containers reach the cards through a CDI specification that something has to write",
    fix="add the layer that brings the NVIDIA Container Toolkit",
)
def _cdi_generator(subject: Subject) -> Iterator[Problem | str]:
    has_driver = any(module.name == "nvidia" for module in subject.tree.out_of_tree)
    if has_driver and not subject.path("usr/bin/nvidia-ctk").is_file():
        yield "no CDI generator: /usr/bin/nvidia-ctk is not there, containers will not see the cards"
