"""The table of checks: what a check is and what it yields, the image as checks see it, and the runner."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from imagebuild.errors import DefinitionError, ImgbuildError
from imagebuild.kernel_modules import (
    MODULES,
    DepmodFiles,
    Exports,
    Module,
    ModuleSymbols,
    ModuleTree,
    UnreadableError,
    find_symvers,
    inside,
    read_depmod,
    read_kernel_exports,
    read_module_file,
    read_module_symbols,
    read_symvers,
    scan_modules,
)

LABEL_RELEASE = "io.imgbuild.kernel-release"
LABEL_KMODS = "io.imgbuild.kmods"
LABEL_TIER = "io.imgbuild.tier"
LABEL_SAME_VERSION = "io.imgbuild.same-version"
LABEL_UNITS = "io.imgbuild.units"
LABEL_FILES = "io.imgbuild.files"
LABEL_RIVALS = "io.imgbuild.rivals"
LABEL_CDI_GENERATOR = "io.imgbuild.cdi-generator"
LABEL_BOOTC = "containers.bootc"

SHOWN = 6  # how many names of a long list a finding shows

Severity = Literal["fatal", "warning", "notice"]
Outcome = Literal["fatal", "warning", "notice", "could-not-run"]
Found = TypeVar("Found")


@dataclass(frozen=True)
class CheckedImage:
    """What the checks look at.

    `root` is the mounted root file system, never written to; `labels` are those of the image's
    configuration; `layers` are its layers as tar files (plain, gzip or zstd), base first.
    """

    root: Path
    labels: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what to do about it."""

    check: str
    severity: Outcome
    what: str
    fix: str


@dataclass(frozen=True)
class Report:
    """The outcome of all checks. A check is passed if it ran to its end and found nothing."""

    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """No finding is fatal, and every check that was not skipped could run."""
        return all(finding.severity in ("warning", "notice") for finding in self.findings)

    def as_dict(self) -> dict[str, object]:
        """The report as plain data, for `--json`."""
        return {
            "ok": self.ok,
            "findings": [
                {"check": f.check, "severity": f.severity, "what": f.what, "fix": f.fix}
                for f in self.findings
            ],
            "passed": list(self.passed),
            "skipped": list(self.skipped),
        }


@dataclass(frozen=True)
class Problem:
    """What a check yields where its own severity or fix do not fit; plain text where they do."""

    what: str
    severity: Severity | None = None
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """One row of the table. `reason` says why it matters, `fix` what usually helps."""

    name: str
    severity: Severity
    reason: str
    fix: str
    find: Callable[[Subject], Iterator[Problem | str]] = field(repr=False)


_checks: dict[str, Check] = {}


def check(
    name: str, *, severity: Severity, reason: str, fix: str
) -> Callable[[Callable[[Subject], Iterator[Problem | str]]], Callable[[Subject], Iterator[Problem | str]]]:
    """Put a function into the table of checks. Names are unique."""

    def register(
        find: Callable[[Subject], Iterator[Problem | str]],
    ) -> Callable[[Subject], Iterator[Problem | str]]:
        if name in _checks:
            raise ValueError(f"there are two checks named {name}")
        _checks[name] = Check(name, severity, reason, fix, find)
        return find

    return register


def list_checks() -> tuple[Check, ...]:
    """All checks, in the order they run."""
    return tuple(_checks.values())


def run_checks(image: CheckedImage, skip: Collection[str] = ()) -> Report:
    """Run all checks but those in `skip`. Raises DefinitionError if `skip` names none of them."""
    unknown = sorted(set(skip) - _checks.keys())
    if unknown:
        raise DefinitionError(
            f"there is no check `{unknown[0]}`", help=f"there is: {', '.join(sorted(_checks))}"
        )
    subject = Subject(image)
    findings: list[Finding] = []
    passed = []
    for one in _checks.values():
        if one.name in skip:
            continue
        before = len(findings)
        try:
            for problem in one.find(subject):
                if isinstance(problem, str):
                    problem = Problem(problem)
                severity = problem.severity or one.severity
                findings.append(Finding(one.name, severity, printable(problem.what), problem.fix or one.fix))
        except ImgbuildError as error:
            what = "; ".join((error.what, *error.lines[-3:]))
            findings.append(Finding(one.name, "could-not-run", printable(what), error.help or _NO_RUN_FIX))
        except Exception as error:  # a check's own crash must never look like a pass
            what = printable(f"{type(error).__name__}: {error}")
            findings.append(Finding(one.name, "could-not-run", what, _NO_RUN_FIX))
        if len(findings) == before:
            passed.append(one.name)
    return Report(tuple(findings), tuple(passed), tuple(name for name in _checks if name in skip))


_NO_RUN_FIX = "mend what kept the check from running, or skip it by name"


