"""Every check on a small image: good → one thing broken → the finding → undone → good again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from elf_writer import (
    compress,
    write_bzimage,
    write_elf,
    write_kernel,
    write_layer,
    write_module,
)

import imagebuild.check.table as check_module
from imagebuild.check import CheckedImage, Report, check, list_checks, run_checks
from imagebuild.errors import DefinitionError

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("depmod", "modprobe", "systemd-analyze"))), reason="needs kmod and systemd"
)

RELEASE = "6.12.1-test"
VERMAGIC = f"{RELEASE} SMP preempt mod_unload modversions "
DRIVER = "550.1.02"
TREE = f"usr/lib/modules/{RELEASE}"
KERNEL = {"module_layout": 0x11, "_printk": 0x22}
PEM = b"-----BEGIN %s KEY-----\nAAAA\n-----END %s KEY-----\n"
UNIT = "[Service]\nExecStart=/usr/bin/hello\n[Install]\nWantedBy=multi-user.target\n"
UNKNOWN = UNIT.replace("[Install]", "Nonsense=1\n[Install]")
DPKG = "usr/lib/sysimage/dpkg"
# What packages of the toy image brought: path → content, or None where dpkg has no checksum of it.
BROUGHT: dict[str, dict[str, bytes | None]] = {
    "libc6": {
        "/usr/bin/hello": b"#!/bin/sh\n",
        "/etc/hello.conf": b"as it came\n",
        "/usr/lib/libhello.so.1": None,
        "/usr/lib/libhello.so.2": b"of libc6\n",
        "/usr/share/doc/libc6/changelog": b"never installed\n",
        "/var/cache/libc6": None,
        "/usr/lib/hello/replaced.conf": b"as it came\n",
    },
    "libcuda1": {"/usr/lib/libhello.so.2": b"of libcuda1\n"},
    "linux-image": {
        f"/boot/vmlinuz-{RELEASE}": b"",
        f"/{TREE}/kernel/drm.ko.xz": None,
        f"/{TREE}/kernel/nouveau.ko.xz": None,
    },
    "kmod-nvidia": {f"/{TREE}/extra/nvidia.ko.xz": None, f"/{TREE}/extra/nvidia-uvm.ko.xz": None},
}
TMPFILES = """\
# TYPE PATH MODE USER GROUP AGE ARGUMENT
d /var/lib 0755 - - -
d  "/var/lib/with space"
d /var/lib/with\\x2d\\040both 0755
d /var/lib/50%% 0755
d /var/lib/\\xc3\\xa9 0755
L /var/lib/dpkg - - - - ../../usr/lib/sysimage/dpkg
d /var/log 0755
f /var/log/wtmp 0664 root utmp -
L+ /var/run - - - - ../run
C /var/lib/copied - - - -
d /run/hello ~2755 root root 10d
w /sys/x - - - - it's
"""
SYSUSERS = 'u root 0 "Super User" /root\nu! hello - "Says hello"\ng kvm -\nm hello kvm\n'


def put(root: Path, path: str, content: bytes | str = b"") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def link(root: Path, path: str, target: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).unlink(missing_ok=True)
    (root / path).symlink_to(target)


def depmod(root: Path) -> None:
    subprocess.run(["depmod", "-b", root, RELEASE], check=True)


def driver(name: str, **changes: object) -> bytes:
    """An out-of-tree module of the toy driver."""
    known: dict[str, object] = {
        "info": {"version": DRIVER, "alias": "pci:v000010DEd*"},
        "versions": {**KERNEL, "drm_init": 0x33},
        "exports": {"nv_register": 0x44},
        "signed": True,
    }
    if name == "nvidia-uvm":
        known |= {"info": {"version": DRIVER, "depends": "nvidia"}, "exports": {}}
        known["versions"] = {**KERNEL, "nv_register": 0x44}
    known |= changes
    vermagic = str(known.pop("vermagic", VERMAGIC))
    return compress(write_module(vermagic, **known), "xz")  # type: ignore[arg-type]


def host_systemd() -> int:
    said = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True)
    return int(said.stdout.split()[1])


@dataclass(frozen=True)
class Toy:
    """A folder with `root/` and `layers/`, and the image they make."""

    folder: Path
    labels: dict[str, str]

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def image(self) -> CheckedImage:
        layers = sorted((self.folder / "layers").iterdir())
        return CheckedImage(self.root, self.labels, tuple(layers))

    def layer(self, files: dict[str, bytes]) -> None:
        """One more layer on top of a good one, as a later build step would leave it."""
        write_layer(self.folder / "layers/2-broken", files, "zst")


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A small image that keeps every promise."""
    folder = tmp_path_factory.mktemp("good")
    root = folder / "root"
    put(root, f"{TREE}/vmlinuz", write_bzimage(write_kernel(KERNEL)))
    put(root, f"{TREE}/initramfs.img", "cpio")
    put(root, f"{TREE}/modules.order")
    put(root, f"{TREE}/modules.builtin")
    drm = write_module(
        VERMAGIC, info={"intree": "Y"}, versions=KERNEL, exports={"drm_exit": 0x32, "drm_init": 0x33}
    )
    put(root, f"{TREE}/kernel/drm.ko.xz", compress(drm, "xz"))
    put(root, f"{TREE}/extra/nvidia.ko.xz", driver("nvidia"))
    put(root, f"{TREE}/extra/nvidia-uvm.ko.xz", driver("nvidia-uvm"))
    nouveau = write_module(VERMAGIC, info={"intree": "Y"}, versions=KERNEL)
    put(root, f"{TREE}/kernel/nouveau.ko.xz", compress(nouveau, "xz"))
    link(root, "lib", "usr/lib")
    depmod(root)
    put(
        root,
        "usr/lib/modprobe.d/nvidia.conf",
        "softdep nvidia post: nvidia-uvm\nblacklist nouveau\n",
    )
    put(root, f"usr/lib/firmware/nvidia/{DRIVER}/gsp_ga10x.bin", "firmware")
    put(root, f"usr/lib/x86_64-linux-gnu/nvidia/libcuda.so.{DRIVER}", "library")
    put(root, "usr/bin/nvidia-ctk", "program")
    dpkg(root)
    filesystem(root)
    put(root, "etc/machine-id", "uninitialized\n")
    (root / "usr/bin/hello").chmod(0o755)
    put(root, "usr/lib/systemd/system/hello.service", UNIT)
    put(root, "usr/lib/systemd/system/multi-user.target", "[Unit]\nDescription=all\n")
    put(root, f"usr/lib/systemd/libsystemd-shared-{host_systemd()}.so")
    link(
        root,
        "etc/systemd/system/multi-user.target.wants/hello.service",
        "/usr/lib/systemd/system/hello.service",
    )
    link(root, "etc/systemd/system/noise.service", "/dev/null")
    (folder / "layers").mkdir()
    harmless = {
        "./usr/bin/ld.so": b"",
        "./usr/bin/bash": b"",
        "./usr/share/doc/test.key": PEM % (b"RSA PRIVATE", b"RSA PRIVATE"),
        "./etc/apt/trusted.key": PEM % (b"PUBLIC", b"PUBLIC"),
        "./etc/apt/binary.key": b"\x99\x02\x0d\x04",
        "./etc/trusted-key.key": b". 3600 IN DNSKEY 257 3 8 AwEAAa",
        "./var/lib/apt/lists/lock": b"",
        "./run/.wh.gone": b"",
    }
    write_layer(folder / "layers/0-base", harmless, "gz")
    write_layer(folder / "layers/1-plain", {"usr/bin/hello": b""})
    labels = {
        "io.imgbuild.tier": "2",
        "io.imgbuild.kernel-release": RELEASE,
        "io.imgbuild.kmods": f"nvidia={DRIVER}",
        "io.imgbuild.same-version": json.dumps(
            {
                "nvidia": {
                    "version": DRIVER,
                    "firmware": f"usr/lib/firmware/nvidia/{DRIVER}",
                    "libraries": ["libcuda", "libnvidia-ml"],
                    "packages": {"libcuda1": f"{DRIVER}-2"},
                }
            }
        ),
        "io.imgbuild.units": json.dumps({"enable": ["hello.service"], "mask": ["noise.service"]}),
        "io.imgbuild.rivals": "nouveau",
        "io.imgbuild.cdi-generator": "usr/bin/nvidia-ctk",
        "io.imgbuild.files": '["/usr/lib/hello/replaced.conf"]',
        "containers.bootc": "1",
    }
    return Toy(folder, labels)


