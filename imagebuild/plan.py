"""Definitions + lock → the graph of images to build. Pure: no file is written, no program is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from imagebuild.compat import ORDERS, Verdict, blocked_error, judge, judge_range
from imagebuild.kernels import allowed_range
from imagebuild.load import Selection
from imagebuild.lock import LockedKmod, LockedPackage, Section, fill

Kind = Literal["bootstrap", "upstream", "kernel", "builder", "core", "kmod", "tier"]


@dataclass(frozen=True)
class Node:
    """One image of the graph.

    `parents` are names of nodes: the one it is built from first, then the kmod or core images it takes in.
    `packages` are what is installed in it, empty when not locked yet; `specs` what was asked for.
    `source` is the package that carries a driver's source. A core takes those `patches` that touch it.
    """

    name: str
    kind: Kind
    summary: str
    parents: tuple[str, ...] = ()
    specs: tuple[str, ...] = ()
    packages: tuple[LockedPackage, ...] = ()
    kmod: str = ""
    source: LockedPackage | None = None
    patches: tuple[str, ...] = ()

    @property
    def has_packages(self) -> bool:
        """Tell whether anything is installed in this node."""
        return bool(self.specs)

    @property
    def final(self) -> bool:
        """Tell whether this node is a tier, which gets a name people use."""
        return self.kind in ("bootstrap", "upstream", "tier")


@dataclass(frozen=True)
class Plan:
    """What would be built: the nodes in an order in which each comes after its parents."""

    selection: Selection
    section: Section | None
    nodes: tuple[Node, ...]
    verdicts: tuple[Verdict, ...]
    notices: tuple[str, ...]

    @property
    def locked(self) -> bool:
        """Tell whether versions are known, and so keys can be."""
        return self.section is not None

    @property
    def kernel_release(self) -> str:
        """The kernel release, or what stands for it while it is not locked."""
        return self.section.kernel_release if self.section else "<unlocked: kernel_release>"

    def kmod(self, name: str) -> LockedKmod:
        """A driver's locked version, or what stands for it."""
        if self.section:
            return self.section.kmods[name]
        known = self.selection.kmods[name][0].version
        return LockedKmod(version=known or f"<unlocked: {name}.version>")

    @property
    def kernel_reason(self) -> str:
        """Why it is this kernel; empty while it is not locked."""
        return self.section.kernel_reason if self.section else ""

    @property
    def target(self) -> Node:
        """The node that was asked for."""
        return self.nodes[-1]


def plan(selection: Selection, section: Section | None, *, allow_blocked: bool = False) -> Plan:
    """Lay out the graph: tier1 → kernel → builder → kmods → tier2, and tier1 → toolchain → cores → kmods.

    Raises:
        BlockedError: a compat rule blocks a driver, and blocked pairs were not allowed.
    """
    verdicts = tuple(_verdicts(selection, section))
    for verdict in verdicts:
        if verdict.kind == "blocked" and not allow_blocked:
            raise blocked_error(verdict)
    transactions = section.transactions if section else {}
    base = selection.base
    upstream = base.tier1.bootstrap
    nodes = [
        Node(
            "tier1",
            "bootstrap" if upstream else "upstream",
            base.summary,
            specs=upstream.packages if upstream else (),
            packages=transactions.get("tier1", ()),
        )
    ]
    if selection.tier >= 2:
        below = "tier1"
        if _own_kernel(selection, section):
            nodes.append(
                Node(
                    "kernel",
                    "kernel",
                    "the one kernel of the image",
                    (below,),
                    base.kernel.packages or base.kernel.replace,
                    transactions.get("kernel", ()),
                )
            )
            below = "kernel"
        if selection.kmods:
            nodes.append(
                Node(
                    "builder",
                    "builder",
                    "kernel headers and compiler; thrown away",
                    (below,),
                    (*base.kernel.headers, *base.toolchain),
                    transactions.get("builder", ()),
                )
            )
        if any(kmod.core for kmod, _ in selection.kmods.values()):
            nodes.append(
                Node(
                    "toolchain",
                    "builder",
                    "compiler without kernel headers; thrown away",
                    ("tier1",),
                    base.toolchain,
                    transactions.get("toolchain", ()),
                )
            )
        by_name = {verdict.kmod: verdict for verdict in verdicts}
        for name, (kmod, _) in selection.kmods.items():
            rule = by_name[name].rule
            source = section.kmods[name].source if section else None
            patches = (rule.patch,) if rule and rule.patch else ()
            if kmod.core:
                nodes.append(
                    Node(
                        f"kmod-{name}-core",
                        "core",
                        f"{kmod.summary}: the part for every kernel",
                        ("toolchain",),
                        kmod.build_packages,
                        transactions.get(f"kmod-{name}-core", ()),
                        kmod=name,
                        source=source,
                        patches=patches,
                    )
                )
            nodes.append(
                Node(
                    f"kmod-{name}",
                    "kmod",
                    kmod.summary,
                    ("builder", f"kmod-{name}-core") if kmod.core else ("builder",),
                    kmod.build_packages,
                    transactions.get(f"kmod-{name}", ()),
                    kmod=name,
                    source=source,
                    patches=patches,
                )
            )
        nodes.append(
            Node(
                "tier2",
                "tier",
                f"{selection.base_name} with vendor {selection.vendor_name}",
                (below, *(f"kmod-{name}" for name in selection.kmods)),
                tuple(spec for piece in selection.pieces for spec in piece.part.packages),
                transactions.get("tier2", ()),
            )
        )
    return Plan(selection, section, tuple(nodes), verdicts, tuple(selection.notices))


def _own_kernel(selection: Selection, section: Section | None) -> bool:
    """Tell whether the kernel is a matter of ours: installed by us, or one of several in the base image."""
    if section is None:
        return bool(selection.base.kernel.packages) or selection.kernel is not None
    return bool(section.transactions.get("kernel")) or section.base_kernels not in (
        (),
        (section.kernel_release,),
    )


def _verdicts(selection: Selection, section: Section | None) -> list[Verdict]:
    order = ORDERS[selection.base.package_manager]
    found = []
    for name, (kmod, piece) in selection.kmods.items():
        if section is None:
            allowed = allowed_range(selection.base.kernel.range, selection.kernel)
            found.append(judge_range(name, kmod.version, allowed, piece.rules, order))
        else:
            driver = section.kmods[name].version
            found.append(judge(name, driver, section.kernel_release, piece.rules, order))
    return found


def fill_kmod(text: str, locked: LockedKmod, release: str) -> str:
    """Fill a kmod's version, epoch and kernel release into a definition's text."""
    return fill(text, version=locked.version, epoch=locked.epoch, release=release)
