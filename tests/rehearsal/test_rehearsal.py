"""The look-alike looks alike, and each of its faults has the effect it is named after."""

from __future__ import annotations

import configparser
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from imagebuild.check import CheckedImage, list_checks, run_checks

from ..conftest import Storage
from . import contents, image
from .look_alike import Rehearsal, Wrong

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
SOURCE = HERE.parents[1]
MARK = "REHEARSAL_MACHINE"
OLD, NEW = (contents.release_of(version) for version in contents.KERNELS.values())


@dataclass(frozen=True)
class Machine:
    """A container of the base image; `root` is its file system."""

    name: str
    root: Path

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, with the output of both streams as stdout."""
        return subprocess.run(
            ["buildah", "run", "--isolation=chroot", f"--env={MARK}={self.root}", self.name, "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )

    def dnf(self, world: Rehearsal, *words: str, repositories: tuple[str, ...] = ()) -> tuple[int, str]:
        """Run dnf with BaseOS, AppStream and other repositories; without any trace of earlier runs."""
        options = ["--disablerepo=*", "--setopt=retries=1", "--setopt=install_weak_deps=0"]
        for name in ("baseos", "appstream"):
            # The image's own definition, moved to where the mirror is.
            options += [f"--enablerepo={name}", f"--setopt={name}.metalink="]
            options += [f"--setopt={name}.baseurl={world.url(name)}"]
        for name in repositories:
            key = self.root / f"etc/pki/rpm-gpg/{name}"
            key.write_bytes(world.key(name).read_bytes())
            options += [f"--repofrompath={name},{world.url(name)}", f"--enablerepo={name}"]
            options += [f"--setopt={name}.{check}=1" for check in ("gpgcheck", "repo_gpgcheck")]
            options += [f"--setopt={name}.gpgkey=file:///etc/pki/rpm-gpg/{name}"]
        script = 'rm -rf /var/cache/dnf; exec dnf -y "$@"'
        done = self.run("sh", "-c", script, "dnf", *options, *words)
        return done.returncode, done.stdout

    def tried(self, world: Rehearsal, *specs: str, repositories: tuple[str, ...] = ()) -> tuple[int, str]:
        """Download, verify and try an installation, without making it."""
        return self.dnf(world, "--setopt=tsflags=test", "install", *specs, repositories=repositories)


def machine(world: Rehearsal) -> Machine:
    """A new container of the base image as a rehearsal publishes it now."""
    place = f"docker://{world.registry.address}/{world.image}:{image.TAG}"
    argv = ["buildah", "from", "--quiet", "--pull-always", "--tls-verify=false", place]
    name = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1]
    mounted = subprocess.run(["buildah", "mount", name], check=True, capture_output=True, text=True)
    return Machine(name, Path(mounted.stdout.strip()))


@pytest.fixture(scope="module")
def centos(rehearsal: Rehearsal, storage: Storage) -> Iterator[Machine]:
    """A container of the base image, shared by tests that install nothing."""
    found = machine(rehearsal)
    yield found
    subprocess.run(["buildah", "rm", found.name], check=True, capture_output=True)


@pytest.fixture
def fresh(private_rehearsal: Rehearsal, storage: Storage) -> Iterator[Callable[[], Machine]]:
    """Makes containers of the private base image, for one test."""
    made = []

    def make() -> Machine:
        made.append(machine(private_rehearsal))
        return made[-1]

    yield make
    for one in made:
        subprocess.run(["buildah", "rm", one.name], check=True, capture_output=True)


def definition(path: str) -> Mapping[str, Any]:
    """A definition as it is shipped."""
    found: dict[str, Any] = yaml.safe_load((SOURCE / path).read_text())
    return found


# --- it looks alike ---


def test_rehearsal_image_passes_the_checks_of_every_base_layer(rehearsal: Rehearsal, centos: Machine) -> None:
    manifest = rehearsal.registry.manifest(rehearsal.image, image.TAG)
    config = rehearsal.registry.config(rehearsal.image, image.TAG)
    blobs = rehearsal.folder / "registry/data/docker/registry/v2/blobs/sha256"
    digests = [layer["digest"].partition(":")[2] for layer in manifest["layers"]]
    layers = tuple(blobs / digest[:2] / digest / "data" for digest in digests)
    wanted = {"no-build-tools", "no-package-caches", "no-leftovers", "no-secrets", "machine-identity"}
    wanted |= {"one-kernel", "vermagic", "depmod-current"}
    labels = {**config["config"]["Labels"], "io.imgbuild.tier": "1"}

    report = run_checks(
        CheckedImage(centos.root, labels, layers), skip={c.name for c in list_checks()} - wanted
    )

    assert report.findings == ()
    assert set(report.passed) == wanted
    assert labels["containers.bootc"] == labels["ostree.bootable"] == "1"
    assert config["config"]["Labels"]["org.opencontainers.image.version"].startswith("stream10")


def test_rehearsal_image_has_the_layout_of_a_bootc_image(centos: Machine) -> None:
    assert list((centos.root / "boot").iterdir()) == []
    assert (centos.root / "ostree").readlink() == Path("sysroot/ostree")
    assert (centos.root / "sysroot").stat().st_mode & 0o7777 == 0o755
    assert "enabled = true" in (centos.root / "usr/lib/ostree/prepare-root.conf").read_text()
    assert [path for path in (centos.root / "var").rglob("*") if path.is_file()] == []
    assert not (centos.root / "var/lib/dpkg").exists()
    lint = centos.run("bootc", "container", "lint", "--fatal-warnings")
    assert lint.returncode == 0 and "STAND-IN" in lint.stdout
    assert centos.run("bootc", "upgrade").returncode != 0


def test_rehearsal_image_has_its_kernel_as_packages_that_verify(centos: Machine) -> None:
    owner = centos.run("rpm", "--query", "--file", f"/usr/lib/modules/{NEW}/vmlinuz").stdout
    assert owner.startswith("kernel-core-")
    provides = centos.run("rpm", "--query", "--provides", "kernel-core").stdout
    assert f"kernel-uname-r = {NEW}\n" in provides
    verified = centos.run("rpm", "--verify", "--all")
    assert (verified.returncode, verified.stdout) == (0, "")


def test_own_repositories_are_only_known_by_metalinks_of_the_real_mirrors(centos: Machine) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read([centos.root / f"etc/yum.repos.d/{name}.repo" for name in ("centos", "centos-addons")])
    enabled = {name for name in parser.sections() if parser[name]["enabled"] == "1"}
    assert enabled == {contents.BASE, contents.APP, contents.EXTRAS}
    assert contents.CRB in parser.sections()
    for name in parser.sections():
        assert parser[name]["metalink"].startswith("https://mirrors.centos.org/")
        assert (parser[name]["gpgcheck"], parser[name]["repo_gpgcheck"]) == ("1", "0")
        assert "baseurl" not in parser[name]
        key = parser[name]["gpgkey"].removeprefix("file:///")
        assert (centos.root / key).is_file()


def test_dnf_resolves_what_the_definitions_ask_for(rehearsal: Rehearsal, centos: Machine) -> None:
    base, nvidia = definition("base/centos/base.yaml"), definition("base/centos/nvidia/vendor.yaml")
    headers = [text.format(release=NEW) for text in base["kernel"]["headers"]]
    code, said = centos.tried(rehearsal, *base["toolchain"], *headers)
    assert code == 0, said

    toolkit = definition("layers/container-toolkit/layer.yaml")["packages"]
    source = nvidia["kmods"]["nvidia"]["source"]["package"]
    repositories = (contents.CUDA, contents.TOOLKIT)
    # The modules' package is promised by imgbuild; without it, NVIDIA's own is wanted, which needs DKMS.
    code, said = centos.tried(rehearsal, *nvidia["packages"], *toolkit, repositories=repositories)
    assert code == 1 and f"nothing provides dkms needed by {source}" in said
    with_dkms = (*repositories, contents.EPEL)
    code, said = centos.tried(rehearsal, *nvidia["packages"], *toolkit, repositories=with_dkms)
    assert code == 0 and source in said, said

    zfs = definition("layers/zfs/layer.yaml")["for"]["centos"]
    code, said = centos.tried(rehearsal, *zfs["packages"], repositories=(contents.ZFS_REPO, contents.EPEL))
    assert code == 0 and zfs["kmods"]["zfs"]["source"]["package"] in said, said


def test_builder_has_its_tools_once_they_are_installed(
    private_rehearsal: Rehearsal, fresh: Callable[[], Machine]
) -> None:
    here = fresh()
    tools = "rpmbuild xz patch gcc make strip ld"
    missing = here.run("sh", "-c", f"for t in {tools}; do command -v $t || :; done")
    assert missing.stdout == ""
    toolchain = definition("base/centos/base.yaml")["toolchain"]

    code, said = here.dnf(private_rehearsal, "install", *toolchain, f"kernel-devel-uname-r = {NEW}")

    assert code == 0, said
    assert here.run("sh", "-euc", f"for t in {tools} modinfo; do command -v $t; done").returncode == 0
    program = "echo 'int main(void) { return 0; }' > /tmp/a.c && gcc -o /tmp/a /tmp/a.c && /tmp/a"
    assert here.run("sh", "-euc", program).returncode == 0
    headers = here.root / f"usr/src/kernels/{NEW}"
    assert (headers / "Module.symvers").is_file() and not (headers / "vmlinux").exists()


# --- its faults ---


def test_base_kernel_moves_the_tag(private_rehearsal: Rehearsal, fresh: Callable[[], Machine]) -> None:
    stock = private_rehearsal.digest()
    with private_rehearsal.base_kernel("both"):
        moved = fresh()
        kernels = sorted(path.name for path in (moved.root / "usr/lib/modules").iterdir())
        assert kernels == [OLD, NEW]
        assert len(moved.run("rpm", "--query", "kernel-core").stdout.splitlines()) == 2
    with private_rehearsal.base_kernel("old"):
        assert private_rehearsal.digest() != stock
        moved = fresh()
        assert [path.name for path in (moved.root / "usr/lib/modules").iterdir()] == [OLD]
        owner = moved.run("rpm", "--query", "--file", f"/usr/lib/modules/{OLD}/vmlinuz")
        assert owner.stdout.startswith(f"kernel-core-{contents.KERNELS['old']}")
    assert private_rehearsal.digest() == stock


def test_traps_of_debian_are_left_in_on_demand(
    private_rehearsal: Rehearsal, fresh: Callable[[], Machine]
) -> None:
    with private_rehearsal.base_kernel(leaky_gpg=True, unshare_plugin=True):
        trapped = fresh()
    # A package whose scriptlet is sound.
    code, said = trapped.dnf(private_rehearsal, "install", "libnvidia-ml", repositories=(contents.CUDA,))
    leaked = left_running(trapped)
    for process in leaked:
        os.kill(process, signal.SIGKILL)
    assert code == 0 and "scriptlet failed" in said
    assert leaked
    good = fresh()
    code, said = good.dnf(private_rehearsal, "install", "libnvidia-ml", repositories=(contents.CUDA,))
    assert code == 0 and "scriptlet failed" not in said
    assert left_running(good) == []


def left_running(machine: Machine) -> list[int]:
    """Processes that were started in a container and are still there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={machine.root}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


