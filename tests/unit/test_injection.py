"""Hostile values: each is refused, or ends as exactly one piece of data."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from conftest import Outcome, Site
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from imagebuild.definitions import FORMATS
from imagebuild.errors import DefinitionError
from imagebuild.load import shipped
from imagebuild.render import Rendered, label_quote, shell_quote, write_context
from imagebuild.solvers import apt_sources
from imagebuild.sources import Location

Imgbuild = Callable[..., Outcome]

HOSTILE = [
    "$(touch /tmp/owned)",
    "`touch /tmp/owned`",
    "a; touch /tmp/owned",
    "a && b",
    "a | b > c",
    "a\nRUN touch /tmp/owned",
    "a\r\nRUN touch /tmp/owned",
    "a\n",
    "a\\\nRUN b",
    "\\",
    "a\\",
    "'",
    '"',
    "a' 'b",
    'a" "b',
    "$HOME",
    "${PATH}",
    "\\${PATH}",
    "# escape=`",
    "<<EOF",
    "--privileged",
    "-x",
    "a b",
    "*",
    "~",
    "!id",
    "%(id)",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "../../etc/passwd",
    "/etc/passwd",
    "a\u2028b",
    "a\u0085b",
    "\u202e",
]
ANY = st.sampled_from(HOSTILE) | st.text(
    alphabet=st.sampled_from("ab \t\n\r\0'\"\\$`(){}[]<>|&;*?~#!%^=+-_./:,@\x1b\x85\u2028é☃"), max_size=12
)


# --- the two filters --------------------------------------------------------------------------------


@given(ANY)
@example("")
def test_shell_quote_gives_one_word_that_a_real_shell_reads_back(text: str) -> None:
    try:
        word = shell_quote(text)
    except DefinitionError:
        assert any(ord(c) < 32 for c in text)
        return
    assert "\n" not in word and shlex.split(word) == [text]
    if text.isascii():
        assert _echoed(word) == text


def _echoed(word: str) -> str:
    return subprocess.run(
        ["sh", "-c", f"printf %s {word}"], capture_output=True, text=True, check=True
    ).stdout


@given(ANY)
@example("a$b")
@example('\\"$x')
def test_label_quote_gives_one_line_that_means_the_text(text: str) -> None:
    try:
        quoted = label_quote(text)
    except DefinitionError:
        assert any(ord(c) < 32 for c in text)
        return
    assert "\n" not in quoted and quoted[0] == quoted[-1] == '"'
    assert _label_value(quoted) == text


def _label_value(quoted: str) -> str:
    """What a Containerfile parser makes of a double-quoted word: \\ escapes ", \\ and $; $ alone expands."""
    inner, value, i = quoted[1:-1], "", 0
    while i < len(inner):
        if inner[i] == "\\" and i + 1 < len(inner) and inner[i + 1] in '"\\$':
            i += 1
        else:
            assert inner[i] not in '"$', "an open quote, or a variable"
        value += inner[i]
        i += 1
    return value


# --- every field of every definition ----------------------------------------------------------------


def instructions(text: str) -> list[str]:
    """The instructions of a Containerfile, comments and continuations as its parser reads them."""
    found, line = [], ""
    for part in text.split("\n"):
        if not line and (not part.strip() or part.lstrip().startswith("#")):
            continue
        if part.endswith("\\"):
            line += part[:-1]
            continue
        found.append(line + part)
        line = ""
    assert not line, "the file ends within an instruction"
    return [entry.split(" ", 1)[0] for entry in found]


def _skeleton(nodes: Mapping[str, Rendered]) -> dict[str, list[str]]:
    return {name: instructions(item.containerfile) for name, item in nodes.items()}


