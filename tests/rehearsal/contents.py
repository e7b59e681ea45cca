"""What the repositories hold: Debian's files under the package names and dependencies of EL 10.

Each function below takes the files of some Debian packages and yields RPMs to be made of them. They name
and require each other as those of CentOS Stream, NVIDIA and OpenZFS do, as far as imgbuild's definitions
and dnf can tell.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .commands import RehearsalError, run
from .debs import Deb
from .rpms import Keys, Rpm

FILES = Path(__file__).parent / "files"
"""Files that Debian does not have: repository definitions, stand-ins, units. By RPM."""

KERNELS = {"old": "6.12.107+deb13", "new": "6.12.117+deb13"}
FLAVOUR = "amd64"
DRIVER = "550.163.01"
DRIVER_EPOCH = 3
ZFS = "2.3.9"

BASE = "baseos"
APP = "appstream"
CRB = "crb"
EXTRAS = "extras-common"
EPEL = "epel"
CUDA = "cuda-rhel10-x86_64"
TOOLKIT = "nvidia-container-toolkit"
ZFS_REPO = "zfs"
FAULTY = "faulty"

SIGNERS = {
    BASE: "centos",
    APP: "centos",
    CRB: "centos",
    EXTRAS: "centos",
    EPEL: "epel",
    CUDA: "nvidia",
    TOOLKIT: "toolkit",
    ZFS_REPO: "zfs",
    FAULTY: "epel",
}
"""Repository → the key that signs its packages and its metadata."""
STRANGER = "stranger"

ROOT_PATTERNS = ("?essential", "?priority(required)")
ROOT_PACKAGES = (
    *("ca-certificates", "cpio", "dbus", "dnf", "dracut-core", "gnupg", "iproute2", "kmod", "libtirpc3t64"),
    *("ostree-boot", "python3", "python3-dnf", "rpm", "systemd", "systemd-sysv", "udev", "zstd"),
)
"""Debian packages of the base image, beside the essential ones."""

COMPILER = ("gcc", "libc6-dev", "binutils")
"""Taken with everything they need that the base image lacks."""


def release_of(version: str) -> str:
    """The kernel release (uname -r) of a kernel version."""
    return f"{version}-{FLAVOUR}"


@dataclass(frozen=True)
class Recipe:
    """RPMs to be made: a function, and the names of the Debian packages it takes the files from."""

    name: str
    make: Callable[[Bench], Iterator[Rpm]]
    debs: tuple[str, ...] = ()


class Bench:
    """Where a recipe unpacks Debian packages and stages the files of its RPMs."""

    def __init__(self, folder: Path, debs: Mapping[str, Deb], keys: Keys) -> None:
        self.folder = folder
        self.debs = debs
        self.keys = keys

    def empty(self) -> Path:
        """A new empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def unpacked(self, *names: str, without: Sequence[str] = ()) -> Path:
        """The files of Debian packages in one tree, /usr merged, without documentation.

        Args:
            without: paths below / to leave out; `*` stands for anything.
        """
        tree = self.empty()
        left_out = [f"--exclude=./{path}" for path in (*NO_FILES, *without)]
        script = 'deb=$1 tree=$2; shift 2; dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tree" "$@"'
        for name in names:
            run(["bash", "-eo", "pipefail", "-c", script, "bash", self.debs[name].path, tree, *left_out])
        for name in ("bin", "sbin", "lib", "lib64"):
            place = tree / name
            if place.is_dir() and not place.is_symlink():
                merge(place, tree / "usr" / name)
        for folder in (tree / "usr/share", tree / "etc"):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return tree

    def own(self, name: str) -> Path:
        """A tree of the files kept in this package for an RPM."""
        tree = self.empty()
        shutil.copytree(FILES / name, tree, symlinks=True, dirs_exist_ok=True)
        return tree


NO_FILES = (
    *(f"usr/share/{name}" for name in ("bug", "doc", "gcc", "gdb", "info", "lintian", "locale", "man")),
    "etc/init.d",
)
"""Of no Debian package."""