def dpkg(root: Path) -> None:
    """The package database, and what it says is installed."""
    status = []
    for package, files in BROUGHT.items():
        same = "Architecture: amd64\nMulti-Arch: same\n" if package == "libcuda1" else ""
        version = f"{DRIVER}-2" if package == "libcuda1" else "1-1"
        head = f"Package: {package}\nStatus: install ok installed\n{same}"
        status.append(f"{head}Version: {version}\nDescription: x\n y\n")
        name = f"{package}:amd64" if same else package
        sums = {path: hashlib.md5(data).hexdigest() for path, data in files.items() if data is not None}
        put(root, f"{DPKG}/info/{name}.list", "/.\n/usr\n" + "".join(f"{path}\n" for path in files))
        put(root, f"{DPKG}/info/{name}.md5sums", "".join(f"{s}  {p[1:]}\n" for p, s in sums.items()))
    put(root, f"{DPKG}/status", "\n".join(status))
    # libcuda1 put its own over libc6's, which went aside.
    put(
        root,
        f"{DPKG}/diversions",
        "/usr/lib/libhello.so.2\n/usr/lib/aside/libhello.so.2\nlibcuda1\n",
    )
    put(
        root,
        "etc/dpkg/dpkg.cfg.d/excludes",
        "path-exclude=/usr/share/*\npath-include=/usr/share/*/copyright\n",
    )
    for path in ("/usr/bin/hello", "/etc/hello.conf", "/usr/lib/libhello.so.2"):
        put(root, path[1:], BROUGHT["libc6"][path] or b"")
    put(root, "usr/lib/aside/libhello.so.2", b"of libc6\n")
    put(root, "usr/lib/libhello.so.2", b"of libcuda1\n")
    link(root, "usr/lib/libhello.so.1", "libhello.so.2")
    put(root, "etc/hello.conf", "changed on purpose\n")
    put(root, "usr/lib/hello/replaced.conf", "by files/ of a layer\n")
    link(root, "var/lib/dpkg", f"../../{DPKG}")
    vmlinuz = (root / TREE / "vmlinuz").read_bytes()
    put(
        root,
        f"{DPKG}/info/linux-image.md5sums",
        f"{hashlib.md5(vmlinuz).hexdigest()}  boot/vmlinuz-{RELEASE}\n",
    )