def _fields(data: Any, where: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The place of every text in a definition."""
    if isinstance(data, dict):
        return [place for key, value in data.items() for place in _fields(value, (*where, key))]
    if isinstance(data, list):
        return [place for i, value in enumerate(data) for place in _fields(value, (*where, i))]
    return [where]


def _with(data: Any, where: tuple[str | int, ...], value: str) -> Any:
    made = json.loads(json.dumps(data))
    inner = made
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    return made


BASE = {
    **yaml.safe_load((shipped() / "base/debian/base.yaml").read_text()),
    "kargs": ["quiet"],
    "units": {"enable": ["a.service"], "disable": ["b.service"], "mask": ["c.service"]},
}
VENDOR = {
    "summary": "toy vendor",
    "repositories": [
        {"name": "toy", "uri": "http://x.example", "suites": ["main"], "components": ["main"], "label": "Toy"}
    ],
    "kmods": {
        "toy": {
            "summary": "toy module",
            "version": "1.0",
            "source": {"package": "toy-dkms", "path": "usr/src/toy-{version}"},
            "build": "make",
            "build_packages": ["bc"],
            "modules": ["toy"],
            "licences": ["usr/share/doc/toy/copyright"],
            "package": {
                "name": "kmod-toy",
                "provides": ["toy-kmod (= {version})"],
                "conflicts": ["toy-dkms"],
            },
        }
    },
    "packages": ["libtoy"],
    "same_version": ["libtoy"],
    "firmware": "usr/lib/firmware/toy",
    "kargs": ["toy.debug=1"],
    "units": {"enable": ["toy.service"], "disable": ["x.service"], "mask": ["y.service"]},
    "provides": ["toy"],
}
COMPAT = {"rules": [{"kmod": "toy", "verdict": "ok", "reason": "it is", "driver": "<2", "kernel": ">=6.12",
                     "link": "https://x.example", "unblock": "nothing"}]}  # fmt: skip
LAYER = {
    "summary": "toy layer",
    "notices": [{"unless": "nothing", "text": "a notice"}],
    "packages": ["toytool"],
    "units": {"enable": ["toyd.service"]},
    "kargs": ["toy=2"],
}
SITE = {
    "name": "fleet",
    "base": "debian",
    "vendor": "toyvendor",
    "with": ["toylayer"],
    "without": ["zfs"],
    "kmods": {"toy": {"version": "1.1", "build": "make"}},
    "packages": ["libtoy"],
    "mirrors": {
        "repositories": {
            "debian": "http://m.example/debian",
            "toy": {"uri": "http://m.example/toy", "key": "k.asc"},
        },
        "registries": {"quay.io": "r.example/quay"},
        "insecure": ["r.example"],
    },
    "cache": "r.example/cache",
    "tags": ["gpu:1"],
}
FILES: dict[str, Any] = {
    "base/debian/base.yaml": BASE,
    "base/debian/toyvendor/vendor.yaml": VENDOR,
    "base/debian/toyvendor/compat.yaml": COMPAT,
    "layers/toylayer/layer.yaml": LAYER,
    "imgbuild.yaml": SITE,
}
PLACES = [(path, where) for path, data in FILES.items() for where in _fields(data)]
KINDS = {"base.yaml": "base", "vendor.yaml": "vendor", "compat.yaml": "compat", "layer.yaml": "layer",
         "imgbuild.yaml": "site"}  # fmt: skip
# Shell lines by their nature: written to a file as they are, never into a command.
SCRIPTS = {"build"}


def _write(site: Site) -> None:
    for path, data in FILES.items():
        site.write(path, json.dumps(data))


def _load_and_render(site: Site) -> dict[str, Rendered]:
    return site.rendered(None, None)  # type: ignore[arg-type]


def test_toy_definitions_are_good_before_they_are_spoilt(site: Site) -> None:
    _write(site)
    nodes = _load_and_render(site)
    assert list(nodes) == ["tier1", "kernel", "builder", "kmod-toy", "tier2"]
    assert _skeleton(nodes)["tier2"][:4] == ["FROM", "RUN", "COPY", "RUN"]
    assert len(PLACES) > 90


@pytest.mark.parametrize("path", FILES)
def test_hostile_value_in_any_field_is_refused_or_changes_no_instruction(site: Site, path: str) -> None:
    _write(site)
    good = _skeleton(_load_and_render(site))
    for where in _fields(FILES[path]):
        for value in HOSTILE:
            data = _with(FILES[path], where, value)
            if _refused(path, data):
                continue
            assert _takes(where, value), f"{where} takes {value!r}"
            site.write(path, json.dumps(data))
            try:
                nodes = _load_and_render(site)
            except DefinitionError:
                continue
            _is_only_data(nodes, good, where, value)


def _refused(path: str, data: Any) -> bool:
    try:
        msgspec.convert(data, FORMATS[KINDS[Path(path).name]], strict=False)
    except msgspec.ValidationError:
        return True
    return False


def _takes(where: tuple[str | int, ...], value: str) -> bool:
    """Whether a field may have this value at all: free text any, others what is harmless in a command."""
    # `releases` is matched against, here and in the solver, and goes nowhere else.
    free = {"summary", "reason", "link", "unblock", "text", "label", "releases", *SCRIPTS}
    if free & set(where):
        return True
    if value == "*":  # file names in quotes; `licences` is meant to be a pattern
        return bool({"path", "licences", "firmware", "patch"} & set(where))
    if value == "~":  # a file of that name
        return where[-1] == "key"
    return shlex.quote(value) == value


def _is_only_data(
    nodes: Mapping[str, Rendered], good: Mapping[str, list[str]], where: tuple[str | int, ...], value: str
) -> None:
    if nodes.keys() == good.keys():
        assert _skeleton(nodes) == good, where
    for item in nodes.values():
        for line in item.containerfile.splitlines():
            if line.startswith("#"):
                continue
            if value.strip() and len(value) > 3 and value in line:
                assert shell_quote(value) in line, f"{where} is not quoted in: {line}"
        for file in item.files:
            if file.path == "bootstrap.sh" and file.data is not None:
                assert _is_shell(file.data), (where, value)


@cache
def _is_shell(script: bytes) -> bool:
    return subprocess.run(["sh", "-n"], input=script, capture_output=True).returncode == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.sampled_from(PLACES), ANY)
def test_any_text_in_any_field_is_refused_or_changes_no_instruction(
    site: Site, place: tuple[str, tuple[str | int, ...]], value: str
) -> None:
    path, where = place
    _write(site)
    good = _skeleton(_load_and_render(site))
    site.write(path, json.dumps(_with(FILES[path], where, value)))
    try:
        nodes = _load_and_render(site)
    except DefinitionError:
        return
    _is_only_data(nodes, good, where, value)


# --- what definitions become ------------------------------------------------------------------------


def test_text_of_a_definition_is_never_a_template(site: Site) -> None:
    _write(site)
    site.write("base/debian/toyvendor/vendor.yaml", yaml.safe_dump(VENDOR | {"summary": "{{ 7 * 7 }}"}))
    for item in _load_and_render(site).values():
        assert "49" not in item.containerfile.split("FROM")[0]


def test_control_and_spec_file_keep_their_fields(site: Site) -> None:
    for base, name in (("debian", "control"), ("centos", "kmod.spec")):
        site.write(f"base/{base}/toyvendor/vendor.yaml", yaml.safe_dump(
            _with(VENDOR, ("kmods", "toy", "summary"), "50% off: %(touch /tmp/owned) Depends: evil"))
        )  # fmt: skip
        item = site.rendered(base, "toyvendor")["kmod-toy"]
        text = next(f.data for f in item.files if f.path == f"kmod/package/{name}").decode()  # type: ignore[union-attr]
        if base == "debian":
            assert re.findall(r"^([A-Za-z-]+):", text, re.MULTILINE).count("Depends") == 1
        else:
            assert "%%(touch" in text and not re.search(r"(?<!%)%\(", text)


@given(st.lists(ANY, min_size=1, max_size=3).map(tuple), st.lists(ANY, max_size=2).map(tuple), ANY, ANY)
def test_source_line_of_apt_has_only_its_own_words(
    suites: tuple[str, ...], components: tuple[str, ...], uri: str, keyring: str
) -> None:
    from imagebuild.definitions import Repository

    data = {"name": "x", "suites": suites, "components": components, "uri": uri, "keyring": keyring}
    try:
        repository = msgspec.convert(data, Repository)
    except msgspec.ValidationError:
        return
    location = Location(repository, str(repository.uri), Path(str(repository.keyring)))
    for line in apt_sources(location, "amd64"):
        assert "\n" not in line and line.count("[") - uri.count("[") == 1
        assert len(line.split(" ")) == 5 + len(components)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("option", ["--base", "--vendor", "--with", "--without", "--node"])
def test_hostile_name_on_the_command_line_is_wrong_usage(
    site: Site, imgbuild: Imgbuild, option: str, value: str
) -> None:
    found = imgbuild("render", f"{option}={value}")
    assert found.code == 2
    assert found.out == ""
    assert not (Path("/tmp/owned")).exists()


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("option", ["--tag", "--cache"])
def test_hostile_image_name_on_the_command_line_is_wrong_usage(
    site: Site, imgbuild: Imgbuild, option: str, value: str
) -> None:
    assert imgbuild("build", f"{option}={value}").code == 2


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_value_in_a_mirror_map_is_refused(site: Site, imgbuild: Imgbuild, value: str) -> None:
    site.write("m.yaml", json.dumps({"repositories": {"debian": value}}))
    assert imgbuild("plan", "--mirror-map", "m.yaml").code == 2
    site.write("m.yaml", json.dumps({"registries": {"quay.io": value}}))
    expected = 0 if value in ("/etc/passwd", "../../etc/passwd") else 2
    assert imgbuild("plan", "--mirror-map", "m.yaml").code == expected


# --- files/ -----------------------------------------------------------------------------------------


def _context(site: Site, folder: Path) -> Path:
    item = site.rendered("debian", "none", with_layers=["toy"])["tier2"]
    write_context(item, folder, {})
    return folder / "files"


@pytest.fixture
def layer(site: Site) -> Path:
    """The files/ folder of a layer of one's own."""
    site.write("layers/toy/layer.yaml", "summary: toy\n")
    folder = site.folder / "layers/toy/files"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        " lead",
        "trail ",
        "a'b",
        'a"b',
        "$(id)",
        "`id`",
        "a;b",
        "-rf",
        "é☃",
        "a\\b",
        "#x",
        "%41",
        "…",
    ],
)
def test_odd_file_name_is_copied_as_it_is(site: Site, layer: Path, tmp_path: Path, name: str) -> None:
    plain = site.rendered("debian", "none", with_layers=["toy"])["tier2"].containerfile
    (layer / name).mkdir()
    (layer / name / name).write_text(name)
    files = _context(site, tmp_path / "c")
    assert (files / name / name).read_text() == name
    assert site.rendered("debian", "none", with_layers=["toy"])["tier2"].containerfile == plain


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x1bb", "\x7f", b"a\xff"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_file_name_with_a_control_character_is_refused(
    site: Site, layer: Path, name: str | bytes, kind: str
) -> None:
    import os

    place = layer / os.fsdecode(name)
    if kind == "file":
        place.write_text("x")
    elif kind == "folder":
        place.mkdir()
        (place / "x").write_text("x")
    else:
        place.symlink_to("x")
    with pytest.raises(DefinitionError, match="has a control character or is not UTF-8"):
        site.rendered("debian", "none", with_layers=["toy"])


