"""The container-toolkit layer against a stand-in of NVIDIA's repository, found through a mirror map.

The repository is a real signed apt repository; the package in it is a stand-in, not NVIDIA's.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebuild import images

from .workshop import TOY_BUILD, Site

TOOLKIT = (*TOY_BUILD, "--with", "container-toolkit", "--with", "cdi", "--mirror-map", "mirrors.yaml")


def gpg(home: Path, *arguments: str) -> str:
    ran = subprocess.run(
        ["gpg", "--batch", "--quiet", "--homedir", str(home), *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return ran.stdout


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat apt repository with a stand-in nvidia-ctk, its key, and a stranger's key."""
    folder = tmp_path_factory.mktemp("toolkit")
    root = folder / "package"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr/bin").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: nvidia-container-toolkit-base\nVersion: 1.20.0-1\nArchitecture: amd64\n"
        "Maintainer: test\nDescription: stand-in, not NVIDIA's\n"
    )
    tool = root / "usr/bin/nvidia-ctk"
    tool.write_text("#!/bin/sh\necho stand-in of nvidia-ctk\n")
    tool.chmod(0o755)
    repo = folder / "repo"
    repo.mkdir()
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(root), str(repo)], check=True, capture_output=True
    )
    home = folder / "gnupg"
    home.mkdir(mode=0o700)
    for name in ("toolkit", "stranger"):
        gpg(home, "--passphrase", "", "--quick-generate-key", name, "rsa3072", "sign", "never")
        (folder / f"{name}.asc").write_text(gpg(home, "--armor", "--export", name))
    packages = subprocess.run(
        ["apt-ftparchive", "packages", "."], cwd=repo, capture_output=True, text=True, check=True
    ).stdout
    (repo / "Packages").write_text(packages)
    release = subprocess.run(
        ["apt-ftparchive", "release", "."], cwd=repo, capture_output=True, text=True, check=True
    ).stdout
    (repo / "Release").write_text(release)
    gpg(home, "-u", "toolkit", "--clearsign", "-o", str(repo / "InRelease"), str(repo / "Release"))
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
    return folder


def mirror(site: Site, repository: Path, key: str) -> None:
    site.write(f"keys/{key}.asc", (repository / f"{key}.asc").read_text())
    site.write(
        "mirrors.yaml",
        "repositories:\n  nvidia-container-toolkit:\n"
        f"    uri: file://{repository}/repo\n    key: keys/{key}.asc\n",
    )


def test_toolkit_comes_from_the_mirror_map_and_is_verified(
    toy: Site, repository: Path, make_site: Callable[[str], Site]
) -> None:
    mirror(toy, repository, "toolkit")
    built = toy.run("build", "--json", *TOOLKIT)
    assert "no CDI generator" not in built.err
    assert "debian/toy/cdi+container-toolkit" in (toy.folder / "imgbuild.lock").read_text()
    with images.mounted(built.json["image"]) as root:
        assert (root / "usr/bin/nvidia-ctk").stat().st_mode & 0o111
        # Nothing of the mirror map or its keys is in the image.
        assert not list((root / "etc/apt").rglob("*toolkit*"))
    statuses = toy.nodes(built.json)
    assert statuses["kmod-toy"] == "cached" and statuses["tier2"] == "built"


@pytest.mark.parametrize("fault", ["stranger's key", "unsigned", "no key"])
def test_toolkit_with_a_wrong_signature_is_refused(toy: Site, repository: Path, fault: str) -> None:
    mirror(toy, repository, "stranger" if fault == "stranger's key" else "toolkit")
    if fault == "unsigned":
        bare = toy.folder / "bare"
        bare.mkdir()
        for path in (repository / "repo").iterdir():
            if path.name != "InRelease":
                os.link(path, bare / path.name)
        toy.edit("mirrors.yaml", f"file://{repository}/repo", f"file://{bare}")
    if fault == "no key":
        toy.edit("mirrors.yaml", "keys/toolkit.asc", "keys/none.asc")
    before = (toy.folder / "imgbuild.lock").read_text()
    failed = toy.run("build", *TOOLKIT, code=None)
    assert failed.code == (2 if fault == "no key" else 4), failed.text
    expected = {"stranger's key": "NO_PUBKEY", "unsigned": "not signed", "no key": "no key file"}[fault]
    assert expected in failed.err, failed.err
    assert (toy.folder / "imgbuild.lock").read_text() == before


def test_key_that_changed_since_it_was_locked_is_refused(toy: Site, repository: Path) -> None:
    mirror(toy, repository, "toolkit")
    toy.run("lock", *TOOLKIT)
    lock = toy.folder / "imgbuild.lock"
    assert '"keys"' in lock.read_text()
    mirror(toy, repository, "stranger")
    before = lock.read_text()
    failed = toy.run("lock", *TOOLKIT, code=1)
    assert "is not the one that was locked" in failed.err and lock.read_text() == before
