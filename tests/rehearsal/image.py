"""The look-alike of quay.io/centos-bootc/centos-bootc:stream10, as layers and as variants in a registry.

The image is a Debian root turned into a bootc root by root.sh, with kernels that dnf installed. Variants
(another kernel, two kernels, Debian's traps) share its layers and differ by a small last one.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ..integration.registries import MANIFESTS
from .commands import RehearsalError, run
from .contents import BASE_ROWS, FILES, KERNEL_RPMS, KERNELS, release_of
from .debs import SUITE, Deb

HERE = Path(__file__).parent
REPOSITORY = "centos-bootc/centos-bootc"
TAG = "stream10"
CREATED = "2025-11-20T00:00:00Z"
LABELS = {
    "containers.bootc": "1",
    "ostree.bootable": "1",
    "org.opencontainers.image.title": "look-alike of CentOS Stream 10 bootc, for tests",
    "org.opencontainers.image.version": "stream10.20251120.0",
}
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = "application/vnd.oci.image.config.v1+json"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

RPMDB = "usr/lib/sysimage/rpm"
UNSHARE_MACRO = "usr/lib/rpm/macros.d/macros.transaction_unshare"


@dataclass(frozen=True)
class Layer:
    """A gzip-compressed layer; `diff_id` is the digest of the tar file in it."""

    file: str
    digest: str
    diff_id: str
    size: int


# --- the root file system ---


def unpack_root(folder: Path, debs: Mapping[str, Deb], cache: Path, work: Path) -> None:
    """Put the Debian root of exactly these packages into `folder`: bootstrapped once, kept in `cache`."""
    names = "\n".join(sorted(f"{deb.path.name} {deb.sha256}" for deb in debs.values()))
    archive = cache / f"root-{hashlib.sha256(names.encode()).hexdigest()[:16]}.tar"
    if not archive.exists():
        part = work / "root.tar"
        _bootstrap(part, debs, work)
        part.rename(archive)
    archive.touch()
    folder.mkdir()
    run(
        [
            "tar",
            "--extract",
            "--numeric-owner",
            "--xattrs",
            "--xattrs-include=*",
            "--directory",
            folder,
            "--file",
            archive,
        ]
    )


def _bootstrap(target: Path, debs: Mapping[str, Deb], work: Path) -> None:
    """Bootstrap a Debian root as a tar file, out of these packages alone and without network."""
    archive = work / "archive"
    archive.mkdir()
    paragraphs = []
    for deb in debs.values():
        name = deb.path.name.replace("%3a", "_")  # apt would decode it
        (archive / name).symlink_to(deb.path)
        lines = [line for line in deb.paragraph.splitlines() if not line.startswith("Filename:")]
        paragraphs.append("\n".join([*lines, f"Filename: ./{name}"]))
    packages = ("\n\n".join(paragraphs) + "\n").encode()
    (archive / "Packages").write_bytes(packages)
    # mmdebstrap asks for the packages of this suite, so the archive has to say that it is one.
    checksum = f"SHA256:\n {hashlib.sha256(packages).hexdigest()} {len(packages)} Packages\n"
    (archive / "Release").write_text(f"Suite: {SUITE}\nCodename: {SUITE}\n{checksum}")
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
    run(
        [
            "mmdebstrap",
            "--quiet",
            "--mode=root",
            "--variant=essential",
            "--format=tar",
            "--architectures=amd64",
            '--aptopt=APT::Sandbox::User "root"',
            "--dpkgopt=force-unsafe-io",
            *left_out,
            f"--include={','.join(sorted(debs))}",
            SUITE,
            target,
            f"deb [trusted=yes] copy://{archive} ./",
        ],
    )


class Root:
    """A root file system that commands run in: without network, and with all they start ended afterwards.

    The folders of `mounts` lie in /run/rehearsal while a command runs, and the scripts beside this file.
    """

    def __init__(self, folder: Path, mounts: Mapping[str, Path]) -> None:
        self.folder = folder
        self.mounts = mounts

    def run(self, *argv: str) -> None:
        """Run a command as root in the root file system."""
        place = self.folder / "run/rehearsal"
        shell = [f'mount -t proc proc "{self.folder}/proc"', f'mount --rbind /dev "{self.folder}/dev"']
        for name, source in self.mounts.items():
            (place / name).mkdir(parents=True)
            shell.append(f'mount --bind "{source}" "{place}/{name}"')
        for script in HERE.glob("*.sh"):
            shutil.copy(script, place)
        shell.append(f'exec chroot "{self.folder}" "$@"')
        run(
            [
                "unshare",
                "--mount",
                "--propagation=private",
                "--pid",
                "--fork",
                "--kill-child",
                "--net",
                "sh",
                "-euc",
                "\n".join(shell),
                "sh",
                *argv,
            ],
            env={"PATH": PATH, "HOME": "/tmp"},
        )
        shutil.rmtree(place)


def make_base(root: Root, folder: Path) -> dict[str, Layer]:
    """Turn the Debian root into the image without a kernel; its layer, and those of Debian's traps."""
    macro = (root.folder / UNSHARE_MACRO).read_bytes()
    shutil.copytree(FILES / "image", root.folder, symlinks=True, dirs_exist_ok=True)
    root.run("sh", "/run/rehearsal/root.sh", *BASE_ROWS)
    return {
        "root": _pack(root.folder, ["."], folder / "root.tar.gz"),
        "unshare-plugin": _small(folder / "unshare-plugin.tar.gz", {UNSHARE_MACRO: macro}),
        "leaky-gpg": _small(folder / "leaky-gpg.tar.gz", {"etc/gnupg/.wh.gpg.conf": b""}),
    }


