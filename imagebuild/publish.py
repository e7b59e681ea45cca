"""Image → registry: stamps what only a published image carries, pushes every name, the moving one last.

The image goes into an OCI layout once, where its layers are compressed and its stamps are set; every
destination is then a copy of that layout, so all of them get the same digest, and a further tag of
a repository costs one manifest. A push that fails midway leaves the moving tag as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from imagebuild import images
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.render import LABEL_PREFIX
from imagebuild.report import Report, size
from imagebuild.run import run
from imagebuild.state import State

Transport = Literal["docker", "oci", "oci-archive"]

# Prefix of the annotations (image-spec, annotations.md).
OCI = "org.opencontainers.image"
# Tags that by habit follow the newest image.
MOVING_TAGS = frozenset({"latest", "stable", "testing", "edge", "main", "nightly"})

# distribution/reference: host, path components, tag.
_HOST = re.compile(r"^(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?\Z")
_PATH = re.compile(r"^[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*\Z")
_TAG = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_HEX = re.compile(r"^[0-9a-f]{12,}$")

_AUTH = re.compile(
    r"unauthorized|authentication required|access denied|\bdenied:|invalid username/password"
    r"|\b40[13] \((?:Unauthorized|Forbidden)\)|status(?: ?code)?(?: from registry)?:? 40[13]\b"
    r"|no basic auth credentials",
    re.IGNORECASE,
)
_PLAIN_HTTP = "server gave HTTP response to HTTPS client"
_CERTIFICATE = re.compile(r"x509:|certificate|tls: ", re.IGNORECASE)
_FATAL = re.compile(r'level=(?:fatal|error) msg="(.*)"\s*$')


@dataclass(frozen=True)
class Destination:
    """Where an image goes.

    `name` is HOST/REPOSITORY of a registry, or the path of a layout or archive. `moving` marks a tag
    that is moved from image to image (True) or never is (False); None leaves it to `push_order`.
    """

    transport: Transport
    name: str
    tag: str = ""
    moving: bool | None = None

    def __str__(self) -> str:
        text = f"{self.name}:{self.tag}" if self.tag else self.name
        return text if self.transport == "docker" else f"{self.transport}:{text}"

    @property
    def registry(self) -> str:
        """Host and port of the registry; empty for a layout or archive."""
        return self.name.split("/", 1)[0] if self.transport == "docker" else ""

    @property
    def location(self) -> str:
        """The destination as skopeo takes it."""
        return f"docker://{self}" if self.transport == "docker" else str(self)


@dataclass(frozen=True)
class PublishOptions:
    """How to publish.

    Attributes:
        stamp: set creation time, revision and the other annotations; without, the image's config
            keeps every byte and its layers are compressed, nothing else.
        created: creation time; None takes $SOURCE_DATE_EPOCH, else now.
        revision: revision of the site; None asks git in `site_folder`, the empty string sets none.
        site_folder: folder of the site file.
        authfile: credentials; None leaves it to skopeo ($REGISTRY_AUTH_FILE, then its own places).
        tls_verify: None leaves it to registries.conf, which verifies unless told otherwise.
        attempts: how often a registry with network trouble is tried.
    """

    stamp: bool = True
    created: datetime | None = None
    revision: str | None = None
    version: str = ""
    source: str = ""
    title: str = ""
    base_name: str = ""
    base_digest: str = ""
    site_folder: Path | None = None
    authfile: Path | None = None
    tls_verify: bool | None = None
    attempts: int = 4


@dataclass(frozen=True)
class Layout:
    """An image in an OCI layout: digest of its manifest, its layers base first, its size in bytes."""

    digest: str
    layers: tuple[tuple[str, int], ...]
    size_bytes: int


@dataclass(frozen=True)
class PublishResult:
    """What was published.

    Attributes:
        image: the name in local storage.
        digest: of the manifest, the same at every destination.
        references: where it is now, in the order of pushing.
        layers: digest and compressed size of every layer, base first.
        size_bytes: all layers and the config, compressed: what a new host downloads.
        annotations: what was stamped.
    """

    image: str
    digest: str
    references: tuple[str, ...]
    layers: tuple[tuple[str, int], ...]
    size_bytes: int
    pinned: tuple[str, ...] = ()
    """HOST/REPOSITORY@DIGEST of every registry repository, for those who want exactly this image."""
    annotations: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "image": self.image,
            "digest": self.digest,
            "references": list(self.references),
            "pinned": list(self.pinned),
            "layers": [{"digest": digest, "size_bytes": size} for digest, size in self.layers],
            "size_bytes": self.size_bytes,
            "annotations": dict(self.annotations),
        }


def parse_destination(text: str, *, moving: bool | None = None) -> Destination:
    """Read a destination: `[docker://]HOST/REPO[:TAG]`, `oci:DIR[:TAG]` or `oci-archive:FILE[:TAG]`.

    A registry destination without a tag means `latest`. The host must be written: unlike other tools
    we push to no registry that nobody named.

    Raises:
        DefinitionError: it is none of these.
    """
    for transport in ("oci-archive", "oci"):
        if text.startswith(f"{transport}:"):
            path, _, tag = text.removeprefix(f"{transport}:").partition(":")
            if not path:
                raise DefinitionError(f"destination `{text}` names no path")
            if tag and not _TAG.match(tag):
                raise DefinitionError(f"destination `{text}`: `{tag}` is not a tag")
            return Destination(transport, path, tag, moving)
    rest = text.removeprefix("docker://")
    if "://" in rest or rest.startswith(("docker-archive:", "dir:", "containers-storage:", "docker-daemon:")):
        raise DefinitionError(
            f"an image cannot be pushed to `{text}`",
            help="destinations are HOST/REPO:TAG, oci:DIR and oci-archive:FILE",
        )
    if "@" in rest:
        raise DefinitionError(
            f"destination `{text}` names a digest", help="the digest follows from the image: name a tag"
        )
    host, slash, path = rest.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        raise DefinitionError(
            f"destination `{text}` names no registry", help="write HOST/REPO:TAG; a folder is oci:DIR"
        )
    path, colon, tag = path.partition(":")
    tag = tag if colon else "latest"
    if not _HOST.match(host):
        raise DefinitionError(f"destination `{text}`: `{host}` is not a host name")
    for part in path.split("/"):
        if not _PATH.match(part):
            raise DefinitionError(
                f"destination `{text}`: `{part}` cannot be part of a repository's name",
                help="lower case letters, digits, and . _ - between them",
            )
    if not _TAG.match(tag):
        raise DefinitionError(f"destination `{text}`: `{tag}` is not a tag")
    return Destination("docker", f"{host}/{path}", tag, moving)


def push_order(destinations: Sequence[Destination], fixed: Iterable[str] = ()) -> tuple[Destination, ...]:
    """Destinations in the order in which they are pushed: what never moves first, moving tags last.

    Args:
        destinations: as named by the user, doubles allowed.
        fixed: words a tag that never moves is made of: version, revision, key, digest.

    A tag moves when it is marked so, or is called like `latest`; and, where nothing is marked, the
    last one named. Unless it is marked otherwise or holds one of `fixed`. Else the order is the user's.
    """
    unique = list(dict.fromkeys(destinations))
    words = [word for word in fixed if word]
    marked = any(item.moving for item in unique)

    def rank(item: Destination) -> int:
        if item.moving is not None:
            return 2 if item.moving else 0
        if item.transport != "docker" or any(_holds(item.tag, word) for word in words):
            return 0
        if item.tag in MOVING_TAGS or (not marked and item is unique[-1]):
            return 2
        return 1

    return tuple(sorted(unique, key=rank))


def _holds(tag: str, word: str) -> bool:
    """Tell whether a tag is made of `word`: between separators, or as a short form of a hash."""
    parts = re.split(r"[._-]", tag)
    if _HEX.match(word):
        return any(len(part) >= 7 and word.startswith(part) for part in parts)
    return re.search(rf"(?:^|[^0-9A-Za-z])v?{re.escape(word)}(?:$|[^0-9A-Za-z])", tag) is not None


def creation_time(created: datetime | None, environment: Mapping[str, str]) -> str:
    """The creation time to stamp, RFC 3339 in UTC: the one given, else $SOURCE_DATE_EPOCH, else now.

    Raises:
        DefinitionError: $SOURCE_DATE_EPOCH is not a number of seconds.
    """
    if created is None:
        epoch = environment.get("SOURCE_DATE_EPOCH")
        try:
            created = datetime.now(UTC) if not epoch else datetime.fromtimestamp(int(epoch), UTC)
        except (ValueError, OverflowError, OSError):
            raise DefinitionError(
                f"$SOURCE_DATE_EPOCH is `{epoch}`, not a number of seconds since 1970"
            ) from None
    return created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def site_revision(folder: Path) -> str:
    """Revision of the git work tree a folder lies in; empty where there is none, or no git.

    `-dirty` is added when tracked files below the folder differ from that revision.
    """
    # Nothing is written, and no program started that a repository's own configuration names.
    git = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder)]
    try:
        head = run([*git, "rev-parse", "HEAD"], check=False)
        if head.returncode != 0:
            return ""
        changed = run([*git, "status", "--porcelain", "--untracked-files=no", "--", "."], check=False)
    except UnavailableError:
        return ""
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def stamps(options: PublishOptions, created: str, revision: str) -> dict[str, str]:
    """The annotations to set; what is empty is left out."""
    found = {
        "created": created,
        "revision": revision,
        "version": options.version,
        "source": options.source,
        "title": options.title,
        "base.name": options.base_name,
        "base.digest": options.base_digest,
    }
    return {f"{OCI}.{name}": value for name, value in found.items() if value}


def read_layout(folder: Path) -> Layout:
    """What the only image of an OCI layout is made of.

    Raises:
        ImgbuildError: it holds no image, several, or a list of images.
    """
    _, entry, manifest = _open(folder)
    layers = tuple((layer["digest"], layer["size"]) for layer in manifest["layers"])
    return Layout(entry["digest"], layers, sum(s for _, s in layers) + manifest["config"]["size"])


def stamp_layout(folder: Path, annotations: Mapping[str, str], created: str) -> Layout:
    """Set annotations on the only image of an OCI layout, in its config (labels) and its manifest.

    What the base of the image is, which the build notes in the manifest alone, goes into the labels
    too; empty annotations go. The result depends on nothing but the image and the arguments.

    Args:
        folder: the layout; changed in place.
        annotations: full names and values.
        created: creation time of the image, RFC 3339.

    Raises:
        ImgbuildError: the layout does not hold exactly one image.
    """
    index, entry, manifest = _open(folder)
    noted = {name: value for name, value in (manifest.get("annotations") or {}).items() if value}
    noted |= annotations
    config_blob = _blob(folder, manifest["config"]["digest"])
    config = json.loads(config_blob.read_bytes())
    config["created"] = created
    inner = config.setdefault("config", {})
    labels = inner.get("Labels") or {}
    labels |= {name: value for name, value in noted.items() if name.startswith(f"{OCI}.")}
    inner["Labels"] = dict(sorted(labels.items()))
    manifest_blob = _blob(folder, entry["digest"])
    manifest["config"] |= _add(folder, config)
    manifest["annotations"] = dict(sorted(noted.items()))
    entry |= _add(folder, manifest)
    (folder / "index.json").write_bytes(_bytes(index))
    for old, now in ((config_blob, manifest["config"]), (manifest_blob, entry)):
        if old != _blob(folder, now["digest"]):
            old.unlink()
    return read_layout(folder)


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A layout's index, the entry of its image in there, and the image's manifest."""
    index = json.loads((folder / "index.json").read_bytes())
    if len(index["manifests"]) != 1:
        raise ImgbuildError(f"the layout holds {len(index['manifests'])} images, not one")
    entry = index["manifests"][0]
    manifest = json.loads(_blob(folder, entry["digest"]).read_bytes())
    if "layers" not in manifest:
        raise ImgbuildError("the image is a list of images for several platforms: publish one of them")
    return index, entry, manifest


