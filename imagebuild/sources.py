"""Where repositories are, and verified downloads from them into the store."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from imagebuild.definitions import Mirror, MirrorMap, Repository
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.load import Selection
from imagebuild.run import MASK, run
from imagebuild.state import State, sha256_of, write_whole

PARALLEL_DOWNLOADS = 8
LONGEST_WAIT_S = 30
"""Whatever a server asks for in Retry-After."""
LARGEST_KEY = 1_000_000
TEMPLATES = Path("/usr/share/python-apt/templates")


@dataclass(frozen=True)
class Location:
    """A repository and where it is found: without trailing slash, with its key as a local file."""

    repository: Repository
    uri: str
    key: Path | None


@dataclass(frozen=True)
class Wanted:
    """One file to have in the store: what it is, where from, its SHA-256 and size in bytes (0: unknown).

    `package` is its name where it is one.
    """

    what: str
    uri: str
    sha256: str
    size: int = 0
    package: str = ""


class GoneError(ImgbuildError):
    """Files are no longer where the lock found them."""

    def __init__(self, gone: Sequence[Wanted]) -> None:
        super().__init__(
            f"the mirror no longer has {len(gone)} of the files that are locked",
            lines=[f"{item.what} is not at {shown(item.uri)}" for item in gone],
            help="`imgbuild lock` locks what there is now, and keeps the rest as it is",
        )
        self.gone = tuple(gone)


class _NotThereError(ImgbuildError):
    """The server answers that there is no such file."""


def host_locations() -> dict[str, str]:
    """Locations the host's own apt uses, by archive label; empty where there is no apt."""
    try:
        result = run(
            ["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Created-By: Packages"],
            check=False,
        )
    except UnavailableError:
        return {}
    found: dict[str, str] = {}
    for line in result.stdout.splitlines():
        label, _, uri = line.partition("|")
        if label and uri.startswith(("http://", "https://")):
            found.setdefault(label, uri.rstrip("/"))
    return found


def tool_location(repository: Repository, templates: Path = TEMPLATES) -> str | None:
    """The archive's location that python-apt ships for it (deb822-like *.info files), None if it has none."""
    archive = (repository.label or "").split("-")[0]
    path = templates / f"{archive}.info"
    if not archive or not path.is_file() or not repository.suites:
        return None
    series = repository.suites[0].split("-")[0]
    for stanza in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line)
        if fields.get("Suite", "").replace("{series}", series) == repository.suites[0]:
            uri = fields.get("BaseURI", "").rstrip("/")
            if uri.startswith(("http://", "https://")):
                return uri
    return None


def locate(selection: Selection, state: State) -> dict[str, Location]:
    """Find every repository: mirror map, definition, the host's own apt, python-apt's default.

    Raises:
        DefinitionError: a repository's key file is not there.
        UnavailableError: a repository's place or key cannot be told.
    """
    mirrors = selection.mirrors
    found: dict[str, Location] = {}
    host: dict[str, str] | None = None
    for repository, folder in selection.repositories:
        mirror = mirrors.repositories.get(repository.name)
        uri = mirror.uri if isinstance(mirror, Mirror) else mirror or repository.uri
        if uri is None and selection.base.package_manager == "dnf":
            uri = ""  # one of the base image's own
        if uri is None:
            host = host_locations() if host is None else host
            uri = host.get(repository.label or "") or tool_location(repository)
        if uri is None:
            raise UnavailableError(
                f"no location known for repository `{repository.name}`",
                help="name one in a mirror map (--mirror-map FILE), or run `apt-get update` so that the "
                f"host's own sources for archive `{repository.label}` can be used",
            )
        key: Path | None
        if isinstance(mirror, Mirror) and mirror.key:
            key = _key(mirror.key, selection.mirrors_folder, repository.name, state)
        elif repository.key:
            key = _key(repository.key, folder, repository.name, state)
        elif repository.keyring:
            key = Path(repository.keyring)
            if not key.is_file():
                raise UnavailableError(
                    f"there is no keyring `{key}` for repository `{repository.name}`",
                    help="apt-get install -y debian-archive-keyring",
                )
        else:
            key = None
        found[repository.name] = Location(repository, uri.rstrip("/"), key)
    return found


def mirrored(selection: Selection, state: State) -> dict[str, Location]:
    """Every repository the mirror map names, with its key if the map gives one."""
    found = {}
    for name, mirror in selection.mirrors.repositories.items():
        given = mirror if isinstance(mirror, Mirror) else Mirror(uri=mirror)
        key = _key(given.key, selection.mirrors_folder, name, state) if given.key else None
        found[name] = Location(Repository(name=name), given.uri.rstrip("/"), key)
    return found


def locate_locked(selection: Selection, own: Mapping[str, str], state: State) -> dict[str, Location]:
    """Every repository packages were locked from, `own` (name → location) being those of the base image."""
    found = {name: Location(Repository(name=name), uri, None) for name, uri in own.items()}
    found |= {name: place for name, place in mirrored(selection, state).items() if name in own}
    return found | {name: place for name, place in locate(selection, state).items() if place.uri}


def _key(key: str, folder: Path, name: str, state: State) -> Path:
    if key.startswith(("http://", "https://", "file://")):
        place = state.root / "keys" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.asc"
        place.parent.mkdir(parents=True, exist_ok=True)
        # Another imgbuild may be reading the old one.
        part = place.with_name(f".{place.name}.{os.urandom(8).hex()}.part")
        try:
            _get(key, part, f"the key of repository `{name}`", limit=LARGEST_KEY)
            if part.stat().st_size > LARGEST_KEY:
                raise ImgbuildError(f"the key of repository `{name}` is no key: {shown(key)} is too long")
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
        return place
    path = (folder / key).absolute()
    if not path.is_file():
        raise DefinitionError(
            f"there is no key file `{key}` for repository `{name}`", help=f"looked for {path}"
        )
    if re.fullmatch(r"[A-Za-z0-9@+=:.~_/-]+", str(path)):
        return path
    # A source line of apt has no way to write a space or a comma in a path.
    kind = "asc" if path.suffix == ".asc" else "gpg"
    copy = state.root / "keys" / f"{name}-{sha256_of(path)[:16]}.{kind}"
    write_whole(copy, path.read_bytes())
    return copy