def add_kernels(root: Root, folder: Path) -> dict[str, Layer]:
    """Install the kernels; the layers of each one's files, and of the RPM databases.

    A database's name says which kernels it has: `rpmdb-old`, `rpmdb-new`, `rpmdb-both`.
    """
    layers: dict[str, Layer] = {}

    def add(name: str, path: str) -> None:
        layers[name] = _pack(root.folder, [path], folder / f"{name}.tar.gz")

    with ThreadPoolExecutor(2) as pool:
        packing = []
        for name, database in (("old", "rpmdb-old"), ("new", "rpmdb-both")):
            release = release_of(KERNELS[name])
            root.run("sh", "/run/rehearsal/install.sh", "kernels", f"kernel-{KERNELS[name]}")
            root.run("depmod", "--all", release)
            packing.append(pool.submit(add, name, f"usr/lib/modules/{release}"))
            add(database, RPMDB)
        forgotten = [f"{name}-{KERNELS['old']}" for name in KERNEL_RPMS]
        root.run("rpm", "--erase", "--justdb", "--nodeps", "--noscripts", *forgotten)
        for path in (root.folder / RPMDB).glob("rpmdb.sqlite-*"):
            path.unlink()
        add("rpmdb-new", RPMDB)
        for future in packing:
            future.result()
    return layers


def _pack(tree: Path, paths: Sequence[str], target: Path) -> Layer:
    """Pack parts of a tree, but nothing that is mounted when it runs."""
    left_out = [f"--exclude=./{name}/*" for name in ("dev", "proc", "run", "sys", "tmp")]
    argv = ["tar", "--create", "--numeric-owner", "--sort=name", "--format=posix"]
    argv += ["--pax-option=delete=atime,delete=ctime", "--xattrs", "--xattrs-include=*"]
    argv += [*left_out, "--directory", str(tree), *paths]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        layer = _compress(process.stdout, target)
    if process.returncode != 0:
        raise RehearsalError(f"tar of {tree} exited with {process.returncode}")
    return layer


def _compress(source: IO[bytes], target: Path) -> Layer:
    plain, packed = hashlib.sha256(), hashlib.sha256()
    squeeze = zlib.compressobj(1, zlib.DEFLATED, 31)
    with target.open("wb") as file:
        while chunk := source.read(1 << 20):
            plain.update(chunk)
            data = squeeze.compress(chunk)
            packed.update(data)
            file.write(data)
        data = squeeze.flush()
        packed.update(data)
        file.write(data)
    return Layer(
        str(target), f"sha256:{packed.hexdigest()}", f"sha256:{plain.hexdigest()}", target.stat().st_size
    )


