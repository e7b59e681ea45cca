"""Definitions → versions and digests: the only step that asks the outside world "which version?".

Three recorded steps: tier 1 (a digest, or the exact package set of a bootstrap); the kernel release
and with it the compat verdict; each transaction, solved by the distribution's own library on top of
those before it. Packages that are compiled later take part as promises.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from imagebuild.compat import ORDERS, blocked_error, judge, judge_range
from imagebuild.definitions import (
    Epoch,
    ImageDigest,
    ImageReference,
    InnerPath,
    KernelRelease,
    Line,
    PackageName,
    PackagePath,
    PackageVersion,
    Sha256,
    Uri,
    as_json,
)
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.load import Selection
from imagebuild.report import Report
from imagebuild.run import run
from imagebuild.sources import Location, locate, registry_reference
from imagebuild.state import State, sha256_of, write_whole

LOCK_FILE = "imgbuild.lock"
FORMAT = 1


class LockedPackage(msgspec.Struct, frozen=True, kw_only=True):
    """One package: what it is, where it lies below its repository, its length and SHA-256."""

    name: PackageName
    version: PackageVersion
    arch: PackageName
    repository: PackageName
    path: PackagePath
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
    sha256: Sha256


class LockedKmod(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A driver: its version, and the package its source comes from (tarballs: see the definition)."""

    version: PackageVersion
    epoch: Epoch = ""
    source: LockedPackage | None = None