def filesystem(root: Path) -> None:
    """What bootc asks of a tree."""
    for name in ("boot", "dev", "proc", "run", "sys", "sysroot", "tmp", "var/log", "var/lib/with space"):
        (root / name).mkdir(parents=True)
    for name in ("with- both", "50%", "é"):
        (root / "var/lib" / name).mkdir()
    put(root, "var/lib/copied/deep/file", "from the factory")
    put(root, "var/log/wtmp")
    link(root, "var/run", "/run")
    link(root, "ostree", "sysroot/ostree")
    put(root, "usr/lib/ostree/prepare-root.conf", "[composefs]\nenabled = true\n")
    put(root, "etc/hostname", "# none\n")
    put(root, "usr/lib/bootc/kargs.d/10-x.toml", 'kargs = ["a=1", "b"]\nmatch-architectures = ["x86_64"]\n')
    put(root, "usr/lib/tmpfiles.d/x.conf", TMPFILES)
    put(root, "usr/lib/tmpfiles.d/hidden.conf", "nonsense")
    link(root, "etc/tmpfiles.d/hidden.conf", "/dev/null")
    put(root, "usr/lib/sysusers.d/x.conf", SYSUSERS)
    put(root, "etc/passwd", "root:x:0:0::/root:/bin/sh\nhello:x:999:999::/:/bin/false\n")
    put(root, "etc/group", "root:x:0:\nhello:x:999:\nkvm:x:998:hello\n")
    put(root, "usr/share/émile", "a name of UTF-8")


@pytest.fixture
def toy(good: Toy, tmp_path: Path) -> Toy:
    """A copy of the good image that a test may break."""
    return copy(good, tmp_path / "toy")


def copy(source: Toy, folder: Path) -> Toy:
    shutil.copytree(source.folder, folder, symlinks=True)
    return replace(source, folder=folder, labels=dict(source.labels))


@dataclass(frozen=True)
class Break:
    """One thing to break, and what the check must say then."""

    check: str
    what: str
    do: Callable[[Toy], object]
    severity: str = "fatal"


def put_driver(name: str, run_depmod: bool = True, **changes: object) -> Callable[[Toy], None]:
    def do(toy: Toy) -> None:
        put(toy.root, f"{TREE}/extra/{name}.ko.xz", driver(name, **changes))
        if run_depmod:
            depmod(toy.root)

    return do


def a_file(path: str, content: bytes | str = b"x") -> Callable[[Toy], None]:
    return lambda toy: put(toy.root, path, content)


def no_file(path: str) -> Callable[[Toy], None]:
    return lambda toy: (toy.root / path).unlink()


def in_layer(path: str, content: bytes = b"x") -> Callable[[Toy], None]:
    return lambda toy: toy.layer({path: content})


def a_dir(path: str, mode: int = 0o755) -> Callable[[Toy], None]:
    return lambda toy: (toy.root / path).mkdir(mode, parents=True)


def a_link(path: str, target: str) -> Callable[[Toy], None]:
    return lambda toy: link(toy.root, path, target)


def no_dir(path: str) -> Callable[[Toy], None]:
    return lambda toy: shutil.rmtree(toy.root / path)


def more(path: str, text: str) -> Callable[[Toy], None]:
    return lambda toy: put(toy.root, path, (toy.root / path).read_text() + text)


def all_of(*steps: Callable[[Toy], object]) -> Callable[[Toy], None]:
    return lambda toy: [step(toy) for step in steps] and None


def label(name: str, value: str) -> Callable[[Toy], None]:
    return lambda toy: toy.labels.update({f"io.imgbuild.{name}": value})


