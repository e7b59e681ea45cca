"""Publishing without a registry: destinations, their order, stamps on a layout, and what a failure says."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from imagebuild import publish as subject
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.images import is_network_trouble
from imagebuild.publish import (
    Destination,
    PublishOptions,
    creation_time,
    parse_destination,
    push_order,
    read_layout,
    site_revision,
    stamp_layout,
    stamps,
)
from imagebuild.run import run

KEY = "c0b0070e7337abc26093909a605401858eb9c6cd2112e1aaface07f1c2593be7"


@pytest.mark.parametrize(
    ("text", "expected", "location"),
    [
        ("r.example/a/b:1", Destination("docker", "r.example/a/b", "1"), "docker://r.example/a/b:1"),
        (
            "docker://r.example/b",
            Destination("docker", "r.example/b", "latest"),
            "docker://r.example/b:latest",
        ),
        ("localhost/b:x", Destination("docker", "localhost/b", "x"), "docker://localhost/b:x"),
        ("127.0.0.1:5000/b:x", Destination("docker", "127.0.0.1:5000/b", "x"), "docker://127.0.0.1:5000/b:x"),
        ("[::1]:5000/b:x", Destination("docker", "[::1]:5000/b", "x"), "docker://[::1]:5000/b:x"),
        ("oci:/a/dir", Destination("oci", "/a/dir"), "oci:/a/dir"),
        ("oci:dir:1.2", Destination("oci", "dir", "1.2"), "oci:dir:1.2"),
        ("oci-archive:f.tar:x", Destination("oci-archive", "f.tar", "x"), "oci-archive:f.tar:x"),
    ],
)
def test_destination_is_read(text: str, expected: Destination, location: str) -> None:
    found = parse_destination(text)
    assert found == expected
    assert found.location == location
    assert parse_destination(str(found)) == found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("gpu-host:1", "names no registry"),
        ("fleet/gpu-host:1", "names no registry"),
        ("", "names no registry"),
        ("r.example/A:1", "cannot be part"),
        ("r.example/a//b:1", "cannot be part"),
        ("r.example/a:", "`` is not a tag"),
        ("r.example/a:-x", "`-x` is not a tag"),
        ("r.example/a:1:2", "is not a tag"),
        ("r.example/a@sha256:" + KEY, "names a digest"),
        ("https://r.example/a:1", "cannot be pushed to"),
        ("dir:/a", "cannot be pushed to"),
        ("oci:", "names no path"),
        ("oci:dir:a b", "is not a tag"),
        ("-r.example/a:1", "is not a host"),
    ],
)
def test_destination_that_makes_no_sense_is_refused(text: str, what: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        parse_destination(text)
    assert what in caught.value.what


def order(*texts: str, fixed: tuple[str, ...] = ()) -> list[str]:
    return [
        item.tag or str(item) for item in push_order([parse_destination(f"r.io/a:{t}") for t in texts], fixed)
    ]


def test_push_order_last_named_moves_last() -> None:
    assert order("b", "a", "c") == ["b", "a", "c"]


def test_push_order_tags_that_hold_the_version_come_first() -> None:
    assert order("fleet", "2026.11", "2026.11-tier2", fixed=("2026.11",)) == [
        "2026.11",
        "2026.11-tier2",
        "fleet",
    ]


def test_push_order_version_as_part_of_another_word_does_not_count() -> None:
    assert order("el10", "v1", "x", fixed=("1",)) == ["v1", "el10", "x"]


@pytest.mark.parametrize("tag", [KEY, f"tier2-{KEY}", f"tier2-{KEY[:12]}", KEY[:7]])
def test_push_order_tags_that_hold_a_hash_come_first(tag: str) -> None:
    assert order("fleet", tag, fixed=(KEY,)) == [tag, "fleet"]


def test_push_order_latest_moves_after_what_was_named_later_with_a_version() -> None:
    assert order("latest", "b", "1.2", fixed=("1.2",)) == ["1.2", "b", "latest"]


def test_push_order_marks_decide() -> None:
    found = push_order(
        [
            Destination("docker", "r.io/a", "fleet", moving=True),
            Destination("docker", "r.io/a", "latest", moving=False),
            Destination("docker", "r.io/a", "z"),
        ]
    )
    assert [item.tag for item in found] == ["latest", "z", "fleet"]


def test_push_order_files_come_first_and_doubles_once() -> None:
    named = [parse_destination(t) for t in ("r.io/a:x", "r.io/a:x", "oci:dir", "r.io/a:y")]
    assert [str(item) for item in push_order(named)] == ["oci:dir", "r.io/a:x", "r.io/a:y"]


def test_creation_time_is_the_one_given_in_utc() -> None:
    given = datetime(2026, 11, 23, 1, 2, 3, 999, timezone(timedelta(hours=2)))
    assert creation_time(given, {"SOURCE_DATE_EPOCH": "0"}) == "2026-11-22T23:02:03Z"


def test_creation_time_obeys_source_date_epoch() -> None:
    assert creation_time(None, {"SOURCE_DATE_EPOCH": "1700000000"}) == "2023-11-14T22:13:20Z"


def test_creation_time_is_now_otherwise() -> None:
    found = datetime.strptime(creation_time(None, {}), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - found).total_seconds()) < 5


@pytest.mark.parametrize("epoch", ["yesterday", "1e9", "9" * 30])
def test_creation_time_bad_epoch_is_refused(epoch: str) -> None:
    with pytest.raises(DefinitionError, match="SOURCE_DATE_EPOCH"):
        creation_time(None, {"SOURCE_DATE_EPOCH": epoch})


def test_stamps_leave_out_what_is_empty() -> None:
    found = stamps(PublishOptions(version="7", base_name="r.io/base:10"), "2026-11-23T00:00:00Z", "")
    assert found == {
        "org.opencontainers.image.created": "2026-11-23T00:00:00Z",
        "org.opencontainers.image.version": "7",
        "org.opencontainers.image.base.name": "r.io/base:10",
    }


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return run(["git", "-C", folder, *settings, *words]).stdout.strip()


def test_site_revision_outside_git_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert site_revision(tmp_path) == ""


def test_site_revision_without_git_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert site_revision(tmp_path) == ""


def test_site_revision_names_the_commit_and_says_when_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    site = tmp_path / "site"
    site.mkdir()
    (site / "imgbuild.yaml").write_text("a\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    (site / "untracked").write_text("x")
    assert site_revision(site) == head
    (site / "imgbuild.yaml").write_text("b\n")
    assert site_revision(site) == f"{head}-dirty"


def add(folder: Path, raw: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(raw).hexdigest()
    (folder / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (folder / "blobs/sha256" / digest).write_bytes(raw)
    return {"digest": f"sha256:{digest}", "size": len(raw)}


def make_layout(folder: Path, annotations: dict[str, str] | None = None, images: int = 1) -> Path:
    """An OCI layout as skopeo writes it, its only layer not really an archive."""
    media = "application/vnd.oci.image"
    configuration = {
        "created": "2023-11-14T22:13:20Z",
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": {"z.kept": "yes", "org.opencontainers.image.version": "old"}},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{media}.manifest.v1+json",
        "config": {"mediaType": f"{media}.config.v1+json", **add(folder, json.dumps(configuration).encode())},
        "layers": [{"mediaType": f"{media}.layer.v1.tar+gzip", **add(folder, b"layer")}],
        "annotations": annotations or {},
    }
    entry = {"mediaType": manifest["mediaType"], **add(folder, json.dumps(manifest).encode())}
    index = {"schemaVersion": 2, "manifests": [entry] * images}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def blob(folder: Path, descriptor: dict[str, Any]) -> bytes:
    """A blob that is what its descriptor says."""
    raw = (folder / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == descriptor["digest"]
    assert len(raw) == descriptor["size"]
    return raw


def test_stamp_layout_sets_config_and_manifest_and_their_digests(tmp_path: Path) -> None:
    base = {
        "org.opencontainers.image.base.name": "r.io/base:10",
        "org.opencontainers.image.base.digest": "",
        "x.kept": "yes",
    }
    folder = make_layout(tmp_path, base)
    before = read_layout(folder)
    new = {"org.opencontainers.image.version": "7 ü"}
    found = stamp_layout(folder, new, "2026-11-23T00:00:00Z")
    entry = json.loads((folder / "index.json").read_text())["manifests"][0]
    manifest = json.loads(blob(folder, entry))
    config = json.loads(blob(folder, manifest["config"]))
    assert found.digest == entry["digest"] != before.digest
    assert found.layers == before.layers
    assert found.size_bytes == 5 + manifest["config"]["size"]
    assert config["created"] == "2026-11-23T00:00:00Z"
    assert config["config"]["Labels"] == {
        "org.opencontainers.image.base.name": "r.io/base:10",
        "org.opencontainers.image.version": "7 ü",
        "z.kept": "yes",
    }
    assert manifest["annotations"] == {
        "org.opencontainers.image.base.name": "r.io/base:10",
        "org.opencontainers.image.version": "7 ü",
        "x.kept": "yes",
    }
    assert len(list((folder / "blobs/sha256").iterdir())) == 3, "nothing of the old image is left"


def test_stamp_layout_is_reproducible_and_settles(tmp_path: Path) -> None:
    new = {"org.opencontainers.image.revision": "abc"}
    first = stamp_layout(make_layout(tmp_path / "a"), new, "2026-11-23T00:00:00Z")
    second = stamp_layout(make_layout(tmp_path / "b"), new, "2026-11-23T00:00:00Z")
    again = stamp_layout(tmp_path / "a", new, "2026-11-23T00:00:00Z")
    assert first == second == again
    assert stamp_layout(tmp_path / "b", new, "2026-11-23T00:00:01Z").digest != first.digest


def test_stamp_layout_without_config_or_annotations(tmp_path: Path) -> None:
    folder = make_layout(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    manifest = json.loads(blob(folder, index["manifests"][0]))
    del manifest["annotations"]
    manifest["config"] |= add(folder, b'{"architecture":"amd64","os":"linux","config":{"Labels":null}}')
    index["manifests"][0] |= add(folder, json.dumps(manifest).encode())
    (folder / "index.json").write_text(json.dumps(index))
    stamp_layout(folder, {"org.opencontainers.image.version": "7"}, "2026-11-23T00:00:00Z")


def test_layout_with_two_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImgbuildError, match="2 images"):
        read_layout(make_layout(tmp_path, images=2))


def test_layout_with_a_list_of_images_is_refused(tmp_path: Path) -> None:
    folder = make_layout(tmp_path)
    entry = add(folder, b'{"schemaVersion":2,"manifests":[]}')
    (folder / "index.json").write_text(json.dumps({"manifests": [entry]}))
    with pytest.raises(ImgbuildError, match="several platforms"):
        read_layout(folder)


PING = "pinging container registry r.io: "


@pytest.mark.parametrize(
    "line",
    [
        PING + 'Get "https://r.io/v2/": dial tcp 127.0.0.1:1: connect: connection refused',
        PING + 'Get "http://r.io/v2/": EOF',
        PING + 'Get "http://r.io/v2/": net/http: TLS handshake timeout',
        PING + "received unexpected HTTP status: 503 Service Unavailable",
        PING + "received unexpected HTTP status: 500 Internal Server Error",
        "writing blob: uploading layer chunked: StatusCode: 502, <html>",
        "writing blob: write tcp 127.0.0.1:2->127.0.0.1:1: write: broken pipe",
        "writing manifest: uploading manifest x: received unexpected HTTP status: 504 Gateway Timeout",
        "reading blob sha256:aa: toomanyrequests: slow down",
        "lookup r.io on 127.0.0.53:53: no such host",
    ],
)
def test_network_trouble_is_told_from_output(line: str) -> None:
    assert is_network_trouble([f'time="2026-11-23T00:00:00Z" level=fatal msg="{line}"'])


@pytest.mark.parametrize(
    "line",
    [
        "writing blob: initiating layer upload to /v2/a/blobs/uploads/ in r.io: denied: not yours",
        "unauthorized: authentication required",
        PING + 'Get "https://r.io/v2/": http: server gave HTTP response to HTTPS client',
        PING + 'Get "https://r.io/v2/": x509: certificate signed by unknown authority',
        PING + 'Get "https://r.io/v2/": remote error: tls: handshake failure',
        "reading manifest 500 in r.io/eof: manifest unknown",
        "blob sha256:00500 of 503 bytes is not what was expected",
    ],
)
def test_refusal_is_no_network_trouble(line: str) -> None:
    assert not is_network_trouble([f'time="2026-11-23T00:00:00Z" level=fatal msg="{line}"'])


def failure(line: str, kind: type[ImgbuildError] = ImgbuildError) -> ImgbuildError:
    tags = [Destination("docker", "r.io/a", tag) for tag in ("1", "2", "latest")]
    lines = ['time="x" level=info msg="noise"', f'time="x" level=fatal msg="{line}"']
    return subject._failure("img", tags[1], kind("copy", lines=lines), tags[:1], tags[2:])


@pytest.mark.parametrize(
    ("line", "what", "help"),
    [
        ("unauthorized: authentication required", "not logged in, or not allowed", "skopeo login r.io"),
        ("denied: requested access to the resource is denied", "not allowed", "skopeo login r.io"),
        ("checking: invalid status code from registry 403 (Forbidden)", "not allowed", "skopeo login"),
        ("http: server gave HTTP response to HTTPS client", "plain HTTP", "--no-tls-verify"),
        (
            "x509: certificate signed by unknown authority",
            "certificate",
            "/etc/containers/certs.d/r.io/ca.crt",
        ),
        ("manifest invalid: not allowed here", "registry r.io refuses r.io/a:2", "kept in local storage"),
    ],
)
def test_refusal_says_why_and_what_to_do(line: str, what: str, help: str) -> None:
    error = failure(line)
    assert isinstance(error, UnavailableError)
    assert what in error.what
    assert help in error.help
    assert error.lines == (line,)
    assert "pushed: r.io/a:1" in error.help
    assert "left as they were: r.io/a:2, r.io/a:latest" in error.help
    assert "`img` is kept in local storage" in error.help


def test_unreachable_registry_is_said_to_be_so() -> None:
    assert failure("connection refused", UnavailableError).what == "registry r.io cannot be reached"


def test_full_disk_is_not_the_registrys_fault() -> None:
    error = failure("writing blob: no space left on device")
    assert type(error) is ImgbuildError


def test_failure_unescapes_what_skopeo_said() -> None:
    assert failure(r"Get \"https://r.io\": denied: no").lines == ('Get "https://r.io": denied: no',)
