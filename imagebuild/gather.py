"""All that a lock names in one folder, for builds without network: gathered here, and read from there.

DIR/imgbuild.lock       the sections that were gathered
DIR/contents.json       what is there and where it came from, an entry per line
DIR/store/ab/abcd…      packages, sources and repository keys, named by their SHA-256
DIR/images              upstream and container images: one OCI layout, found by digest;
                        by-digest/… are indexes of one image each over the same blobs
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from imagebuild import images
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.lock import LOCK_FILE, update
from imagebuild.plan import Plan
from imagebuild.render import Rendered
from imagebuild.report import Report, size
from imagebuild.sources import Wanted, fetch, locate_locked, pinned_source, shown, wanted_packages
from imagebuild.state import State, sha256_of, write_whole

CONTENTS = "contents.json"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename={"source": "from"}):
    """One thing in the folder. Of an image, `sha256` is its digest and `size` that of all its parts."""

    kind: str
    name: str
    version: str
    size: int
    sha256: str
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from others, and how entries are sorted."""
        return self.kind, self.name, self.version, self.sha256


class _Contents(msgspec.Struct, frozen=True):
    entries: tuple[Entry, ...]
    version: int = 1


@dataclass(frozen=True)
class Folder:
    """A folder that holds what locks name. Reading changes nothing in it."""

    root: Path

    @property
    def store(self) -> State:
        """Its files, as in the state folder."""
        return State(self.root)

    @property
    def blobs(self) -> Path:
        """Where the parts of its images lie."""
        return self.root / "images" / "blobs"

    def entries(self) -> dict[tuple[str, str, str, str], Entry]:
        """What it says it holds; nothing where there is no table of contents, or no readable one."""
        try:
            found = msgspec.json.decode((self.root / CONTENTS).read_bytes(), type=_Contents)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return {}
        return {entry.key: entry for entry in found.entries}

    def parts(self, digest: str) -> dict[str, int]:
        """Size of every part of an image by digest, itself first, as far as its manifests are there.

        Raises:
            ImgbuildError: a manifest has its digest, but is none.
        """
        path = self.blob(digest)
        if not _is(path, digest):
            return {digest: 0}
        found = {digest: path.stat().st_size}
        try:
            manifest = json.loads(path.read_bytes())
            for child in manifest.get("manifests", ()):
                found |= self.parts(str(child["digest"]))
            leaves = [manifest["config"], *manifest["layers"]] if "layers" in manifest else []
            found |= {str(leaf["digest"]): int(leaf["size"]) for leaf in leaves}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise ImgbuildError(f"`{path}` is no manifest of an image") from None
        return found

    def blob(self, digest: str) -> Path:
        """Where a part of an image lies, whether it is there or not."""
        if not _DIGEST.fullmatch(digest):
            raise ImgbuildError(f"an image of `{self.root}` has a part with the digest {digest!r}")
        return self.blobs / "sha256" / digest[7:]

    def broken(self, digest: str) -> list[Path]:
        """The parts of an image that are not there, or are not what their names say."""
        return [self.blob(part) for part in self.parts(digest) if not _is(self.blob(part), part)]

    @contextmanager
    def image(self, digest: str, state: State) -> Iterator[str]:
        """Where skopeo copies an image of the folder from."""
        with state.work(f"layout-{digest[7:19]}") as work:
            # A layout of this image alone: skopeo finds images in one by name, not by digest.
            (work / "blobs").symlink_to(self.blobs)
            _write_index(work, [self._descriptor(digest)])
            yield f"oci:{work}"

    def _descriptor(self, digest: str) -> dict[str, Any]:
        raw = self.blob(digest).read_bytes()
        manifest = json.loads(raw)
        kind = manifest.get("mediaType") or (_INDEX if "manifests" in manifest else _MANIFEST)
        return {"mediaType": kind, "digest": digest, "size": len(raw)}

    def add_image(self, digest: str, source: str, tls_verify: bool) -> bool:
        """Have an image in the folder, whole and with its digest.

        Returns:
            True if something of it had to be copied.

        Raises:
            UnavailableError: the registry cannot be reached.
            ImgbuildError: it refused, or what came is another image.
        """
        copied = False
        for _ in range(2):  # which parts there are is known only when the manifests are right
            broken = self.broken(digest)
            if not broken:
                break
            for path in broken:  # skopeo keeps a part that is there, whatever is in it
                path.unlink(missing_ok=True)
            self._copy_image(digest, source, tls_verify)
            copied = True
        if copied and self.broken(digest):
            raise ImgbuildError(f"{source} is not the image {digest}, or lacks parts of it")
        self._index(digest)
        return copied

    def _copy_image(self, digest: str, source: str, tls_verify: bool) -> None:
        words = ["--quiet", "--all", "--preserve-digests"]
        words += [] if tls_verify else ["--src-tls-verify=false"]
        # Parts appear whole, so those of a copy that was cut short stay; the index comes last.
        words += ["--dest-shared-blob-dir", str(self.blobs)]
        with self.store.work(f"image-{digest[7:19]}") as work:
            try:
                images.copy(source, f"oci:{work}/layout", *words)
            except UnavailableError:
                raise
            except ImgbuildError as error:
                if not any("preserve digests" in line for line in error.lines):
                    raise
                # Docker's own format: OCI layouts may hold it, but it has to be asked for.
                images.copy(source, f"oci:{work}/layout", *words, "--format", "v2s2")

    def _index(self, digest: str) -> None:
        """Name an image in the layout, by the hexadecimal digits of its digest.

        skopeo of Debian 12 finds images of Docker's format in a layout only where they are alone: so each
        image has an index of its own, too.
        """
        folder = self.root / "images"
        _write_index(folder / "by-digest" / digest[7:], [self._descriptor(digest)])
        try:
            old = json.loads((folder / "index.json").read_bytes())["manifests"]
            known = {entry["digest"]: entry for entry in old}
        except (OSError, ValueError, TypeError, LookupError):
            known = {}
        names = {"org.opencontainers.image.ref.name": digest[7:]}
        known[digest] = {**self._descriptor(digest), "annotations": names}
        _write_index(folder, [known[key] for key in sorted(known)])