def merge(source: Path, target: Path) -> None:
    """Move what is in a folder into another, which may have some of the same folders; files replace."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        place = target / path.name
        if path.is_dir() and not path.is_symlink() and place.is_dir() and not place.is_symlink():
            merge(path, place)
        else:
            path.rename(place)
    source.rmdir()


def take(tree: Path, *patterns: str, to: Path) -> None:
    """Move what matches from one tree to the same places in another."""
    for pattern in patterns:
        found = sorted(tree.glob(pattern))
        if not found:
            raise RehearsalError(f"the Debian packages have no {pattern} any more")
        for path in found:
            place = to / path.relative_to(tree)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)


def libraries(tree: Path) -> None:
    """Move a tree's libraries to where EL has them; the base image's linker looks there too."""
    source = tree / "usr/lib/x86_64-linux-gnu"
    target = tree / "usr/lib64"
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted([*source.glob("*.so*"), *source.glob("nvidia/current/*.so*")]):
        path.rename(target / path.name)
    shutil.rmtree(source)


# --- CentOS Stream ---

NAMES_ONLY = (
    *("ca-certificates", "coreutils", "cpio", "dbus", "diffutils", "dnf", "dracut", "elfutils-libelf"),
    *("findutils", "gawk", "gnupg2", "grep", "gzip", "iproute", "libtirpc", "libzstd", "openssl-libs"),
    *("ostree", "python3", "rpm", "sed", "shadow-utils", "systemd", "systemd-udev", "tar", "util-linux"),
    *("xz-libs", "zlib-ng-compat", "zstd"),
)
"""What the base image has as Debian files: rows of the RPM database that own none of them."""

BASE_ROWS = (
    *("bash", "centos-gpg-keys", "centos-stream-release", "centos-stream-repos", "glibc", "kmod"),
    *NAMES_ONLY,
)
"""RPMs of the base image, without its kernel."""

KEY_FOLDER = "etc/pki/rpm-gpg"
CENTOS_KEYS = ("RPM-GPG-KEY-centosofficial-SHA256", "RPM-GPG-KEY-CentOS-SIG-Extras-SHA512")

SHELL = ("/bin/sh", "/usr/bin/sh", "/bin/bash", "/usr/bin/bash")
LDCONFIG = ("/sbin/ldconfig", "/usr/sbin/ldconfig")


def centos(bench: Bench) -> Iterator[Rpm]:
    """Release, repository definitions, and the names of what the base image has from Debian."""
    yield Rpm(
        *(BASE, "centos-stream-release", "10.0"),
        arch="noarch",
        tree=bench.own("centos-stream-release"),
        provides=(
            *("centos-release = 10.0", "system-release = 10.0", "system-release(releasever) = 10"),
            "base-module(platform:el10)",
        ),
        requires=("centos-stream-repos = 10.0",),
    )
    yield Rpm(
        *(BASE, "centos-stream-repos", "10.0"),
        arch="noarch",
        tree=bench.own("centos-stream-repos"),
        requires=("centos-gpg-keys = 10.0",),
    )
    tree = bench.empty()
    (tree / KEY_FOLDER).mkdir(parents=True)
    for name in CENTOS_KEYS:
        shutil.copy(bench.keys.public("centos"), tree / KEY_FOLDER / name)
    yield Rpm(BASE, "centos-gpg-keys", "10.0", arch="noarch", tree=tree)
    # Scriptlets make rpm require their interpreter, whatever AutoReqProv says.
    yield Rpm(BASE, "bash", "5.2.37", arch="noarch", provides=SHELL)
    yield Rpm(BASE, "glibc", "2.41", arch="noarch", provides=LDCONFIG)
    for name in NAMES_ONLY:
        version = {"systemd": "257", "systemd-udev": "257", "rpm": "4.20.1", "dnf": "4.23.0"}.get(name, "1.0")
        yield Rpm(BASE, name, version, arch="noarch")
    yield Rpm(CRB, "libtirpc-devel", "1.3.6", arch="noarch")
    yield Rpm(EXTRAS, "epel-release", "10", release="6.el10", arch="noarch")
    yield Rpm(EPEL, "epel-release", "10", release="7.el10", arch="noarch")
    yield Rpm(EPEL, "dkms", "3.2.0", arch="noarch", tree=bench.own("dkms"))


def kernel(version: str) -> Callable[[Bench], Iterator[Rpm]]:
    """The recipe of one kernel and its modules."""

    def make(bench: Bench) -> Iterator[Rpm]:
        release = release_of(version)
        left_out = [f"usr/lib/modules/*/kernel/{name}" for name in NO_MODULES]
        core = bench.unpacked(f"linux-image-{release}", without=left_out)
        folder = Path("usr/lib/modules", release)
        for name in ("vmlinuz", "config", "System.map"):
            (core / f"boot/{name}-{release}").rename(core / folder / name)
        shutil.rmtree(core / "boot")
        for name in ("build", "source"):
            (core / folder / name).unlink(missing_ok=True)
        (core / folder / "build").symlink_to(f"/usr/src/kernels/{release}")
        (core / folder / "source").symlink_to("build")
        modules, more = bench.empty(), bench.empty()
        take(core, *(f"{folder}/kernel/{path}" for path in MORE_MODULES), to=more)
        take(core, f"{folder}/kernel", to=modules)

        def one(
            name: str, tree: Path | None, provides: Sequence[str] = (), requires: Sequence[str] = ()
        ) -> Rpm:
            kind = "kernel-module" if name.startswith("kernel-modules") else "kernel"
            return Rpm(
                *(BASE, name, version, FLAVOUR),
                tree=tree,
                provides=(
                    f"{name}-uname-r = {release}",
                    *(f"{what} = {release}" for what in provides),
                    f"installonlypkg({kind})",
                ),
                requires=tuple(f"{what} = {release}" for what in requires),
            )

        yield one("kernel-core", core, ["kernel-uname-r"], ["kernel-modules-core-uname-r"])
        yield one("kernel-modules-core", modules, [], ["kernel-uname-r"])
        yield one("kernel-modules", more, [], ["kernel-uname-r", "kernel-modules-core-uname-r"])
        yield Rpm(
            *(BASE, "kernel", version, FLAVOUR),
            provides=("installonlypkg(kernel)",),
            requires=tuple(
                f"kernel-{part}-uname-r = {release}" for part in ("core", "modules", "modules-core")
            ),
        )

    return make


KERNEL_RPMS = ("kernel", "kernel-core", "kernel-modules", "kernel-modules-core")

NO_MODULES = (
    *("drivers/accel", "drivers/atm", "drivers/base/regmap/regmap-sdw*", "drivers/block/rbd*"),
    *("drivers/bluetooth", "drivers/comedi", "drivers/crypto/chelsio", "drivers/hid/surface-hid"),
    *("drivers/hid/hid-[a-l]*", "drivers/hid/hid-mcp*", "drivers/hid/hid-[n-z]*", "drivers/hwmon"),
    *("drivers/iio", "drivers/infiniband/[hsu]*", "drivers/input/touchscreen", "drivers/isdn"),
    *(f"drivers/media/{name}" for name in ("common", "dvb*", "firewire", "i2c", "mmc", "pci", "platform")),
    *(f"drivers/media/{name}" for name in ("radio", "rc/keymaps", "spi", "test-drivers", "tuners", "usb")),
    *("drivers/mfd/cs42*", "drivers/mtd", "drivers/net/can", "drivers/net/ethernet", "drivers/net/wireless"),
    *("drivers/platform/[!x]*", "drivers/platform/x86/[!w]*", "drivers/power/supply", "drivers/powercap"),
    *("drivers/ptp/ptp_ocp*", "drivers/rtc/rtc-wilco*", "drivers/soundwire", "drivers/staging"),
    *("drivers/target", "drivers/thermal/intel", "drivers/usb/dwc3", "drivers/usb/gadget"),
    *("drivers/usb/serial", "drivers/usb/usbip", "drivers/vhost/vhost_scsi*", "drivers/xen/xen-scsi*"),
    *(f"drivers/gpu/drm/{name}" for name in ("amd", "i915", "nouveau", "radeon", "xe")),
    *(f"drivers/scsi/{name}" for name in ("bfa", "bnx2*", "cxgbi", "lpfc", "qed*", "qla2xxx")),
    *("drivers/video/fbdev", "fs/bcachefs", "fs/ceph", "fs/f2fs", "fs/gfs2", "fs/jffs2", "fs/nfsd"),
    *("fs/ocfs2", "fs/romfs", "fs/ubifs", "net/batman-adv", "net/bluetooth", "net/ceph", "net/mac80211"),
    *("net/sctp", "net/tipc", "net/wireless", "sound"),
)
"""Modules nothing here needs, more than half of the whole: left out to keep the image small."""
MORE_MODULES = ("drivers/gpu", "drivers/infiniband", "drivers/input")
"""Modules that kernel-modules has, not kernel-modules-core."""


def kernel_devel(version: str) -> Callable[[Bench], Iterator[Rpm]]:
    """The recipe of one kernel's headers: one tree, where Debian has three that point to each other."""

    def make(bench: Bench) -> Iterator[Rpm]:
        release = release_of(version)
        # With a vmlinux, kbuild wants pahole for each module; EL's kernel-devel has neither.
        left_out = ["usr/src/*/vmlinux", *(f"usr/src/*/arch/{name}" for name in OTHER_ARCHITECTURES)]
        tree = bench.unpacked(*headers_of(version), without=left_out)
        sources = tree / "usr/src"
        target = sources / "kernels" / release
        target.parent.mkdir()
        flavour = sources / f"linux-headers-{release}"
        (sources / f"linux-headers-{version}-common").rename(target)
        # The makefile is that of `common`; scripts and tools are those of kbuild, not links to them.
        for path in (target / "scripts", target / "tools", flavour / "scripts", flavour / "tools"):
            path.unlink(missing_ok=True)
        (flavour / "Makefile").unlink()
        merge(flavour, target)
        merge(tree / f"usr/lib/linux-kbuild-{version}", target)
        shutil.rmtree(tree / "usr/lib")
        yield Rpm(
            *(APP, "kernel-devel", version, FLAVOUR),
            tree=tree,
            provides=(f"kernel-devel-uname-r = {release}", "installonlypkg(kernel)"),
        )
        yield Rpm(
            *(APP, "kernel-devel-matched", version, FLAVOUR),
            requires=(f"kernel-devel = {version}-{FLAVOUR}", f"kernel-core = {version}-{FLAVOUR}"),
        )

    return make