OTHER = "6.12.2-other"
PREPARE_ROOT = "usr/lib/ostree/prepare-root.conf"
BOOTC_COPY = "usr/share/doc/bootc/baseimage/base"
STALE_DEP = "kernel/drm.ko.xz:\nextra/nvidia.ko.xz:\nextra/nvidia-uvm.ko.xz: extra/nvidia.ko.xz\n"
BREAKS = {
    # one-kernel
    "second kernel": Break("one-kernel", "2 kernels", a_file(f"usr/lib/modules/{OTHER}/vmlinuz")),
    "no kernel": Break("one-kernel", "no kernel", no_file(f"{TREE}/vmlinuz")),
    "foreign modules": Break("one-kernel", f"modules of {OTHER}", a_file(f"usr/lib/modules/{OTHER}/x.ko")),
    "other label": Break("one-kernel", "the label", label("kernel-release", OTHER)),
    "no modules": Break(
        "one-kernel",
        "has no modules",
        lambda t: [shutil.rmtree(t.root / TREE / part) for part in ("kernel", "extra")],
    ),
    # initramfs
    "no initramfs": Break("initramfs", "missing", no_file(f"{TREE}/initramfs.img")),
    "empty initramfs": Break("initramfs", "empty", a_file(f"{TREE}/initramfs.img", b"")),
    # vermagic
    "other release": Break(
        "vermagic", OTHER, put_driver("nvidia", vermagic=f"{OTHER} SMP preempt mod_unload ")
    ),
    "other flags": Break(
        "vermagic", "nvidia.ko", put_driver("nvidia", vermagic=f"{RELEASE} SMP mod_unload ")
    ),
    "damaged module": Break(
        "vermagic", "cannot be read", a_file(f"{TREE}/kernel/bad.ko.xz", b"\xfd7zXZ\0rubbish")
    ),
    "in-tree of another release": Break(
        "vermagic",
        "kernel/x.ko",
        a_file(f"{TREE}/kernel/x.ko", write_module(f"{OTHER} SMP ", info={"intree": "Y"})),
    ),
    # symbol-crcs
    "kernel crc": Break(
        "symbol-crcs", "other versions of: _printk", put_driver("nvidia", versions={**KERNEL, "_printk": 9})
    ),
    "module crc": Break(
        "symbol-crcs", "other versions of: drm_init", put_driver("nvidia", versions={**KERNEL, "drm_init": 9})
    ),
    "sibling crc": Break(
        "symbol-crcs", "nvidia-uvm.ko.xz was compiled", put_driver("nvidia", exports={"nv_register": 9})
    ),
    "layout crc": Break(
        "symbol-crcs", "module_layout", put_driver("nvidia", versions={**KERNEL, "module_layout": 9})
    ),
    "unknown symbol": Break(
        "symbol-crcs", "nobody exports: gone", put_driver("nvidia", versions={**KERNEL, "gone": 9})
    ),
    "no versions": Break(
        "symbol-crcs", "no version for: _printk", put_driver("nvidia", versions={}, undefined=["_printk"])
    ),
    "one version less": Break(
        "symbol-crcs",
        "no version for: _printk",
        put_driver("nvidia", versions={"module_layout": 0x11}, undefined=["_printk"]),
        "warning",
    ),
    "opaque kernel": Break(
        "symbol-crcs", "no Module.symvers", a_file(f"{TREE}/vmlinuz", b"MZ opaque"), "could-not-run"
    ),
    # depmod-current
    "no modules.dep": Break("depmod-current", "modules.dep", no_file(f"{TREE}/modules.dep")),
    "no index": Break("depmod-current", "modules.alias.bin", no_file(f"{TREE}/modules.alias.bin")),
    "unlisted module": Break(
        "depmod-current",
        "does not list: extra/new.ko",
        a_file(f"{TREE}/extra/new.ko", write_module(VERMAGIC)),
    ),
    "module gone": Break(
        "depmod-current", "not there: extra/nvidia-uvm", no_file(f"{TREE}/extra/nvidia-uvm.ko.xz")
    ),
    "stale alias": Break(
        "depmod-current",
        "pci:new",
        put_driver("nvidia", False, info={"version": DRIVER, "alias": "pci:new*"}),
    ),
    "stale dependency": Break(
        "depmod-current",
        "depends on: i2c_core",
        put_driver("nvidia-uvm", False, info={"version": DRIVER, "depends": "nvidia,i2c-core"}),
    ),
    "stale index": Break(
        "depmod-current", "modules.dep.bin differs", a_file(f"{TREE}/modules.dep", STALE_DEP)
    ),
    # modprobe-resolves
    "alias to nothing": Break(
        "modprobe-resolves", "nothing", a_file("etc/modprobe.d/x.conf", "alias nvidia nvidia-current\n")
    ),
    "install to missing": Break(
        "modprobe-resolves",
        "diverts nvidia to nvidia_current",
        a_file("etc/modprobe.d/x.conf", "install nvidia modprobe -i nvidia-current $CMDLINE_OPTS\n"),
    ),
    "install away": Break(
        "modprobe-resolves",
        "replaces the loading of nvidia_uvm",
        a_file("etc/modprobe.d/x.conf", "install nvidia-uvm /bin/false\n"),
    ),
    "through alternatives": Break(
        "modprobe-resolves",
        "diverts",
        lambda t: (
            put(t.root, "etc/glx.conf", "install nvidia /sbin/modprobe gone\n"),
            link(t.root, "etc/modprobe.d/a.conf", "/etc/glx.conf"),
        ),
    ),
    "no dependency file": Break("modprobe-resolves", "modprobe nvidia", no_file(f"{TREE}/modules.dep.bin")),
    # unsigned-modules, cdi-generator
    "unsigned": Break(
        "unsigned-modules", "not signed: nvidia.ko.xz", put_driver("nvidia", signed=False), "warning"
    ),
    "no ctk": Break("cdi-generator", "no CDI generator", no_file("usr/bin/nvidia-ctk"), "notice"),
    # same-driver-version
    "module version": Break(
        "same-driver-version",
        "of version 1.0",
        put_driver("nvidia-uvm", info={"version": "1.0", "depends": "nvidia"}),
    ),
    "no such module": Break(
        "same-driver-version", "no module of zfs", label("kmods", f"nvidia={DRIVER} zfs=2.3.9")
    ),
    "no firmware": Break(
        "same-driver-version",
        "firmware is missing",
        no_file(f"usr/lib/firmware/nvidia/{DRIVER}/gsp_ga10x.bin"),
    ),
    "other library": Break(
        "same-driver-version",
        "libnvidia-ml.so.570.1 is of version",
        a_file("usr/lib64/libnvidia-ml.so.570.1"),
    ),
    "other package": Break(
        "same-driver-version",
        "libcuda1 is 1-1",
        a_file("var/lib/dpkg/status", "Package: libcuda1\nStatus: install ok installed\nVersion: 1-1\n"),
    ),
    "no package": Break(
        "same-driver-version",
        "not installed",
        a_file("var/lib/dpkg/status", "Package: libcuda1\nStatus: deinstall ok config-files\nVersion: 1-1\n"),
    ),
    "bad label": Break("same-driver-version", "not JSON", label("same-version", "{"), "could-not-run"),
    "no package database": Break(
        "same-driver-version", "neither dpkg", no_file("var/lib/dpkg/status"), "could-not-run"
    ),
    "firmware folder is empty": Break(
        "same-driver-version",
        "firmware is missing",
        all_of(no_dir(f"usr/lib/firmware/nvidia/{DRIVER}"), a_dir(f"usr/lib/firmware/nvidia/{DRIVER}")),
    ),
    # rival-driver
    **{
        f"rival {name}": Break("rival-driver", "nouveau", do)
        for name, do in {
            "not blocked": a_file("usr/lib/modprobe.d/nvidia.conf", "softdep nvidia post: nvidia-uvm\n"),
            "in a comment": a_file("usr/lib/modprobe.d/nvidia.conf", "# blacklist nouveau\n"),
            "another blocked": a_file("usr/lib/modprobe.d/nvidia.conf", "blacklist nouveau-x\n"),
            "hidden by /etc": a_link("etc/modprobe.d/nvidia.conf", "/dev/null"),
        }.items()
    },
    # package-files, modules-owned
    "changed file": Break(
        "package-files", "/usr/bin/hello (libc6)", a_file("usr/bin/hello", "#!/bin/bash\n")
    ),
    "changed kernel": Break("package-files", f"{TREE}/vmlinuz (linux-image)", a_file(f"{TREE}/vmlinuz")),
    "file gone": Break("package-files", "it is gone: /usr/bin/hello", no_file("usr/bin/hello")),
    "link gone": Break(
        "package-files", "it is gone: /usr/lib/libhello.so.1", no_file("usr/lib/libhello.so.1")
    ),
    "link for file": Break("package-files", "no longer the kind", a_link("usr/bin/hello", "sh")),
    "changed beside a diversion": Break(
        "package-files", "/usr/lib/aside/libhello.so.2 (libc6)", a_file("usr/lib/aside/libhello.so.2")
    ),
    "changed diverter": Break(
        "package-files", "/usr/lib/libhello.so.2 (libcuda1)", a_file("usr/lib/libhello.so.2")
    ),
    "replaced, and not declared": Break(
        "package-files", "/usr/lib/hello/replaced.conf", label("files", '["/usr/lib/hello/other.conf"]')
    ),
    "excluded, then included": Break(
        "package-files",
        "it is gone: /usr/share/doc/libc6/copyright",
        more(f"{DPKG}/info/libc6.list", "/usr/share/doc/libc6/copyright\n"),
    ),
    "bad list of files": Break("package-files", "not a JSON list", label("files", "{}"), "could-not-run"),
    "no database": Break("package-files", "neither dpkg", no_dir(DPKG), "could-not-run"),
    **{
        f"nobody's {path}": Break(
            "modules-owned", f"no package owns: /usr/lib/modules/{path}", a_file(f"usr/lib/modules/{path}")
        )
        for path in (
            f"{RELEASE}/extra/mine.ko",
            f"{RELEASE}/extra/sub/mine.ko.zst",
            f"{OTHER}/updates/mine.ko.xz",
        )
    },
    "package without its list": Break(
        "modules-owned", "extra/nvidia-uvm.ko.xz", no_file(f"{DPKG}/info/kmod-nvidia.list")
    ),
    "modules, and no database": Break("modules-owned", "neither dpkg", no_dir(DPKG), "could-not-run"),
    # what bootc wants of a tree
    **{
        f"no /{name}": Break("api-base-directories", f"/{name} is missing", no_dir(name))
        for name in ("dev", "proc", "run", "sys", "sysroot", "tmp", "var")
    },
    "base directory is a link": Break(
        "api-base-directories", "/tmp is no folder", all_of(no_dir("tmp"), a_link("tmp", "var"))
    ),
    "no sysroot": Break("baseimage-root", "/sysroot is no folder", no_dir("sysroot")),
    "no ostree": Break("baseimage-root", "/ostree is no link", no_file("ostree")),
    "ostree leads elsewhere": Break("baseimage-root", "/ostree is", a_link("ostree", "/sysroot/ostree")),
    "ostree is a folder": Break(
        "baseimage-root", "/ostree is no link", all_of(no_file("ostree"), a_dir("ostree"))
    ),
    "bootc's own copy": Break(
        "baseimage-root", f"/{BOOTC_COPY}/ostree is no link", a_dir(f"{BOOTC_COPY}/sysroot")
    ),
    **{
        f"composefs {name}": Break("baseimage-composefs", what, do, "warning")
        for name, (what, do) in {
            "absent": ("no prepare-root.conf", no_file(PREPARE_ROOT)),
            "off": (PREPARE_ROOT, a_file(PREPARE_ROOT, "[composefs]\nenabled = no\n")),
            "unsaid": (PREPARE_ROOT, a_file(PREPARE_ROOT, "[sysroot]\nreadonly = true\n")),
            "off in /etc": (
                "/etc/ostree",
                a_file("etc/ostree/prepare-root.conf", "[composefs]\nenabled=0\n"),
            ),
            "damaged": ("cannot be read", a_file(PREPARE_ROOT, "enabled = true\n")),
            "off in bootc's copy": (BOOTC_COPY, a_file(f"{BOOTC_COPY}/{PREPARE_ROOT}", "[composefs]\n")),
        }.items()
    },
    "usr/etc": Break("etc-usretc", "/usr/etc", a_dir("usr/etc")),
    "var/run is a folder": Break("var-run", "is no link", all_of(no_file("var/run"), a_dir("var/run"))),
    "var/run leads elsewhere": Break("var-run", "leads to ../tmp", a_link("var/run", "../tmp")),
    **{
        f"injected {name}": Break(
            "buildah-injected", f"/etc/{name} is empty", a_file(f"etc/{name}", b""), "warning"
        )
        for name in ("hostname", "hosts", "resolv.conf")
    },
    "kernel in boot": Break("nonempty-boot", "not empty: vmlinuz", a_file("boot/vmlinuz"), "warning"),
    "no boot": Break("nonempty-boot", "/boot is missing", no_dir("boot"), "warning"),
    **{
        f"left {path}": Break("nonempty-run-tmp", f"is not empty: /{path}", do, "warning")
        for path, do in {
            "run/.containerenv": a_file("run/.containerenv", b""),
            "run/lock": a_dir("run/lock"),
            "tmp/x": a_link("tmp/x", "/nowhere"),
        }.items()
    },
    "name": Break("utf8", r"not UTF-8: /usr/share/a\xff", a_file(os.fsdecode(b"usr/share/a\xff"))),
    "folder name": Break("utf8", r"/usr/\xffb", a_dir(os.fsdecode(b"usr/\xffb"))),
    "link target": Break("utf8", "where /usr/x leads", a_link("usr/x", os.fsdecode(b"\xff"))),
    # bootc-kargs
    **{
        f"kargs {text}": Break("bootc-kargs", what, a_file("usr/lib/bootc/kargs.d/10-x.toml", text))
        for text, what in {
            "kargs = [": "is not TOML",
            b"kargs = ['\xff']": "is not TOML",
            "": "has no `kargs`",
            'kargs = "quiet"': "`kargs` is no list of texts",
            "kargs = [1]": "`kargs` is no list of texts",
            'kargs = []\nmatch-architectures = "x86_64"': "`match-architectures` is no list",
            "kargs = []\nmatch_architectures = []": "does not know: match_architectures",
        }.items()
    },
    "kargs for nobody": Break(
        "bootc-kargs",
        "no architecture there is: amd64",
        a_file("usr/lib/bootc/kargs.d/10-x.toml", 'kargs = []\nmatch-architectures = ["amd64"]'),
        "warning",
    ),
    # /var
    **{
        f"tmpfiles.d {line}": Break("tmpfiles", what, more("usr/lib/tmpfiles.d/x.conf", f"{line}\n"))
        for line, what in {
            "k /var/x": "no such type",
            "dd /var/x": "no such type",
            "d": "no absolute path",
            "d var/x 0755": "no absolute path",
            'd "/var/x 0755': "no absolute path",
            "d /var/x 0999": "`0999` is no mode",
            "d /var/x root": "`root` is no mode",
        }.items()
    },
    **{
        f"in /var: {name}": Break("var-tmpfiles", what, do)
        for name, (what, do) in {
            "folder": ("no line for: /var/lib/x", a_dir("var/lib/x")),
            "folder in a known one": ("/var/lib/with space/x", a_dir("var/lib/with space/x")),
            "link": ("no line for: /var/x", a_link("var/x", "../run")),
            "file": ("content that no update would change: /var/lib/x", a_file("var/lib/x")),
            "name that steers": (r"/var/a\x0ab\x1b[31m", a_file("var/a\nb\x1b[31m")),
            "empty log": ("content that no update would change: /var/log/x", a_file("var/log/x", b"")),
            "line taken back": ("/var/lib/dpkg", a_link("etc/tmpfiles.d/x.conf", "/dev/null")),
            "line that makes nothing": (
                "no line for: /var/lib/x",
                all_of(
                    a_dir("var/lib/x"), more("usr/lib/tmpfiles.d/x.conf", "z /var/lib/x 0755\nx /var/lib/x\n")
                ),
            ),
            "line of another path": (
                "no line for: /var/lib/x",
                all_of(a_dir("var/lib/x"), more("usr/lib/tmpfiles.d/x.conf", "d /var/lib/xy\n")),
            ),
        }.items()
    },
    "log in /var": Break("var-log", "/var/log/sub/x", a_file("var/log/sub/x"), "warning"),
    # sysusers
    "user": Break("sysusers", "/etc/passwd has what", more("etc/passwd", "x:x:1:1::/:/bin/sh\n"), "warning"),
    "group": Break("sysusers", "/etc/group has what", more("etc/group", "x:x:1:\n"), "warning"),
    "member is no user": Break(
        "sysusers",
        "does not make: x",
        all_of(more("etc/passwd", "x:x:1:1::/:/\n"), more("usr/lib/sysusers.d/x.conf", "m x kvm\n")),
        "warning",
    ),
    "group is no user": Break(
        "sysusers", "does not make: kvm", more("etc/passwd", "kvm:x:1:1::/:/bin/sh\n"), "warning"
    ),
    **{
        f"sysusers.d {line}": Break(
            "sysusers", "cannot be read", more("usr/lib/sysusers.d/x.conf", f"{line}\n")
        )
        for line in ("q x", "u", "user x")
    },
    # layers
    **{
        f"tool {path}": Break("no-build-tools", kind, in_layer(path))
        for path, kind in {
            "usr/bin/x86_64-linux-gnu-gcc-14": "compiler in layer 3",
            "./usr/bin/as": "assembler",
            "usr/local/bin/ld.gold": "linker",
            "bin/make": "make",
            "usr/sbin/dkms": "DKMS",
            "usr/bin/rpmbuild": "package builder",
            "usr/bin/dpkg-buildpackage": "package builder",
            "usr/libexec/gcc/x86_64-redhat-linux/14/cc1": "compiler",
            "usr/src/kernels/6.12/Makefile": "kernel headers",
            "usr/src/linux-headers-6.12/Makefile": "kernel headers",
            "usr/src/zfs-2.3.9/dkms.conf": "DKMS",
        }.items()
    },
    "C header": Break("no-build-tools", "C headers", in_layer("usr/include/stdio.h"), "warning"),
    **{
        f"cache {path}": Break("no-package-caches", "package cache", in_layer(path))
        for path in (
            "var/cache/apt/archives/x_1_amd64.deb",
            "var/cache/apt/pkgcache.bin",
            "var/lib/apt/lists/mirror_dists_trixie_InRelease",
            "var/cache/dnf/x/repodata/primary.xml",
        )
    },
    "log": Break("no-package-caches", "log of", in_layer("var/log/dpkg.log"), "warning"),
    "leftover": Break("no-leftovers", "/tmp/build.sh", in_layer("tmp/build.sh"), "warning"),
    "private key": Break(
        "no-secrets",
        "private key in layer 3",
        in_layer("etc/pki/host.pem", PEM % (b"EC PRIVATE", b"EC PRIVATE")),
    ),
    "binary key": Break("no-secrets", "/etc/x/sign.key", in_layer("etc/x/sign.key", b"\x30\x82binary")),
    "ssh key": Break("no-secrets", "/root/.ssh/id_ed25519", in_layer("root/.ssh/id_ed25519")),
    "pull secret": Break("no-secrets", "credentials", in_layer("etc/ostree/auth.json")),
    "damaged layer": Break(
        "no-secrets",
        "cannot be read",
        lambda t: put(t.folder, "layers/2", b"\x1f\x8brubbish"),
        "could-not-run",
    ),
    # machine-identity
    "machine id": Break(
        "machine-identity", "machine-id is set", a_file("etc/machine-id", "0123456789abcdef\n")
    ),
    "host key": Break("machine-identity", "ssh_host_rsa_key", a_file("etc/ssh/ssh_host_rsa_key")),
    "host id": Break("machine-identity", "/etc/hostid", a_file("etc/hostid")),
    # units-verify
    "not enabled": Break(
        "units-verify", "not enabled", no_file("etc/systemd/system/multi-user.target.wants/hello.service")
    ),
    "not masked": Break("units-verify", "not masked", no_file("etc/systemd/system/noise.service")),
    "should be off": Break("units-verify", "should not be", label("units", '{"disable": ["hello.service"]}')),
    "no program": Break("units-verify", "not executable", no_file("usr/bin/hello")),
    "unknown key": Break(
        "units-verify", "Unknown key", a_file("usr/lib/systemd/system/hello.service", UNKNOWN)
    ),
    "unit gone": Break("units-verify", "hello.service", no_file("usr/lib/systemd/system/hello.service")),
    "older systemd here": Break(
        "units-verify",
        "the image has 9999",
        lambda t: (
            no_file(f"usr/lib/systemd/libsystemd-shared-{host_systemd()}.so")(t),
            put(t.root, "usr/lib/systemd/libsystemd-shared-9999.so"),
            put(t.root, "usr/lib/systemd/system/hello.service", UNKNOWN),
        ),
        "notice",
    ),
}


