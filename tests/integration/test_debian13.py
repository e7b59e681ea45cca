"""The same build under Debian 13's newer buildah and Python, in a chroot of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebuild.sources import host_locations

from .conftest import Storage
from .registries import remove_storage
from .workshop import TOY, TOY_BUILD

pytestmark = pytest.mark.full
REPOSITORY = Path(__file__).parents[2]
PACKAGES = (
    "apt-utils,buildah,ca-certificates,crun,debian-archive-keyring,git,kmod,mmdebstrap,python3-apt,"
    "python3-venv,skopeo,systemd,uidmap,xz-utils,zstd"
)


@pytest.fixture
def trixie(tmp_path: Path, storage: Storage) -> Iterator[Path]:
    """A Debian 13 root with the repository and the toy site in it, /proc, /sys and /dev mounted."""
    root = tmp_path / "trixie"
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source = f"deb [signed-by={keyring}] {host_locations()['Debian']} trixie main"
    subprocess.run(
        ["mmdebstrap", "--mode=root", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "trixie",
         str(root), source],
        check=True, capture_output=True,
    )  # fmt: skip
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__")
    shutil.copytree(REPOSITORY, root / "imgbuild", ignore=ignored)
    shutil.copytree(TOY, root / "site")
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    for conf in ("/etc/pip.conf", f"{Path.home()}/.config/pip/pip.conf", f"{Path.home()}/.pip/pip.conf"):
        if Path(conf).is_file():
            shutil.copy(conf, root / "etc/pip.conf")
    mounted = []
    try:
        for kind, place in (("proc", "proc"), ("sysfs", "sys"), ("devtmpfs", "dev")):
            subprocess.run(["mount", "-t", kind, kind, str(root / place)], check=True)
            mounted.append(root / place)
        yield root
    finally:
        remove_storage(root / "var/lib/containers/storage")
        for place in reversed(mounted):
            subprocess.run(["umount", "-l", str(place)], check=False)


def inside(root: Path, script: str) -> str:
    ran = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "chroot", str(root), "sh", "-ec", script],
        capture_output=True,
        text=True,
        check=False,
        env={
            **{k: v for k, v in os.environ.items() if k.startswith(("PIP_", "HTTP", "http", "SSL"))},
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
        },
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout + ran.stderr


def test_newer_buildah_builds_and_checks_the_toy_image(trixie: Path) -> None:
    version = inside(trixie, "buildah --version")
    assert tuple(map(int, re.findall(r"(\d+)\.(\d+)", version)[0])) >= (1, 39)
    inside(trixie, "python3 -m venv /venv && /venv/bin/pip install -q /imgbuild")
    (trixie / "site/sources").mkdir()
    mirror = host_locations()
    (trixie / "site/mirrors.yaml").write_text(
        f"repositories:\n  debian: {mirror['Debian']}\n  debian-security: {mirror['Debian-Security']}\n"
    )
    build = f"cd /site && /venv/bin/imgbuild build {' '.join(TOY_BUILD)} --mirror-map mirrors.yaml"
    said = inside(trixie, build)
    assert "kmod-toy: done" in said
    digest = re.findall(r"digest +(\S+)", said)
    assert "nothing to do" in inside(trixie, build)
    inside(trixie, "/venv/bin/imgbuild check localhost/imgbuild/debian-toy:tier2")
    tier2 = "localhost/imgbuild/debian-tier2"
    inside(trixie, f"buildah rmi $(buildah images -q {tier2}) && {build} | grep {digest[0]}")