OTHER_ARCHITECTURES = (
    *("alpha", "arc", "arm", "arm64", "csky", "hexagon", "loongarch", "m68k", "microblaze", "mips", "nios2"),
    *("openrisc", "parisc", "powerpc", "riscv", "s390", "sh", "sparc", "um", "xtensa"),
)


def headers_of(version: str) -> tuple[str, ...]:
    """Debian packages of a kernel's headers."""
    release = release_of(version)
    return (f"linux-headers-{release}", f"linux-headers-{version}-common", f"linux-kbuild-{version}")


def compiler(bench: Bench) -> Iterator[Rpm]:
    """gcc and what it needs, in the packages EL has it in."""
    names = set(bench.debs)
    parts = {
        "binutils": ("binutils", "libbinutils", "libctf", "libgprofng", "libjansson", "libsframe"),
        "cpp": ("cpp", "libisl", "libmpc", "libmpfr"),
        "glibc-devel": ("libc6-dev", "libc-dev-bin", "libcrypt-dev", "rpcsvc-proto"),
        "kernel-headers": ("linux-libc-dev",),
        "gcc": ("",),
    }
    linux = KERNELS["new"].partition("+")[0]
    versions = {"binutils": "2.44", "glibc-devel": "2.41", "kernel-headers": linux}
    needs = {
        "gcc": ("binutils >= 2.24", "cpp = 14.2.0", "glibc-devel >= 2.2.90-12"),
        "glibc-devel": ("kernel-headers",),
    }
    for part, prefixes in parts.items():
        mine = sorted(name for name in names if name.startswith(prefixes))
        names -= set(mine)
        tree = bench.unpacked(*mine, without=NO_COMPILER_FILES)
        if part == "gcc":
            (tree / "usr/bin/cc").symlink_to("gcc")
        yield Rpm(*(APP, part, versions.get(part, "14.2.0")), tree=tree, requires=needs.get(part, ()))