def found(report: Report, name: str) -> list[tuple[str, str]]:
    return [(f.severity, f.what) for f in report.findings if f.check == name]


def test_good_image_passes_every_check(good: Toy) -> None:
    report = run_checks(good.image)
    assert report.findings == ()
    assert report.ok
    assert set(report.passed) == {one.name for one in list_checks()}
    assert len(report.passed) == len(list_checks()) == 32


@pytest.mark.parametrize("name", BREAKS)
def test_broken_image_is_found_and_undone_passes(good: Toy, tmp_path: Path, name: str) -> None:
    case = BREAKS[name]
    others = [one.name for one in list_checks() if one.name != case.check]
    toy = copy(good, tmp_path / "toy")
    case.do(toy)
    report = run_checks(toy.image, skip=others)
    matching = [severity for severity, what in found(report, case.check) if case.what in what]
    assert set(matching) == {case.severity}, report.findings
    assert {f.severity for f in report.findings} == {case.severity}
    assert report.ok is (case.severity in ("warning", "notice"))
    assert report.passed == ()
    assert run_checks(good.image, skip=others).passed == (case.check,), "undone, it passes"


def test_every_check_has_a_break() -> None:
    assert {case.check for case in BREAKS.values()} == {one.name for one in list_checks()}


def test_every_check_has_reason_and_fix() -> None:
    for one in list_checks():
        assert one.reason and one.fix and one.severity in ("fatal", "warning", "notice")


