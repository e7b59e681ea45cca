"""An image, read only: does it keep its promises? A table of small checks, each with a reason and a fix.

A check yields what is wrong. One that cannot run (a missing tool, a damaged file, a bug) becomes a
finding `could-not-run`, which counts as failed: silence always means that somebody looked.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import zstandard

from imagebuild import images
from imagebuild.errors import DefinitionError, ImgbuildError
from imagebuild.kernel_modules import (
    MODULES,
    DepmodFiles,
    Disagreement,
    Exports,
    Module,
    ModuleSymbols,
    ModuleTree,
    UnreadableError,
    disagreement,
    find_symvers,
    inside,
    module_files,
    module_name,
    read_depmod,
    read_kernel_exports,
    read_module_file,
    read_module_symbols,
    read_symvers,
    scan_modules,
)
from imagebuild.run import run
from imagebuild.state import State

LABEL_RELEASE = "io.imgbuild.kernel-release"
LABEL_KMODS = "io.imgbuild.kmods"
LABEL_TIER = "io.imgbuild.tier"
LABEL_SAME_VERSION = "io.imgbuild.same-version"
LABEL_UNITS = "io.imgbuild.units"

SHOWN = 6  # how many names of a long list a finding shows
MAX_SECRET_BYTES = 64 * 1024  # a larger file is no key; also bounds what is read of a layer

Severity = Literal["fatal", "warning", "notice"]
Outcome = Literal["fatal", "warning", "notice", "could-not-run"]


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
                findings.append(
                    Finding(one.name, problem.severity or one.severity, problem.what, problem.fix or one.fix)
                )
        except ImgbuildError as error:
            what = "; ".join((error.what, *error.lines[-3:]))
            findings.append(Finding(one.name, "could-not-run", what, error.help or _NO_RUN_FIX))
        except Exception as error:  # a check's own crash must never look like a pass
            what = f"{type(error).__name__}: {error}"
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

    def path(self, path: str | PurePosixPath) -> Path:
        """Where a path of the image lies on this machine."""
        return inside(self.root, path)

    def json_label(self, name: str) -> dict[str, Any]:
        """A label that holds a JSON object; empty without the label. Raises ImgbuildError."""
        try:
            value = json.loads(self.labels.get(name) or "{}")
        except ValueError as error:
            raise ImgbuildError(f"label {name} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ImgbuildError(f"label {name} is not a JSON object")
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

    @cached_property
    def layer_hits(self) -> tuple[LayerHit, ...]:
        """What the layer rules match. Raises ImgbuildError without layers, or for a damaged one."""
        if not self.layers:
            raise ImgbuildError("the layers of the image were not given")
        with ThreadPoolExecutor(2) as pool:
            hits = list(pool.map(_scan_layer, range(1, len(self.layers) + 1), self.layers))
        return tuple(hit for of_layer in hits for hit in of_layer)


def _some(names: Iterable[object]) -> str:
    """A list for people: the first few names, and how many more there are."""
    words = [str(name) for name in names]
    rest = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# --- kernel and modules -----------------------------------------------------------------------------


@check(
    "one-kernel",
    severity="fatal",
    reason="the boot loader takes one kernel, and every module is compiled for exactly that one",
    fix="remove the other kernel's packages in the layer that brought them, and build again",
)
def _one_kernel(subject: Subject) -> Iterator[Problem | str]:
    kernels = subject.kernels
    expected = subject.labels.get(LABEL_RELEASE)
    if len(kernels) > 1:
        yield f"{len(kernels)} kernels: {_some(kernels)}"
    if not kernels and subject.tier > 1:
        yield Problem(f"no kernel: /{MODULES}/*/vmlinuz", fix="build on a tier that has a kernel")
    if len(kernels) == 1 and expected and kernels[0] != expected:
        yield f"the kernel is {kernels[0]}, the label {LABEL_RELEASE} says {expected}"
    modules = subject.path(MODULES)
    for folder in sorted(modules.iterdir()) if modules.is_dir() else []:
        has_modules = folder.is_dir() and bool(module_files(folder))
        if folder.name in kernels and not has_modules:
            yield f"kernel {folder.name} has no modules"
        if folder.name not in kernels and has_modules:
            yield f"modules of {folder.name}, which is not the kernel of this image"


@check(
    "initramfs",
    severity="fatal",
    reason="bootc installs /usr/lib/modules/RELEASE/initramfs.img; its own lint does not look for it",
    fix="run dracut for this kernel when the image is built",
)
def _initramfs(subject: Subject) -> Iterator[Problem | str]:
    if subject.tier < 2 or subject.release is None:
        return
    path = MODULES / subject.release / "initramfs.img"
    found = subject.path(path)
    if not found.is_file():
        yield f"/{path} is missing"
    elif found.stat().st_size == 0:
        yield f"/{path} is empty"


@check(
    "vermagic",
    severity="fatal",
    reason="the kernel refuses a module whose version magic differs from its own",
    fix="compile the modules against the headers of exactly this kernel",
)
def _vermagic(subject: Subject) -> Iterator[Problem | str]:
    tree = subject.tree
    for path, reason in tree.broken:
        yield f"{path} cannot be read: {reason}"
    own = Counter(module.vermagic for module in tree.modules if not module.out_of_tree)
    wrong: dict[str, list[PurePosixPath]] = {}
    for module in tree.modules:
        words = module.vermagic.split()
        right = bool(words) and words[0] == subject.release
        if right and module.out_of_tree and own:
            right = module.vermagic == own.most_common(1)[0][0]
        if not right:
            wrong.setdefault(module.vermagic, []).append(module.path)
    expected = own.most_common(1)[0][0] if own else subject.release
    for vermagic, paths in sorted(wrong.items()):
        yield f"vermagic is `{vermagic}`, the kernel's is `{expected}`: {_some(paths)}"
    if tree.out_of_tree and not own:
        raise ImgbuildError("the kernel has no module of its own to compare with")


@check(
    "symbol-crcs",
    severity="fatal",
    reason="a module that was compiled against another interface is refused at load, or worse, is not",
    fix="compile the modules against the headers and Module.symvers of exactly this kernel",
)
def _symbol_crcs(subject: Subject) -> Iterator[Problem | str]:
    modules = subject.tree.out_of_tree
    if not modules:
        return
    available: dict[str, int | None] = dict(subject.exports)
    by_name = {module.name: module for module in subject.tree.modules if not module.out_of_tree}
    for module in modules:
        available |= subject.symbols(module).exports
    providers = set()
    for module in modules:
        needs = subject.symbols(module)
        for symbol in (needs.undefined | needs.weak | needs.versions.keys()) - available.keys():
            provider = subject.depmod.symbols.get(symbol)
            if provider in by_name:
                providers.add(provider)
    for name in sorted(providers):
        available = dict(subject.symbols(by_name[name]).exports) | available
    for module in modules:
        needs = subject.symbols(module)
        yield from _disagreements(module, bool(needs.versions), disagreement(needs, available))


def _disagreements(module: Module, has_versions: bool, found: Disagreement) -> Iterator[Problem | str]:
    if found.unknown:
        yield f"{module.path} needs symbols that nobody exports: {_some(found.unknown)}"
    if found.mismatched:
        yield f"{module.path} was compiled against other versions of: {_some(found.mismatched)}"
    if found.unversioned:
        # The kernel refuses a module without any versions, and lets single ones go unchecked.
        yield Problem(
            f"{module.path} has no version for: {_some(found.unversioned)}",
            "warning" if has_versions else "fatal",
        )


@check(
    "depmod-current",
    severity="fatal",
    reason="modprobe and udev know only modules, dependencies and aliases that depmod has seen",
    fix="run `depmod -a RELEASE` as the last step that touches modules",
)
def _depmod_current(subject: Subject) -> Iterator[Problem | str]:
    if subject.release is None:
        return
    try:
        depmod = subject.depmod
    except UnreadableError as error:
        yield f"/{MODULES}/{subject.release}: {error.what}"
        return
    files = module_files(subject.tree.folder)
    listed = depmod.dependencies.keys()
    gone = listed - set(files)
    if gone:
        yield f"modules.dep lists files that are not there: {_some(sorted(gone))}"
    # Of two modules with one name depmod lists the one that wins (updates/ before kernel/).
    names = {module_name(path) for path in listed}
    unlisted = [path for path in files if path not in listed and module_name(path) not in names]
    if unlisted:
        yield f"modules.dep does not list: {_some(unlisted)}"
    for name in depmod.stale:
        yield f"{name} differs from the text file beside it"
    for module in subject.tree.out_of_tree:
        if module.path not in listed:
            continue
        have = {module_name(path) for path in depmod.dependencies[module.path]}
        wanted = {name.replace("-", "_") for name in module.first("depends").split(",") if name}
        if wanted - have:
            yield f"modules.dep lacks what {module.path} depends on: {_some(sorted(wanted - have))}"
        missing = set(module.info.get("alias", ())) - depmod.aliases.get(module.name, frozenset())
        if missing:
            yield f"modules.alias lacks aliases of {module.path}: {_some(sorted(missing))}"


_MODPROBE_DIRS = ("usr/lib/modprobe.d", "usr/local/lib/modprobe.d", "etc/modprobe.d")


@contextmanager
def _modprobe_config(subject: Subject) -> Iterator[Path]:
    """The image's modprobe.d as one folder. modprobe's `-d` moves the modules, not the configuration,
    and absolute links (Debian's alternatives) would lead into this machine's /etc.
    """
    with tempfile.TemporaryDirectory(prefix="imgbuild-check-") as name:
        folder = Path(name)
        for place in _MODPROBE_DIRS:  # later places win, file by file: modprobe.d(5)
            source = subject.path(place)
            for entry in sorted(source.glob("*.conf")) if source.is_dir() else []:
                found = subject.path(PurePosixPath(place) / entry.name)
                text = found.read_bytes() if found.is_file() else b""
                (folder / entry.name).write_bytes(text)
        yield folder


@check(
    "modprobe-resolves",
    severity="fatal",
    reason="a module that modprobe does not find, or diverts, is not there when the unit wants it",
    fix="mend /usr/lib/modprobe.d or /etc/modprobe.d, or the modules that are missing",
)
def _modprobe_resolves(subject: Subject) -> Iterator[Problem | str]:
    modules = subject.tree.out_of_tree
    if not modules or subject.release is None:
        return
    known = {module.name for module in subject.tree.modules}
    with _modprobe_config(subject) as config:
        base: list[str | Path] = ["modprobe", "-C", config, "-S", subject.release, "-d", subject.root]
        installs = {}
        for line in run([*base, "--showconfig"]).stdout.splitlines():
            words = line.split(maxsplit=2)
            if words[:1] == ["install"] and len(words) == 3:
                installs[words[1].replace("-", "_")] = words[2]
        for module in modules:
            result = run([*base, "--dry-run", "--show-depends", module.name], check=False)
            if result.returncode != 0:
                yield f"modprobe {module.name}: {_some(result.tail) or 'fails'}"
                continue
            inserted = [
                PurePosixPath(line.split()[1]).name
                for line in result.stdout.splitlines()
                if line.startswith("insmod ")
            ]
            if module.path.name not in inserted:
                yield f"modprobe {module.name} loads {_some(inserted) or 'nothing'}, not {module.path.name}"
            # --show-depends ignores `install`, so it is judged here.
            command = installs.get(module.name)
            if command is not None:
                loaded = _modprobed(command)
                missing = [name for name in loaded if name not in known]
                if not loaded:
                    yield f"modprobe.d replaces the loading of {module.name} by `{command}`"
                elif missing:
                    yield f"modprobe.d diverts {module.name} to {_some(missing)}, which does not exist"


def _modprobed(command: str) -> list[str]:
    """The module names that an `install` line of modprobe.d passes to modprobe."""
    names = []
    for part in re.split(r"[;&|]+", command):
        words = part.split()
        if words and PurePosixPath(words[0]).name == "modprobe":
            plain = [word for word in words[1:] if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", word)]
            names += [word.replace("-", "_") for word in plain[:1]]  # options of the module follow
    return names


@check(
    "unsigned-modules",
    severity="warning",
    reason="with Secure Boot the kernel locks itself down and refuses unsigned modules",
    fix="give a signing key to the build and enrol its certificate, or leave Secure Boot off",
)
def _unsigned_modules(subject: Subject) -> Iterator[Problem | str]:
    unsigned = [module.path.name for module in subject.tree.out_of_tree if not module.signed]
    if unsigned:
        yield f"not signed: {_some(unsigned)}"


# --- drivers and their userland ---------------------------------------------------------------------

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


# --- layers -----------------------------------------------------------------------------------------

_BIN = r"(?:usr/(?:local/)?)?s?bin/"
_TRIPLET = r"(?:[a-z0-9_]+(?:-[a-z0-9_]+)*-linux(?:-[a-z0-9]+)?-)?"


@dataclass(frozen=True)
class LayerRule:
    """Files that no layer may hold; `pattern` must match the whole path, without leading slash."""

    check: str
    what: str
    pattern: re.Pattern[str]
    severity: Severity = "fatal"


def _tool(what: str, names: str) -> LayerRule:
    return LayerRule("no-build-tools", what, re.compile(rf"{_BIN}{names}(?:-\d[\d.]*)?"))


_SECRET_PLACES = r"(?:usr/)?etc/.*|root/.*|home/.*|var/(?:home|roothome)/.*"

LAYER_RULES: tuple[LayerRule, ...] = (
    _tool("compiler", rf"{_TRIPLET}(?:gcc|g\+\+|cc|c\+\+|cpp|clang|clang\+\+|c89|c99|c89-gcc|c99-gcc)"),
    _tool("assembler", rf"{_TRIPLET}as"),
    _tool("linker", rf"{_TRIPLET}(?:ld|ld\.bfd|ld\.gold|ld\.lld|gold|mold)"),
    _tool("make", r"(?:make|gmake|cmake|ninja)"),
    _tool("DKMS", r"dkms"),
    _tool("package builder", r"(?:rpmbuild|dpkg-buildpackage|debuild)"),
    LayerRule(
        "no-build-tools",
        "compiler",
        re.compile(r"usr/(?:lib|libexec)/gcc/.*/(?:cc1|cc1plus|collect2|lto1|lto-wrapper)"),
    ),
    LayerRule(
        "no-build-tools", "DKMS", re.compile(r"(?:usr/lib|etc|var/lib)/dkms/.*|usr/src/[^/]+/dkms\.conf")
    ),
    LayerRule(
        "no-build-tools",
        "kernel headers",
        re.compile(r"usr/src/(?:linux-headers|linux-kbuild|kernels/).*|usr/lib/linux-kbuild-.*"),
    ),
    LayerRule("no-build-tools", "C headers", re.compile(r"usr/include/.*\.(?:h|hpp)"), "warning"),
    LayerRule(
        "no-package-caches",
        "package cache",
        re.compile(
            r"var/cache/apt/archives/.*\.deb|var/cache/apt/[^/]+\.bin"
            r"|var/lib/apt/lists/(?!lock$|partial/|auxfiles/).*"
            r"|var/cache/(?:dnf|libdnf5|yum|PackageKit)/.*"
        ),
    ),
    LayerRule(
        "no-package-caches",
        "log of a package manager",
        re.compile(
            r"var/log/(?:apt/.*|dpkg\.log.*|alternatives\.log.*|bootstrap\.log|dnf.*\.log.*|yum\.log.*|hawkey\.log.*)"
        ),
        "warning",
    ),
    LayerRule("no-leftovers", "run-time file", re.compile(r"(?:run|tmp|var/tmp|var/run)/.*"), "warning"),
    LayerRule("no-secrets", "mounted build secret", re.compile(r"run/secrets/.*")),
    LayerRule(
        "no-secrets",
        "credentials",
        re.compile(
            rf"(?={_SECRET_PLACES})(?:.*/)?"
            r"(?:id_(?:rsa|dsa|ecdsa|ed25519)(?:_sk)?|\.netrc|\.pgpass|\.git-credentials"
            r"|\.docker/config\.json|ostree/auth\.json|containers/auth\.json)"
        ),
    ),
)
_KEY_BY_CONTENT = LayerRule("no-secrets", "private key", re.compile(_SECRET_PLACES))
_PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")
_PUBLIC_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]+ )*(?:PUBLIC KEY(?: BLOCK)?|CERTIFICATE)-----"
    rb"|\A[\x98\x99\xc6]"  # binary OpenPGP public key, RFC 4880 section 4.2
    rb"|\b(?:DNSKEY|DS)\s+\d"  # trust anchors of DNSSEC
)


@dataclass(frozen=True)
class LayerHit:
    """One file of one layer that a rule forbids; layers count from 1."""

    layer: int
    digest: str
    rule: LayerRule
    path: str


def _scan_layer(number: int, layer: Path) -> list[LayerHit]:
    hits = []
    try:
        with _open_layer(layer) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                path = member.name.removeprefix("./").lstrip("/")
                if member.isdir() or PurePosixPath(path).name.startswith(".wh."):
                    continue
                rules = [rule for rule in LAYER_RULES if rule.pattern.fullmatch(path)]
                if not rules and _KEY_BY_CONTENT.pattern.fullmatch(path) and member.isreg():
                    content = tar.extractfile(member) if member.size <= MAX_SECRET_BYTES else None
                    if _is_private(path, content.read() if content else b""):
                        rules = [_KEY_BY_CONTENT]
                hits += [LayerHit(number, layer.name, rule, path) for rule in rules]
    except (tarfile.TarError, OSError, EOFError, zstandard.ZstdError) as error:
        raise ImgbuildError(f"layer {number} ({layer.name}) cannot be read: {error}") from None
    return hits


def _is_private(path: str, content: bytes) -> bool:
    if _PRIVATE_KEY.search(content):
        return True
    return path.endswith(".key") and bool(content) and not _PUBLIC_KEY.search(content)


@contextmanager
def _open_layer(layer: Path) -> Iterator[IO[bytes]]:
    with layer.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(b"\x1f\x8b"):
            with gzip.open(file) as plain:
                yield io.BufferedReader(plain, 1 << 20)
        elif magic == b"\x28\xb5\x2f\xfd":
            with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
                yield io.BufferedReader(stream, 1 << 20)
        else:
            yield file


def _in_layers(subject: Subject, check_name: str) -> Iterator[Problem]:
    """One problem per layer and kind of file."""
    groups: dict[tuple[int, str, str, Severity], list[str]] = {}
    for hit in subject.layer_hits:
        if hit.rule.check == check_name:
            key = (hit.layer, hit.digest, hit.rule.what, hit.rule.severity)
            groups.setdefault(key, []).append("/" + hit.path)
    for (number, digest, what, severity), paths in groups.items():
        yield Problem(f"{what} in layer {number} ({digest[:12]}): {_some(paths)}", severity)


@check(
    "no-build-tools",
    severity="fatal",
    reason="a host is never edited: a compiler only helps who should not be there; and a layer hides nothing",
    fix="install build tools in the kmod stage only, whose layers are thrown away",
)
def _no_build_tools(subject: Subject) -> Iterator[Problem | str]:
    yield from _in_layers(subject, "no-build-tools")


@check(
    "no-package-caches",
    severity="fatal",
    reason="caches and logs are downloaded by every host and differ with every build",
    fix="remove them in the same RUN step that made them: a later layer only hides them",
)
def _no_package_caches(subject: Subject) -> Iterator[Problem | str]:
    yield from _in_layers(subject, "no-package-caches")


@check(
    "no-leftovers",
    severity="warning",
    reason="/run and /tmp are emptied at boot: what lies there in a layer was left by a build step",
    fix="remove it in the same RUN step that made it",
)
def _no_leftovers(subject: Subject) -> Iterator[Problem | str]:
    yield from _in_layers(subject, "no-leftovers")


@check(
    "no-secrets",
    severity="fatal",
    reason="whoever can pull the image can read every layer of it",
    fix="revoke the secret, then give it to the build as a secret mount, or to the host at run time",
)
def _no_secrets(subject: Subject) -> Iterator[Problem | str]:
    yield from _in_layers(subject, "no-secrets")


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
        yield f"SSH host keys: {_some(key.name for key in keys)}"
    for name in ("etc/hostid", "var/lib/systemd/random-seed"):
        if subject.path(name).exists():
            yield f"/{name} is there"


# --- units ------------------------------------------------------------------------------------------

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
            yield f"{unit}: systemd-analyze exited with {result.returncode}: {_some(said[-2:])}"
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


def check_image(name: str, state: State, skip: Collection[str] = ()) -> Report:
    """Check an image of local storage: mounts it, unpacks its layers, and takes both away again.

    Raises:
        ImgbuildError: there is no such image.
        DefinitionError: `skip` names a check there is not.
    """
    labels = images.labels(name)
    with state.work("check") as folder, images.mounted(name) as root:
        layers = images.layer_files(name, folder / "layers")
        return run_checks(CheckedImage(root, labels, layers), skip)