def _blob(folder: Path, digest: str) -> Path:
    algorithm, _, value = digest.partition(":")
    return folder / "blobs" / algorithm / value


def _bytes(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()


def _add(folder: Path, data: Any) -> dict[str, Any]:
    """Write a JSON blob; returns the part of its descriptor that says which one it is."""
    raw = _bytes(data)
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    _blob(folder, digest).write_bytes(raw)
    return {"digest": digest, "size": len(raw)}


def publish(
    image: str, destinations: Sequence[Destination], state: State, report: Report, options: PublishOptions
) -> PublishResult:
    """Put an image of local storage at every destination, under one digest.

    Raises:
        DefinitionError: no destination, or $SOURCE_DATE_EPOCH makes no sense.
        UnavailableError: a registry is down or refuses. The image stays in local storage, and tags
            that were still to come stay what they were.
        ImgbuildError: there is no such image, or it cannot be written.
    """
    if not destinations:
        raise DefinitionError("no destination to push to", help="name one: HOST/REPO:TAG")
    found = images.inspect(image)
    identity = str(found["FromImageID"])
    key = (found["OCIv1"]["config"].get("Labels") or {}).get(f"{LABEL_PREFIX}.key", "")
    annotations: dict[str, str] = {}
    created = revision = ""
    if options.stamp:
        created = creation_time(options.created, os.environ)
        revision = options.revision if options.revision is not None else ""
        if options.revision is None and options.site_folder is not None:
            revision = site_revision(options.site_folder)
        annotations = stamps(options, created, revision)
    with state.work(f"publish-{os.urandom(4).hex()}") as work:
        folder = work / "layout"
        with report.step("compress", image) as step:
            # By its id: skopeo would look for a short name in another registry than buildah does.
            images.copy(f"containers-storage:{identity}", f"oci:{folder}", "--quiet", attempts=1)
            layout = stamp_layout(folder, annotations, created) if options.stamp else read_layout(folder)
            step.outcome = f"{len(layout.layers)} layers, {size(layout.size_bytes)}"
        words = (options.version, revision.removesuffix("-dirty"), key, identity, layout.digest[7:])
        ordered = push_order(destinations, words)
        for position, destination in enumerate(ordered):
            with report.step("push", str(destination)) as step:
                try:
                    _push(folder, destination, layout.digest, work, options)
                except ImgbuildError as error:
                    done, left = ordered[:position], ordered[position + 1 :]
                    raise _failure(image, destination, error, done, left) from None
                step.outcome = layout.digest
    repositories = dict.fromkeys(item.name for item in ordered if item.transport == "docker")
    return PublishResult(
        image,
        layout.digest,
        tuple(str(item) for item in ordered),
        layout.layers,
        layout.size_bytes,
        tuple(f"{name}@{layout.digest}" for name in repositories),
        tuple(sorted(annotations.items())),
    )


def _push(folder: Path, destination: Destination, digest: str, work: Path, options: PublishOptions) -> None:
    """Copy the layout to one destination and see that it arrived under its digest."""
    told = work / "digest"
    words = ["--quiet", "--preserve-digests", "--digestfile", str(told)]
    if destination.transport == "docker":
        if options.authfile is not None:
            words += ["--dest-authfile", str(options.authfile)]
        if options.tls_verify is not None:
            words.append(f"--dest-tls-verify={str(options.tls_verify).lower()}")
        images.copy(f"oci:{folder}", destination.location, *words, attempts=options.attempts)
    else:
        _write(folder, destination, words)
    arrived = told.read_text().strip()
    if arrived != digest:
        raise ImgbuildError(f"{destination} has digest {arrived}, expected {digest}")


def _write(folder: Path, destination: Destination, words: Sequence[str]) -> None:
    """Copy the layout into another, or into an archive; an archive is there whole or not at all."""
    place = Path(destination.name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if destination.transport == "oci":
            images.copy(f"oci:{folder}", destination.location, *words, attempts=1)
            return
        part = place.with_name(f".{place.name}.{os.getpid()}.part")
        try:
            images.copy(f"oci:{folder}", replace(destination, name=str(part)).location, *words, attempts=1)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ImgbuildError(f"cannot write {destination}", lines=[str(error)]) from None


def _failure(
    image: str,
    destination: Destination,
    error: ImgbuildError,
    done: Sequence[Destination],
    left: Sequence[Destination],
) -> ImgbuildError:
    """A push that failed as a person needs it: why, what is where now, and what to do."""
    advice = [f"`{image}` is kept in local storage: push it again when this is settled"]
    if done:
        advice.append(f"pushed: {', '.join(map(str, done))}")
    if done or left:
        advice.append(f"left as they were: {', '.join(map(str, (destination, *left)))}")
    if not destination.registry:
        return type(error)(f"cannot write {destination}", lines=_said(error), help="\n".join(advice))
    host = destination.registry
    text = "\n".join(error.lines)
    if isinstance(error, UnavailableError):
        what = f"registry {host} cannot be reached" if error.lines else error.what
        if error.help:
            advice.insert(0, error.help)
    elif "no space left on device" in text.lower():
        return ImgbuildError(f"no space to push {destination}", lines=_said(error), help="\n".join(advice))
    elif _PLAIN_HTTP in text:
        what = f"registry {host} speaks plain HTTP, and TLS is asked for"
        advice.insert(0, "to trust it as it is: --no-tls-verify")
    elif _AUTH.search(text):
        what = f"registry {host} refuses {destination}: not logged in, or not allowed to push there"
        advice.insert(0, f"log in: skopeo login {host} (or name the credentials: --authfile FILE)")
    elif _CERTIFICATE.search(text):
        what = f"the certificate of registry {host} is not accepted"
        advice.insert(0, f"put its CA into /etc/containers/certs.d/{host}/ca.crt, or --no-tls-verify")
    else:
        what = f"registry {host} refuses {destination}" if error.lines else error.what
    return UnavailableError(what, lines=_said(error), help="\n".join(advice))


def _said(error: ImgbuildError) -> list[str]:
    """What skopeo said of its failure, without its log decoration."""
    found = [match[1].replace('\\"', '"') for line in error.lines if (match := _FATAL.search(line))]
    return found or list(error.lines)
