"""Makes the rehearsal's repositories and image once, and keeps them: same input, same folder.

    CACHE/debian/            package lists, Debian packages (verified at each use), bootstrapped roots
    CACHE/made/KEY/          repositories, keys, and a registry's data with the image
    CACHE/made/by-lists/     what key the last package lists gave

KEY is made of the Debian packages' SHA-256 and of this package's own files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..integration.registries import process_registry
from . import contents, image
from .commands import RehearsalError, link
from .debs import Deb, DebianView
from .rpms import Keys, build, index

HERE = Path(__file__).parent
KEPT = 2
"""Finished sets that stay, the newest."""

Say = Callable[[str], None]


def cache_folder() -> Path:
    """$IMGBUILD_REHEARSAL_CACHE, else imgbuild-rehearsal in the user's cache folder."""
    if named := os.environ.get("IMGBUILD_REHEARSAL_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "imgbuild-rehearsal"


def made(cache: Path, say: Say = lambda _: None) -> Path:
    """The folder of a finished set: `repositories/`, `keys/`, `registry/`, `layers.json`, `rpms.json`.

    Raises RehearsalError if it cannot be made here.
    """
    check_tools()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        view = DebianView(cache / "debian")
        view.refresh()
        short = cache / "made/by-lists" / _digest(view.fingerprint(), _own_files())
        if short.is_file() and (place := cache / "made" / short.read_text()).is_dir():
            os.utime(place)
            return place
        say("asking what Debian packages there are")
        root, rest = _resolve(view)
        wanted = {deb.path.name: deb.sha256 for deb in [*root.values(), *rest.values()]}
        key = _digest(_own_files(), *(f"{name} {sha256}" for name, sha256 in sorted(wanted.items())))
        place = cache / "made" / key
        if not place.is_dir():
            with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as name:
                _make(Path(name), view, root, rest, say)
                place.parent.mkdir(exist_ok=True)
                Path(name, "result").rename(place)
        short.parent.mkdir(parents=True, exist_ok=True)
        short.write_text(key)
        _tidy(cache, place)
        return place


def check_tools() -> None:
    """See that the programs are here that this needs. Raises RehearsalError naming the packages."""
    if os.geteuid() != 0:
        raise RehearsalError("the rehearsal's image is made in a chroot: that needs root")
    needed = {
        "createrepo_c": "createrepo-c",
        "docker-registry": "docker-registry",
        "gpg": "gpg gpg-agent",
        "gpgconf": "gpgconf",
        "mmdebstrap": "mmdebstrap",
        "rpmbuild": "rpm",
        "rpmsign": "rpm",
    }
    missing = sorted({package for program, package in needed.items() if shutil.which(program) is None})
    if missing:
        raise RehearsalError(f"programs are missing: apt-get install -y {' '.join(missing)}")


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _own_files() -> str:
    """SHA-256 over everything that decides what is made."""
    digest = hashlib.sha256()
    names = ("commands", "contents", "debs", "image", "making", "rpms")
    files = [HERE / f"{name}.py" for name in names] + sorted(HERE.glob("*.sh"))
    for path in [*files, *sorted((HERE / "files").rglob("*"))]:
        if path.is_symlink():
            digest.update(f"{path.relative_to(HERE)} -> {path.readlink()}\n".encode())
        elif path.is_file():
            digest.update(f"{path.relative_to(HERE)} {path.stat().st_mode & 0o111}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _resolve(view: DebianView) -> tuple[dict[str, Deb], dict[str, Deb]]:
    """The Debian packages of the root, and those that RPMs are made of."""
    base = [*contents.ROOT_PATTERNS, *contents.ROOT_PACKAGES]
    exact = sorted({name for recipe in contents.recipes() for name in recipe.debs})
    try:
        rest = view.exactly(exact)  # leaves apt's own cache for the other two
    except RehearsalError as error:
        raise RehearsalError(
            f"Debian has other versions by now: adapt those in contents.py\n{error}"
        ) from None
    with ThreadPoolExecutor(2) as pool:
        root, larger = pool.map(view.closure, (base, [*base, *contents.COMPILER]))
    return root, {**{name: deb for name, deb in larger.items() if name not in root}, **rest}


def _make(work: Path, view: DebianView, root: Mapping[str, Deb], rest: Mapping[str, Deb], say: Say) -> None:
    """Make everything in `work`; what is kept is its folder `result`."""
    began = time.monotonic()

    def note(text: str) -> None:
        say(f"{time.monotonic() - began:5.1f} s  {text}")

    result = work / "result"
    repositories = result / "repositories"
    recipes = contents.recipes()
    exact = {name for recipe in recipes for name in recipe.debs}
    compiler = contents.Recipe(
        "compiler", contents.compiler, tuple(name for name in rest if name not in exact)
    )
    with (
        Keys(result / "keys") as keys,
        ThreadPoolExecutor(1) as downloads,
        ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool,
    ):
        # Downloads in the order in which they are needed; whoever needs one waits for it.
        root_here = downloads.submit(view.fetch, root.values())
        here = {
            recipe.name: downloads.submit(view.fetch, [rest[name] for name in recipe.debs])
            for recipe in (*recipes, compiler)
        }
        keys.make(dict.fromkeys([*contents.SIGNERS.values(), contents.STRANGER]))

        rpms: dict[str, dict[str, Any]] = {}

        def cook(recipe: contents.Recipe) -> list[Path]:
            here[recipe.name].result()
            bench = contents.Bench(
                Path(tempfile.mkdtemp(dir=work)), {name: rest[name] for name in recipe.debs}, keys
            )
            made: dict[str, list[Path]] = {}
            for rpm in recipe.make(bench):
                place = repositories / rpm.repository / "Packages"
                made.setdefault(rpm.repository, []).append(build(rpm, place, bench.folder))
                rpms[rpm.file_name] = {**asdict(rpm), "tree": None}
            for repository, files in made.items():
                keys.sign_packages(contents.SIGNERS[repository], files)
            shutil.rmtree(bench.folder)
            note(f"RPMs: {recipe.name}")
            return [file for files in made.values() for file in files]

        def sign(name: str) -> None:
            index(repositories / name)
            keys.sign_metadata(contents.SIGNERS[name], repositories / name)

        def bootstrap() -> None:
            root_here.result()
            image.unpack_root(work / "root", root, view.folder, _folder(work, "bootstrap"))
            note("the Debian root")

        bootstrapping = pool.submit(bootstrap)
        cooking = {recipe.name: pool.submit(cook, recipe) for recipe in (*recipes, compiler)}
        # The image needs few of the packages: it is made beside the others.
        mounts = {"keys": result / "keys"}
        for step in ("first", "kernels"):
            mounts[step] = _folder(work, step)
        layers_folder = _folder(work, "layers")
        base = image.Root(work / "root", mounts)

        def gather(step: str, names: Iterable[str]) -> None:
            for name in names:
                for file in cooking[name].result():
                    link(file, mounts[step] / file.name)
            index(mounts[step])

        gather("first", contents.FIRST)
        bootstrapping.result()
        layers = image.make_base(base, layers_folder)
        note("the image without kernels")
        gather("kernels", contents.THEN)
        layers |= image.add_kernels(base, layers_folder)
        note("the image")
        for future in cooking.values():
            future.result()
        list(pool.map(sign, contents.SIGNERS))
        note("the repositories")
        with process_registry(work / "registry") as registry:
            image.upload(registry.address, layers, layers_folder)
        (work / "registry/data").rename(result / "registry")
        (result / "layers.json").write_text(image.as_json(layers))
        (result / "rpms.json").write_text(json.dumps(rpms, indent=1))
        note("done")


def _folder(parent: Path, name: str) -> Path:
    place = parent / name
    place.mkdir()
    return place


def _tidy(cache: Path, current: Path) -> None:
    """Remove older finished sets, and what an interrupted making left."""
    sets = [path for path in (cache / "made").iterdir() if path.name != "by-lists" and path != current]
    for path in sorted(sets, key=lambda path: -path.stat().st_mtime)[KEPT - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
    for path in cache.glob("making-*"):
        shutil.rmtree(path, ignore_errors=True)
    month = time.time() - 30 * 24 * 3600
    for path in [*(cache / "debian/debs").iterdir(), *(cache / "debian").glob("root-*.tar")]:
        # What is used is touched, see Deb.intact.
        if path.stat().st_mtime < month:
            path.unlink()
