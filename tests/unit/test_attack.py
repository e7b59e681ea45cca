"""What is not ours: files that others left in our folders, what servers say, and names that lie."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Outcome, Site
from synthetic_lock import synthetic_section

from imagebuild import build, images, lock, solvers, sources, state
from imagebuild.definitions import MirrorMap
from imagebuild.documents import parse, read_yaml
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.report import Report
from imagebuild.state import State

Imgbuild = Callable[..., Outcome]
GOOD = b"what was locked"
SHA256 = hashlib.sha256(GOOD).hexdigest()


def write_lock(site: Site, vendor: str = "none", change: Callable[[Any], None] = lambda _: None) -> None:
    selection = site.load("debian", vendor)
    made = lock.Lockfile(sections={selection.section: synthetic_section(selection)})
    data = json.loads(lock.dumps(made))
    change(data["sections"][selection.section])
    site.write("imgbuild.lock", json.dumps(data))


# --- the store --------------------------------------------------------------------------------------


def stored(folder: Path, data: bytes) -> State:
    found = State(folder)
    place = found.stored(SHA256)
    place.parent.mkdir(parents=True)
    place.write_bytes(data)
    return found


@pytest.mark.parametrize("data", [b"", b"something else", GOOD + b"\0"])
def test_damaged_file_of_the_store_is_fetched_again(tmp_path: Path, data: bytes) -> None:
    ours = stored(tmp_path / "state", data)
    (tmp_path / "a.deb").write_bytes(GOOD)
    assert not ours.has(SHA256)
    assert sources.fetch([sources.Wanted("a", f"file://{tmp_path}/a.deb", SHA256)], ours) == (1, len(GOOD))
    assert ours.has(SHA256) and ours.stored(SHA256).read_bytes() == GOOD
    assert sources.fetch([sources.Wanted("a", "file:///nowhere", SHA256)], ours) == (0, 0)


def test_link_in_the_store_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    ours = stored(tmp_path / "state", b"")
    target = tmp_path / "target"
    target.write_bytes(b"of somebody else")
    ours.stored(SHA256).unlink()
    ours.stored(SHA256).symlink_to(target)
    (tmp_path / "a.deb").write_bytes(GOOD)
    sources.fetch([sources.Wanted("a", f"file://{tmp_path}/a.deb", SHA256)], ours)
    assert target.read_bytes() == b"of somebody else"
    assert not ours.stored(SHA256).is_symlink() and ours.has(SHA256)


def test_context_never_gets_a_damaged_package(site: Site, imgbuild: Imgbuild, tmp_path: Path) -> None:
    def change(section: Any) -> None:
        section["transactions"]["tier1"][0] |= {"path": "pool/a.deb", "sha256": SHA256}

    write_lock(site, change=change)
    place = stored(tmp_path / "state", GOOD).stored(SHA256)
    assert imgbuild("render", "--out", "good").code == 0
    assert (site.folder / "good/tier1/packages/a.deb").read_bytes() == GOOD
    place.unlink()
    place.write_bytes(b"something else")
    assert imgbuild("render", "--out", "bad").code == 0
    assert not (site.folder / "bad/tier1/packages/a.deb").exists()


# --- what a run leaves for the next one -------------------------------------------------------------

JUNK = [
    "[]", "5", '{"inputs": []}', '{"inputs": null}', '{"inputs": {"package apt:amd64": 5}, "key": [1]}',
    '{"seconds": 1e999}', '{"seconds": NaN}', '{"seconds": -1}', "[" * 100_000, "\0", '"\ud800"',
]  # fmt: skip


@pytest.mark.parametrize("text", JUNK, ids=range(len(JUNK)))
def test_junk_in_the_journal_changes_nothing(
    site: Site, imgbuild: Imgbuild, tmp_path: Path, text: str
) -> None:
    write_lock(site)
    place = tmp_path / "state/journal/debian_none_--tier1.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = imgbuild("plan")
    assert found.code == 0 and "tier1" in found.out


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, True, 1e300, "7", None])
def test_junk_duration_gives_an_expectation_all_the_same(site: Site, tmp_path: Path, value: Any) -> None:
    rendered = site.rendered()
    made = SimpleNamespace(selection=SimpleNamespace(section="debian/none/-"))
    ours = State(tmp_path)
    ours.remember("debian_none_--kernel", {"seconds": value})
    builder = build._Builder(made, [], ours, Report(io.StringIO()), build.Options())  # type: ignore[arg-type]
    assert 0 <= builder._expected_s(rendered["kernel"]) < 1e6


def test_journal_name_fits_a_file_name_and_tells_long_selections_apart() -> None:
    def name(layers: str) -> str:
        made = SimpleNamespace(selection=SimpleNamespace(section=f"debian/nvidia/{layers}"))
        return build.journal_name(made, SimpleNamespace(name="tier2"))  # type: ignore[arg-type]

    long = "+".join(f"layer{i}-{'x' * 50}" for i in range(9))
    assert len(name(long) + ".json") < 230 and name(long) != name(long + "y")
    assert name("zfs") == "debian_nvidia_zfs-tier2"


def test_process_of_another_container_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = f"imgbuild-4194305-1-{state._boot()}"
    assert state.is_dead(f"{gone}{state._namespace()}") and state.is_dead(gone)
    assert not state.is_dead(f"{gone}f00")
    assert not state.is_dead(state.owner()) and not state.is_dead(f"{gone}\n")
    assert state.is_dead("imgbuild-4194305-1-00000000f00" if state._boot() != "00000000" else gone)


def test_container_of_another_program_is_no_left_over(tmp_path: Path) -> None:
    place = tmp_path / "overlay-containers/x/userdata/buildah.json"
    place.parent.mkdir(parents=True)
    for text in ("null", "[]", '{"CommonBuildOpts": null}', '{"CommonBuildOpts": {"AddHost": [5]}}', "{"):
        place.write_text(text)
        assert not images._is_left_over({"id": "x", "containername": "y"}, tmp_path)


def test_part_file_is_none_that_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    monkeypatch.setattr(os, "urandom", lambda n: b"\0" * n)
    (tmp_path / f".lock.{'00' * 8}.part").symlink_to(target)
    with pytest.raises(ImgbuildError):
        state.write_whole(tmp_path / "lock", "x")
    assert not target.exists()


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        state.write_whole(tmp_path / "lock", "x")
    assert list(tmp_path.iterdir()) == []


# --- the lock ---------------------------------------------------------------------------------------


def test_sections_that_two_processes_write_are_both_kept(site: Site, tmp_path: Path) -> None:
    ours, path = State(tmp_path / "state"), site.folder / "imgbuild.lock"
    section = synthetic_section(site.load())
    names = [f"debian/none/{i}" for i in range(6)]
    threads = [threading.Thread(target=lock.update, args=(path, name, section, ours)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lock.read(path).sections) == names


@pytest.mark.parametrize("what", ["tier1", "kernel", "builder", "tier2", "source"])
def test_lock_that_lost_packages_is_refused(site: Site, imgbuild: Imgbuild, what: str) -> None:
    def change(section: Any) -> None:
        if what == "source":
            del section["kmods"]["nvidia"]["source"]
        else:
            del section["transactions"][what]

    write_lock(site, "nvidia", change)
    found = imgbuild("plan", "--vendor", "nvidia")
    assert found.code == 2 and "lacks packages" in found.err and what in found.err


def test_size_no_file_has_is_refused(site: Site, imgbuild: Imgbuild) -> None:
    write_lock(site, change=lambda section: section["transactions"]["tier1"][0].update(size=10**400))
    assert imgbuild("plan").code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", "../../../../etc/passwd"),
        ("sha256", None),
        ("path", "../../x.deb"),
        ("path", "x.deb\nRUN id"),
        ("name", "$(id)"),
        ("version", "1;id"),
        ("arch", ""),
        ("size", -1),
    ],
)
def test_package_as_a_hostile_repository_describes_it_is_refused(field: str, value: Any) -> None:
    good = {"name": "a", "version": "1", "arch": "all", "repository": "r", "path": "p/a.deb", "size": 1,
            "sha256": SHA256}  # fmt: skip
    assert lock._package(good).name == "a"
    with pytest.raises(ImgbuildError, match="refused"):
        lock._package(good | {field: value})


def test_solver_takes_no_module_from_the_current_folder(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no system Python")
    monkeypatch.setenv("PYTHONPATH", str(site.folder))
    for name in ("apt_pkg", "json"):
        site.write(f"{name}.py", "open('owned', 'w')\nraise ImportError\n")
    question: dict[str, Any] = {"folder": str(site.folder / "apt"), "arch": "amd64", "sources": [],
                                "repositories": {}, "prefer": {}, "promises": [], "update": False,
                                "transactions": [], "candidates": []}  # fmt: skip
    try:
        solvers._run_apt(question)
    except UnavailableError as error:
        assert "python-apt" in error.what
    assert not (site.folder / "owned").exists()


# --- servers ----------------------------------------------------------------------------------------


def test_server_cannot_make_us_wait_for_days() -> None:
    retry = sources._session().get_adapter("http://x").max_retries
    answer = SimpleNamespace(headers={"Retry-After": "999999"})
    assert retry.get_retry_after(answer) == sources.LONGEST_WAIT_S
    assert retry.get_retry_after(SimpleNamespace(headers={})) is None
    assert type(retry.new(total=1)) is type(retry)


class Endless:
    status_code = 200

    def __enter__(self) -> Endless:
        return self

    def __exit__(self, *_: object) -> None: ...

    def iter_content(self, size: int) -> Any:
        for _ in range(1000):
            yield b"x" * 1000
        raise AssertionError("read on and on")


def test_endless_file_does_not_fill_the_disk(tmp_path: Path) -> None:
    session = SimpleNamespace(get=lambda *_, **__: Endless())
    sources._get("http://x/a", tmp_path / "a", "a", session, limit=10)
    assert (tmp_path / "a").stat().st_size == 1000


def test_password_of_a_mirror_is_in_no_message(tmp_path: Path) -> None:
    for uri in ("http://user:geheim@127.0.0.1:1/a", "file://user:geheim@x/a"):
        with pytest.raises(ImgbuildError) as caught:
            sources._get(uri, tmp_path / "a", "a", None if uri[0] == "f" else Refusing())
        assert "geheim" not in " ".join([caught.value.what, *caught.value.lines])


class Refusing:
    def get(self, uri: str, **_: object) -> None:
        import requests

        raise requests.ConnectionError(f"cannot reach {uri}")


def test_key_in_a_folder_with_a_space_gets_a_path_that_apt_takes(tmp_path: Path) -> None:
    folder = tmp_path / "my fleet, [new]"
    folder.mkdir()
    (folder / "k.asc").write_text("key")
    found = sources._key("k.asc", folder, "debian", State(tmp_path / "state"))
    assert found.read_text() == "key" and found.suffix == ".asc" and " " not in str(found)
    (folder / "loop").symlink_to("loop")
    with pytest.raises(DefinitionError):
        sources._key("loop", folder, "debian", State(tmp_path / "state"))


def test_key_path_that_would_be_several_words_is_refused() -> None:
    from imagebuild.definitions import Repository

    repository = Repository(name="x", suites=("a",), components=("b",))
    for path in ("/my state/k.asc", "/a,b/k.asc", "/a]/k.asc", "/a\n/k.asc"):
        with pytest.raises(DefinitionError):
            solvers.apt_sources(sources.Location(repository, "http://x", Path(path)), "amd64")


@pytest.mark.parametrize("label", ["right", "wrong"])
def test_cached_image_gets_its_name_after_it_was_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, label: str
) -> None:
    done: list[tuple[str, ...]] = []

    def copy(source: str, destination: str, *_: str, **__: int) -> None:
        assert destination != "containers-storage:localhost/imgbuild/debian-kmod-x:right"
        done.append(("copy",))

    monkeypatch.setattr(images, "copy", copy)
    monkeypatch.setattr(images, "labels", lambda name: {"io.imgbuild.key": label})
    monkeypatch.setattr(images, "tag", lambda name, *others: done.append(("tag", *others)))
    monkeypatch.setattr(images, "remove", lambda names: done.append(("remove",)))
    item = SimpleNamespace(
        node=SimpleNamespace(kind="kmod", name="kmod-x"),
        key="right",
        image="localhost/imgbuild/debian-kmod-x:right",
    )
    made = SimpleNamespace(selection=SimpleNamespace(mirrors=MirrorMap()))
    options = build.Options(cache="r.example/cache")
    builder = build._Builder(made, [], State(tmp_path), Report(io.StringIO()), options)  # type: ignore[arg-type]
    builder.pull_kmods([item])  # type: ignore[list-item]
    tagged = [("tag", item.image)] if label == "right" else []
    assert done == [("copy",), *tagged, ("remove",)]
    assert builder.pulled == ([item.image] if tagged else [])


# --- files/ and definitions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{% include "/etc/hostname" %}',
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ site.with_.append(1) }}",
    ],
)
def test_template_reaches_neither_files_nor_python(site: Site, imgbuild: Imgbuild, text: str) -> None:
    site.write("layers/mine/layer.yaml", "summary: mine\n")
    site.write("layers/mine/files/etc/x.j2", text)
    found = imgbuild("render", "--with", "mine")
    assert found.code == 2 and "cannot be rendered" in found.err


@pytest.mark.parametrize("name", ["etc/.j2", "etc/.wh.passwd", ".wh..wh..opq", "etc/.wh.d/x"])
def test_file_name_that_would_do_something_else_is_refused(site: Site, imgbuild: Imgbuild, name: str) -> None:
    site.write("layers/mine/layer.yaml", "summary: mine\n")
    site.write(f"layers/mine/files/{name}", "x")
    assert imgbuild("render", "--with", "mine", "--out", "out").code == 2


def test_tarball_with_a_line_end_in_its_url_is_refused(site: Site) -> None:
    from imagebuild.definitions import Site as SiteFile

    source = {"url": "https://x.example/a.tar.gz\n", "sha256": "0" * 64}
    path = site.write("imgbuild.yaml", json.dumps({"kmods": {"nvidia": {"version": "1", "source": source}}}))
    with pytest.raises(DefinitionError):
        parse(read_yaml(path), SiteFile)


# --- command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--base", "--vendor"])
def test_empty_name_is_not_the_default(site: Site, imgbuild: Imgbuild, option: str) -> None:
    assert imgbuild("plan", option, "").code == 2


def test_destination_is_looked_at_before_the_build(site: Site, imgbuild: Imgbuild) -> None:
    found = imgbuild("build", "--push", "nonsense")
    assert found.code == 2 and not (site.folder / "imgbuild.lock").exists()
    for text in ("r.example/a:1\n", "r.example/a\n:1", "r.example:1\n/a"):
        assert imgbuild("build", "--push", text).code == 2


@pytest.mark.parametrize("name", ["r.example/cache:1", "localhost:5000"])
def test_cache_has_no_tag(site: Site, imgbuild: Imgbuild, name: str) -> None:
    assert imgbuild("build", "--cache", name).code == 2
    site.write("imgbuild.yaml", f"cache: {name}\n")
    assert imgbuild("build").code == 2


@pytest.mark.parametrize("command", [("render", "--out"), ("init",), ("schema", "--out")])
def test_place_that_cannot_be_written_is_an_error(
    site: Site, imgbuild: Imgbuild, command: tuple[str, ...]
) -> None:
    site.write("file", "")
    (site.folder / "dangling").symlink_to("nowhere/at/all")
    for place in ("file/x", "dangling"):
        found = imgbuild(*command, place)
        assert found.code == 1 and found.err.count("error: ") == 1


def test_contexts_are_there_whole_or_not_at_all(site: Site, imgbuild: Imgbuild) -> None:
    site.write("layers/mine/layer.yaml", "summary: mine\n")
    site.write("layers/mine/files/etc/" + "x" * 200, "")

    def change(section: Any) -> None:
        for package in section["transactions"]["kernel"][:2]:
            package |= {"path": "same.deb", "sha256": SHA256}

    write_lock(site, change=change)
    stored(Path(os.environ["IMGBUILD_STATE_DIR"]), GOOD)
    assert imgbuild("render", "--out", "out").code == 1
    assert list((site.folder / "out").iterdir()) == []


def test_folder_that_is_gone_is_an_error(
    site: Site, imgbuild: Imgbuild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = imgbuild("list")
    assert found.code == 2 and "current folder is gone" in found.err
    monkeypatch.chdir(tmp_path)


def test_state_folder_that_is_none_is_an_error(
    site: Site, imgbuild: Imgbuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGBUILD_STATE_DIR", str(site.write("file", "")))
    monkeypatch.setattr(lock, "resolve", lambda *_, **__: synthetic_section(site.load()))
    found = imgbuild("lock")
    assert found.code == 1 and "error: " in found.err


def test_relative_state_folder_is_one_of_the_current_folder(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGBUILD_STATE_DIR", "here")
    assert state.default_state_dir() == site.folder / "here"


def test_image_name_is_no_option_of_buildah(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(argv: list[str], **_: object) -> Any:
        asked.append(argv)
        return SimpleNamespace(returncode=1, tail=())

    monkeypatch.setattr(images, "run", run)
    with pytest.raises(ImgbuildError, match="no image"):
        images.inspect("--help")
    assert asked[0][-2:] == ["--", "--help"]


# --- terminals --------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("line", ["make: [/usr/src] x", "[/]", "[bold", "[link=x]", ":smile:"])
def test_output_of_a_build_is_no_markup(line: str) -> None:
    report = Report(Terminal())
    with report.step("kmod-x", "compiling") as step:
        step.line(line)
        from rich.console import Console

        shown = io.StringIO()
        Console(file=shown, width=100).print(report._table())
    assert line in shown.getvalue()


def test_terminal_gets_no_control_characters(site: Site, imgbuild: Imgbuild) -> None:
    out = io.StringIO()
    report = Report(out, verbose=True)
    report.say("a\x1b]0;title\x07b\x9b")
    with report.step("x") as step:
        step.line("\x1b[31mred\x1b[0m\x1b[2J")
        step.line("10%\r50%\r100%\r")
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue() and "\x9b" not in out.getvalue()
    assert "red" in out.getvalue() and "x | 100%" in out.getvalue()
    site.write("imgbuild.yaml", '"\\e]0;title\\a": 1\n')
    assert "\x1b" not in imgbuild("plan").err


def test_junk_of_the_isolation_journal_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUILDAH_ISOLATION", raising=False)
    monkeypatch.setattr(images, "buildah_version", lambda: (1, 2, 3))
    monkeypatch.setattr(images, "_try_isolation", lambda: ("chroot", "tried"))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    ours = State(tmp_path)
    for junk in (
        {},
        {"isolation": 5, "why": "x"},
        {"isolation": "--privileged", "why": "x"},
        {"isolation": "oci"},
    ):
        ours.remember("isolation", {"boot": boot, "buildah": "1.2.3", **junk})
        assert images.isolation(ours) == ("chroot", "tried")
    monkeypatch.setenv("BUILDAH_ISOLATION", "--privileged")
    with pytest.raises(DefinitionError):
        images.isolation(ours)