def test_link_is_copied_as_a_link_and_never_followed(site: Site, layer: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    for name, target in {"out": str(secret), "file": str(secret / "key"), "up": "../../..", "gone": "nowhere",
                         "loop": "loop", "t.j2": str(secret / "key")}.items():  # fmt: skip
        (layer / name).symlink_to(target)
    files = _context(site, tmp_path / "c")
    assert sorted(path.name for path in files.iterdir() if path.is_symlink()) == [
        "file", "gone", "loop", "out", "t.j2", "up",
    ]  # fmt: skip
    assert str((files / "out").readlink()) == str(secret)
    item = site.rendered("debian", "none", with_layers=["toy"])["tier2"]
    assert "files/out/key" not in [file.path for file in item.files]


def test_file_below_a_link_of_another_layer_is_refused_and_not_written_through(
    site: Site, layer: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (layer / "etc").symlink_to(outside)
    site.write("layers/zoo/layer.yaml", "summary: zoo\n")
    site.write("layers/zoo/files/etc/passwd", "owned")
    with pytest.raises(DefinitionError, match="which is no folder"):
        site.rendered("debian", "none", with_layers=["toy", "zoo"])
    assert list(outside.iterdir()) == []


def test_file_below_a_file_of_another_layer_is_refused(site: Site, layer: Path) -> None:
    (layer / "etc").write_text("a file")
    site.write("layers/zoo/layer.yaml", "summary: zoo\n")
    site.write("layers/zoo/files/etc/passwd", "x")
    with pytest.raises(DefinitionError, match="which is no folder"):
        site.rendered("debian", "none", with_layers=["toy", "zoo"])


def test_later_layer_replaces_a_file(site: Site, layer: Path, tmp_path: Path) -> None:
    (layer / "f").write_text("one")
    site.write("layers/zoo/layer.yaml", "summary: zoo\n")
    site.write("layers/zoo/files/f", "two")
    item = site.rendered("debian", "none", with_layers=["toy", "zoo"])["tier2"]
    write_context(item, tmp_path / "c", {})
    assert (tmp_path / "c/files/f").read_text() == "two"


def test_device_or_pipe_in_files_is_refused(site: Site, layer: Path) -> None:
    import os

    os.mkfifo(layer / "pipe")
    with pytest.raises(DefinitionError, match="is neither a file nor a link"):
        site.rendered("debian", "none", with_layers=["toy"])


def test_template_in_files_is_rendered_and_named_without_its_suffix(
    site: Site, layer: Path, tmp_path: Path
) -> None:
    (layer / "motd.j2").write_text("{{ base }} {{ vendor }} {{ kernel_release }}\n")
    files = _context(site, tmp_path / "c")
    assert (files / "motd").read_text() == "debian none 6.12.117+deb13-amd64\n"
    assert not (files / "motd.j2").exists()


@pytest.mark.parametrize("text", ["{{ nonsense }}", "{% if %}", "{{ 1 / 0 }}", "{{ base.x.y }}", b"\xff"])
def test_broken_template_is_a_definition_error_that_names_it(
    site: Site, layer: Path, text: str | bytes
) -> None:
    (layer / "motd.j2").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DefinitionError, match=r"motd\.j2` cannot be rendered"):
        site.rendered("debian", "none", with_layers=["toy"])


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../b", "a/..", "~/x", "a//b"])
def test_path_that_leaves_the_source_is_refused(site: Site, path: str) -> None:
    site.write("imgbuild.yaml", f"kmods: {{nvidia: {{source: {{package: toy-dkms, path: {path}}}}}}}\n")
    with pytest.raises(DefinitionError) as raised:
        site.load("debian", "nvidia")
    assert raised.value.where is not None
    assert raised.value.where.field == "kmods.nvidia.source.path"


@pytest.mark.parametrize("path", ["../x.patch", "/etc/passwd", "patches/../../x.patch"])
def test_patch_outside_its_folder_is_refused(site: Site, path: str) -> None:
    site.write("layers/x.patch", "")
    site.write("layers/toy/layer.yaml", "summary: toy\n")
    site.write("layers/toy/compat.yaml", f"rules: [{{kmod: a, verdict: patch, patch: {path}, reason: b}}]\n")
    with pytest.raises(DefinitionError, match=r"`rules\[0\]\.patch` has a form that is not allowed"):
        site.load(with_layers=["toy"])