NO_COMPILER_FILES = ("usr/lib/*/lib*san.*", "usr/lib/*/lib*san_*", "usr/libexec/gcc/*/lto1")
"""Sanitizers and link-time optimisation: no kernel module uses them."""


def tools(bench: Bench) -> Iterator[Rpm]:
    """What the toolchain line asks for beside gcc."""
    yield Rpm(BASE, "kmod", "34.2", tree=bench.unpacked("kmod", "libkmod2"))
    yield Rpm(BASE, "make", "4.4.1", epoch=1, tree=bench.unpacked("make"))
    yield Rpm(BASE, "patch", "2.8", tree=bench.unpacked("patch"))
    yield Rpm(BASE, "xz", "5.8.1", epoch=1, tree=bench.unpacked("xz-utils"))
    yield Rpm(
        *(APP, "elfutils-libelf-devel", "0.192"),
        tree=bench.unpacked("libelf-dev"),
        requires=("elfutils-libelf",),
    )
    tree, all_of_rpm = bench.empty(), bench.unpacked("rpm", "debugedit")
    take(all_of_rpm, *RPM_BUILD, to=tree)
    take(all_of_rpm, "usr/bin/debugedit", "usr/bin/find-debuginfo", "usr/bin/sepdebugcrcfix", to=tree)
    yield Rpm(APP, "rpm-build", "4.20.1", tree=tree, requires=("rpm = 4.20.1",))