class Subject:
    """An image under check, and what several checks want to know of it, read once."""

    def __init__(self, image: CheckedImage) -> None:
        self.root = image.root
        self.labels = image.labels
        self.layers = image.layers
        self._symbols: dict[PurePosixPath, ModuleSymbols] = {}
        self._folders: dict[str, Path] = {}
        self._found: dict[Callable[[Subject], Any], Any] = {}

    def path(self, path: str | PurePosixPath) -> Path:
        """Where a path of the image lies on this machine."""
        return inside(self.root, path)

    def entry(self, path: str) -> Path:
        """Where an entry of a folder lies on this machine: itself, even if it is a link."""
        folder, _, name = path.rstrip("/").rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self.path(folder)
        return self._folders[folder] / name

    def inner(self, path: Path) -> str:
        """The path in the image of what lies at `path` on this machine."""
        return f"/{path.relative_to(self.root)}"

    def config(self, kind: str) -> dict[str, Path]:
        """The .conf files of a folder such as `modprobe.d`, by name, where they lie on this machine.

        As systemd and modprobe read them: a file of /etc hides one of /usr that has its name, and a
        link to /dev/null leaves nothing of it.
        """
        found = {}
        for place in ("usr/lib", "usr/local/lib", "etc"):
            folder = self.path(f"{place}/{kind}")
            for entry in folder.glob("*.conf") if folder.is_dir() else []:
                found[entry.name] = self.path(f"{place}/{kind}/{entry.name}")
        return {name: path for name, path in sorted(found.items()) if path.is_file()}

    def json_label(self, name: str) -> dict[str, Any]:
        """A label that holds a JSON object; empty without the label. Raises ImgbuildError."""
        return self._json(name, dict)

    def json_list(self, name: str) -> list[Any]:
        """A label that holds a JSON list; empty without the label. Raises ImgbuildError."""
        return self._json(name, list)

    def _json(self, name: str, kind: type[Found]) -> Found:
        try:
            value = json.loads(self.labels.get(name) or "null")
        except ValueError as error:
            raise ImgbuildError(f"label {name} is not JSON: {error}") from None
        if value is None:
            return kind()
        if not isinstance(value, kind):
            raise ImgbuildError(f"label {name} is not a JSON {'list' if kind is list else 'object'}")
        return value

    @property
    def tier(self) -> int:
        """The image's tier; without a label, the one that promises most."""
        text = self.labels.get(LABEL_TIER, "3")
        if text not in ("1", "2", "3"):
            raise ImgbuildError(f"label {LABEL_TIER} is `{text}`, not 1, 2 or 3")
        return int(text)

    @cached_property
    def kernels(self) -> tuple[str, ...]:
        """Releases that have a kernel image."""
        folder = self.path(MODULES)
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        return tuple(name for name in names if self.path(MODULES / name / "vmlinuz").is_file())

    @property
    def release(self) -> str | None:
        """The one kernel release; None for a tier 1 without a kernel. Raises ImgbuildError."""
        if len(self.kernels) == 1:
            return self.kernels[0]
        if not self.kernels and self.tier == 1:
            return None
        raise ImgbuildError(
            f"needs exactly one kernel, there are {len(self.kernels)}", help="see the finding of one-kernel"
        )

    @cached_property
    def tree(self) -> ModuleTree:
        """The modules of the one kernel."""
        return scan_modules(self.root, self.release) if self.release else ModuleTree(self.root, ())

    @cached_property
    def depmod(self) -> DepmodFiles:
        return read_depmod(self.tree.folder)

    @cached_property
    def exports(self) -> Exports:
        """What the kernel image exports, or what the distribution's list beside it says it does."""
        try:
            vmlinuz = self.path(MODULES / self.tree.folder.name / "vmlinuz")
            return read_kernel_exports(vmlinuz.read_bytes())
        except UnreadableError as error:
            symvers = find_symvers(self.tree.folder)
            if symvers is None:
                raise UnreadableError(f"vmlinuz: {error.what}; no Module.symvers beside it") from None
            return read_symvers(symvers)

    def symbols(self, module: Module) -> ModuleSymbols:
        """What a module exports and needs."""
        if module.path not in self._symbols:
            assert self.release is not None
            data = read_module_file(self.root, self.release, module.path)
            self._symbols[module.path] = read_module_symbols(data)
        return self._symbols[module.path]

    def once(self, read: Callable[[Subject], Found]) -> Found:
        """What `read` finds in the image: it runs once, unless it raises."""
        if read not in self._found:
            self._found[read] = read(self)
        found: Found = self._found[read]
        return found


def printable(text: str) -> str:
    """Text that may hold names out of an image: what is no UTF-8 or would steer a terminal is escaped."""
    shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", shown)


def some(names: Iterable[object]) -> str:
    """A list for people: the first few names, and how many more there are."""
    words = [str(name) for name in names]
    rest = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
