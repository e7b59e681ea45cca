"""Image storage through buildah and skopeo: which images are there, build, mount, copy, remove.

Knows nothing of tiers or locks. Builds run without network, in a PID namespace of their own, so
that everything they start ends with them (unshare(1), --kill-child).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.run import Result, run
from imagebuild.state import State, is_dead, owner

# The smallest x86-64 ELF program: exit(0). Enough to see whether a RUN step works here.
_TRUE_ELF = bytes.fromhex(
    "7f454c4602010100000000000000000002003e00010000007800400000000000"
    "4000000000000000000000000000000000000000400038000100000000000000"
    "0100000005000000000000000000000000004000000000000000400000000000"
    "8100000000000000810000000000000000100000000000006a3c5831ff0f0500"
    "00"
)


# No network, and a PID namespace whose end is the end of everything in it (unshare(1)).
_ALONE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


@dataclass(frozen=True)
class Image:
    """One image in local storage."""

    id: str
    names: tuple[str, ...]
    digest: str
    size_bytes: int


@cache
def buildah_version() -> tuple[int, ...]:
    """Version of the installed buildah. Raises UnavailableError without one."""
    text = run(["buildah", "--version"]).stdout
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise ImgbuildError(f"cannot tell buildah's version from `{text.strip()}`")
    return tuple(int(part) for part in match.groups())


def images() -> list[Image]:
    """All images in local storage."""
    listed = json.loads(run(["buildah", "images", "--json"]).stdout or "null") or []
    return [
        Image(
            item["id"], tuple(item.get("names") or ()), item.get("digest", ""), _bytes(item.get("size", ""))
        )
        for item in listed
    ]


def _bytes(text: str) -> int:
    match = re.match(r"([0-9.]+) ?([kKMGT]?)i?B?", text)
    if match is None:
        return 0
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def by_name() -> dict[str, Image]:
    """Images of local storage by each of their names."""
    return {name: image for image in images() for name in image.names}


def inspect(name: str) -> dict[str, Any]:
    """What buildah tells of an image, with `OCIv1` (the image config) and `FromImageDigest`.

    Raises:
        ImgbuildError: there is no such image in local storage.
    """
    result = run(["buildah", "inspect", "--type", "image", "--", name], check=False)
    if result.returncode != 0:
        raise ImgbuildError(f"there is no image `{name}` in local storage", lines=result.tail)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def labels(name: str) -> dict[str, str]:
    """The labels of an image."""
    found: dict[str, str] = inspect(name)["OCIv1"]["config"].get("Labels") or {}
    return found


def remove(names: Sequence[str]) -> None:
    """Remove image names, and images no other name is left of; unknown ones are passed over."""
    for name in names:
        run(["buildah", "rmi", name], check=False)


def tag(name: str, *others: str) -> None:
    """Give an image further names."""
    if others:
        run(["buildah", "tag", name, *others])


def storage_info() -> dict[str, Any]:
    """Storage driver, graph root and host facts, as `buildah info` tells them."""
    found: dict[str, Any] = json.loads(run(["buildah", "info"]).stdout)
    return found


def graph_root() -> Path:
    """Folder of the image storage."""
    return Path(storage_info()["store"]["GraphRoot"])


def isolation(state: State) -> tuple[str, str]:
    """The isolation RUN steps can use here, and why: `oci` where it works, else `chroot`.

    Tried out with a program that does nothing, once per boot and buildah version.
    $BUILDAH_ISOLATION is obeyed.
    """
    named = os.environ.get("BUILDAH_ISOLATION")
    if named:
        if named not in ("oci", "rootless", "chroot"):
            raise DefinitionError(f"$BUILDAH_ISOLATION is `{named}`", help="it takes oci, rootless or chroot")
        return named, "$BUILDAH_ISOLATION"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    version = ".".join(map(str, buildah_version()))
    known = state.journal("isolation")
    if known.get("boot") == boot and known.get("buildah") == version:
        chosen, why = known.get("isolation"), known.get("why")
        if chosen in ("oci", "chroot") and isinstance(why, str):
            return chosen, why
    chosen, why = _try_isolation()
    state.remember("isolation", {"boot": boot, "buildah": version, "isolation": chosen, "why": why})
    return chosen, why


def _try_isolation() -> tuple[str, str]:
    name = f"{owner()}-probe"
    run(["buildah", "from", *_limits(), "--name", name, "scratch"])
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(_TRUE_ELF)
            file.flush()
            Path(file.name).chmod(stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
            run(["buildah", "copy", name, file.name, "/true"])
        tried = run(
            [*_ALONE, "buildah", "run", "--isolation", "oci", "--network", "none", name, "--", "/true"],
            check=False,
        )
        if tried.returncode == 0:
            return "oci", "works on this machine"
        last = tried.tail[0] if tried.tail else f"exit code {tried.returncode}"
        return "chroot", f"the default does not work on this machine: {last[:160]}"
    finally:
        run(["buildah", "rm", name], check=False)


def build(
    context: Path,
    *,
    name: str,
    isolation: str,
    timestamp: int,
    labels: Mapping[str, str],
    scratch: Path,
    log: Path,
    on_line: Callable[[str], None],
) -> Result:
    """Build `context/Containerfile` into the image `name`; the name appears only when all is done.

    Args:
        timestamp: seconds since the epoch that every file and the history get.
        labels: set at commit.
        scratch: folder for buildah's temporary files.

    Raises:
        ImgbuildError: the build failed; the error carries the last lines.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    argv = build_command(
        context, name=name, isolation=isolation, timestamp=timestamp, labels=labels, mark=owner()
    )
    return run_alone(
        argv,
        env={"TMPDIR": str(scratch), "SOURCE_DATE_EPOCH": str(timestamp)},
        log=log,
        on_line=on_line,
        merge=True,
    )