class LockedRepository(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A repository that the base image brings: where it was found, and its key inside the image."""

    uri: Uri
    keys: tuple[InnerPath, ...] = ()


class Section(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one base × vendor × layer set resolved to."""

    request: str
    """SHA-256 over what was asked for; another one means that definitions changed since."""
    kernel_release: KernelRelease
    keys: dict[PackageName, Sha256] = {}
    """SHA-256 of each repository's key, for those that are not a keyring of this machine."""
    base_image: str = ""
    """The upstream image as it was asked for; empty where tier 1 is bootstrapped."""
    base_digest: ImageDigest = ""
    """Digest of the upstream image."""
    base_kernels: tuple[KernelRelease, ...] = ()
    """Kernel releases in the upstream image; those that are not `kernel_release` are removed."""
    kernel_reason: Line = ""
    """Why it is this kernel."""
    repositories: dict[PackageName, LockedRepository] = {}
    """Repositories of the upstream image that packages come from."""
    images: dict[ImageReference, ImageDigest] = {}
    """Container images that layers name."""
    kmods: dict[str, LockedKmod] = {}
    transactions: dict[str, tuple[LockedPackage, ...]] = {}

    def packages(self) -> list[LockedPackage]:
        """Every package of the section, sources of drivers included."""
        found = [p for packages in self.transactions.values() for p in packages]
        return found + [kmod.source for kmod in self.kmods.values() if kmod.source]


class Lockfile(msgspec.Struct, frozen=True, kw_only=True):
    """`imgbuild.lock`."""

    version: int = FORMAT
    sections: dict[str, Section] = {}


def lock_path(selection: Selection) -> Path:
    """Where the lock lies: beside the site file, or in the current folder."""
    return selection.site_folder / LOCK_FILE


def read(path: Path) -> Lockfile:
    """Read a lock; an empty one where there is no file.

    Raises:
        DefinitionError: the file is no lock of this format.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Lockfile()
    except OSError as error:
        raise DefinitionError(f"cannot read `{path}`: {error.strerror}") from None
    try:
        found = msgspec.json.decode(data, type=Lockfile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DefinitionError(
            f"`{path}` is not a lock: {error}", help="remove it; the next `imgbuild lock` writes it anew"
        ) from None
    if found.version != FORMAT:
        raise DefinitionError(f"`{path}` has format {found.version}, this imgbuild reads {FORMAT}")
    return found


def dumps(lock: Lockfile) -> str:
    """A lock as text: sorted, one package per line, so that a diff reads like a change log."""

    def one(value: Any) -> str:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)

    def block(value: Any, indent: str) -> str:
        if isinstance(value, dict) and "sha256" not in value and value:
            inner = ",\n".join(
                f"{indent} {one(key)}: {block(item, indent + ' ')}" for key, item in sorted(value.items())
            )
            return f"{{\n{inner}\n{indent}}}"
        if isinstance(value, list | tuple) and value:
            inner = ",\n".join(f"{indent} {block(item, indent + ' ')}" for item in value)
            return f"[\n{inner}\n{indent}]"
        return one(value)

    return block(msgspec.to_builtins(lock), "") + "\n"


def write(path: Path, lock: Lockfile) -> None:
    """Write a lock whole or not at all."""
    write_whole(path, dumps(lock))


def update(path: Path, name: str, section: Section, state: State) -> None:
    """Put one section into a lock; what another imgbuild wrote in the meantime is kept."""
    with state.lock(f"lock-{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]}"):
        write(path, Lockfile(sections={**read(path).sections, name: section}))


def differences(old: Section | None, new: Section) -> list[str]:
    """What moved between two locks of one section, a line each; empty when nothing did."""
    if old is None:
        return []
    lines = []
    if old.base_digest != new.base_digest:
        lines.append(f"base image {old.base_digest} -> {new.base_digest}")
    if old.kernel_release != new.kernel_release:
        lines.append(f"kernel {old.kernel_release} -> {new.kernel_release}")
    for name in sorted(old.kmods.keys() & new.kmods.keys()):
        if old.kmods[name].version != new.kmods[name].version:
            lines.append(f"driver {name} {old.kmods[name].version} -> {new.kmods[name].version}")
    before = {p.name: p for p in old.packages()}
    after = {p.name: p for p in new.packages()}
    for name in sorted(before.keys() | after.keys()):
        a, b = before.get(name), after.get(name)
        if a is None and b is not None:
            lines.append(f"package {name} {b.version} added")
        elif b is None and a is not None:
            lines.append(f"package {name} {a.version} removed")
        elif a is not None and b is not None and a.sha256 != b.sha256:
            lines.append(f"package {name} {a.version} -> {b.version}")
    return lines


def request_of(selection: Selection) -> str:
    """SHA-256 over everything in the definitions that decides what is locked."""
    asked: list[Any] = [
        selection.base_name,
        selection.base.arch,
        selection.vendor_name if selection.tier >= 2 else "",
        as_json(selection.base.tier1),
        as_json(selection.base.kernel),
        [as_json(repository) for repository, _ in selection.repositories],
        list(selection.base.toolchain),
    ]
    # In an order of its own: images with the same layers in another order have one section.
    for piece in sorted(selection.pieces, key=lambda piece: (piece.kind, piece.name)):
        asked.append([piece.name, list(piece.part.packages)])
        for name, kmod in piece.part.kmods.items():
            # Where a directory lies is the machine's matter, and nothing of it is locked.
            source = "directory" if kmod.source.directory else as_json(kmod.source)
            asked.append([name, kmod.version, source, list(kmod.build_packages), as_json(kmod.package)])
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def trusted_keys(lock: Lockfile) -> dict[str, str]:
    """SHA-256 of every repository key that any section of a lock holds, by repository."""
    return {name: sha256 for section in lock.sections.values() for name, sha256 in section.keys.items()}


def section_of(lock: Lockfile, selection: Selection) -> Section | None:
    """The lock's section for a selection, None if there is none or if it is stale.

    Raises:
        DefinitionError: the section lacks packages: somebody changed it by hand, or a merge did.
    """
    section = lock.sections.get(selection.section)
    if section is None or section.request != request_of(selection):
        return None
    if section.kmods.keys() != selection.kmods.keys():
        return None
    needed = ["tier1"] if selection.base.tier1.bootstrap else []
    if selection.tier >= 2:
        needed += ["kernel"] if selection.base.kernel.packages else []
        needed += [t["name"] for t in _transactions(selection, section.kernel_release)]
    absent = [name for name in needed if name not in section.transactions]
    absent += [
        f"the source of {name}"
        for name, (kmod, _) in selection.kmods.items()
        if kmod.source.package and section.kmods[name].source is None
    ]
    if absent:
        raise DefinitionError(
            f"section `{selection.section}` of the lock lacks packages: {', '.join(absent)}",
            help="`imgbuild lock` writes it anew",
        )
    return section


def precheck(selection: Selection, *, allow_blocked: bool = False) -> None:
    """Stop at rules that block a base's whole kernel range, before anything is asked of a network.

    Raises:
        BlockedError: a rule blocks, and blocked pairs were not allowed.
    """
    order = ORDERS[selection.base.package_manager]
    for name, (kmod, piece) in selection.kmods.items():
        verdict = judge_range(name, kmod.version, selection.base.kernel.range, piece.rules, order)
        if verdict.kind == "blocked" and not allow_blocked:
            raise blocked_error(verdict)


def check_verdicts(
    selection: Selection, kernel_release: str, versions: Mapping[str, str | None], *, allow_blocked: bool
) -> None:
    """Stop at rules that block a driver on this kernel. Raises BlockedError."""
    order = ORDERS[selection.base.package_manager]
    for name, (_, piece) in selection.kmods.items():
        verdict = judge(name, versions.get(name), kernel_release, piece.rules, order)
        if verdict.kind == "blocked" and not allow_blocked:
            raise blocked_error(verdict)


def upstream_version(version: str) -> tuple[str, str]:
    """Epoch and upstream version of a package version: `3:550.163.01-1.el10` → ("3", "550.163.01")."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "", version
    return epoch, rest.rsplit("-", 1)[0] if "-" in rest else rest


def fill(text: str, **values: str) -> str:
    """Fill `{name}` in a definition's text; anything else in braces stays."""
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def resolve(
    selection: Selection,
    state: State,
    report: Report,
    *,
    prefer: Iterable[LockedPackage] = (),
    trusted: Mapping[str, str] | None = None,
    allow_blocked: bool = False,
) -> Section:
    """Resolve everything a selection needs.

    Args:
        prefer: packages whose versions are kept where the mirror still has them.
        trusted: SHA-256 of repository keys that were locked before; another key is refused.

    Raises:
        BlockedError, UnavailableError, DefinitionError, ImgbuildError.
    """
    precheck(selection, allow_blocked=allow_blocked)
    solve = SOLVERS[selection.base.package_manager]
    with report.step("lock", "asking which versions there are") as step:
        keys = _check_keys(locate(selection, state), trusted or {})
        section = solve(selection, state, {p.name: p.version for p in prefer}, allow_blocked, step.line)
        section = msgspec.structs.replace(section, keys=keys)
        step.outcome = f"kernel {section.kernel_release}, {len(section.packages())} packages"
    return section


def _check_keys(locations: Mapping[str, Location], trusted: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each repository's key; raises ImgbuildError for one that is not the locked one."""
    found = {}
    for name, location in sorted(locations.items()):
        if location.key is None or str(location.key) == location.repository.keyring:
            continue
        found[name] = sha256_of(location.key)
        if trusted.get(name, found[name]) != found[name]:
            raise ImgbuildError(
                f"the key of repository `{name}` is not the one that was locked",
                lines=[f"locked {trusted[name]}", f"found  {found[name]}"],
                help="if its owner changed it, remove the repository from `keys` in imgbuild.lock",
            )
    return found


def _transactions(selection: Selection, release: str) -> list[dict[str, Any]]:
    """What is solved once the kernel release is known; each on top of those it comes after."""
    kernel = selection.base.kernel
    headers = [fill(spec, release=release) for spec in kernel.headers]
    found: list[dict[str, Any]] = []
    if selection.kmods:
        found.append(
            {
                "name": "builder",
                "after": ["tier1", "kernel"],
                "install": [*headers, *selection.base.toolchain],
            }
        )
        for name, (kmod, _) in selection.kmods.items():
            if kmod.build_packages:
                found.append(
                    {
                        "name": f"kmod-{name}",
                        "after": ["tier1", "kernel", "builder"],
                        "install": list(kmod.build_packages),
                    }
                )
    if selection.tier >= 2:
        install = [spec for piece in selection.pieces for spec in piece.part.packages]
        found.append({"name": "tier2", "after": ["tier1", "kernel"], "install": install})
    return found


def _lock_with_apt(
    selection: Selection,
    state: State,
    prefer: Mapping[str, str],
    allow_blocked: bool,
    on_line: Callable[[str], None],
) -> Section:
    bootstrap = selection.base.tier1.bootstrap
    if bootstrap is None:
        raise DefinitionError(
            f"base `{selection.base_name}`: apt bases are bootstrapped, an image cannot be locked"
        )
    locations = locate(selection, state)
    base_names = {repository.name for repository in selection.base.repositories}
    question: dict[str, Any] = {
        "arch": selection.base.arch,
        "sources": [
            line for location in locations.values() for line in apt_sources(location, selection.base.arch)
        ],
        "repositories": {name: location.uri for name, location in locations.items()},
        "prefer": dict(prefer),
        "promises": [],
        "update": True,
    }
    folder = state.root / "apt" / hashlib.sha256("\n".join(question["sources"]).encode()).hexdigest()[:16]
    question["folder"] = str(folder)
    base_transactions = [
        {
            "name": "tier1",
            "after": [],
            "install": ["apt", *bootstrap.packages],
            "essential": True,
        },
        {"name": "kernel", "after": ["tier1"], "install": list(selection.base.kernel.packages)},
    ]
    with state.lock(f"apt-{folder.name}", on_line):
        on_line("tier 1 and kernel")
        # The kernel release, and the verdict on it, before anything of a vendor is asked for.
        own = [line for name in base_names for line in apt_sources(locations[name], selection.base.arch)]
        first = _ask_apt(
            question | {"sources": sorted(own), "transactions": base_transactions, "candidates": []}
        )
        release = _release(selection, first["transactions"]["kernel"])
        known = {name: kmod.version for name, (kmod, _) in selection.kmods.items()}
        check_verdicts(selection, release, known, allow_blocked=allow_blocked)
        on_line("drivers")
        sources = {
            name: kmod.source.package for name, (kmod, _) in selection.kmods.items() if kmod.source.package
        }
        question["update"] = len(own) < len(question["sources"])
        second = _ask_apt(question | {"transactions": [], "candidates": sorted(set(sources.values()))})
        kmods: dict[str, LockedKmod] = {}
        for name, (kmod, _) in selection.kmods.items():
            package = None
            version, epoch = kmod.version or "", ""
            if name in sources:
                package = _package(second["candidates"][sources[name]])
                epoch, version = upstream_version(package.version)
            kmods[name] = LockedKmod(version=version, epoch=epoch, source=package)
        check_verdicts(
            selection, release, {n: k.version for n, k in kmods.items()}, allow_blocked=allow_blocked
        )
        on_line("transactions")
        question["update"] = False
        question["promises"] = [_promise(selection, name, kmods[name], release) for name in selection.kmods]
        third = _ask_apt(
            question
            | {"transactions": [*base_transactions, *_transactions(selection, release)], "candidates": []}
        )
    transactions = {
        name: tuple(_package(package) for package in packages)
        for name, packages in third["transactions"].items()
    }
    _check_same_version(selection, kmods, transactions)
    return Section(
        request=request_of(selection), kernel_release=release, kmods=kmods, transactions=transactions
    )


def _package(data: Mapping[str, Any]) -> LockedPackage:
    """A package as a repository describes it: what it says ends in file names and commands."""
    try:
        return msgspec.convert(data, LockedPackage)
    except msgspec.ValidationError as error:
        raise ImgbuildError(
            f"repository `{data.get('repository')}` describes package {str(data.get('name'))!r} in a way"
            f" that is refused: {error}"
        ) from None


def apt_sources(location: Location, arch: str) -> list[str]:
    """sources.list(5) lines of one repository.

    Raises:
        DefinitionError: apt has no way to write the path of the key.
    """
    if re.search(r"[\s,\[\]]", str(location.key or "")):
        raise DefinitionError(
            f"apt cannot take a key from `{location.key}`",
            help="the state folder ($IMGBUILD_STATE_DIR) needs a path without spaces, commas and brackets",
        )
    options = f"arch={arch}" + (f" signed-by={location.key}" if location.key else "")
    components = " ".join(location.repository.components)
    # Without components a suite is the path of a flat repository, which ends in a slash.
    suites = [
        suite if components or suite.endswith("/") else f"{suite}/" for suite in location.repository.suites
    ]
    return [f"deb [{options}] {location.uri} {suite} {components}".rstrip() for suite in suites]


def _ask_apt(question: Mapping[str, Any]) -> dict[str, Any]:
    script = Path(__file__).parent / "installers" / "apt" / "solve.py"
    # -I: no module of the current folder or of $PYTHONPATH gets in.
    python = ["/usr/bin/python3", "-I"]
    probe = run([*python, "-c", "import apt_pkg"], check=False)
    if probe.returncode != 0:
        raise UnavailableError(
            "python-apt is not installed", help="install it: apt-get install -y python3-apt"
        )
    result = run([*python, str(script)], stdin=json.dumps(question), check=False)
    try:
        answer: dict[str, Any] = json.loads(result.stdout)
    except ValueError:
        raise ImgbuildError("the apt solver failed", lines=result.tail) from None
    error = answer.get("error")
    if error:
        kind = UnavailableError if error["kind"] == "unreachable" else ImgbuildError
        raise kind(
            error["what"],
            lines=error["lines"],
            help="is the mirror right? See --mirror-map" if kind is UnavailableError else "",
        )
    return answer


def _release(selection: Selection, kernel: Iterable[Mapping[str, Any]]) -> str:
    template = selection.base.kernel.release_from or ""
    pattern = re.compile(re.escape(template).replace(r"\{release\}", r"([0-9]+\.[0-9]+[A-Za-z0-9.+_~-]*)"))
    found = sorted({m[1] for p in kernel if (m := pattern.fullmatch(str(p["name"])))})
    if len(found) != 1:
        raise ImgbuildError(
            f"the packages of base `{selection.base_name}` bring {len(found)} kernels, one was expected",
            lines=found,
        )
    return found[0]


def _promise(selection: Selection, name: str, locked: LockedKmod, release: str) -> str:
    """The stanza of a kmod package that is not compiled yet (deb-control(5))."""
    kmod = selection.kmods[name][0]
    provides = [
        fill(p, version=locked.version, epoch=locked.epoch, release=release) for p in kmod.package.provides
    ]
    lines = [
        f"Package: {kmod.package.name}",
        "Status: install ok installed",
        f"Version: {locked.version}",
        f"Architecture: {selection.base.arch}",
        "Maintainer: imgbuild",
        "Description: promise",
    ]
    if provides:
        lines.append(f"Provides: {', '.join(provides)}")
    if kmod.package.conflicts:
        lines.append(f"Conflicts: {', '.join(kmod.package.conflicts)}")
    return "\n".join(lines)


def _check_same_version(
    selection: Selection,
    kmods: Mapping[str, LockedKmod],
    transactions: Mapping[str, tuple[LockedPackage, ...]],
) -> None:
    """Refuse userland and firmware of another version than the modules."""
    installed = {p.name: p.version for p in transactions.get("tier2", ())}
    for piece in selection.pieces:
        for name in piece.part.kmods:
            for package in piece.part.same_version:
                if package not in installed:
                    continue
                version = upstream_version(installed[package])[1]
                if version != kmods[name].version:
                    raise DefinitionError(
                        f"kmod `{name}` is version {kmods[name].version}, but `{package}` is {version}",
                        help="modules, firmware and userland must be of one version: name userland packages "
                        "that fit in the site file (`packages:`), or take the driver of the distribution",
                    )


def _lock_with_dnf(
    selection: Selection,
    state: State,
    prefer: Mapping[str, str],
    allow_blocked: bool,
    on_line: Callable[[str], None],
) -> Section:
    on_line("tier 1")
    upstream_digest(selection)
    raise ImgbuildError(f"base `{selection.base_name}` can be planned and rendered, but not locked yet")


def upstream_digest(selection: Selection) -> str:
    """The digest an upstream image has now.

    Raises:
        UnavailableError: its registry cannot be reached.
    """
    image = selection.base.tier1.image
    assert image is not None
    reference, verify = registry_reference(image, selection.mirrors)
    result = run(
        [
            "skopeo",
            "inspect",
            "--no-tags",
            f"--tls-verify={str(verify).lower()}",
            "--format",
            "{{.Digest}}",
            f"docker://{reference}",
        ],
        check=False,
    )
    if result.returncode != 0:
        raise UnavailableError(
            f"cannot ask the registry for {reference}",
            lines=result.tail[-3:],
            help="a mirror map can name another registry (--mirror-map FILE)",
        )
    return result.stdout.strip()


SOLVERS: Mapping[str, Callable[..., Section]] = {"apt": _lock_with_apt, "dnf": _lock_with_dnf}