def _small(target: Path, files: Mapping[str, bytes]) -> Layer:
    """A layer of a few files; `.wh.NAME` removes NAME of a lower layer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    return _compress(buffer, target)


# --- in a registry ---


@dataclass(frozen=True)
class Variant:
    """One look of the upstream image: which kernels it has, and which of Debian's traps are left in it."""

    kernel: str = "new"
    """`old`, `new`, or `both`: what an update leaves behind."""
    leaky_gpg: bool = False
    """dnf's gpg starts agents that outlive it."""
    unshare_plugin: bool = False
    """In a chroot every scriptlet fails, and dnf exits with 0."""

    def layers(self, layers: Mapping[str, Layer]) -> list[Layer]:
        """Its layers, lowest first. Raises RehearsalError if there is no such kernel."""
        if self.kernel not in (*KERNELS, "both"):
            raise RehearsalError(f"there is no kernel `{self.kernel}`, only: {', '.join(KERNELS)}, both")
        kernels = list(KERNELS) if self.kernel == "both" else [self.kernel]
        names = ["root", *kernels, f"rpmdb-{self.kernel}"]
        names += ["leaky-gpg"] if self.leaky_gpg else []
        names += ["unshare-plugin"] if self.unshare_plugin else []
        return [layers[name] for name in names]


def upload(address: str, layers: Mapping[str, Layer], folder: Path) -> None:
    """Put the layers into the image's repository of a registry."""
    for layer in layers.values():
        _put_blob(address, REPOSITORY, layer.digest, (folder / layer.file).read_bytes())


def publish(address: str, repository: str, tag: str, layers: Mapping[str, Layer], variant: Variant) -> str:
    """Move a tag to a variant, whose layers the registry has; returns the manifest's digest."""
    chosen = variant.layers(layers)
    config = {
        "created": CREATED,
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Cmd": ["/sbin/init"],
            "Env": [f"PATH={PATH}"],
            "Labels": LABELS,
            "StopSignal": "SIGRTMIN+3",
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in chosen]},
        "history": [{"created": CREATED, "comment": "look-alike for tests"} for _ in chosen],
    }
    data = json.dumps(config, sort_keys=True).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if repository != REPOSITORY:
        for layer in chosen:
            _request(address, "POST", f"{repository}/blobs/uploads/?mount={layer.digest}&from={REPOSITORY}")
    _put_blob(address, repository, digest, data)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFESTS,
        "config": {"mediaType": CONFIG, "digest": digest, "size": len(data)},
        "layers": [{"mediaType": LAYER, "digest": one.digest, "size": one.size} for one in chosen],
    }
    headers = _request(
        address, "PUT", f"{repository}/manifests/{tag}", json.dumps(manifest).encode(), content_type=MANIFESTS
    )
    return headers["docker-content-digest"]


def _put_blob(address: str, repository: str, digest: str, data: bytes) -> None:
    place = _request(address, "POST", f"{repository}/blobs/uploads/")["location"]
    _request(address, "PUT", f"{place}&digest={digest}", data)


def _request(
    address: str,
    method: str,
    path: str,
    data: bytes = b"",
    *,
    content_type: str = "application/octet-stream",
) -> dict[str, str]:
    """One request to a registry's API; returns the answer's headers, in lower case."""
    url = path if path.startswith("http") else f"http://{address}/v2/{path}"
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=60) as response:
        return {name.lower(): value for name, value in response.headers.items()}


def as_json(layers: Mapping[str, Layer]) -> str:
    """Layers as text, without the files they were in."""
    return json.dumps({name: {**asdict(layer), "file": ""} for name, layer in layers.items()}, indent=1)


def from_json(text: str) -> dict[str, Layer]:
    """What `as_json` wrote."""
    found: dict[str, dict[str, Any]] = json.loads(text)
    return {name: Layer(**fields) for name, fields in found.items()}