def _is(path: Path, digest: str) -> bool:
    try:
        return not path.is_symlink() and path.is_file() and sha256_of(path) == digest[7:]
    except OSError:
        return False


def _write_index(folder: Path, manifests: Sequence[Mapping[str, Any]]) -> None:
    write_whole(folder / "oci-layout", '{"imageLayoutVersion": "1.0.0"}\n')
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": manifests}
    write_whole(folder / "index.json", json.dumps(index, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Gathered:
    """What `gather` did: new files (images count as one each) and bytes, and what the selection needs."""

    files: int
    bytes: int
    entries: tuple[Entry, ...]


def gather(
    plan: Plan, rendered: Sequence[Rendered], folder: Folder, state: State, report: Report
) -> Gathered:
    """Bring everything that a locked plan needs into a folder; what is there and right stays.

    Raises:
        DefinitionError: the folder's name cannot be used.
        UnavailableError: a mirror or registry cannot be reached.
        ImgbuildError: something is gone, or is not what is locked.
    """
    section, selection = plan.section, plan.selection
    assert section is not None
    if ":" in str(folder.root):
        raise DefinitionError(f"`{folder.root}` cannot be gathered into: it has a colon in its name")
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImgbuildError(f"cannot write `{folder.root}`: {error.strerror}") from None
    name = hashlib.sha256(os.fsencode(folder.root)).hexdigest()[:16]
    with state.lock(f"gather-{name}", report.say):
        folder.store.sweep()
        try:
            known = folder.entries()
            new, files, bytes_ = _files(plan, rendered, folder, state, report, known)
            for reference, digest in _image_references(plan).items():
                source, verify = pinned_source(reference, digest, selection.mirrors)
                with report.step("pull", reference) as step:
                    copied = folder.add_image(digest, source, verify)
                    length = sum(folder.parts(digest).values())
                    step.outcome = size(length) if copied else "there already"
                files, bytes_ = files + copied, bytes_ + copied * length
                entry = Entry(
                    kind="image", name=reference, version="", size=length, sha256=digest[7:], source=source
                )
                new.append(known.get(entry.key, entry))
        finally:
            with suppress(OSError):
                (folder.root / "work").rmdir()
        update(folder.root / LOCK_FILE, selection.section, section, state)
        every = {**known, **{entry.key: entry for entry in new}}
        lines = [msgspec.json.encode(every[key], order="deterministic").decode() for key in sorted(every)]
        text = ",\n  ".join(lines)
        write_whole(folder.root / CONTENTS, f'{{\n "version": 1,\n "entries": [\n  {text}\n ]\n}}\n')
    return Gathered(files, bytes_, tuple(sorted(new, key=lambda entry: entry.key)))


def _image_references(plan: Plan) -> dict[str, str]:
    """Every image a plan names, as written, with its locked digest: tier 1's and those of layers."""
    assert plan.section is not None
    found = dict(plan.section.images)
    if plan.selection.base.tier1.image is not None:
        found[plan.selection.base.tier1.image] = plan.section.base_digest
    return dict(sorted(found.items()))


def _files(
    plan: Plan,
    rendered: Sequence[Rendered],
    folder: Folder,
    state: State,
    report: Report,
    known: Mapping[tuple[str, str, str, str], Entry],
) -> tuple[list[Entry], int, int]:
    """Packages, sources and keys; the second and third value are what was downloaded, in files and bytes."""
    assert plan.section is not None
    packages = list({p.sha256: p for item in rendered for p in item.packages}.values())
    tarballs = {item.tarball[1]: (item.node.kmod, item.tarball[0]) for item in rendered if item.tarball}
    keys = plan.section.keys
    entries: list[Entry] = []
    wanted: list[Wanted] = []

    def want(kind: str, name: str, version: str, item: Wanted) -> None:
        wanted.append(item)
        entry = Entry(
            kind=kind, name=name, version=version, size=item.size, sha256=item.sha256, source=shown(item.uri)
        )
        entries.append(known.get(entry.key, entry))

    unknown = [p for p in packages if ("package", p.name, p.version, p.sha256) not in known]
    absent = [p for p in packages if not folder.store.has(p.sha256)]
    no_keys = [n for n, sha in keys.items() if not folder.store.has(sha) or ("key", n, "", sha) not in known]
    # Mirrors are asked for only when there is something to ask.
    own = {name: found.uri for name, found in plan.section.repositories.items()}
    locations = locate_locked(plan.selection, own, state) if unknown or absent or no_keys else {}
    uris = {w.sha256: w for w in wanted_packages(packages, locations)} if unknown or absent else {}
    for p in packages:
        plain = Wanted(f"{p.name} {p.version}", "", p.sha256, p.size)
        want("package", p.name, p.version, uris.get(p.sha256, plain))
    for sha256, (kmod, uri) in tarballs.items():
        want("source", kmod, plan.kmod(kmod).version, Wanted(f"source of {kmod}", uri, sha256))
    for name, sha256 in keys.items():
        key = locations[name].key if name in locations else None
        if key is not None and sha256_of(key) != sha256:
            raise ImgbuildError(
                f"the key of repository `{name}` is not the one that is locked",
                lines=[f"locked {sha256}", f"found  {sha256_of(key)}"],
                help="`imgbuild lock` says more",
            )
        place = key.absolute().as_uri() if key is not None else ""
        origin = locations[name].repository.key or locations[name].uri if key is not None else ""
        wanted.append(Wanted(f"the key of repository {name}", place, sha256))
        entry = Entry(kind="key", name=name, version="", size=0, sha256=sha256, source=shown(origin))
        entries.append(known.get(entry.key, entry))
    _copy(wanted, state, folder.store)
    missing = [w for w in wanted if not folder.store.has(w.sha256)]
    files = bytes_ = 0
    if missing:
        with report.step("fetch", f"{len(missing)} files, {size(sum(w.size for w in missing))}") as step:
            files, bytes_ = fetch(missing, folder.store, lambda item: step.line(item.what))
            step.outcome = f"{size(bytes_)} downloaded and verified"
    lengths = {e.sha256: folder.store.stored(e.sha256).stat().st_size for e in entries}
    return [msgspec.structs.replace(e, size=lengths[e.sha256]) for e in entries], files, bytes_


def _copy(wanted: Sequence[Wanted], source: State, target: State) -> int:
    """Copy what one store has and another has not; returns the number of files."""
    copied = 0
    for item in wanted:
        if target.has(item.sha256) or not source.has(item.sha256):
            continue
        with target.work("copy") as work:
            try:
                shutil.copyfile(source.stored(item.sha256), work / item.sha256)
                target.add(work / item.sha256, item.sha256)
            except OSError as error:
                raise ImgbuildError(f"cannot copy {item.what} to `{target.root}`: {error.strerror}") from None
        copied += 1
    return copied


@dataclass(frozen=True)
class Offline:
    """A build that asks no network.

    `folder` is where everything comes from that this machine does not have; without one, it must have
    all. `command` is what brings it, run where there is a network.
    """

    folder: Folder | None
    command: str

    @property
    def place(self) -> str:
        """Where things come from, in words."""
        return f"from {self.folder.root}" if self.folder else "from this machine"

    def take(self, wanted: Sequence[Wanted], upstream: tuple[str, str] | None, state: State) -> int:
        """Bring files into the state store, and see that the upstream image (name, digest) is to be had.

        Returns:
            Number of files copied.

        Raises:
            UnavailableError: something is missing or altered; the error names all of it.
        """
        wanted = list({w.sha256: w for w in wanted}.values())
        lines = [f"{w.what}: {why}" for w in wanted if (why := self._problem(w, state))]
        if upstream is not None and not images.has(*upstream):
            name = "@".join(upstream)
            if self.folder is None:
                lines.append(f"image {name}: not there")
            else:
                broken = self.folder.broken(upstream[1])
                lines += [f"image {name}: {_why(path)}" for path in broken]
        if lines:
            place = f"neither in `{self.folder.root}` nor" if self.folder else "not"
            raise UnavailableError(
                f"what this build needs is {place} on this machine as it was locked",
                lines=lines,
                help=f"where there is a network, with the same site and lock: {self.command}",
            )
        return _copy(wanted, self.folder.store, state) if self.folder is not None else 0

    def _problem(self, item: Wanted, state: State) -> str:
        """What is wrong with a file; empty when it is to be had."""
        if state.has(item.sha256) or (self.folder is not None and self.folder.store.has(item.sha256)):
            return ""
        return _why((self.folder.store if self.folder is not None else state).stored(item.sha256))


def _why(path: Path) -> str:
    """Why a file that is named by its SHA-256 cannot be used."""
    if not os.path.lexists(path):
        return "not there"
    return f"altered, its SHA-256 is another: {path}"
