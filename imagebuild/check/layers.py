"""Checks of the layers, each read as a stream: what one layer holds, no later one takes back."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import zstandard

from imagebuild.check.table import Problem, Severity, Subject, check, some
from imagebuild.errors import ImgbuildError

MAX_SECRET_BYTES = 64 * 1024  # a larger file is no key; also bounds what is read of a layer

_BIN = r"(?:usr/(?:local/)?)?s?bin/"
_TRIPLET = r"(?:[a-z0-9_]+(?:-[a-z0-9_]+)*-linux(?:-[a-z0-9]+)?-)?"


@dataclass(frozen=True)
class LayerRule:
    """Files that no layer may hold; `pattern` must match the whole path, without leading slash."""

    check: str
    what: str
    pattern: re.Pattern[str]
    severity: Severity = "fatal"


def _tool(what: str, names: str) -> LayerRule:
    return LayerRule("no-build-tools", what, re.compile(rf"{_BIN}{names}(?:-\d[\d.]*)?"))


_SECRET_PLACES = r"(?:usr/)?etc/.*|root/.*|home/.*|var/(?:home|roothome)/.*"

LAYER_RULES: tuple[LayerRule, ...] = (
    _tool("compiler", rf"{_TRIPLET}(?:gcc|g\+\+|cc|c\+\+|cpp|clang|clang\+\+|c89|c99|c89-gcc|c99-gcc)"),
    _tool("assembler", rf"{_TRIPLET}as"),
    _tool("linker", rf"{_TRIPLET}(?:ld|ld\.bfd|ld\.gold|ld\.lld|gold|mold)"),
    _tool("make", r"(?:make|gmake|cmake|ninja)"),
    _tool("DKMS", r"dkms"),
    _tool("package builder", r"(?:rpmbuild|dpkg-buildpackage|debuild)"),
    LayerRule(
        "no-build-tools",
        "compiler",
        re.compile(r"usr/(?:lib|libexec)/gcc/.*/(?:cc1|cc1plus|collect2|lto1|lto-wrapper)"),
    ),
    LayerRule(
        "no-build-tools", "DKMS", re.compile(r"(?:usr/lib|etc|var/lib)/dkms/.*|usr/src/[^/]+/dkms\.conf")
    ),
    LayerRule(
        "no-build-tools",
        "kernel headers",
        re.compile(r"usr/src/(?:linux-headers|linux-kbuild|kernels/).*|usr/lib/linux-kbuild-.*"),
    ),
    LayerRule("no-build-tools", "C headers", re.compile(r"usr/include/.*\.(?:h|hpp)"), "warning"),
    LayerRule(
        "no-package-caches",
        "package cache",
        re.compile(
            r"var/cache/apt/archives/.*\.deb|var/cache/apt/[^/]+\.bin"
            r"|var/lib/apt/lists/(?!lock$|partial/|auxfiles/).*"
            r"|var/cache/(?:dnf|libdnf5|yum|PackageKit)/.*"
        ),
    ),
    LayerRule(
        "no-package-caches",
        "log of a package manager",
        re.compile(
            r"var/log/(?:apt/.*|dpkg\.log.*|alternatives\.log.*|bootstrap\.log|dnf.*\.log.*|yum\.log.*|hawkey\.log.*)"
        ),
        "warning",
    ),
    LayerRule("no-leftovers", "run-time file", re.compile(r"(?:run|tmp|var/tmp|var/run)/.*"), "warning"),
    LayerRule("no-secrets", "mounted build secret", re.compile(r"run/secrets/.*")),
    LayerRule(
        "no-secrets",
        "credentials",
        re.compile(
            rf"(?={_SECRET_PLACES})(?:.*/)?"
            r"(?:id_(?:rsa|dsa|ecdsa|ed25519)(?:_sk)?|\.netrc|\.pgpass|\.git-credentials"
            r"|\.docker/config\.json|ostree/auth\.json|containers/auth\.json)"
        ),
    ),
)
_KEY_BY_CONTENT = LayerRule("no-secrets", "private key", re.compile(_SECRET_PLACES))
_PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")
_PUBLIC_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]+ )*(?:PUBLIC KEY(?: BLOCK)?|CERTIFICATE)-----"
    rb"|\A[\x98\x99\xc6]"  # binary OpenPGP public key, RFC 4880 section 4.2
    rb"|\b(?:DNSKEY|DS)\s+\d"  # trust anchors of DNSSEC
)


@dataclass(frozen=True)
class LayerHit:
    """One file of one layer that a rule forbids; layers count from 1."""

    layer: int
    digest: str
    rule: LayerRule
    path: str


def _hits(subject: Subject) -> tuple[LayerHit, ...]:
    """What the layer rules match. Raises ImgbuildError without layers, or for a damaged one."""
    if not subject.layers:
        raise ImgbuildError("the layers of the image were not given")
    with ThreadPoolExecutor(2) as pool:
        hits = list(pool.map(_scan_layer, range(1, len(subject.layers) + 1), subject.layers))
    return tuple(hit for of_layer in hits for hit in of_layer)


def _scan_layer(number: int, layer: Path) -> list[LayerHit]:
    hits = []
    try:
        with _open_layer(layer) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                path = member.name.removeprefix("./").lstrip("/")
                if member.isdir() or PurePosixPath(path).name.startswith(".wh."):
                    continue
                rules = [rule for rule in LAYER_RULES if rule.pattern.fullmatch(path)]
                if not rules and _KEY_BY_CONTENT.pattern.fullmatch(path) and member.isreg():
                    content = tar.extractfile(member) if member.size <= MAX_SECRET_BYTES else None
                    if _is_private(path, content.read() if content else b""):
                        rules = [_KEY_BY_CONTENT]
                hits += [LayerHit(number, layer.name, rule, path) for rule in rules]
    except (tarfile.TarError, OSError, EOFError, zstandard.ZstdError) as error:
        raise ImgbuildError(f"layer {number} ({layer.name}) cannot be read: {error}") from None
    return hits


def _is_private(path: str, content: bytes) -> bool:
    if _PRIVATE_KEY.search(content):
        return True
    return path.endswith(".key") and bool(content) and not _PUBLIC_KEY.search(content)


@contextmanager
def _open_layer(layer: Path) -> Iterator[IO[bytes]]:
    with layer.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(b"\x1f\x8b"):
            with gzip.open(file) as plain:
                yield io.BufferedReader(plain, 1 << 20)
        elif magic == b"\x28\xb5\x2f\xfd":
            with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
                yield io.BufferedReader(stream, 1 << 20)
        else:
            yield file


def _in_layers(subject: Subject, check_name: str) -> Iterator[Problem]:
    """One problem per layer and kind of file."""
    groups: dict[tuple[int, str, str, Severity], list[str]] = {}
    for hit in subject.once(_hits):
        if hit.rule.check == check_name:
            key = (hit.layer, hit.digest, hit.rule.what, hit.rule.severity)
            groups.setdefault(key, []).append("/" + hit.path)
    for (number, digest, what, severity), paths in groups.items():
        yield Problem(f"{what} in layer {number} ({digest[:12]}): {some(paths)}", severity)


@check(
    "no-build-tools",
    severity="fatal",
    reason="a host is never edited: a compiler only helps who should not be there; and a layer hides nothing",
    fix="install build tools in the kmod stage only, whose layers are thrown away",
)
def _no_build_tools(subject: Subject) -> Iterator[Problem | str]:
    yield from _in_layers(subject, "no-build-tools")


@check(
    "no-package-caches",
    severity="fatal",
    reason="caches and logs are downloaded by every host and differ with every build",
    fix="remove them in the same RUN step that made them: a later layer only hides them",
)
def _no_package_caches(subject: Subject) -> Iterator[Problem | str]:
    yield from _in_layers(subject, "no-package-caches")


@check(
    "no-leftovers",
    severity="warning",
    reason="/run and /tmp are emptied at boot: what lies there in a layer was left by a build step",
    fix="remove it in the same RUN step that made it",
)
def _no_leftovers(subject: Subject) -> Iterator[Problem | str]:
    yield from _in_layers(subject, "no-leftovers")


@check(
    "no-secrets",
    severity="fatal",
    reason="whoever can pull the image can read every layer of it",
    fix="revoke the secret, then give it to the build as a secret mount, or to the host at run time",
)
def _no_secrets(subject: Subject) -> Iterator[Problem | str]:
    yield from _in_layers(subject, "no-secrets")