RPM_BUILD = (
    *("usr/bin/rpmbuild", "usr/bin/rpmspec", "usr/bin/gendiff", "usr/lib/rpm/brp-*", "usr/lib/rpm/check-*"),
    *("usr/lib/rpm/elfdeps", "usr/lib/rpm/fileattrs", "usr/lib/rpm/find-*", "usr/lib/rpm/rpmdeps"),
    *("usr/lib/rpm/rpmuncompress", "usr/lib/rpm/script.req", "usr/lib/rpm/sysusers.sh"),
)
"""Files of Debian's package rpm that EL has in rpm-build; the base image lacks them."""


# --- NVIDIA ---


def nvidia_source(bench: Bench) -> Iterator[Rpm]:
    """The DKMS package, carrier of the modules' source."""
    tree, unpacked = bench.empty(), bench.unpacked("nvidia-open-kernel-dkms")
    target = tree / f"usr/src/nvidia-{DRIVER}"
    _source(unpacked, target)
    _mend(target / "nvidia/nv-pci.c")
    yield Rpm(
        *(CUDA, "kmod-nvidia-open-dkms", DRIVER),
        epoch=DRIVER_EPOCH,
        tree=tree,
        provides=(f"nvidia-kmod = {DRIVER_EPOCH}:{DRIVER}",),
        requires=(f"nvidia-kmod-common = {DRIVER_EPOCH}:{DRIVER}", "dkms"),
        # As the original's: a module that does not compile is no failure to dnf.
        scriptlets=(
            f"%post\ndkms add -m nvidia -v {DRIVER} -q --rpm_safe_upgrade || :\n"
            f"dkms build -m nvidia -v {DRIVER} -q || :\ndkms install -m nvidia -v {DRIVER} -q --force || :\n"
            f"%preun\ndkms remove -m nvidia -v {DRIVER} -q --all --rpm_safe_upgrade || :\n"
        ),
    )


