"""Folders that hold all of a lock: what is whole, what is missing, and what an offline build says of it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Outcome, Site
from synthetic_lock import locked_package, synthetic_section

from imagebuild import gather, images, lock
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.gather import Folder, Offline
from imagebuild.load import Selection
from imagebuild.plan import plan
from imagebuild.render import render
from imagebuild.report import Report
from imagebuild.sources import Wanted
from imagebuild.state import State

Imgbuild = Callable[..., Outcome]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(folder: Folder, data: bytes) -> str:
    """Store a part of an image; its digest."""
    path = folder.blobs / "sha256" / sha256(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f"sha256:{sha256(data)}"


def put_image(folder: Folder, *layers: bytes) -> str:
    """Store an image; the digest of its manifest."""
    parts = [{"digest": put(folder, data), "size": len(data)} for data in (b"{}", *layers)]
    return put(folder, json.dumps({"config": parts[0], "layers": parts[1:]}).encode())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "usb")


# --- images -----------------------------------------------------------------------------------------


def test_every_part_of_a_list_of_images_counts(folder: Folder) -> None:
    one, two = put_image(folder, b"base", b"one"), put_image(folder, b"base", b"two")
    both = put(folder, json.dumps({"manifests": [{"digest": one}, {"digest": two}]}).encode())
    assert folder.broken(both) == []
    assert len(folder.parts(both)) == 1 + 2 + 1 + 3  # list, manifests, the config, layers: base only once
    layer = folder.blob(f"sha256:{sha256(b'two')}")
    layer.write_bytes(b"tWo")
    folder.blob(two).rename(folder.root / "away")
    assert folder.broken(both) == [folder.blob(two)]
    (folder.root / "away").rename(folder.blob(two))
    assert folder.broken(both) == [layer]
    layer.unlink()
    layer.symlink_to(folder.blob(one))
    assert folder.broken(both) == [layer]


@pytest.mark.parametrize(
    "manifest",
    [
        b"no manifest",
        b"[]",
        b'{"layers": []}',
        b'{"config": {"digest": "sha256:../../x", "size": 1}, "layers": []}',
        b'{"config": {"digest": 1, "size": {}}, "layers": []}',
        b'{"manifests": [7]}',
    ],
)
def test_junk_with_a_right_digest_is_refused_without_a_traceback(folder: Folder, manifest: bytes) -> None:
    digest = put(folder, manifest)
    with pytest.raises(ImgbuildError):
        folder.broken(digest)


class FakeRegistry:
    """Stands in for `images.copy`: copies an image's parts from a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.folder = Folder(root)
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.refuses_docker = False

    def copy(self, source: str, destination: str, *words: str) -> None:
        self.calls.append((source, words))
        if self.refuses_docker and "v2s2" not in words:
            raise ImgbuildError("no", lines=['we cannot modify it: "Instructed to preserve digests"'])
        target = Path(words[words.index("--dest-shared-blob-dir") + 1])
        digest = source.partition("@")[2]
        for part in self.folder.parts(digest):
            place = target / "sha256" / part[7:]
            place.parent.mkdir(parents=True, exist_ok=True)
            manifest = self.folder.blob(part).read_bytes().startswith(b'{"')
            if manifest or not place.exists():  # as skopeo: a part that is there is kept
                place.write_bytes(self.folder.blob(part).read_bytes())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRegistry:
    found = FakeRegistry(tmp_path / "registry")
    monkeypatch.setattr(images, "copy", found.copy)
    return found


def test_altered_manifest_and_altered_layer_are_both_repaired(folder: Folder, server: FakeRegistry) -> None:
    digest = put_image(server.folder, b"base", b"top")
    source = f"docker://registry.example/os@{digest}"
    assert folder.add_image(digest, source, True)
    folder.blob(digest).write_bytes(b"{}")
    folder.blob(f"sha256:{sha256(b'base')}").write_bytes(b"bad")
    assert folder.add_image(digest, source, True)
    assert folder.broken(digest) == []
    assert not folder.add_image(digest, source, True) and len(server.calls) == 3
    (entry,) = json.loads((folder.root / "images/index.json").read_text())["manifests"]
    assert entry["digest"] == digest
    assert not list((folder.root / "work").glob("*"))


