"""A plausible lock of any selection, made up without a network."""

from __future__ import annotations

import hashlib

from imagebuild.load import Selection
from imagebuild.lock import (
    LockedKmod,
    LockedPackage,
    LockedRepository,
    Section,
    fill,
    image_references,
    request_of,
)

RELEASES = {"apt": "6.12.117+deb13-amd64", "dnf": "6.12.0-150.el10.x86_64"}
DRIVERS = {"nvidia": "550.163.01", "zfs": "2.3.4"}


def locked_package(
    name: str, selection: Selection, *, version: str = "1.0-1", salt: str = ""
) -> LockedPackage:
    """A package as a lock has it; `salt` gives it other bytes."""
    suffix = {"apt": "deb", "dnf": "rpm"}[selection.base.package_manager]
    digest = hashlib.sha256(f"{name} {version} {salt}".encode()).hexdigest()
    rpm = selection.base.package_manager == "dnf"
    names = [r.name for r, _ in selection.repositories if r.key or not rpm]
    return LockedPackage(
        name=name,
        version=version,
        arch=selection.base.arch,
        repository=names[0] if names else "image",
        path=f"pool/{name}_{version.replace(':', '%3a')}_{selection.base.arch}.{suffix}",
        size=1000 + int(digest[:5], 16),
        sha256=digest,
    )


def synthetic_section(
    selection: Selection, *, release: str = "", fillers: int = 0, salts: dict[str, str] | None = None
) -> Section:
    """What `lock` could have written for a selection.

    Args:
        release: another kernel release.
        fillers: this many more packages in the uppermost transaction.
        salts: package name → anything; packages named here get other bytes.
    """
    salts = salts or {}
    release = release or RELEASES[selection.base.package_manager]

    def packages(specs: tuple[str, ...] | list[str]) -> tuple[LockedPackage, ...]:
        names = dict.fromkeys(fill(spec, release=release).split(" ")[0] for spec in specs)
        return tuple(locked_package(name, selection, salt=salts.get(name, "")) for name in sorted(names))

    base, bootstrap = selection.base, selection.base.tier1.bootstrap
    transactions = {}
    if bootstrap is not None:
        transactions["tier1"] = packages(["apt", "dpkg", *bootstrap.packages])
    kmods = {}
    if selection.tier >= 2:
        if base.kernel.packages:
            transactions["kernel"] = packages([*base.kernel.packages, base.kernel.release_from])
        if selection.kmods:
            transactions["builder"] = packages([*base.kernel.headers, *base.toolchain])
        for name, (kmod, _) in selection.kmods.items():
            version = kmod.version or DRIVERS.get(name, "1.2.3")
            source = None
            if kmod.source.package:
                package = kmod.source.package
                source = locked_package(
                    package, selection, version=f"{version}-1", salt=salts.get(package, "")
                )
            kmods[name] = LockedKmod(
                version=version, epoch="3" if base.package_manager == "dnf" else "", source=source
            )
            if kmod.build_packages:
                transactions[f"kmod-{name}"] = packages(kmod.build_packages)
            if kmod.core:
                transactions["toolchain"] = packages([*base.toolchain, *base.kernel.user_headers])
            if kmod.core and kmod.build_packages:
                transactions[f"kmod-{name}-core"] = packages(kmod.build_packages)
        specs = [spec for piece in selection.pieces for spec in piece.part.packages]
        transactions["tier2"] = packages([*specs, *(f"filler-{i:04}" for i in range(fillers))])
    image = base.tier1.image or ""
    digest = f"sha256:{'ab' * 32}" if image else ""
    own = {"image": LockedRepository(uri="http://mirror.example/image", keys=("/etc/pki/rpm-gpg/KEY",))}
    return Section(
        request=request_of(selection, digest),
        kernel_release=release,
        base_image=image,
        base_digest=digest,
        base_kernels=(release,) if image else (),
        repositories=own if image else {},
        keys={repository.name: "cd" * 32 for repository, _ in selection.repositories if repository.key},
        images={
            name: f"sha256:{hashlib.sha256(f'{name} {salts.get(name, str())}'.encode()).hexdigest()}"
            for name in image_references(selection)
        },
        kmods=kmods,
        transactions=transactions,
    )
