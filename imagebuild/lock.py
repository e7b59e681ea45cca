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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from imagebuild import kernels, solvers
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
from imagebuild.documents import nearest
from imagebuild.errors import DefinitionError, ImgbuildError
from imagebuild.load import Selection
from imagebuild.report import Report
from imagebuild.sources import Location, locate, mirrored
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
    for name in sorted(old.images.keys() | new.images.keys()):
        was, is_ = old.images.get(name), new.images.get(name)
        if was is None:
            lines.append(f"image {name} {is_} added")
        elif is_ is None:
            lines.append(f"image {name} {was} removed")
        elif was != is_:
            lines.append(f"image {name} {was} -> {is_}")
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


def request_of(selection: Selection, base_digest: str = "") -> str:
    """SHA-256 over everything that decides what is locked: definitions, and the upstream image.

    A lock in which somebody changed the digest of the upstream image is stale by that.
    """
    asked: list[Any] = [
        selection.base_name,
        selection.base.arch,
        selection.vendor_name if selection.tier >= 2 else "",
        as_json(selection.base.tier1),
        base_digest,
        as_json(selection.base.kernel),
        selection.kernel,
        [as_json(repository) for repository, _ in selection.repositories],
        list(selection.base.toolchain),
    ]
    # In an order of its own: images with the same layers in another order have one section.
    for piece in sorted(selection.pieces, key=lambda piece: (piece.kind, piece.name)):
        asked.append([piece.name, list(piece.part.packages)])
        if piece.part.images:
            asked.append(list(piece.part.images))
        for name, kmod in piece.part.kmods.items():
            # Where a directory lies is the machine's matter, and nothing of it is locked.
            source = "directory" if kmod.source.directory else as_json(kmod.source)
            asked.append([name, kmod.version, source, list(kmod.build_packages), as_json(kmod.package)])
            asked += ["core"] if kmod.core else []
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
    if section is None or section.request != request_of(selection, section.base_digest):
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
    absent += [f"image {name}" for name in image_references(selection) if not section.images.get(name)]
    if absent:
        raise DefinitionError(
            f"section `{selection.section}` of the lock lacks packages or digests: {', '.join(absent)}",
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
        allowed = kernels.allowed_range(selection.base.kernel.range, selection.kernel)
        verdict = judge_range(name, kmod.version, allowed, piece.rules, order)
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


@dataclass(frozen=True)
class Upgrade:
    """What a new lock may move: everything, or what these names stand for.

    A name is `base` (the upstream image), `kernel`, a driver, a vendor, a layer, a package or a container
    image.
    """

    everything: bool = False
    names: frozenset[str] = frozenset()

    def covers(self, *names: str) -> bool:
        """Tell whether one of these names may move."""
        return self.everything or not self.names.isdisjoint(names)


KEEP = Upgrade()
ALL = Upgrade(everything=True)


@dataclass(frozen=True)
class _Kept:
    """What stays as it was locked, if it still can be had."""

    prefer: Mapping[str, str]
    base_digest: str = ""
    kernel_release: str = ""
    images: Mapping[str, str] = field(default_factory=dict)


def _kept(selection: Selection, known: Lockfile, upgrade: Upgrade) -> _Kept:
    """What the lock has of this image, else of others of its base, so that they share nodes."""
    old = known.sections.get(selection.section)
    same_base = [s for name, s in sorted(known.sections.items()) if name.split("/")[0] == selection.base_name]
    sections = [old] if old is not None else same_base
    if upgrade.names:
        groups = {"base", "kernel", *selection.kmods, *(piece.name for piece in selection.pieces)}
        movable = (
            groups
            | {p.name for s in sections for p in s.packages()}
            | {i for s in sections for i in s.images}
        )
        for name in sorted(upgrade.names - movable):
            raise DefinitionError(f"the lock has no `{name}` that could be moved", help=nearest(name, groups))
    if upgrade.everything or not sections:
        return _Kept({})
    moved = set(upgrade.names)
    for section in sections:
        moved |= _moved_with(selection, section, upgrade)
    image = selection.base.tier1.image or ""
    digests = [s.base_digest for s in sections if s.base_image == image]
    return _Kept(
        {p.name: p.version for s in sections for p in s.packages() if p.name not in moved},
        "" if upgrade.covers("base") or not digests else digests[0],
        "" if upgrade.covers("kernel") else sections[0].kernel_release,
        {name: d for s in sections for name, d in s.images.items() if not upgrade.covers(name)},
    )


def _moved_with(selection: Selection, section: Section, upgrade: Upgrade) -> set[str]:
    """Packages that move with what was named: those asked for, and their siblings of the same version."""
    names: set[str] = set()
    for piece in selection.pieces:
        if upgrade.covers(piece.name, *piece.part.kmods):
            names |= {
                re.split("[ <>=]", spec)[0] for spec in (*piece.part.packages, *piece.part.same_version)
            }
            names |= {k.source.package for k in piece.part.kmods.values() if k.source.package}
    if upgrade.covers("kernel"):
        names |= {p.name for p in section.transactions.get("kernel", ()) if section.kernel_release in p.name}
        names |= {p.name for p in section.transactions.get("kernel", ()) if p.name.startswith("kernel")}
    versions = {p.version for p in section.packages() if p.name in names}
    return names | {p.name for p in section.packages() if p.version in versions}


def resolve(
    selection: Selection,
    known: Lockfile,
    state: State,
    report: Report,
    *,
    upgrade: Upgrade = KEEP,
    allow_blocked: bool = False,
    base_digest: str = "",
) -> Section:
    """Resolve everything a selection needs.

    Args:
        known: the lock so far: what it has is kept where it still can be had, and its repository keys
            are trusted where another key is refused.
        upgrade: what may move although it still can be had.
        base_digest: the upstream image to take, whatever its tag names now.

    Raises:
        BlockedError, UnavailableError, DefinitionError, ImgbuildError.
    """
    precheck(selection, allow_blocked=allow_blocked)
    kept = _kept(selection, known, upgrade)
    with report.step("lock", "asking which versions there are") as step:
        locations = locate(selection, state)
        keys = _check_keys(locations, trusted_keys(known), state)
        image = selection.base.tier1.image or ""
        if image:
            base_digest = base_digest or kept.base_digest or solvers.upstream_digest(image, selection)
        with solvers.opened(
            selection, locations, state, prefer=kept.prefer, base_digest=base_digest, on_line=step.line
        ) as ask:
            section = _solve(selection, ask, kept, allow_blocked, step.line)
        # A mirror of one of the base image's own repositories may come with a key of its own.
        own = {n: p for n, p in mirrored(selection, state).items() if n in section.repositories and p.key}
        keys |= _check_keys(own, trusted_keys(known), state)
        section = msgspec.structs.replace(
            section,
            request=request_of(selection, base_digest),
            keys=keys,
            base_image=image,
            base_digest=base_digest,
            images=image_digests(selection, kept.images),
        )
        step.outcome = f"kernel {section.kernel_release}, {len(section.packages())} packages"
    return section


def _solve(
    selection: Selection,
    ask: solvers.Ask,
    kept: _Kept,
    allow_blocked: bool,
    on_line: Callable[[str], None],
) -> Section:
    """The recorded steps: kernel, drivers, transactions."""
    on_line("tier 1 and kernel")
    kernel, stock, done = _kernel(selection, ask, kept)
    release = kernel.release
    # The verdict comes before anything of a vendor is asked for.
    known = {name: kmod.version for name, (kmod, _) in selection.kmods.items()}
    check_verdicts(selection, release, known, allow_blocked=allow_blocked)
    on_line("drivers")
    sources = {n: kmod.source.package for n, (kmod, _) in selection.kmods.items() if kmod.source.package}
    found = ask(candidates=sorted(set(sources.values()))).candidates if sources else {}
    kmods: dict[str, LockedKmod] = {}
    for name, (kmod, _) in selection.kmods.items():
        package = _package(found[sources[name]]) if name in sources else None
        epoch, version = upstream_version(package.version) if package else ("", kmod.version or "")
        kmods[name] = LockedKmod(version=version, epoch=epoch, source=package)
    versions = {name: kmod.version for name, kmod in kmods.items()}
    check_verdicts(selection, release, versions, allow_blocked=allow_blocked)
    on_line("transactions")
    answer = ask(
        transactions=_transactions(selection, release),
        done=done,
        promises=[_promise(selection, name, kmods[name], release) for name in selection.kmods],
    )
    transactions = {
        name: tuple(_package(package) for package in packages)
        for name, packages in (done | answer.transactions).items()
    }
    for name in answer.dropped:
        on_line(f"{name}: what was locked cannot be kept together")
    second = sorted({r for name in ("tier2",) for r in answer.releases.get(name, ()) if r != release})
    if second:
        raise ImgbuildError(
            f"the packages of tier 2 bring a second kernel: {', '.join(second)} beside {release}",
            help=f"an image has one: `kernel: {second[-1]}` in the site file takes that one, "
            "or leave out the package that asks for it",
        )
    _check_same_version(selection, kmods, transactions)
    return Section(
        request="",
        kernel_release=release,
        kernel_reason=kernel.reason,
        base_kernels=tuple(stock) if selection.base.tier1.image else (),
        kmods=kmods,
        transactions=transactions,
        repositories={
            name: LockedRepository(uri=found.uri, keys=found.keys)
            for name, found in answer.repositories.items()
        },
    )


def _kernel(
    selection: Selection, ask: solvers.Ask, kept: _Kept
) -> tuple[kernels.Choice, list[str], dict[str, Any]]:
    """The kernel, the releases that would come without asking, and the solved transactions up to it."""
    kernel, wanted = selection.base.kernel, selection.kernel
    bootstrap = selection.base.tier1.bootstrap
    first: list[dict[str, Any]] = []
    if bootstrap is not None:
        packages = ["apt", *bootstrap.packages]
        required = bootstrap.variant == "minbase"
        first.append(
            {"name": "tier1", "after": [], "install": packages, "essential": True, "required": required}
        )

    def transactions(install: Iterable[str]) -> list[dict[str, Any]]:
        return [*first, {"name": "kernel", "after": ["tier1"], "install": list(install)}]

    filled = [spec for spec in kernel.replace if "{release}" in spec]
    rest = [spec for spec in kernel.replace if "{release}" not in spec]
    named = wanted if wanted is not None and kernels.is_package(wanted) else None
    install = [named, *rest] if named else list(kernel.packages)
    asked = transactions(install) if install else first
    # Without kmods nothing is compiled, and headers do not matter.
    headers = [spec for spec in kernel.headers if "{release}" in spec] if selection.kmods else []
    patterns = list(dict.fromkeys([*filled, *headers]))
    answer = ask(base_only=True, transactions=asked, releases_of=patterns)
    brought = answer.releases.get("kernel", [])
    if install and len(brought) != 1:
        raise ImgbuildError(
            f"{', '.join(install)} bring {len(brought)} kernels, one was expected",
            lines=brought,
            help=f"one of base `{selection.base_name}` is named like {kernel.release_from}",
        )
    stock = brought if install else answer.kernels
    if not stock:
        raise ImgbuildError(
            f"the image of base `{selection.base_name}` has no kernel in /usr/lib/modules",
            help="a base image must be bootable by itself",
        )

    def common(specs: Iterable[str]) -> set[str] | None:
        found = [set(answer.releases_of.get(spec, {})) for spec in specs]
        return set.intersection(*found) if found else None

    choice = kernels.choose(
        stock,
        installable=common(filled) or (),
        with_headers=common(headers),
        allowed=kernels.allowed_range(kernel.range, wanted),
        flavour=kernel.releases,
        order=ORDERS[selection.base.package_manager],
        asked=wanted,
        keep=kept.kernel_release,
    )
    if choice.replaced:
        specs = [*(fill(spec, release=choice.release) for spec in filled), *rest]
        answer = ask(base_only=True, transactions=transactions(specs))
    elif named:
        choice = kernels.Choice(choice.release, f"kernel {choice.release}, because the site asks for {named}")
    return choice, sorted(answer.kernels), answer.transactions


def _promise(selection: Selection, name: str, locked: LockedKmod, release: str) -> dict[str, Any]:
    """A kmod package that is not compiled yet, as a solver takes part of it."""
    package = selection.kmods[name][0].package
    values = {"version": locked.version, "epoch": locked.epoch, "release": release}
    return {
        "name": package.name,
        "version": locked.version,
        "epoch": locked.epoch,
        "arch": selection.base.arch,
        "provides": [fill(text, **values) for text in package.provides],
        "conflicts": list(package.conflicts),
    }


def drift(selection: Selection, known: Lockfile, state: State, report: Report) -> list[str]:
    """What moved upstream since a selection was locked, a line each; empty when nothing did.

    The lock stays as it is. Where the upstream image moved, that is said, and the rest is asked on top of
    the locked one.
    """
    section = section_of(known, selection)
    if section is None:
        stale = selection.section in known.sections
        why = "definitions changed since it was locked" if stale else "not locked"
        return [f"section {selection.section}: {why}"]
    lines = []
    if section.base_image:
        now = solvers.upstream_digest(section.base_image, selection)
        if now != section.base_digest:
            lines.append(f"base image {section.base_digest} -> {now}")
    new = resolve(
        selection,
        known,
        state,
        report,
        upgrade=ALL,
        allow_blocked=True,
        base_digest=section.base_digest,
    )
    return lines + differences(section, new)


def offered(
    selection: Selection, section: Section, names: Iterable[str], state: State
) -> dict[str, list[str]]:
    """Versions the repositories offer now of some packages, oldest first."""
    wanted = sorted(set(names))
    with solvers.opened(
        selection,
        locate(selection, state),
        state,
        prefer={},
        base_digest=section.base_digest,
        on_line=lambda _: None,
    ) as ask:
        return ask(offered=wanted).offered


def _check_keys(
    locations: Mapping[str, Location], trusted: Mapping[str, str], state: State
) -> dict[str, str]:
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
        state.keep(location.key, found[name])
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
    cores = [name for name, (kmod, _) in selection.kmods.items() if kmod.core]
    if cores:  # on tier 1 alone: no kernel may have a say
        found.append({"name": "toolchain", "after": ["tier1"], "install": list(selection.base.toolchain)})
        found += [
            {"name": f"kmod-{name}-core", "after": ["tier1", "toolchain"], "install": list(packages)}
            for name in cores
            if (packages := selection.kmods[name][0].build_packages)
        ]
    if selection.tier >= 2:
        install = [spec for piece in selection.pieces for spec in piece.part.packages]
        found.append({"name": "tier2", "after": ["tier1", "kernel"], "install": install, "promised": True})
    return found


def _package(data: Mapping[str, Any]) -> LockedPackage:
    """A package as a repository describes it: what it says ends in file names and commands."""
    try:
        return msgspec.convert(data, LockedPackage)
    except msgspec.ValidationError as error:
        raise ImgbuildError(
            f"repository `{data.get('repository')}` describes package {str(data.get('name'))!r} in a way"
            f" that is refused: {error}"
        ) from None


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


def image_references(selection: Selection) -> list[str]:
    """The container images that the pieces of a selection name, as they are written there."""
    return sorted({reference for piece in selection.pieces for reference in piece.part.images})


def image_digests(selection: Selection, keep: Mapping[str, str]) -> dict[str, str]:
    """The digest of each container image a selection names, by reference.

    Args:
        keep: digests to keep, by reference; registries are asked only for the others, and never for a
            reference that holds a digest itself.

    Raises:
        UnavailableError: a registry cannot be reached, or does not have the image.
    """
    return {
        reference: reference.partition("@")[2]
        or keep.get(reference)
        or solvers.upstream_digest(reference, selection)
        for reference in image_references(selection)
    }
