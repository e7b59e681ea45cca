"""Fixtures for tests against the real thing. All are per session, and made only when asked for.

registry     a running, empty registry (see registries.Registry): `.address`, `.kind`, `.tags(repo)`,
             `.digest(repo, tag)`, `.stop()`/`.start()` for an outage. Use repositories of your own.
storage      a container storage of its own; from its first use on, buildah and skopeo use it.
make_image   name, files → a small image built FROM scratch in `storage`.
tiny_image   the name of one such image.
rehearsal    the world of base `centos`: registry, repositories, mirror map (see rehearsal.fixtures).

Set IMGBUILD_TEST_REGISTRY=process to have the registry as a process where containers would work.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagebuild import images

from .integration.registries import Registry, container_registry, process_registry, remove_storage
from .integration.workshop import TOY_BUILD, TOY_CENTOS, Site, toy_centos_site, toy_site
from .rehearsal.fixtures import private_rehearsal, rehearsal  # noqa: F401
from .rehearsal.look_alike import Rehearsal

BUILD_TIME = 1_700_000_000

_said: list[str] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which registry the tests talked to."""
    for line in _said:
        terminalreporter.write_line(line)


@dataclass(frozen=True)
class Storage:
    """A container storage; `conf` is what $CONTAINERS_STORAGE_CONF names while it is in use."""

    root: Path
    conf: Path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A real registry: a container where that is possible, else a process. The summary says which."""
    folder = tmp_path_factory.mktemp("registry")
    if os.environ.get("IMGBUILD_TEST_REGISTRY") != "process":
        manager = container_registry(folder / "engine")
        try:
            found = manager.__enter__()
        except Exception as error:  # whatever it is, the process is the answer to it
            remove_storage(folder / "engine")
            warnings.warn(f"registry as a process, not in a container: {error}", stacklevel=1)
        else:
            _said.append(f"registry: container at {found.address} ({found.engine})")
            try:
                yield found
            finally:
                manager.__exit__(None, None, None)
                remove_storage(folder)
            return
    with process_registry(folder / "process") as process:
        _said.append(f"registry: process at {process.address}")
        yield process
    remove_storage(folder)


@contextlib.contextmanager
def fresh_storage(folder: Path) -> Iterator[Storage]:
    """An empty container storage (overlay) in a folder; removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    conf = folder / "storage.conf"
    conf.write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n'
    )
    try:
        yield Storage(folder / "graph", conf)
    finally:
        remove_storage(folder)


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """An empty container storage (overlay) that buildah and skopeo use until the session ends."""
    folder = tmp_path_factory.mktemp("storage")
    with fresh_storage(folder) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(found.conf))
        assert images.graph_root() == found.root
        yield found


ImageMaker = Callable[[str, Mapping[str, str]], str]


@pytest.fixture(scope="session")
def make_image(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> ImageMaker:
    """Builds `localhost/imgbuild-test/NAME:1` FROM scratch out of files (path → text); returns its name."""

    def make(name: str, files: Mapping[str, str]) -> str:
        folder = tmp_path_factory.mktemp("image")
        for path, text in files.items():
            place = folder / "context/files" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        (folder / "context/Containerfile").write_text("FROM scratch\nCOPY files /\n")
        full = f"localhost/imgbuild-test/{name}:1"
        images.build(
            folder / "context",
            name=full,
            isolation="chroot",
            timestamp=BUILD_TIME,
            labels={"io.imgbuild.key": "0123456789abcdef" * 4},
            scratch=folder / "tmp",
            log=folder / "log",
            on_line=lambda _: None,
        )
        return full

    return make


@pytest.fixture(scope="session")
def tiny_image(make_image: ImageMaker) -> str:
    """The name of an image of one small file."""
    return make_image("tiny", {"etc/motd": "a small image\n"})


@pytest.fixture(scope="session")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder shared by the tests of a session, so that everything is downloaded and built once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def make_site(
    storage: Storage, state_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Site]:
    """Makes an empty site folder whose commands use the session's storage and state."""

    def make(name: str) -> Site:
        folder = tmp_path_factory.mktemp(name)
        return Site(folder, {"IMGBUILD_STATE_DIR": str(state_dir)})

    return make


@pytest.fixture(scope="session")
def toy_lock(make_site: Callable[[str], Site]) -> str:
    """The lock of the toy vendor: resolved once, with tier 1, kernel and builder built once."""
    site = make_site("toy-first")
    toy_site(site.folder, site.env)
    site.build(*TOY_BUILD)
    return (site.folder / "imgbuild.lock").read_text()


@pytest.fixture
def toy(make_site: Callable[[str], Site], toy_lock: str) -> Site:
    """A fresh site with the toy vendor, locked, with all but the module built."""
    site = make_site("toy")
    toy_site(site.folder, site.env)
    site.write("imgbuild.lock", toy_lock)
    return site


@pytest.fixture(scope="session")
def toy_centos(make_site: Callable[[str], Site], rehearsal: Rehearsal) -> Site:  # noqa: F811
    """A site with the toy vendor for base centos, built; the result lies in first.json."""
    site = toy_centos_site(make_site("toy-centos"))
    outcome = site.run("build", "--json", *TOY_CENTOS, "--mirror-map", str(rehearsal.mirror_map))
    (site.folder / "first.json").write_text(outcome.out)
    return site
