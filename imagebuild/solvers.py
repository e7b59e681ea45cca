"""The distributions' own solvers, asked as plain data: apt's library on this machine, dnf's inside tier 1.

Both take the same question and give the same answer (see installers/*/solve.py). A solver is open for
several questions, since each later one builds on what the first brought to light.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from imagebuild import images
from imagebuild.definitions import (
    ImageDigest,
    InnerPath,
    KernelRelease,
    Line,
    PackageName,
    PackageVersion,
    Uri,
)
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.load import Selection
from imagebuild.run import Result, run
from imagebuild.sources import Location, mirrored, pinned_source, registry_reference, untagged
from imagebuild.state import State

INSTALLERS = Path(__file__).parent / "installers"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A repository of the base image that packages come from, and its keys inside the image."""

    uri: Uri
    keys: tuple[InnerPath, ...] = ()


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a solver found.

    `transactions` and `candidates` hold packages as plain data; `releases` the kernel releases that each
    transaction brings; `releases_of` what is on offer, release → package version; `kernels` what the base
    image has. `dropped` are the transactions for which the preferred versions could not be kept.
    """

    transactions: dict[str, list[dict[str, Any]]] = {}
    candidates: dict[str, dict[str, Any]] = {}
    releases: dict[str, list[KernelRelease]] = {}
    releases_of: dict[str, dict[Line, Line]] = {}
    offered: dict[PackageName, list[PackageVersion]] = {}
    kernels: list[KernelRelease] = []
    repositories: dict[PackageName, Found] = {}
    dropped: list[str] = []


class Ask(Protocol):
    """Puts one question to an open solver; what is not given is not asked.

    `done` are transactions of an earlier answer, which others come after.
    """

    def __call__(
        self,
        *,
        base_only: bool = False,
        promises: Sequence[Mapping[str, Any]] = (),
        transactions: Sequence[Mapping[str, Any]] = (),
        done: Mapping[str, Any] = MappingProxyType({}),
        candidates: Sequence[str] = (),
        releases_of: Sequence[str] = (),
        offered: Sequence[str] = (),
    ) -> Answer: ...


def opened(
    selection: Selection,
    locations: Mapping[str, Location],
    state: State,
    *,
    prefer: Mapping[str, str],
    base_digest: str,
    on_line: Callable[[str], None],
) -> AbstractContextManager[Ask]:
    """A solver for a selection.

    Args:
        prefer: package name → version that is kept where the repositories still have it.
        base_digest: digest of the upstream image; empty where tier 1 is bootstrapped.

    Raises:
        UnavailableError: a tool, mirror or registry is missing.
    """
    opener = _apt if selection.base.package_manager == "apt" else _dnf
    return opener(selection, locations, state, prefer, base_digest, on_line)


def _answer(result: Result, manager: str) -> Answer:
    try:
        found: dict[str, Any] = json.loads(result.stdout)
    except ValueError:
        raise ImgbuildError(f"the {manager} solver failed", lines=result.tail) from None
    error = found.get("error")
    if error:
        kind = UnavailableError if error["kind"] == "unreachable" else ImgbuildError
        help_ = {
            "unreachable": "is the mirror right? See --mirror-map",
            "untrusted": "nothing of it is used; a mirror map can name another location and key",
        }
        raise kind(error["what"], lines=error["lines"], help=help_.get(error["kind"], ""))
    try:
        return msgspec.convert(found, Answer)
    except msgspec.ValidationError as error:
        raise ImgbuildError(f"a repository describes itself in a way that is refused: {error}") from None


# --- apt --------------------------------------------------------------------------------------------


@contextmanager
def _apt(
    selection: Selection,
    locations: Mapping[str, Location],
    state: State,
    prefer: Mapping[str, str],
    base_digest: str,
    on_line: Callable[[str], None],
) -> Iterator[Ask]:
    if selection.base.tier1.bootstrap is None:
        raise DefinitionError(
            f"base `{selection.base_name}`: apt bases are bootstrapped, an image cannot be locked"
        )
    arch = selection.base.arch
    base_names = {repository.name for repository in selection.base.repositories}
    lines = {name: apt_sources(location, arch) for name, location in locations.items()}
    every = [line for name in lines for line in lines[name]]
    own = sorted(line for name in base_names for line in lines[name])
    folder = state.root / "apt" / hashlib.sha256("\n".join(every).encode()).hexdigest()[:16]
    updated: set[bool] = set()

    def ask(*, base_only: bool = False, promises: Sequence[Mapping[str, Any]] = (), **asked: Any) -> Answer:
        # Lists are fetched once for the base's own sources, and once more if there are others.
        update = base_only not in updated and (not updated or len(own) < len(every))
        updated.add(base_only)
        question = {
            "arch": arch,
            "folder": str(folder),
            "sources": own if base_only else every,
            "repositories": {name: location.uri for name, location in locations.items()},
            "prefer": dict(prefer),
            "promises": [_stanza(promise) for promise in promises],
            "update": update,
            "release_from": selection.base.kernel.release_from,
            "done": dict(asked.get("done", {})),
            **{name: list(asked.get(name, ())) for name in _ASKED},
        }
        return _answer(_run_apt(question), "apt")

    with state.lock(f"apt-{folder.name}", on_line):
        yield ask


_ASKED = ("transactions", "candidates", "releases_of", "offered")


def _run_apt(question: Mapping[str, Any]) -> Result:
    # -I: no module of the current folder or of $PYTHONPATH gets in.
    argv = ["/usr/bin/python3", "-I", str(INSTALLERS / "apt/solve.py")]
    result = run(argv, stdin=json.dumps(question), check=False)
    if "No module named 'apt" in result.stderr:
        raise UnavailableError(
            "python-apt is not installed", help="install it: apt-get install -y python3-apt"
        )
    return result


def apt_sources(location: Location, arch: str) -> list[str]:
    """sources.list(5) lines of one repository.

    Raises:
        DefinitionError: apt has no way to write the path of the key.
    """
    if re.search(r"[\s,\[\]]", str(location.key or "")):
        raise DefinitionError(
            f"apt cannot take a key from `{location.key}`",
            help="the state folder ($IMGBUILD_STATE_DIR) needs a path without spaces, commas and brackets",
        )
    options = f"arch={arch}" + (f" signed-by={location.key}" if location.key else "")
    components = " ".join(location.repository.components)
    # Without components a suite is the path of a flat repository, which ends in a slash.
    suites = [
        suite if components or suite.endswith("/") else f"{suite}/" for suite in location.repository.suites
    ]
    return [f"deb [{options}] {location.uri} {suite} {components}".rstrip() for suite in suites]


def _stanza(promise: Mapping[str, Any]) -> str:
    """A package that is not compiled yet, as an installed one (deb-control(5))."""
    lines = [
        f"Package: {promise['name']}",
        "Status: install ok installed",
        f"Version: {promise['version']}",
        f"Architecture: {promise['arch']}",
        "Maintainer: imgbuild",
        "Description: promise",
    ]
    for field in ("provides", "conflicts"):
        if promise[field]:
            lines.append(f"{field.capitalize()}: {', '.join(promise[field])}")
    return "\n".join(lines)


# --- dnf --------------------------------------------------------------------------------------------

_INSIDE = "/run/imgbuild"


@contextmanager
def _dnf(
    selection: Selection,
    locations: Mapping[str, Location],
    state: State,
    prefer: Mapping[str, str],
    base_digest: str,
    on_line: Callable[[str], None],
) -> Iterator[Ask]:
    base = selection.base
    if base.tier1.image is None:
        raise DefinitionError(f"base `{selection.base_name}`: dnf bases start from an image")
    if os.geteuid() != 0:
        raise UnavailableError(
            "locking this base needs root: its own dnf runs in a container of the base image",
            help="run it as root, in a root CI container, or with sudo",
        )
    upstream = f"{untagged(base.tier1.image)}@{base_digest}"
    on_line(f"tier 1: {upstream}")
    source, verify = pinned_source(base.tier1.image, base_digest, selection.mirrors)
    images.ensure(untagged(base.tier1.image), base_digest, source, verify)
    defined = {repository.name for repository, _ in selection.repositories}
    relocated = {id_: place for id_, place in mirrored(selection, state).items() if id_ not in defined}
    isolation, _ = images.isolation(state)
    with state.work("dnf") as folder, images.container(upstream) as container:
        shutil.copyfile(INSTALLERS / "dnf/solve.py", folder / "solve.py")
        keys = {name: _put_key(location.key, folder, name) for name, location in locations.items()}
        moved = {
            id_: {"uri": place.uri, "key": _put_key(place.key, folder, f"own-{id_}")}
            for id_, place in relocated.items()
        }
        volumes = {str(folder): _INSIDE}
        for uri in [*(place.uri for place in locations.values()), *(p["uri"] or "" for p in moved.values())]:
            if uri.startswith("file://"):
                path = unquote(urlsplit(uri).path)
                volumes[path] = path

        base_names = {repository.name for repository in base.repositories}

        def ask(
            *, base_only: bool = False, promises: Sequence[Mapping[str, Any]] = (), **asked: Any
        ) -> Answer:
            question = {
                "arch": base.arch,
                "environment": {k: v for k, v in os.environ.items() if k.lower() in _PROXIES},
                "repositories": [
                    {
                        "name": name,
                        "uri": location.uri or None,
                        "key": keys[name],
                        "signed": list(location.repository.signed),
                    }
                    for name, location in locations.items()
                    if not base_only or name in base_names
                ],
                "relocated": moved,
                "prefer": dict(prefer),
                "promises": list(promises),
                "release_from": base.kernel.release_from,
                "done": dict(asked.get("done", {})),
                **{name: list(asked.get(name, ())) for name in _ASKED},
            }
            place = folder / "question.json"  # a proxy may come with a password
            place.unlink(missing_ok=True)
            place.touch(mode=0o600)
            place.write_text(json.dumps(question))
            python = ["python3", "-I", f"{_INSIDE}/solve.py", f"{_INSIDE}/question.json"]
            return _answer(container(python, isolation=isolation, volumes=volumes), "dnf")

        yield ask


_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


def _put_key(key: Path | None, folder: Path, name: str) -> str | None:
    """Copy a key to where the container sees it; its path there."""
    if key is None:
        return None
    shutil.copyfile(key, folder / f"{name}.asc")
    return f"{_INSIDE}/{name}.asc"


def upstream_digest(image: str, selection: Selection) -> ImageDigest:
    """The digest an image has now in its registry.

    Raises:
        UnavailableError: its registry cannot be reached.
    """
    reference, verify = registry_reference(image, selection.mirrors)
    argv = [
        "skopeo",
        "inspect",
        "--no-tags",
        f"--tls-verify={str(verify).lower()}",
        "--format",
        "{{.Digest}}",
    ]
    result = run([*argv, f"docker://{reference}"], check=False)
    if result.returncode != 0:
        raise UnavailableError(
            f"cannot ask the registry for {reference}",
            lines=result.tail[-3:],
            help="a mirror map can name another registry (--mirror-map FILE)",
        )
    return result.stdout.strip()