def run_alone(argv: Sequence[str | Path], **options: Any) -> Result:
    """`run.run`, without network and in a PID namespace of its own."""
    return run([*_ALONE, *argv], **options)


def build_command(
    context: Path | str,
    *,
    name: str,
    isolation: str,
    timestamp: int,
    labels: Mapping[str, str],
    mark: str = "",
) -> list[str]:
    """The buildah command that builds a context; `mark` is how a dead owner's containers are found."""
    argv = ["buildah", "build", "--format", "oci", "--layers=false", "--pull=never"]
    argv += ["--isolation", isolation, "--timestamp", str(timestamp)]
    if isolation != "chroot":  # which has no network of its own to configure
        argv += ["--network", "none"]
    if mark:
        argv += ["--add-host", f"{mark}:127.0.0.1", *_limits()]
    for key, value in sorted(labels.items()):
        argv += ["--label", f"{key}={value}"]
    return [*argv, "--tag", name, "--file", f"{context}/Containerfile", str(context)]


def _limits() -> list[str]:
    """Limits no higher than this process's own: newer buildah asks for 1048576 files, which a container
    without CAP_SYS_RESOURCE may not have."""
    found = []
    for name, kind, most in (
        ("nofile", resource.RLIMIT_NOFILE, 1_048_576),
        ("nproc", resource.RLIMIT_NPROC, 4_194_304),
    ):
        hard = resource.getrlimit(kind)[1]
        value = most if hard == resource.RLIM_INFINITY else min(hard, most)
        found += ["--ulimit", f"{name}={value}:{value}"]
    return found


def sweep() -> list[str]:
    """Remove working containers that a dead imgbuild left, and only those; returns their ids."""
    listed = json.loads(run(["buildah", "containers", "--json"]).stdout or "null") or []
    if not listed:
        return []
    root = graph_root()
    gone = []
    for item in listed:
        if _is_left_over(item, root):
            run(["buildah", "rm", item["id"]], check=False)
            gone.append(item["id"])
    return gone


def _is_left_over(container: Mapping[str, Any], root: Path) -> bool:
    name = str(container.get("containername", ""))
    if is_dead("-".join(name.split("-")[:4])):
        return True
    for driver in root.glob("*-containers"):
        try:
            text = (driver / container["id"] / "userdata" / "buildah.json").read_text()
            hosts = json.loads(text)["CommonBuildOpts"]["AddHost"]
            return any(is_dead(host.split(":")[0]) for host in hosts)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # of another program, or half-written
    return False


@contextmanager
def mounted(name: str) -> Iterator[Path]:
    """The root file system of an image, mounted for reading; unmounted afterwards."""
    container = f"{owner()}-{os.urandom(4).hex()}"
    result = run(["buildah", "from", "--pull=never", "--name", container, name], check=False)
    if result.returncode != 0:
        raise ImgbuildError(f"there is no image `{name}` in local storage", lines=result.tail)
    try:
        yield Path(run(["buildah", "mount", container]).stdout.strip())
    finally:
        run(["buildah", "rm", container], check=False)


class Runner(Protocol):
    """Runs a command in a container."""

    def __call__(self, argv: Sequence[str], *, isolation: str, volumes: Mapping[str, str]) -> Result: ...


