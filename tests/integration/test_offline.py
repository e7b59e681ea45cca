"""Images by digest in local storage, folders that hold all of a lock, and builds with the network cut."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagebuild import images
from imagebuild.errors import ImgbuildError, UnavailableError
from imagebuild.load import load
from imagebuild.lock import Lockfile, Section, dumps, request_of
from tests.conftest import ImageMaker, Storage, fresh_storage

from .registries import Registry
from .workshop import Site

INDEX = "application/vnd.oci.image.index.v1+json"
LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
KINDS = ("oci", "oci list", "docker", "docker list")


def shell(*argv: str | Path) -> str:
    """Run a program that must succeed; its output."""
    return subprocess.run([*map(str, argv)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def upstream(registry: Registry, make_image: ImageMaker) -> dict[str, tuple[str, str]]:
    """Images in the registry, each as repository and digest: single ones and lists, OCI's and Docker's."""
    found = {}
    for kind in KINDS:
        docker = kind.startswith("docker")
        repository = f"upstream/{kind.replace(' ', '-')}"
        target = f"docker://{registry.address}/{repository}"
        words = ["--quiet", "--dest-tls-verify=false", "--format", "v2s2" if docker else "oci"]
        entries = []
        for architecture in ("amd64", "arm64"):
            name = make_image(
                f"{kind.replace(' ', '-')}-{architecture}", {"etc/motd": f"{kind} for {architecture}\n"}
            )
            shell("skopeo", "copy", *words, f"containers-storage:{name}", f"{target}:{architecture}")
            raw = shell("skopeo", "inspect", "--raw", "--tls-verify=false", f"{target}:{architecture}")
            entries.append(
                {
                    "mediaType": json.loads(raw)["mediaType"],
                    "digest": f"sha256:{hashlib.sha256(raw.encode()).hexdigest()}",
                    "size": len(raw),
                    "platform": {"architecture": architecture, "os": "linux"},
                }
            )
        digest = entries[0]["digest"]
        if kind.endswith("list"):
            index = {"schemaVersion": 2, "mediaType": LIST if docker else INDEX, "manifests": entries}
            digest = registry.put_manifest(repository, "1", json.dumps(index), str(index["mediaType"]))
        found[kind] = (repository, str(digest))
    return found


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage) -> Iterator[Storage]:
    """An empty storage, in use for one test."""
    with fresh_storage(tmp_path / "machine") as found:
        monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(found.conf))
        yield found


def from_and_read(name: str, folder: Path) -> str:
    """What /etc/motd holds in an image built FROM `name` with --pull=never."""
    (folder / "context").mkdir()
    (folder / "context/Containerfile").write_text(f"FROM {name}\n")
    images.build(
        folder / "context",
        name="localhost/from:1",
        isolation="chroot",
        timestamp=1_700_000_000,
        labels={},
        scratch=folder / "tmp",
        log=folder / "log",
        on_line=lambda _: None,
    )
    with images.mounted("localhost/from:1") as root:
        return (root / "etc/motd").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_image_of_a_digest_can_be_built_from_without_a_registry(
    kind: str, upstream: dict[str, tuple[str, str]], registry: Registry, fresh: Storage, tmp_path: Path
) -> None:
    repository, digest = upstream[kind]
    source = f"docker://{registry.address}/{repository}@{digest}"
    assert images.ensure("quay.example/os/base", digest, source, False)
    assert not images.ensure("quay.example/os/base", digest, "docker://127.0.0.1:1/gone", True)  # no call
    assert from_and_read(f"quay.example/os/base@{digest}", tmp_path) == f"{kind} for amd64\n"


def test_another_image_than_the_digest_says_is_refused_and_not_kept(
    upstream: dict[str, tuple[str, str]], registry: Registry, fresh: Storage
) -> None:
    repository, digest = upstream["oci"]
    with pytest.raises(ImgbuildError):
        images.ensure(
            "quay.example/os/base", f"sha256:{'0' * 64}", f"docker://{registry.address}/{repository}@{digest}",
            False,
        )  # fmt: skip
    assert images.images() == []


def test_registry_that_is_down_is_unavailable(fresh: Storage) -> None:
    digest = f"sha256:{'0' * 64}"
    with pytest.raises(UnavailableError):
        images.ensure("quay.example/os/base", digest, f"docker://127.0.0.1:1/os/base@{digest}", False)


def image_site(site: Site, digest: str, address: str, repository: str) -> Site:
    """A site with a base that starts from an upstream image, locked at `digest`."""
    site.write(
        "base/toyel/base.yaml",
        f"tier1: {{image: 'quay.example/{repository}:stream10'}}\n"
        "summary: a base that starts from an image\npackage_manager: dnf\narch: x86_64\nbootc: true\n"
        "module_compression: xz\n"
        "kernel: {range: '>=6.12', release_from: 'kernel-uname-r = {release}', releases: '[0-9].*',\n"
        "  headers: [kernel-devel], image_package: kernel}\ntoolchain: [gcc]\n",
    )
    site.write("base/toyel/none/vendor.yaml", "summary: no GPU\n")
    site.write(
        "mirrors.yaml",
        f"registries: {{quay.example: '{address}'}}\ninsecure: ['{address}']\n",
    )
    selection = load(tier=1, base="toyel", folder=site.folder)
    section = Section(
        request=request_of(selection),
        kernel_release="6.12.0-1.el10.x86_64",
        base_image=f"quay.example/{repository}:stream10",
        base_digest=digest,
    )
    site.write("imgbuild.lock", dumps(Lockfile(sections={"toyel": section})))
    return site


@pytest.mark.parametrize("kind", ["oci", "docker list"])
def test_base_from_an_image_is_pulled_through_the_mirror_map_and_built(
    kind: str,
    upstream: dict[str, tuple[str, str]],
    registry: Registry,
    make_site: Callable[[str], Site],
    fresh: Storage,
) -> None:
    repository, digest = upstream[kind]
    site = image_site(make_site("upstream"), digest, registry.address, repository)
    words = ("--base", "toyel", "--tier", "1", "--mirror-map", "mirrors.yaml")
    built = site.build(*words)
    assert site.nodes(built) == {"tier1": "built"}
    with images.mounted(built["image"]) as root:
        assert (root / "etc/motd").read_text() == f"{kind} for amd64\n"
    again = site.run("build", "--json", "--no-cache", *words)
    assert again.json["digest"] == built["digest"] and "there already" in again.err