def test_image_of_dockers_format_is_asked_for_in_that_format(folder: Folder, server: FakeRegistry) -> None:
    digest = put_image(server.folder, b"base")
    server.refuses_docker = True
    assert folder.add_image(digest, f"docker://registry.example/os@{digest}", False)
    assert [("v2s2" in words, "--src-tls-verify=false" in words) for _, words in server.calls] == [
        (False, True),
        (True, True),
    ]


def test_registry_that_gives_another_image_is_refused(folder: Folder, server: FakeRegistry) -> None:
    other = put_image(server.folder, b"other")
    with pytest.raises(ImgbuildError, match="is not the image"):
        folder.add_image(f"sha256:{'0' * 64}", f"docker://registry.example/os@{other}", True)
    assert not (folder.root / "images/index.json").exists()


# --- files ------------------------------------------------------------------------------------------


def small_section(selection: Selection, mirror: Path) -> lock.Section:
    """A lock whose packages lie in a folder."""
    section = synthetic_section(selection)

    def real(package: lock.LockedPackage) -> lock.LockedPackage:
        data = package.name.encode()
        place = mirror / package.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return msgspec.structs.replace(package, sha256=sha256(data), size=len(data))

    return msgspec.structs.replace(
        section,
        transactions={name: tuple(map(real, packages)) for name, packages in section.transactions.items()},
    )


def test_gathering_copies_fetches_and_lists(
    site: Site, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    site.write("keys/own.asc", "a key")
    site.write(
        "m.yaml",
        "".join(
            f"{'repositories:' if i == 0 else ''}\n  {name}: {{uri: 'file://{mirror}', key: keys/own.asc}}"
            for i, name in enumerate(["debian", "debian-security"])
        ),
    )
    selection = site.load("debian", "none", mirror_map=site.folder / "m.yaml")
    key = sha256(b"a key")
    section = msgspec.structs.replace(small_section(selection, mirror), keys={"debian": key})
    made = plan(selection, section)
    state, report = State(tmp_path / "state"), Report(io.StringIO())
    first = section.packages()[0]
    part = tmp_path / "part"
    part.write_bytes(first.name.encode())
    state.add(part, first.sha256)
    (mirror / first.path).unlink()  # gone from the mirror, but this machine has it
    done = gather.gather(made, render(made), folder, state, report)
    assert {e.sha256 for e in done.entries} == {p.sha256 for p in section.packages()} | {key}
    assert all(folder.store.has(e.sha256) and e.source for e in done.entries)
    assert done.files == len(done.entries) - 1
    text = (folder.root / "contents.json").read_text()
    assert sum('"sha256"' in line for line in text.splitlines()) == len(done.entries)
    assert lock.read(folder.root / "imgbuild.lock").sections == {selection.section: section}

    def nobody(*_: Any) -> None:
        raise AssertionError("asked for locations")

    monkeypatch.setattr(gather, "locate_locked", nobody)
    again = gather.gather(made, render(made), folder, state, report)
    assert again.files == 0 and (folder.root / "contents.json").read_text() == text
    (folder.root / "contents.json").write_text("[}")  # whoever did that: it is made again
    monkeypatch.undo()
    (mirror / first.path).write_bytes(b"")
    gather.gather(made, render(made), folder, state, report)
    assert (folder.root / "contents.json").read_text() == text


def test_key_that_is_not_the_locked_one_is_not_gathered(site: Site, folder: Folder, tmp_path: Path) -> None:
    site.write("own.asc", "another key")
    place = "{uri: 'file:///nowhere', key: own.asc}"
    site.write("m.yaml", f"repositories:\n  debian: {place}\n  debian-security: {place}\n")
    selection = site.load("debian", "none", mirror_map=site.folder / "m.yaml")
    section = msgspec.structs.replace(synthetic_section(selection), keys={"debian": "0" * 64})
    made = plan(selection, section)
    with pytest.raises(ImgbuildError, match="not the one that is locked"):
        gather.gather(made, render(made), folder, State(tmp_path / "state"), Report(io.StringIO()))


def test_folder_with_a_colon_is_refused(site: Site, tmp_path: Path) -> None:
    selection = site.load("debian", "none")
    made = plan(selection, synthetic_section(selection))
    with pytest.raises(DefinitionError, match="colon"):
        gather.gather(
            made, render(made), Folder(tmp_path / "a:b"), State(tmp_path), Report(io.StringIO())
        )  # fmt: skip


# --- offline ----------------------------------------------------------------------------------------


def test_everything_missing_is_named_at_once(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(tmp_path / "state")
    monkeypatch.setattr(images, "has", lambda *_: False)
    wanted = [Wanted(f"{n} 1.0", "", sha256(n.encode())) for n in ("there", "gone", "altered")]
    for name, text in (("there", "there"), ("altered", "other")):
        place = folder.store.stored(sha256(name.encode()))
        place.parent.mkdir(parents=True)
        place.write_text(text)
    digest = f"sha256:{'0' * 64}"
    with pytest.raises(UnavailableError) as found:
        Offline(folder, "imgbuild fetch usb --tier 2").take(wanted, ("quay.example/os", digest), state)
    lines = found.value.lines
    assert lines[0] == "gone 1.0: not there" and lines[1].startswith("altered 1.0: altered")
    assert lines[2:] == (f"image quay.example/os@{digest}: not there",)
    assert "imgbuild fetch usb --tier 2" in found.value.help
    assert not state.root.exists()  # nothing is taken of an incomplete folder
    Offline(folder, "").take(wanted[:1], None, state)
    assert state.has(wanted[0].sha256)
    Offline(None, "").take(wanted[:1], None, state)
    with pytest.raises(UnavailableError, match="not on this machine"):
        Offline(None, "").take(wanted, None, state)


def write_lock(place: Path, selection: Selection) -> None:
    lock.write(place, lock.Lockfile(sections={selection.section: synthetic_section(selection)}))


def test_offline_build_without_a_lock_says_where_to_make_one(site: Site, imgbuild: Imgbuild) -> None:
    failed = imgbuild("build", "--tier", "1", "--offline")
    assert failed.code == 2 and "section `debian` is not locked" in failed.err
    assert "imgbuild fetch DIR --tier 1; then here: imgbuild build --offline DIR" in failed.err


def test_offline_build_with_a_stale_lock_says_so(site: Site, imgbuild: Imgbuild) -> None:
    write_lock(site.folder / "imgbuild.lock", site.load("debian", "none", tier=2))
    site.write("layers/more/layer.yaml", "summary: more\npackages: [vim]\n")
    (site.folder / "usb").mkdir()
    lockfile = json.loads((site.folder / "imgbuild.lock").read_text())
    lockfile["sections"]["debian/none/more"] = lockfile["sections"]["debian/none/-"]
    site.write("imgbuild.lock", json.dumps(lockfile))
    failed = imgbuild("build", "--with", "more", "--offline", "usb")
    assert failed.code == 2 and "was locked for other definitions" in failed.err
    assert "imgbuild fetch usb --with more" in failed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--offline", "nowhere"], "no folder `nowhere`"),
        (["--offline", "--push", "registry.example/a:1"], "--offline asks no network"),
    ],
)
def test_offline_that_cannot_be_is_refused_before_any_work(
    site: Site, imgbuild: Imgbuild, words: list[str], said: str
) -> None:
    failed = imgbuild("build", *words)
    assert failed.code == 2 and said in failed.err