def _source(unpacked: Path, target: Path) -> None:
    """Move the one source tree of a DKMS package; its name tells the version."""
    (found,) = (unpacked / "usr/src").iterdir()
    version = target.name.rpartition("-")[2]
    if not found.name.endswith(f"-{version}"):
        raise RehearsalError(f"Debian has {found.name} by now: adapt version {version} in contents.py")
    target.parent.mkdir(parents=True)
    found.rename(target)


def _mend(file: Path) -> None:
    """Give pci_resize_resource() the argument it has since Linux 6.12.97.

    NVIDIA's driver for EL compiles on EL's kernel; Debian's of the same version does not on Debian's.
    """
    old = "    r = pci_resize_resource(pci_dev, NV_GPU_BAR1, requested_size);\n"
    new = (
        "#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 97)\n"
        f"{old.replace('size);', 'size, 0);')}#else\n{old}#endif\n"
    )
    text = file.read_text()
    if text.count(old) != 1:
        raise RehearsalError(f"{file.name} of the NVIDIA source is another than expected")
    file.write_text(text.replace(old, new))


def nvidia_userland(bench: Bench) -> Iterator[Rpm]:
    """The headless driver: libraries, firmware, tools and daemon."""
    evr = f"= {DRIVER_EPOCH}:{DRIVER}"

    def one(name: str, tree: Path, *requires: str, arch: str = "x86_64", scriptlets: str = "") -> Rpm:
        return Rpm(
            *(CUDA, name, DRIVER),
            epoch=DRIVER_EPOCH,
            arch=arch,
            tree=tree,
            requires=requires,
            scriptlets=scriptlets,
        )

    def library(name: str, *debs: str, requires: Iterable[str] = ()) -> Rpm:
        tree = bench.unpacked(*debs)
        libraries(tree)
        for path in (tree / "etc", tree / "usr/share"):
            shutil.rmtree(path, ignore_errors=True)
        return one(name, tree, *requires, scriptlets="%post -p /sbin/ldconfig\n%postun -p /sbin/ldconfig\n")

    common = bench.own("nvidia-kmod-common")
    take(bench.unpacked("firmware-nvidia-gsp"), f"usr/lib/firmware/nvidia/{DRIVER}", to=common)
    yield one("nvidia-kmod-common", common, f"nvidia-kmod {evr}", arch="noarch")
    yield library("libnvidia-ml", "libnvidia-ml1")
    yield library("libnvidia-cfg", "libnvidia-cfg1")
    yield library(
        *("nvidia-driver-cuda-libs", "libcuda1", "libcudadebugger1", "libnvidia-ptxjitcompiler1"),
        requires=[f"libnvidia-ml {evr}"],
    )
    tree, unpacked = bench.empty(), bench.unpacked("nvidia-smi")
    (tree / "usr/bin").mkdir(parents=True)
    (unpacked / "usr/lib/nvidia/current/nvidia-smi").rename(tree / "usr/bin/nvidia-smi")
    yield one(
        *("nvidia-driver-cuda", tree, f"nvidia-driver-cuda-libs {evr}", f"nvidia-kmod-common {evr}"),
        *(f"nvidia-modprobe {evr}", f"nvidia-persistenced {evr}"),
    )
    yield one("nvidia-modprobe", bench.unpacked("nvidia-modprobe"))
    tree = bench.own("nvidia-persistenced")
    take(bench.unpacked("nvidia-persistenced"), "usr/bin/nvidia-persistenced", to=tree)
    yield one(
        *("nvidia-persistenced", tree, f"libnvidia-cfg {evr}"),
        scriptlets="%post\nsystemctl preset nvidia-persistenced.service >/dev/null 2>&1 || :\n",
    )


def toolkit(bench: Bench) -> Iterator[Rpm]:
    """A stand-in of the container toolkit, which Debian does not have."""
    for name, requires in (
        ("nvidia-container-toolkit-base", ()),
        ("nvidia-container-toolkit", ("nvidia-container-toolkit-base = 1.18.0-1",)),
    ):
        tree = bench.own(name) if (FILES / name).is_dir() else None
        yield Rpm(TOOLKIT, name, "1.18.0", "1", tree=tree, requires=requires)