@contextmanager
def container(image: str) -> Iterator[Runner]:
    """A throw-away container of an image, whose commands have the network of this machine.

    What they start ends with them. `volumes` are folders of this machine → where they are seen, read-only.
    """
    name = f"{owner()}-{os.urandom(4).hex()}"
    made = run(["buildah", "from", "--pull=never", *_limits(), "--name", name, image], check=False)
    if made.returncode != 0:
        raise ImgbuildError(f"there is no image `{image}` in local storage", lines=made.tail)

    def call(argv: Sequence[str], *, isolation: str, volumes: Mapping[str, str]) -> Result:
        # Chroot isolation has the host's network anyway; and a PID namespace leaves no agent behind.
        network = [] if isolation == "chroot" else ["--network", "host"]
        mounts = [word for here, there in volumes.items() for word in ("--volume", f"{here}:{there}:ro")]
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["buildah", "run", "--isolation", isolation, *network, *mounts, name, "--", *argv]
        return run([*alone, *command], check=False)

    try:
        yield call
    finally:
        run(["buildah", "rm", name], check=False)


def layer_files(name: str, folder: Path) -> tuple[Path, ...]:
    """The layers of an image as tar files in `folder`, base first."""
    # By id: skopeo takes a short name for one of docker.io, buildah for a local one.
    image = inspect(name)["FromImageID"]
    run(["skopeo", "copy", "--quiet", f"containers-storage:{image}", f"dir:{folder}"])
    manifest = json.loads((folder / "manifest.json").read_text())
    return tuple(folder / layer["digest"].split(":")[1] for layer in manifest["layers"])


_NETWORK = re.compile(
    r"connection refused|connection reset|connection timed out|broken pipe|no such host|server misbehaving"
    r"|network is unreachable|no route to host|i/o timeout|TLS handshake timeout|deadline exceeded"
    r"|(?:unexpected |: )EOF\b|Client\.Timeout|Too ?Many ?Requests|Service Unavailable|Bad Gateway"
    r"|\bstatus(?: ?code)?(?: from registry)?:? (?:429|50[0234])\b|\b50[04] [(]?(?:Internal|Gateway)",
    re.IGNORECASE,
)


def is_network_trouble(lines: Sequence[str]) -> bool:
    """Tell whether a program's output speaks of the network or a server, not of what was asked."""
    return any(_NETWORK.search(line) for line in lines)


def copy(source: str, destination: str, *options: str, attempts: int = 4) -> Result:
    """`skopeo copy` with back-off on network trouble, and on nothing else.

    Raises:
        UnavailableError: the registry could not be reached, whatever the number of attempts.
        ImgbuildError: it was reached and refused.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

    retrying = Retrying(
        retry=retry_if_exception_type(UnavailableError),
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(multiplier=0.5, max=8) + wait_random(0, 1),
        reraise=True,
    )
    for attempt in retrying:
        with attempt:
            result = run(["skopeo", "copy", *options, source, destination], check=False)
            if result.returncode == 0:
                return result
            kind = UnavailableError if is_network_trouble(result.tail) else ImgbuildError
            raise kind(f"cannot copy {source} to {destination}", lines=result.tail[-5:])
    raise AssertionError("unreachable")


def has(reference_name: str, digest: str) -> bool:
    """Tell whether local storage has NAME@DIGEST."""
    return _manifest_digest(f"containers-storage:{reference_name}@{digest}") == digest


def ensure(reference_name: str, digest: str, source: str, tls_verify: bool) -> bool:
    """Make sure that local storage has NAME@DIGEST, so that `FROM NAME@DIGEST` needs no registry.

    The digest may be that of a list of images: storage then keeps the list beside the image for this
    machine's architecture, and answers to the list's digest.

    Args:
        reference_name: the image's name, without tag and digest.
        digest: `sha256:` and 64 hexadecimal digits.
        source: where it is copied from, as skopeo writes it: `docker://HOST/NAME@DIGEST`, `oci:FOLDER`.
        tls_verify: whether the registry's certificate has to be good.

    Returns:
        True if it had to be copied.

    Raises:
        UnavailableError: the registry cannot be reached.
        ImgbuildError: it refused, or what came is another image.
    """
    name = f"{reference_name}@{digest}"
    here = f"containers-storage:{name}"
    if has(reference_name, digest):
        return False
    verify = [] if tls_verify else ["--src-tls-verify=false"]
    copy(source, here, "--quiet", *verify)
    found = _manifest_digest(here)
    if found != digest:
        remove([name])
        raise ImgbuildError(
            f"{source} is not the image {name}",
            lines=[f"expected {digest}", f"found    {found or 'nothing'}"],
        )
    return True


def _manifest_digest(location: str) -> str:
    """Digest of the manifest (or list) at a location, from its bytes; empty where there is none."""
    result = run(["skopeo", "inspect", "--raw", location], check=False)
    return f"sha256:{hashlib.sha256(result.stdout.encode()).hexdigest()}" if result.returncode == 0 else ""