def test_opaque_kernel_with_symvers_is_judged_by_it(toy: Toy) -> None:
    lines = [f"0x{crc:08x}\t{name}\tvmlinux\tEXPORT_SYMBOL\t" for name, crc in KERNEL.items()]
    put(toy.root, f"{TREE}/symvers.xz", compress("\n".join(lines).encode(), "xz"))
    put(toy.root, f"{TREE}/vmlinuz", b"MZ opaque")
    assert found(run_checks(toy.image), "symbol-crcs") == []
    put(toy.root, f"{TREE}/symvers.xz", compress("\n".join(lines).replace("22", "99").encode(), "xz"))
    assert "_printk" in found(run_checks(toy.image), "symbol-crcs")[0][1]


def test_zfs_release_suffix_is_the_same_version(toy: Toy) -> None:
    module = write_module(VERMAGIC, info={"version": "2.3.9-1"}, versions=KERNEL, signed=True)
    put(toy.root, f"{TREE}/extra/zfs.ko", module)
    more(f"{DPKG}/info/kmod-nvidia.list", f"/{TREE}/extra/zfs.ko\n")(toy)
    depmod(toy.root)
    toy.labels["io.imgbuild.kmods"] += " zfs=2.3.9"
    assert run_checks(toy.image).ok
    toy.labels["io.imgbuild.kmods"] = toy.labels["io.imgbuild.kmods"].replace("2.3.9", "2.3")
    assert not run_checks(toy.image).ok