def test_offline_takes_a_folder_or_none(site: Site) -> None:
    from imagebuild import cli

    for words, expected in (
        ([], None),
        (["--offline"], ""),
        (["--offline", "usb", "--tier", "1"], "usb"),
        (["--tier", "1", "--offline=usb"], "usb"),
        (["--offline", "--tier", "1"], ""),
    ):
        context = cli.build.make_context("build", list(words))
        assert context.params["offline"] == expected, words


def test_lock_of_the_folder_is_taken_where_the_site_has_none(
    site: Site, imgbuild: Imgbuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = site.load("debian", "none")
    write_lock(site.folder / "usb/imgbuild.lock", selection)
    monkeypatch.setattr(images, "by_name", lambda: {})
    monkeypatch.setattr("imagebuild.run.available", lambda _: True)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(images, "isolation", lambda _: ("chroot", "a test"))
    info = {"store": {"GraphRoot": str(site.folder), "GraphDriverName": "overlay"}}
    monkeypatch.setattr(images, "storage_info", lambda: info)
    failed = imgbuild("build", "--offline", "usb")
    assert failed.code == 4 and "(from " in failed.out
    section = lock.read(site.folder / "imgbuild.lock").sections[selection.section]
    for package in section.packages():
        assert f"{package.name} {package.version}: not there" in failed.err
    assert locked_package("apt", selection).name in failed.err
