"""What differs between the bases whose whole line test_line.py goes through: data alone, a row for each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..rehearsal import contents
from .workshop import TOY

THIRD = Path(__file__).parent / "third"


@dataclass(frozen=True)
class Line:
    """A base with a vendor: how it is asked for, and what has to come out."""

    base: str
    words: tuple[str, ...]
    """What the command line says of it."""
    upstream: str
    """Name of the fixture that gives the words about where its packages come from."""
    why_base: str
    """Why it is this base, in the first line of output."""
    kmod: str
    package: str
    """The package of the compiled modules."""
    modules: tuple[str, ...]
    suffix: str
    """Of a module's file name."""
    release: str
    """The kernel's release, as a pattern."""
    nodes: tuple[str, ...]
    locks: frozenset[str]
    """The transactions in its lock."""
    facts: frozenset[str]
    """What the lock holds of it beside transactions."""
    installed: str
    """The command that prints the name of every installed package."""
    owned: str
    """The command that prints every file that a package owns."""
    owner: str
    """The command that prints the package of each file given to it, a line for each."""
    owner_says: str
    """How each of its lines begins."""
    answers: Mapping[str, str]
    """Other commands in the image, and a pattern that is found in what they print."""
    files: tuple[str, ...]
    """Patterns of paths that are in the image."""
    units: tuple[str, ...]
    """What starts at boot."""
    verdict: str
    """What the compat rules say."""
    wanted: frozenset[str] = frozenset()
    """Packages of the userland."""
    unwanted: frozenset[str] = frozenset()
    """Packages that only a builder has."""
    patch: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    """Path of the image → text in it."""
    notices: tuple[str, ...] = ()
    """What a plan draws attention to."""
    findings: frozenset[tuple[str, str]] = frozenset()
    """What `check` says of the finished image: check and severity."""
    by_machine: frozenset[tuple[str, str]] = frozenset()
    """What it says as well where the building machine has an older systemd or buildah."""
    given: tuple[str, ...] = ()
    """Nodes with files that whoever made the upstream image answers for."""
    definitions: Mapping[str, Path] = field(default_factory=dict)
    """Definitions that are not shipped: place in the site → folder to copy."""


NVIDIA = ("nvidia", "nvidia-modeset", "nvidia-drm", "nvidia-uvm", "nvidia-peermem")
NVIDIA_UNITS = ("imgbuild-cdi.service", "nvidia-persistenced.service")
GSP = "usr/lib/firmware/nvidia/*/gsp_*.bin"
KARGS = {"usr/lib/bootc/kargs.d/10-imgbuild-nvidia.toml": "modprobe.blacklist=nouveau"}
UNSIGNED = ("unsigned-modules", "warning")
# Settings that the machine's systemd does not know.
UNJUDGED = ("units-verify", "notice")
NO_GENERATOR = "no CDI generator"
# Runs; without a card it says so.
SMI = {"nvidia-smi": "^NVIDIA-SMI"}
NOTHING = r"\A\Z"
APT_OWNED = "cat /var/lib/dpkg/info/*.list"
APT_INSTALLED = "dpkg-query -W -f '${Package}\\n'"
BUILDER = frozenset({"gcc", "make", "patch"})
BOOTSTRAPPED = ("tier1", "kernel", "builder")