def test_module_that_shadows_another_need_not_both_be_listed(toy: Toy) -> None:
    put(toy.root, f"{TREE}/updates/drm.ko.xz", (toy.root / TREE / "kernel/drm.ko.xz").read_bytes())
    depmod(toy.root)
    assert found(run_checks(toy.image), "depmod-current") == []


def test_configuration_in_etc_replaces_that_of_usr(toy: Toy) -> None:
    put(toy.root, "usr/lib/modprobe.d/x.conf", "install nvidia /bin/false\n")
    put(toy.root, "etc/modprobe.d/x.conf", "# nothing\n")
    assert found(run_checks(toy.image), "modprobe-resolves") == []


def test_tier_1_needs_no_kernel(toy: Toy) -> None:
    shutil.rmtree(toy.root / "usr/lib/modules")
    for name in ("linux-image", "kmod-nvidia"):
        no_file(f"{DPKG}/info/{name}.list")(toy)
    image = replace(
        toy.image, labels={"io.imgbuild.tier": "1", "io.imgbuild.files": toy.labels["io.imgbuild.files"]}
    )
    assert run_checks(image).findings == ()
    image = replace(image, labels={})
    assert {f.severity for f in run_checks(image).findings} == {"fatal", "could-not-run"}


def test_layers_not_given_is_no_pass(good: Toy) -> None:
    report = run_checks(replace(good.image, layers=()))
    assert found(report, "no-secrets") == [("could-not-run", "the layers of the image were not given")]
    assert not report.ok


