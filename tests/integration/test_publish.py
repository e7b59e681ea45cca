"""Publishing to real registries, and to registries that are down, refuse or hiccup."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from imagebuild import images
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.publish import (
    Destination,
    PublishOptions,
    PublishResult,
    parse_destination,
    publish,
    read_layout,
)
from imagebuild.report import Report
from imagebuild.run import run
from imagebuild.state import State
from tests.conftest import ImageMaker

from .registries import HTPASSWD, ProcessRegistry, Proxy, Registry, auth_file, process_registry

CREATED = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
STAMPED = PublishOptions(
    created=CREATED,
    revision="0123abc",
    version="2026.11",
    source="https://git.example/fleet",
    tls_verify=False,
)
PLAIN = PublishOptions(stamp=False, tls_verify=False)
OCI = "org.opencontainers.image"


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state")


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own."""
    return f"test/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture(scope="module")
def second_image(make_image: ImageMaker) -> str:
    return make_image("second", {"etc/motd": "another small image\n"})


def push(image: str, state: State, options: PublishOptions, *texts: str) -> PublishResult:
    return publish(image, [parse_destination(t) for t in texts], state, Report(io.StringIO()), options)


def left_over(state: State) -> list[str]:
    work = state.root / "work"
    return [str(path) for path in work.rglob("*")] if work.exists() else []


def test_publish_several_tags_share_one_digest(
    registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    base = f"{registry.address}/{repo}"
    result = push(tiny_image, state, STAMPED, f"docker://{base}:latest", f"{base}:2026.11", f"{base}:fleet")
    assert registry.tags(repo) == ["2026.11", "fleet", "latest"]
    assert {registry.digest(repo, tag) for tag in registry.tags(repo)} == {result.digest}
    assert result.references == (f"{base}:2026.11", f"{base}:latest", f"{base}:fleet")
    assert result.pinned == (f"{base}@{result.digest}",)
    manifest = registry.manifest(repo, "fleet")
    assert result.layers == tuple((layer["digest"], layer["size"]) for layer in manifest["layers"])
    assert result.size_bytes == sum(s for _, s in result.layers) + manifest["config"]["size"]
    assert json.loads(json.dumps(result.as_dict()))["digest"] == result.digest
    assert left_over(state) == []


def test_publish_stamps_config_and_manifest(
    registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    push(tiny_image, state, STAMPED, f"{registry.address}/{repo}:1")
    expected = {
        f"{OCI}.created": "2026-11-23T12:00:00Z",
        f"{OCI}.revision": "0123abc",
        f"{OCI}.version": "2026.11",
        f"{OCI}.source": "https://git.example/fleet",
    }
    config = registry.config(repo, "1")
    assert config["created"] == "2026-11-23T12:00:00Z"
    assert expected.items() <= config["config"]["Labels"].items()
    assert config["config"]["Labels"]["io.imgbuild.key"] == "0123456789abcdef" * 4
    assert registry.manifest(repo, "1")["annotations"] == expected
    assert f"{OCI}.created" not in images.labels(tiny_image), "the image in local storage stays as it was"


def test_publish_same_image_and_stamps_give_the_same_digest(
    registry: Registry, tiny_image: str, state: State, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = push(tiny_image, state, STAMPED, f"{registry.address}/{repo}:1")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(CREATED.timestamp())))
    options = PublishOptions(
        revision="0123abc", version="2026.11", source="https://git.example/fleet", tls_verify=False
    )
    second = push(tiny_image, state, options, f"{registry.address}/{repo}:2")
    assert first.digest == second.digest
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert push(tiny_image, state, options, f"{registry.address}/{repo}:3").digest != first.digest


def test_publish_takes_the_revision_of_the_site(
    registry: Registry, tiny_image: str, state: State, repo: str, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "imgbuild.yaml").write_text("x\n")
    git = [
        "git",
        "-C",
        site,
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "one"]):
        run([*git, *words])
    push(
        tiny_image, state, PublishOptions(site_folder=site, tls_verify=False), f"{registry.address}/{repo}:1"
    )
    labels = registry.config(repo, "1")["config"]["Labels"]
    assert labels[f"{OCI}.revision"] == run([*git, "rev-parse", "HEAD"]).stdout.strip()


def test_publish_unstamped_keeps_every_byte(
    registry: Registry, tiny_image: str, state: State, repo: str, tmp_path: Path
) -> None:
    result = push(tiny_image, state, PLAIN, f"{registry.address}/{repo}:1")
    inspected = images.inspect(tiny_image)
    config = registry.blob(repo, registry.manifest(repo, "1")["config"]["digest"])
    assert config.decode() == inspected["Config"]
    assert f"sha256:{inspected['FromImageID']}" == registry.manifest(repo, "1")["config"]["digest"]
    run(["skopeo", "copy", "--quiet", f"containers-storage:{tiny_image}", f"oci:{tmp_path}/direct"])
    assert read_layout(tmp_path / "direct").digest == result.digest == registry.digest(repo, "1")