LINES = (
    Line(
        base="debian",
        words=("--tier", "2", "--vendor", "nvidia"),
        upstream="host_mirror",
        why_base="default; no --base, no site file names one",
        kmod="nvidia",
        package="kmod-nvidia",
        modules=NVIDIA,
        suffix=".ko.xz",
        release=r"6\.12\.[0-9]+\+deb13-amd64",
        nodes=(*BOOTSTRAPPED, "kmod-nvidia", "tier2"),
        locks=frozenset({*BOOTSTRAPPED, "tier2"}),
        facts=frozenset({"kernel_release", "kernel_reason", "kmods"}),
        installed=APT_INSTALLED,
        owned=APT_OWNED,
        owner="dpkg -S",
        owner_says="kmod-nvidia: ",
        answers={
            "dpkg-query -W -f '${Provides}' kmod-nvidia": "nvidia-open-kernel-550",
            "dpkg --verify kmod-nvidia": NOTHING,
            **SMI,
        },
        files=(GSP, "usr/share/doc/kmod-nvidia/copyright"),
        units=NVIDIA_UNITS,
        verdict="patch",
        wanted=frozenset({"firmware-nvidia-gsp", "libcuda1", "nvidia-persistenced", "nvidia-smi"}),
        unwanted=BUILDER | {"linux-libc-dev", "nvidia-open-kernel-dkms", "dkms"},
        patch="patches/pci_resize_resource.patch",
        texts={"usr/lib/modprobe.d/imgbuild-nvidia.conf": "blacklist nouveau", **KARGS},
        notices=(NO_GENERATOR,),
        findings=frozenset({UNSIGNED, ("cdi-generator", "notice")}),
        by_machine=frozenset({UNJUDGED}),
    ),
    Line(
        base="centos",
        words=("--base", "centos", "--vendor", "nvidia"),
        upstream="look_alike",
        why_base="--base",
        kmod="nvidia",
        package="kmod-nvidia-open",
        modules=NVIDIA,
        suffix=".ko.xz",
        release=re.escape(contents.release_of(contents.KERNELS["new"])),
        nodes=("tier1", "builder", "kmod-nvidia", "tier2"),
        locks=frozenset({"builder", "tier2"}),
        facts=frozenset({"base_digest", "kernel_release", "kernel_reason", "keys", "kmods", "repositories"}),
        installed="rpm -qa --qf '%{NAME}\\n'",
        owned="rpm -qla",
        owner="rpm -qf",
        owner_says="kmod-nvidia-open-",
        answers={
            "rpm -q --provides kmod-nvidia-open": (
                f"(?m)^nvidia-kmod = {contents.DRIVER_EPOCH}:{re.escape(contents.DRIVER)}$"
            ),
            # Layers have one clamped time, so that the same inputs give the same digest.
            "rpm -V --nomtime kmod-nvidia-open nvidia-driver-cuda kernel-core": NOTHING,
            "bootc container lint": "STAND-IN",
            **SMI,
        },
        files=(GSP,),
        units=NVIDIA_UNITS,
        verdict="unknown",
        wanted=frozenset(
            {"nvidia-container-toolkit-base", "nvidia-driver-cuda", "nvidia-kmod-common"}
            | {"nvidia-persistenced"}
        ),
        unwanted=BUILDER | {"dkms", "kernel-devel", "kmod-nvidia-open-dkms", "rpm-build"},
        texts={"usr/lib/modprobe.d/nvidia.conf": "blacklist nouveau", **KARGS},
        findings=frozenset({UNSIGNED}),
        # Older buildah leaves empty files in /etc where the upstream image has none.
        by_machine=frozenset({UNJUDGED, ("buildah-injected", "warning")}),
        given=("tier1",),
    ),
    Line(
        base="third",
        words=("--base", "third", "--vendor", "toy", "--with", "cdi"),
        upstream="host_mirror",
        why_base="--base",
        kmod="toy",
        package="kmod-toy",
        modules=("toy",),
        suffix=".ko",
        release=r"6\.12\.[0-9]+\+deb13-cloud-amd64",
        nodes=(*BOOTSTRAPPED, "kmod-toy", "tier2"),
        locks=frozenset({*BOOTSTRAPPED, "tier2"}),
        facts=frozenset({"kernel_release", "kernel_reason", "kmods"}),
        installed=APT_INSTALLED,
        owned=APT_OWNED,
        owner="dpkg -S",
        owner_says="kmod-toy: ",
        answers={
            "dpkg-query -W -f '${Provides}' kmod-toy": r"^toy-kmod \(= 1\.0\)$",
            "dpkg --verify kmod-toy": NOTHING,
        },
        files=("usr/lib/dracut/dracut.conf.d/90-toy.conf", "usr/share/doc/kmod-toy/COPYING"),
        units=("imgbuild-cdi.service",),
        verdict="unknown",
        wanted=frozenset({"less"}),
        unwanted=BUILDER,
        notices=(NO_GENERATOR,),
        findings=frozenset({UNSIGNED}),
        by_machine=frozenset({UNJUDGED}),
        definitions={
            "base/third": THIRD / "base/third",
            "base/third/toy": TOY / "base/debian/toy",
            "source": TOY / "source",
        },
    ),
)