# --- OpenZFS ---


def zfs(bench: Bench) -> Iterator[Rpm]:
    """OpenZFS: source, libraries, tools and units."""
    source = bench.empty()
    _source(bench.unpacked("zfs-dkms"), source / f"usr/src/zfs-{ZFS}")
    yield Rpm(
        *(ZFS_REPO, "zfs-dkms", ZFS),
        arch="noarch",
        tree=source,
        provides=(f"zfs-kmod = {ZFS}",),
        requires=("dkms >= 2.2.0.3", "gcc", "make", "kernel-devel"),
        scriptlets=f"%post\ndkms add -m zfs -v {ZFS} --rpm_safe_upgrade || :\n",
    )
    names = ("libnvpair3", "libuutil3", "libzpool6", "libzfs6")
    for name in names:
        tree = bench.unpacked(f"{name}linux")
        libraries(tree)
        yield Rpm(
            *(ZFS_REPO, name, ZFS),
            tree=tree,
            scriptlets="%post -p /sbin/ldconfig\n%postun -p /sbin/ldconfig\n",
        )
    tree = bench.unpacked("zfsutils-linux", "zfs-zed")
    for name in ("etc/cron.d", "etc/sudoers.d", "etc/default"):
        shutil.rmtree(tree / name, ignore_errors=True)
    # EL's package leaves loading the module to whoever uses it.
    (tree / "usr/lib/modules-load.d/zfs.conf").unlink()
    (tree / "usr/lib/modules-load.d").rmdir()
    yield Rpm(
        *(ZFS_REPO, "zfs", ZFS),
        tree=tree,
        requires=(f"zfs-kmod = {ZFS}", *(f"{name} = {ZFS}" for name in names)),
    )


# --- packages for faults ---

BROKEN = "broken-scriptlet"


def faulty(bench: Bench) -> Iterator[Rpm]:
    """A package whose %post fails: dnf says so, and exits with 0."""
    yield Rpm(
        FAULTY, BROKEN, "1.0", arch="noarch", scriptlets="%post\necho 'this scriptlet fails' >&2\nexit 7\n"
    )


FIRST = ("tools", "CentOS")
"""Recipes of the RPMs that the base image has, its kernels aside."""
THEN = tuple(f"kernel {version}" for version in KERNELS.values())
"""Recipes of its kernels."""


def recipes() -> tuple[Recipe, ...]:
    """All recipes but that of the compiler: those of FIRST, then the slow ones."""
    return (
        Recipe("CentOS", centos),
        Recipe(
            "tools",
            tools,
            ("debugedit", "kmod", "libelf-dev", "libkmod2", "make", "patch", "rpm", "xz-utils"),
        ),
        *(
            Recipe(f"kernel {version}", kernel(version), (f"linux-image-{release_of(version)}",))
            for version in KERNELS.values()
        ),
        Recipe("NVIDIA source", nvidia_source, ("nvidia-open-kernel-dkms",)),
        *(
            Recipe(f"headers {version}", kernel_devel(version), headers_of(version))
            for version in KERNELS.values()
        ),
        Recipe(
            "NVIDIA userland",
            nvidia_userland,
            (
                *("firmware-nvidia-gsp", "libcuda1", "libcudadebugger1", "libnvidia-cfg1", "libnvidia-ml1"),
                *("libnvidia-ptxjitcompiler1", "nvidia-modprobe", "nvidia-persistenced", "nvidia-smi"),
            ),
        ),
        Recipe(
            "OpenZFS",
            zfs,
            (
                *("libnvpair3linux", "libuutil3linux", "libzfs6linux", "libzpool6linux"),
                *("zfs-dkms", "zfs-zed", "zfsutils-linux"),
            ),
        ),
        Recipe("toolkit", toolkit),
        Recipe("faults", faulty),
    )