@pytest.mark.parametrize(("offered", "other"), [("old", NEW), ("new", OLD)])
def test_kernel_devel_is_offered_for_one_kernel_only(
    private_rehearsal: Rehearsal, centos: Machine, offered: str, other: str
) -> None:
    release = contents.release_of(contents.KERNELS[offered])
    private_rehearsal.kernel_devel(offered)
    assert centos.tried(private_rehearsal, f"kernel-devel-uname-r = {release}")[0] == 0
    code, said = centos.tried(private_rehearsal, f"kernel-devel-uname-r = {other}")
    assert code == 1 and "Unable to find a match" in said
    code, said = centos.dnf(private_rehearsal, "-q", "repoquery", "--whatprovides", "kernel-uname-r")
    assert said.count("kernel-core") == 1


def test_vanished_package_is_gone_and_another_release_is_there(
    rehearsal: Rehearsal, private_rehearsal: Rehearsal, centos: Machine
) -> None:
    private_rehearsal.vanish("nvidia-persistenced")
    query = ["-q", "repoquery", "nvidia-persistenced"]
    _, now = centos.dnf(private_rehearsal, *query, repositories=(contents.CUDA,))
    _, before = centos.dnf(rehearsal, *query, repositories=(contents.CUDA,))
    assert "nvidia-persistenced-3:550.163.01-1.el10.x86_64" in before
    assert "nvidia-persistenced-3:550.163.01-2.el10.x86_64" in now and "-1.el10" not in now
    (file,) = private_rehearsal.servers[contents.CUDA].folder.glob("Packages/nvidia-persistenced-*")
    old = next(path for path in rehearsal.servers[contents.CUDA].folder.glob(f"Packages/{file.name[:19]}*"))
    listed = [
        subprocess.run(["rpm", "-qlp", path], check=True, capture_output=True, text=True).stdout
        for path in (old, file)
    ]
    assert listed[0] == listed[1] != ""

    private_rehearsal.vanish("nvidia-modprobe", replaced=False)
    code, said = centos.tried(private_rehearsal, "nvidia-modprobe", repositories=(contents.CUDA,))
    assert code == 1 and "Unable to find a match" in said