def test_damaged_module_does_not_hide_behind_a_crash(toy: Toy) -> None:
    put(toy.root, f"{TREE}/extra/nvidia.ko.xz", compress(write_elf({".modinfo": b"vermagic=x\0"}), "xz"))
    report = run_checks(toy.image)
    assert found(report, "vermagic")[0][0] == "fatal"
    assert not report.ok


def test_missing_tool_could_not_run(good: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = run_checks(good.image)
    for name in ("modprobe-resolves", "units-verify"):
        assert [severity for severity, _ in found(report, name)] == ["could-not-run"]
        assert name not in report.passed
    assert any("apt-get install" in f.fix for f in report.findings)
    assert not report.ok


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(check_module, "_checks", {})
    yield


@pytest.mark.usefixtures("own_table")
def test_crash_of_a_check_is_a_finding_and_keeps_what_was_found(tmp_path: Path) -> None:
    @check("crashes", severity="warning", reason="r", fix="f")
    def _crashes(subject: object) -> Iterator[str]:
        yield "one thing"
        raise ZeroDivisionError("oops")

    @check("quiet", severity="fatal", reason="r", fix="f")
    def _quiet(subject: object) -> Iterator[str]:
        yield from ()

    report = run_checks(CheckedImage(tmp_path))
    assert found(report, "crashes") == [
        ("warning", "one thing"),
        ("could-not-run", "ZeroDivisionError: oops"),
    ]
    assert report.passed == ("quiet",)
    assert not report.ok
    assert report.as_dict()["findings"][0] == {  # type: ignore[index]
        "check": "crashes",
        "severity": "warning",
        "what": "one thing",
        "fix": "f",
    }
    with pytest.raises(ValueError, match="two checks"):
        check("quiet", severity="fatal", reason="r", fix="f")(_quiet)


def test_skip_names_what_was_skipped(good: Toy) -> None:
    report = run_checks(good.image, skip=["vermagic", "one-kernel"])
    assert report.skipped == ("one-kernel", "vermagic")
    assert "vermagic" not in report.passed
    json.dumps(report.as_dict())


def test_skip_of_unknown_check_is_refused(good: Toy) -> None:
    with pytest.raises(DefinitionError, match="no check `vermagick`"):
        run_checks(good.image, skip=["vermagick"])