def registry_reference(reference: str, mirrors: MirrorMap) -> tuple[str, bool]:
    """Where an image is really pulled from, and whether TLS is verified there."""
    for prefix, other in sorted(mirrors.registries.items(), key=lambda item: -len(item[0])):
        if reference == prefix or reference.startswith(prefix.rstrip("/") + "/"):
            reference = other.rstrip("/") + reference[len(prefix.rstrip("/")) :]
            break
    return reference, reference.split("/", 1)[0] not in mirrors.insecure


def untagged(reference: str) -> str:
    """The name of an image: its reference without tag and digest."""
    folder, slash, last = reference.split("@")[0].rpartition("/")
    return f"{folder}{slash}{last.split(':')[0]}"


def pinned_source(reference: str, digest: str, mirrors: MirrorMap) -> tuple[str, bool]:
    """Where exactly this image is copied from, as skopeo writes it, and whether TLS is verified there."""
    place, verify = registry_reference(reference, mirrors)
    return f"docker://{untagged(place)}@{digest}", verify


def _session() -> Any:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    class _Retry(Retry):
        def get_retry_after(self, response: Any) -> float | None:
            asked = super().get_retry_after(response)
            return None if asked is None else min(asked, LONGEST_WAIT_S)

    session = requests.Session()
    retry = _Retry(
        total=4,
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        respect_retry_after_header=True,
    )
    adapter = HTTPAdapter(max_retries=retry, pool_maxsize=PARALLEL_DOWNLOADS)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def shown(uri: str) -> str:
    """A location as messages may have it: without user and password."""
    return re.sub(r"//[^/@]*@", f"//{MASK}@", uri)


def _get(uri: str, place: Path, what: str, session: Any = None, limit: int = 0) -> None:
    """Fetch one file; of one that is longer than `limit` bytes only a bit more (0: any length).

    Raises UnavailableError (server) or ImgbuildError (it is not there).
    """
    safe = shown(uri)
    if uri.startswith("file://"):
        source = Path(unquote(urlsplit(uri).path))
        try:
            if not source.is_file():
                raise _NotThereError(f"{what} is not at {safe}")
            shutil.copyfile(source, place)
        except OSError as error:
            raise ImgbuildError(f"cannot copy {what} from {safe} to `{place}`: {error.strerror}") from None
        return
    import requests

    try:
        with (session or _session()).get(uri, stream=True, timeout=(15, 60)) as response:
            if response.status_code in (403, 404, 410):
                raise _NotThereError(f"{what} is not at {safe} (HTTP {response.status_code})")
            if response.status_code != 200:
                raise UnavailableError(f"{what}: {safe} answers HTTP {response.status_code}")
            with place.open("wb") as file:
                for chunk in response.iter_content(1 << 20):
                    file.write(chunk)
                    if limit and file.tell() > limit:
                        break  # it cannot be right any more, and shall not fill the disk
    except (requests.RequestException, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
            raise ImgbuildError(f"cannot write {what} to `{place}`: {error.strerror}") from None
        lines = [shown(str(error))[:300]]
        raise UnavailableError(f"{what} cannot be fetched from {safe}", lines=lines) from None


def fetch(
    wanted: Sequence[Wanted], state: State, on_file: Callable[[Wanted], None] = lambda _: None
) -> tuple[int, int]:
    """Put every wanted file that is not there yet into the store, verified.

    Returns:
        Number of files and bytes that were downloaded.

    Raises:
        UnavailableError: a server cannot be reached.
        GoneError: files are no longer there; all of them are named.
        ImgbuildError: a file is not what the lock says.
    """
    missing = list({w.sha256: w for w in wanted if not state.has(w.sha256)}.values())
    if not missing:
        return 0, 0
    session = _session()
    with state.work("download") as folder:
        gone: list[Wanted] = []

        def one(item: Wanted) -> int:
            part = folder / item.sha256
            try:
                _get(item.uri, part, item.what, session, item.size)
            except _NotThereError:
                gone.append(item)
                return 0
            got = part.stat().st_size
            if sha256_of(part) != item.sha256:
                raise ImgbuildError(
                    f"{item.what} from {shown(item.uri)} has the wrong SHA-256",
                    lines=[f"expected {item.sha256}", f"found    {sha256_of(part)} ({got} bytes)"],
                    help="the mirror changed the file, or something on the way did: nothing of it is used",
                )
            state.add(part, item.sha256)
            on_file(item)
            return got

        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            futures = [pool.submit(one, item) for item in missing]
            try:
                sizes = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if gone:
            raise GoneError(sorted(gone, key=lambda item: item.what))
    return len(missing), sum(sizes)


def wanted_packages(packages: Iterable[Any], locations: Mapping[str, Location]) -> list[Wanted]:
    """What to fetch for locked packages. Raises DefinitionError for a repository that is gone."""
    found = []
    for package in packages:
        location = locations.get(package.repository)
        if location is None:
            raise DefinitionError(
                f"the lock takes `{package.name}` from the unknown repository `{package.repository}`",
                help="run `imgbuild lock` again",
            )
        found.append(
            Wanted(
                f"{package.name} {package.version}",
                f"{location.uri}/{package.path}",
                package.sha256,
                package.size,
                package.name,
            )
        )
    return found