def test_split_driver_fits_to_itself_but_not_to_the_modules(
    private_rehearsal: Rehearsal, centos: Machine
) -> None:
    repositories = (contents.CUDA, contents.EPEL)
    private_rehearsal.split_driver()
    code, said = centos.tried(private_rehearsal, "nvidia-driver-cuda", repositories=repositories)
    assert code == 1 and "nothing provides nvidia-kmod = 3:550.163.02" in said
    private_rehearsal.restore()
    private_rehearsal.split_driver(required=False)
    code, said = centos.tried(private_rehearsal, "nvidia-driver-cuda", repositories=repositories)
    assert code == 0 and "nvidia-driver-cuda-libs" in said, said


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("metadata", "GPG signature verification error"),
        ("metadata-missing", "GPG signature is not available"),
        ("package", "GPG check FAILED"),
        ("package-unsigned", "is not signed"),
        ("bytes", "Cannot download"),
    ],
)
def test_wrong_signature_is_refused_by_dnf(
    private_rehearsal: Rehearsal, centos: Machine, kind: Wrong, message: str
) -> None:
    repository = contents.TOOLKIT
    with private_rehearsal.wrong_signature(repository, kind):
        code, said = centos.tried(
            private_rehearsal, "nvidia-container-toolkit-base", repositories=(repository,)
        )
        assert code == 1 and message in said, said
    code, said = centos.tried(private_rehearsal, "nvidia-container-toolkit-base", repositories=(repository,))
    assert code == 0, said


