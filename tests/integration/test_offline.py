"""Images by digest in local storage, folders that hold all of a lock, and builds with the network cut."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imagebuild import images
from imagebuild.errors import ImgbuildError, UnavailableError
from imagebuild.load import load
from imagebuild.lock import Lockfile, Section, dumps, request_of
from tests.conftest import ImageMaker, Storage, fresh_storage

from .registries import Registry
from .workshop import TOY_BUILD, Outcome, Site, toy_site

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
        request=request_of(selection, digest),
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


# --- folders that hold all of a lock ---

WORDS = (*TOY_BUILD, "--with", "llm")


@dataclass(frozen=True)
class Stick:
    """A folder that was fetched with network, and the site it was fetched for."""

    site: Site
    folder: Path
    images: dict[str, str]
    mirrored: Registry

    def fetch(self, *words: str, code: int = 0) -> Outcome:
        return self.site.run("fetch", str(self.folder), *WORDS, *words, "--mirror-map", "m.yaml", code=code)

    def entries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / "contents.json").read_text())["entries"]
        return found

    def files(self) -> dict[str, float]:
        """Every file with the time it was changed."""
        return {
            str(path.relative_to(self.folder)): path.stat().st_mtime
            for path in self.folder.rglob("*")
            if path.is_file()
        }


@pytest.fixture(scope="module")
def stick(
    make_site: Callable[[str], Site],
    toy_lock: str,
    upstream: dict[str, tuple[str, str]],
    registry: Registry,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stick:
    """A folder with all that the toy image and a layer with container images need."""
    site = make_site("connected")
    toy_site(site.folder, site.env)
    site.write("imgbuild.lock", toy_lock)
    named = {f"quay.example/{upstream[kind][0]}:1": upstream[kind][1] for kind in ("oci list", "docker list")}
    site.write("layers/llm/layer.yaml", f"summary: serves\nimages: {json.dumps(list(named))}\n")
    quadlet = "".join(f"Image={{{{ images['{name}'] }}}}\n" for name in named)
    site.write("layers/llm/files/usr/share/llm.container.j2", quadlet)
    site.write(
        "m.yaml", f"registries: {{quay.example: '{registry.address}'}}\ninsecure: ['{registry.address}']\n"
    )
    found = Stick(site, tmp_path_factory.mktemp("stick") / "usb", named, registry)
    found.fetch()
    return found


@pytest.fixture
def apart(stick: Stick, tmp_path: Path, storage: Storage) -> Iterator[Site]:
    """The same site on a machine that never had a network, and has nothing yet."""
    folder = tmp_path / "apart"
    with fresh_storage(folder / "storage") as fresh:
        env = {"IMGBUILD_STATE_DIR": str(folder / "state"), "CONTAINERS_STORAGE_CONF": str(fresh.conf)}
        shutil.copytree(stick.site.folder, folder / "site")
        yield Site(folder / "site", env, prefix=("unshare", "--net"))


def test_fetch_locks_and_gathers_everything_with_a_table_of_contents(stick: Stick) -> None:
    lock = json.loads((stick.folder / "imgbuild.lock").read_text())
    (name,) = lock["sections"]
    assert name == "debian/toy/llm"
    section = lock["sections"][name]
    assert json.loads((stick.site.folder / "imgbuild.lock").read_text())["sections"][name] == section
    assert section["images"] == stick.images
    wanted = {p["sha256"] for packages in section["transactions"].values() for p in packages}
    entries = stick.entries()
    assert {e["sha256"] for e in entries if e["kind"] == "package"} == wanted
    assert {e["name"]: f"sha256:{e['sha256']}" for e in entries if e["kind"] == "image"} == stick.images
    for entry in entries:
        assert entry["from"] and entry["size"] > 0
        if entry["kind"] != "image":
            path = stick.folder / "store" / entry["sha256"][:2] / entry["sha256"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
            assert path.stat().st_size == entry["size"]
    keys = [(e["kind"], e["name"], e["version"], e["sha256"]) for e in entries]
    assert keys == sorted(keys)
    assert sorted(p.name for p in stick.folder.iterdir()) == [
        "contents.json",
        "images",
        "imgbuild.lock",
        "store",
    ]


@pytest.mark.parametrize("kind", ["oci list", "docker list"])
def test_gathered_image_can_be_carried_to_another_registry_and_keeps_its_digest(
    stick: Stick, kind: str, registry: Registry, upstream: dict[str, tuple[str, str]]
) -> None:
    digest = upstream[kind][1]
    target = f"docker://{registry.address}/carried/{kind.replace(' ', '-')}"
    source = f"oci:{stick.folder}/images/by-digest/{digest[7:]}"
    blobs = f"--src-shared-blob-dir={stick.folder}/images/blobs"
    listed = json.loads((stick.folder / "images/index.json").read_text())["manifests"]
    assert digest in [entry["digest"] for entry in listed]
    shell(
        "skopeo",
        "copy",
        "--quiet",
        "--all",
        "--preserve-digests",
        "--dest-tls-verify=false",
        blobs,
        source,
        f"{target}:1",
    )
    raw = shell("skopeo", "inspect", "--raw", "--tls-verify=false", f"{target}@{digest}")
    assert f"sha256:{hashlib.sha256(raw.encode()).hexdigest()}" == digest


def test_fetch_again_asks_nobody_and_changes_nothing(stick: Stick) -> None:
    before = stick.files()
    text = (stick.folder / "contents.json").read_text()
    site = stick.site
    try:
        stick.site.prefix = ("unshare", "--net")
        again = stick.fetch("--json")
    finally:
        site.prefix = ()
    assert again.json["fetched"] == again.json["fetched_bytes"] == 0
    assert (stick.folder / "contents.json").read_text() == text
    after = stick.files()
    moved = {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert not [p for p in moved if p.startswith(("store/", "images/blobs/"))]


def damage(path: Path) -> None:
    """Change one byte of a file."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_fetch_repairs_what_is_missing_or_altered(stick: Stick, tmp_path: Path) -> None:
    fixed = Stick(stick.site, tmp_path / "usb", stick.images, stick.mirrored)
    shutil.copytree(stick.folder, fixed.folder)
    package = next(e for e in fixed.entries() if e["name"] == "hostname")
    damage(fixed.folder / "store" / package["sha256"][:2] / package["sha256"])
    blobs = sorted((fixed.folder / "images/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    for path in blobs[::2]:
        damage(path)
    blobs[1].unlink()
    (fixed.folder / "contents.json").unlink()
    fixed.fetch()
    assert fixed.files().keys() == stick.files().keys()
    for path in (fixed.folder / "images/blobs/sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert fixed.entries() == stick.entries()


def test_another_selection_is_added_to_the_same_folder(stick: Stick, tmp_path: Path) -> None:
    folder = tmp_path / "usb"
    shutil.copytree(stick.folder, folder)
    stick.site.run("fetch", str(folder), "--tier", "1")
    more = json.loads((folder / "contents.json").read_text())["entries"]
    assert [e for e in stick.entries() if e not in more] == []
    assert sorted(json.loads((folder / "imgbuild.lock").read_text())["sections"]) == [
        "debian",
        "debian/toy/llm",
    ]


def test_build_with_the_network_cut_makes_the_same_image(stick: Stick, apart: Site) -> None:
    connected = stick.site.build(*WORDS, "--mirror-map", "m.yaml")
    (apart.folder / "imgbuild.lock").unlink()  # the folder has a copy
    built = apart.build(*WORDS, "--offline", str(stick.folder))
    assert set(apart.nodes(built).values()) == {"built"}
    assert built["digest"] == connected["digest"]
    assert built["downloaded_files"] == 0
    assert (apart.folder / "imgbuild.lock").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", apart.env["CONTAINERS_STORAGE_CONF"])
        with images.mounted(built["image"]) as root:
            text = (root / "usr/share/llm.container").read_text()
        images.remove([built["image"], *built["tags"]])
    for name, digest in stick.images.items():
        assert f"Image={name.rsplit(':', 1)[0]}@{digest}\n" in text
    # Everything is on this machine now: it needs the folder no more.
    again = apart.build(*WORDS, "--offline")
    assert apart.nodes(again)["tier2"] == "built" and again["digest"] == connected["digest"]


def test_what_is_missing_or_altered_is_named_at_once_with_the_command(
    stick: Stick, apart: Site, tmp_path: Path
) -> None:
    folder = tmp_path / "usb"
    shutil.copytree(stick.folder, folder)
    places = {}
    for name in ("hostname", "gcc"):
        package = next(e for e in stick.entries() if e["name"] == name)
        places[f"{name} {package['version']}"] = folder / "store" / package["sha256"][:2] / package["sha256"]
    (gone, altered) = places
    places[gone].unlink()
    damage(places[altered])
    failed = apart.run("build", *WORDS, "--offline", str(folder), code=4)
    assert f"{gone}: not there" in failed.err and f"{altered}: altered" in failed.err
    assert str(places[altered]) in failed.err
    assert f"imgbuild fetch {folder} --tier 2 --vendor toy --with llm" in failed.err
    assert "Traceback" not in failed.err and not (Path(apart.env["IMGBUILD_STATE_DIR"]) / "store").exists()
    alone = apart.run("build", *WORDS, "--offline", code=4)
    assert f"{gone}: not there" in alone.err and "imgbuild build --offline DIR" in alone.err


def test_base_from_an_image_is_built_with_the_network_cut(
    upstream: dict[str, tuple[str, str]],
    registry: Registry,
    make_site: Callable[[str], Site],
    tmp_path: Path,
    storage: Storage,
) -> None:
    for kind in ("oci list", "docker list"):
        repository, digest = upstream[kind]
        site = image_site(make_site("image-base"), digest, registry.address, repository)
        usb = tmp_path / kind / "usb"
        site.run("fetch", str(usb), "--base", "toyel", "--tier", "1", "--mirror-map", "mirrors.yaml")
        with fresh_storage(tmp_path / kind / "storage") as fresh:
            env = {
                "IMGBUILD_STATE_DIR": str(tmp_path / kind / "state"),
                "CONTAINERS_STORAGE_CONF": str(fresh.conf),
            }
            apart = Site(site.folder, env, prefix=("unshare", "--net"))
            words = ("--base", "toyel", "--tier", "1", "--offline")
            missing = apart.run("build", *words, code=4)
            assert f"image quay.example/{repository}@{digest}: not there" in missing.err
            manifest = usb / "images/blobs/sha256" / digest[7:]
            kept = manifest.read_bytes()
            damage(manifest)
            altered = apart.run("build", *words, str(usb), code=4)
            assert "altered" in altered.err and str(manifest) in altered.err
            manifest.write_bytes(kept)
            built = apart.build(*words, str(usb))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CONTAINERS_STORAGE_CONF", str(fresh.conf))
                with images.mounted(built["image"]) as root:
                    assert (root / "etc/motd").read_text() == f"{kind} for amd64\n"


def test_killed_fetch_leaves_only_whole_files_and_goes_on(stick: Stick, tmp_path: Path) -> None:
    site = Site(stick.site.folder, {**stick.site.env, "IMGBUILD_STATE_DIR": str(tmp_path / "state")})
    cut = Stick(site, tmp_path / "usb", stick.images, stick.mirrored)
    process = site.start("fetch", str(cut.folder), *WORDS, "--mirror-map", "m.yaml")
    until = time.monotonic() + 60
    while len(list((cut.folder / "store").glob("*/*"))) < 20:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    there = list((cut.folder / "store").glob("*/*"))
    for path in there:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    done = cut.fetch("--json")
    assert done.json["fetched"] < done.json["entries"] and done.json["fetched"] > 0
    assert not (cut.folder / "work").exists()
    assert cut.entries() == stick.entries()
