"""A bare Debian 12 and 13 (git and Python, nothing else), in a chroot: install, build, check, build again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebuild.sources import host_locations
from tests.conftest import Storage

from .workshop import TOY, TOY_BUILD

pytestmark = pytest.mark.full
REPOSITORY = Path(__file__).parents[2]
BUILDAH = {"bookworm": (1, 28), "trixie": (1, 39)}
"""Suites, and the buildah each has at least."""
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@pytest.fixture(params=sorted(BUILDAH))
def machine(request: pytest.FixtureRequest, tmp_path: Path, storage: Storage) -> Iterator[Path]:
    """A root of that suite with the repository and the toy site in it, /proc, /sys and /dev mounted."""
    suite = request.param
    root = tmp_path / suite
    known = host_locations()
    sources = [
        f"deb [signed-by={KEYRING}] {known['Debian']} {suite} main",
        f"deb [signed-by={KEYRING}] {known['Debian-Security']} {suite}-security main",
    ]
    subprocess.run(
        ["mmdebstrap", "--mode=root", "--quiet", "--variant=minbase", "--include=ca-certificates,git,python3",
         suite, str(root), *sources],
        check=True, capture_output=True,
    )  # fmt: skip
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__")
    shutil.copytree(REPOSITORY, root / "imgbuild", ignore=ignored)
    shutil.copytree(TOY, root / "site")
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    if "PIP_CERT" in os.environ:  # a package index behind a certificate authority of its own
        shutil.copy(os.environ["PIP_CERT"], root / "pip-ca.crt")
    mounted = []
    try:
        # A root that is a mount point, as any machine's or container's is.
        subprocess.run(["mount", "--bind", str(root), str(root)], check=True)
        mounted.append(root)
        for kind, place in (("proc", "proc"), ("sysfs", "sys"), ("devtmpfs", "dev")):
            subprocess.run(["mount", "-t", kind, kind, str(root / place)], check=True)
            mounted.append(root / place)
        yield root
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", "-l", str(place)], check=False)


def inside(root: Path, script: str) -> str:
    ran = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "chroot", str(root), "sh", "-ec", script],
        capture_output=True,
        text=True,
        check=False,
        env={
            **{k: v for k, v in os.environ.items() if k.startswith(("PIP_INDEX", "HTTP", "http"))},
            **({"PIP_CERT": "/pip-ca.crt"} if "PIP_CERT" in os.environ else {}),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
        },
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout + ran.stderr


def test_bare_machine_builds_and_checks_the_toy_image(machine: Path) -> None:
    build = f"cd /site && /imgbuild/imgbuild.sh build {' '.join(TOY_BUILD)}"
    said = inside(machine, build)  # installs buildah, mmdebstrap and all else first
    assert "kmod-toy: done" in said
    version = inside(machine, "buildah --version")
    assert tuple(map(int, re.findall(r"(\d+)\.(\d+)", version)[0])) >= BUILDAH[machine.name]
    digest = re.findall(r"digest +(\S+)", said)[0]
    assert "nothing to do" in inside(machine, build)
    inside(machine, "/imgbuild/imgbuild.sh check localhost/imgbuild/debian-toy:tier2")
    # The same key, built again, is the same image.
    again = inside(machine, f"{build} --no-cache")
    assert re.findall(r"digest +(\S+)", again)[0] == digest