def test_broken_scriptlet_leaves_exit_code_0(
    private_rehearsal: Rehearsal, fresh: Callable[[], Machine]
) -> None:
    private_rehearsal.broken_scriptlet("libnvidia-ml")
    code, said = fresh().dnf(private_rehearsal, "install", "libnvidia-ml", repositories=(contents.CUDA,))
    assert code == 0 and "this scriptlet fails" in said and "scriptlet failed" in said, said


def test_flaky_server_refuses_every_second_request(private_rehearsal: Rehearsal, centos: Machine) -> None:
    server = private_rehearsal.servers[contents.TOOLKIT]
    with private_rehearsal.flaky(contents.TOOLKIT):
        centos.tried(private_rehearsal, "nvidia-container-toolkit-base", repositories=(contents.TOOLKIT,))
    codes = [code for _, code in server.requests]
    assert len(codes) > 2
    assert codes[::2] == [503] * len(codes[::2]) and 503 not in codes[1::2]


@pytest.mark.parametrize(("refused", "message"), [(False, "503"), (True, "Curl error (7)")])
def test_server_that_is_down(
    private_rehearsal: Rehearsal, centos: Machine, refused: bool, message: str
) -> None:
    with private_rehearsal.down("appstream", refused=refused):
        code, said = centos.tried(private_rehearsal, "gcc")
        assert code == 1 and message in said, said
    assert centos.tried(private_rehearsal, "rpm-build")[0] == 0


def test_private_rehearsal_leaves_the_shared_one_unharmed(rehearsal: Rehearsal) -> None:
    digest, folder = rehearsal.digest(), rehearsal.servers[contents.TOOLKIT].folder
    packages = {path.name: path.stat() for path in folder.rglob("*.rpm")}
    with rehearsal.private() as world:
        world.base_kernel("old")
        world.wrong_signature(contents.TOOLKIT, "package")
        world.wrong_signature(contents.TOOLKIT, "bytes")
        assert yaml.safe_load(world.mirror_map.read_text()) != yaml.safe_load(
            rehearsal.mirror_map.read_text()
        )
    assert rehearsal.digest() == digest
    assert {path.name: path.stat().st_mtime for path in folder.rglob("*.rpm")} == {
        name: stat.st_mtime for name, stat in packages.items()
    }
    assert not world.folder.exists()