def test_publish_pulled_again_has_the_same_layers(
    registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    result = push(tiny_image, state, STAMPED, f"{registry.address}/{repo}:1")
    name = "localhost/imgbuild-test/pulled:1"
    images.copy(
        f"docker://{result.pinned[0]}", f"containers-storage:{name}", "--quiet", "--src-tls-verify=false"
    )
    layers = images.inspect(name)["OCIv1"]["rootfs"]["diff_ids"]
    assert layers == images.inspect(tiny_image)["OCIv1"]["rootfs"]["diff_ids"]
    images.remove([name])


def test_publish_second_tag_uploads_no_blob_again(
    registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    with Proxy(registry.address, lambda *_: None) as proxy:
        push(tiny_image, state, STAMPED, *(f"{proxy.address}/{repo}:{tag}" for tag in ("a", "b", "c")))
        assert proxy.count("POST", "/blobs/uploads/") == 2, "one layer, one config"
        assert proxy.count("PUT", "/manifests/") == 3
        push(tiny_image, state, STAMPED, f"{proxy.address}/{repo}:d")
        assert proxy.count("POST", "/blobs/uploads/") == 2


def test_publish_that_fails_midway_leaves_the_moving_tag(
    registry: Registry, tiny_image: str, second_image: str, state: State, repo: str
) -> None:
    old = push(tiny_image, state, STAMPED, f"{registry.address}/{repo}:fleet")

    def refuse(method: str, path: str) -> int | None:
        return 400 if method == "PUT" and path.endswith("/manifests/canary") else None

    with Proxy(registry.address, refuse) as proxy:
        base = f"{proxy.address}/{repo}"
        with pytest.raises(UnavailableError, match="refuses") as caught:
            push(second_image, state, STAMPED, f"{base}:2026.11", f"{base}:canary", f"{base}:fleet")
    assert registry.tags(repo) == ["2026.11", "fleet"]
    assert registry.digest(repo, "fleet") == old.digest
    assert registry.digest(repo, "2026.11") != old.digest
    assert f"pushed: {base}:2026.11" in caught.value.help
    assert f"left as they were: {base}:canary, {base}:fleet" in caught.value.help
    assert second_image in images.by_name()
    assert left_over(state) == []


def test_publish_whose_last_push_fails_leaves_the_moving_tag(
    registry: Registry, tiny_image: str, second_image: str, state: State, repo: str
) -> None:
    old = push(tiny_image, state, STAMPED, f"{registry.address}/{repo}:latest")

    def refuse(method: str, path: str) -> int | None:
        return 403 if method == "PUT" and path.endswith("/manifests/latest") else None

    with Proxy(registry.address, refuse) as proxy:
        base = f"{proxy.address}/{repo}"
        with pytest.raises(UnavailableError) as caught:
            push(second_image, state, STAMPED, f"{base}:latest", f"{base}:2026.11-tier2")
        assert [path for method, path in proxy.requests if method == "PUT" and "/manifests/" in path] == [
            f"/v2/{repo}/manifests/2026.11-tier2",
            f"/v2/{repo}/manifests/latest",
        ]
    assert registry.digest(repo, "latest") == old.digest
    assert registry.tags(repo) == ["2026.11-tier2", "latest"]
    assert "skopeo login" in caught.value.help


@pytest.fixture
def own_registry(tmp_path: Path) -> Iterator[ProcessRegistry]:
    with process_registry(tmp_path / "own") as found:
        yield found


def test_publish_registry_down_keeps_the_image_and_works_later(
    own_registry: ProcessRegistry, tiny_image: str, state: State
) -> None:
    name = f"{own_registry.address}/a/b:1"
    own_registry.stop()
    with pytest.raises(UnavailableError, match="cannot be reached") as caught:
        push(tiny_image, state, PublishOptions(tls_verify=False, attempts=2), name)
    assert caught.value.exit_code == 4
    assert "connection refused" in "\n".join(caught.value.lines)
    assert f"`{tiny_image}` is kept" in caught.value.help
    assert tiny_image in images.by_name()
    assert left_over(state) == []
    own_registry.start()
    push(tiny_image, state, STAMPED, name)
    assert own_registry.tags("a/b") == ["1"]


def test_publish_shared_registry_survives_an_outage(
    registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    name = f"{registry.address}/{repo}:1"
    first = push(tiny_image, state, STAMPED, name)
    registry.stop()
    try:
        with pytest.raises(UnavailableError):
            push(tiny_image, state, PublishOptions(tls_verify=False, attempts=1), name)
    finally:
        registry.start()
    assert registry.digest(repo, "1") == first.digest


@pytest.mark.parametrize("status", [401, 403])
def test_publish_refused_by_the_registry_is_not_tried_again(
    status: int, tiny_image: str, state: State
) -> None:
    def refuse(method: str, path: str) -> int:
        return 200 if status == 403 and path == "/v2/" else status

    with Proxy(None, refuse) as proxy:
        with pytest.raises(UnavailableError, match="not logged in, or not allowed") as caught:
            push(tiny_image, state, STAMPED, f"{proxy.address}/a/b:1")
        assert proxy.count("GET", "/v2/") <= 2, "one attempt"
    assert caught.value.exit_code == 4
    assert f"skopeo login {proxy.address}" in caught.value.help
    assert tiny_image in images.by_name()


def test_publish_obeys_authfile(tiny_image: str, state: State, tmp_path: Path) -> None:
    with process_registry(tmp_path / "own", htpasswd=HTPASSWD) as own:
        name = f"{own.address}/a/b:1"
        right = auth_file(tmp_path / "right.json", own.address, "imgbuild", "secret")
        wrong = auth_file(tmp_path / "wrong.json", own.address, "imgbuild", "guess")
        for file in (None, wrong):
            with pytest.raises(UnavailableError, match="not logged in") as caught:
                push(tiny_image, state, PublishOptions(tls_verify=False, authfile=file), name)
            assert "skopeo login" in caught.value.help
            assert "guess" not in str(caught.value.lines)
        push(tiny_image, state, PublishOptions(tls_verify=False, authfile=right), name)


def test_publish_obeys_registry_auth_file_variable(
    tiny_image: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process_registry(tmp_path / "own", htpasswd=HTPASSWD) as own:
        file = auth_file(tmp_path / "right.json", own.address, "imgbuild", "secret")
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
        push(tiny_image, state, STAMPED, f"{own.address}/a/b:1")


def test_publish_verifies_tls_unless_told_otherwise(
    registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    for verify in (None, True):
        with pytest.raises(UnavailableError, match="speaks plain HTTP") as caught:
            push(tiny_image, state, PublishOptions(tls_verify=verify), f"{registry.address}/{repo}:1")
        assert "--no-tls-verify" in caught.value.help
    assert registry.tags(repo) == []


@pytest.mark.parametrize("trouble", [503, "drop"])
def test_publish_tries_again_after_network_trouble(
    trouble: int | str, registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    seen: list[str] = []

    def hiccup(method: str, path: str) -> int | str | None:
        seen.append(path)
        return trouble if len(seen) == 1 else None

    with Proxy(registry.address, hiccup) as proxy:
        result = push(tiny_image, state, STAMPED, f"{proxy.address}/{repo}:1")
    assert registry.digest(repo, "1") == result.digest


def test_publish_tries_again_when_an_upload_is_cut(
    registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    cut: list[str] = []

    def hang_up(method: str, path: str) -> str | None:
        if method in ("PATCH", "PUT") and not cut:
            cut.append(path)
            return "drop"
        return None

    with Proxy(registry.address, hang_up) as proxy:
        result = push(tiny_image, state, STAMPED, f"{proxy.address}/{repo}:1")
    assert cut
    assert registry.digest(repo, "1") == result.digest


def test_publish_gives_up_on_a_registry_that_stays_ill(tiny_image: str, state: State) -> None:
    with Proxy(None, lambda *_: 503) as proxy:
        with pytest.raises(UnavailableError, match="cannot be reached"):
            push(tiny_image, state, PublishOptions(tls_verify=False, attempts=2), f"{proxy.address}/a/b:1")
        assert proxy.count("GET", "/v2/") >= 2


def test_publish_layout_and_archive_have_the_registrys_digest(
    registry: Registry, tiny_image: str, state: State, repo: str, tmp_path: Path
) -> None:
    folder, file = tmp_path / "out/layout", tmp_path / "out/image.tar"
    result = push(
        tiny_image, state, STAMPED, f"{registry.address}/{repo}:1", f"oci:{folder}:1", f"oci-archive:{file}"
    )
    assert read_layout(folder).digest == result.digest == registry.digest(repo, "1")
    found = run(["skopeo", "inspect", "--format", "{{.Digest}}", f"oci-archive:{file}"]).stdout.strip()
    assert found == result.digest
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["image.tar", "layout"]
    assert result.references[-1] == f"{registry.address}/{repo}:1"


def test_publish_archive_that_cannot_be_written_fails_and_keeps_the_old(
    tiny_image: str, state: State, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(ImgbuildError) as caught:
        push(tiny_image, state, STAMPED, f"oci:{tmp_path}/file/layout")
    assert caught.value.exit_code == 1
    with pytest.raises(ImgbuildError) as caught:
        push(tiny_image, state, STAMPED, f"oci-archive:{tmp_path}/file/image.tar")
    assert caught.value.exit_code == 1


def test_publish_unknown_image_or_no_destination_fails(
    registry: Registry, state: State, storage: object
) -> None:
    with pytest.raises(ImgbuildError, match="no image"):
        push("localhost/imgbuild-test/none:1", state, STAMPED, f"{registry.address}/a:1")
    with pytest.raises(DefinitionError):
        publish("x", [], state, Report(io.StringIO()), STAMPED)


def test_publish_marked_destination_moves_last(
    registry: Registry, tiny_image: str, state: State, repo: str
) -> None:
    base = f"{registry.address}/{repo}"
    named = [Destination("docker", base, "fleet", moving=True), Destination("docker", base, "other")]
    result = publish(tiny_image, named, state, Report(io.StringIO()), STAMPED)
    assert result.references == (f"{base}:other", f"{base}:fleet")
