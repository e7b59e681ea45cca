"""YAML as people mean it, and every problem at its place."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, Site
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import fields

from imagebuild import definitions
from imagebuild.definitions import Compat, Layer, Vendor, describe_pattern
from imagebuild.definitions import Site as SiteFormat
from imagebuild.documents import MAX_DEPTH, Document, parse, read_yaml
from imagebuild.errors import DefinitionError

Imgbuild = Callable[..., Outcome]


def _is_format(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, definitions.Strict)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str | bytes], Document]:
    def from_text(text: str | bytes) -> Document:
        path = tmp_path / "x.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_yaml(path, "x.yaml")

    return from_text


def problems(document: Document, kind: type = SiteFormat) -> list[DefinitionError]:
    with pytest.raises(DefinitionError) as raised:
        parse(document, kind, describe_pattern)
    return [raised.value, *raised.value.others]


# --- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("6.10", "6.10"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("22:22", "22:22"),
        ("0o17", "0o17"),
        ("017", "017"),
        ("1e3", "1e3"),
        ("1_000", "1_000"),
        ("2026-11-23", "2026-11-23"),
        (".inf", ".inf"),
        ("=", "="),
        ("'true'", "true"),
        ('"null"', "null"),
        ("!!str true", "true"),
        ("!!str", ""),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("é ☃ 𝄞", "é ☃ 𝄞"),
        ("'a\\nb'", "a\\nb"),
        ('"a\\nb"', "a\nb"),
        ("|\n  a\n  b", "a\nb\n"),
        (">-\n  a\n  b", "a b"),
    ],
)
def test_scalar_is_read_as_a_person_means_it(
    read: Callable[[str], Document], written: str, meant: object
) -> None:
    assert read(f"a: {written}\n").data == {"a": meant}


def test_version_that_looks_like_a_number_stays_text(site: Site) -> None:
    site.write("imgbuild.yaml", "kmods:\n  zfs:\n    version: 2.10\n")
    selection = site.load(with_layers=["zfs"])
    assert selection.kmods["zfs"][0].version == "2.10"


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "---\n...\n"])
def test_empty_file_is_an_empty_mapping(read: Callable[[str], Document], text: str) -> None:
    document = read(text)
    assert parse(document, SiteFormat) == SiteFormat()
    assert "`summary` is missing" in [p.what for p in problems(document, Vendor)]


def test_byte_order_mark_and_windows_line_ends_are_no_text(read: Callable[[bytes], Document]) -> None:
    document = read(b"\xef\xbb\xbfname: fleet\r\nnmae: x\r\n")
    assert document.data == {"name": "fleet", "nmae": "x"}
    assert str(document.locate(("nmae",), key=True)) == "x.yaml:2:1  nmae"


def test_alias_repeats_its_anchor(read: Callable[[str], Document]) -> None:
    document = read("with: &layers [zfs, cdi]\nwithout: *layers\n")
    assert document.data == {"with": ["zfs", "cdi"], "without": ["zfs", "cdi"]}


# --- what no file may have --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says", "at"),
    [
        (b"name: a\0b\n", "a control character (U+0000) cannot be in a file", "1:8"),
        (b"a: 1\nname: \x1b[2J\n", "a control character (U+001B) cannot be in a file", "2:7"),
        (b"a: 1\nname: \xff\n", "not UTF-8 text: invalid start byte", "2:1"),
        (b"name: \xed\xa0\x80\n", "not UTF-8 text: invalid continuation byte", "1:1"),
        (b"name: x\n\twith: y\n", "not valid YAML: found a tab character that violates indentation", "2:1"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML: but found another document", "2:1"),
        (b"name: *x\n", "not valid YAML: found undefined alias", "1:7"),
        (b"name: [a\n", "not valid YAML: did not find expected ',' or ']'", "2:1"),
        (b"with: &a [*a]\n", "this alias contains itself", "1:7  with[0]"),
        (b"? [a]\n: b\n", "a key must be text", "1:3"),
        (
            b"a: !!python/object/apply:os.system [id]\n",
            "a tag (`tag:yaml.org,2002:python/object/apply:os.system`) means nothing here",
            "1:4  a",
        ),
        (b"a: !!binary aGk=\n", "a tag (`tag:yaml.org,2002:binary`) means nothing here", "1:4  a"),
        (b"a: !env HOME\n", "a tag (`!env`) means nothing here", "1:4  a"),
    ],
)
def test_file_that_is_no_plain_yaml_is_refused_at_its_place(
    read: Callable[[bytes], Document], text: bytes, says: str, at: str
) -> None:
    with pytest.raises(DefinitionError) as raised:
        read(text)
    assert (raised.value.what, str(raised.value.where)) == (says, f"x.yaml:{at}")


def test_control_character_never_reaches_the_terminal(site: Site, imgbuild: Imgbuild) -> None:
    site.write("imgbuild.yaml", b"name: \x1b]0;owned\x07\n")
    assert "\x1b" not in imgbuild("plan").err


def test_duplicate_keys_are_all_refused_with_the_first_ones_line(read: Callable[[str], Document]) -> None:
    with pytest.raises(DefinitionError) as raised:
        read("name: a\nbase: b\nname: c\nmirrors:\n  insecure: []\n  insecure: [x]\n")
    first, second = raised.value, raised.value.others[0]
    assert (first.what, str(first.where)) == ("duplicate key `name`", "x.yaml:3:1  name")
    assert first.help == "it is already there in line 1; keep one"
    assert str(second.where) == "x.yaml:6:3  mirrors.insecure"


def test_alias_bomb_is_stopped_early(read: Callable[[str], Document]) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for old, new in zip("abcde", "bcdef", strict=True):
        lines.append(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]")
    began = time.process_time()
    with pytest.raises(DefinitionError, match="expands to more than 100000 values"):
        read("\n".join(lines))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1_000, 300_000])
@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused_not_a_crash(
    read: Callable[[str], Document], depth: int, opening: str
) -> None:
    with pytest.raises(DefinitionError, match="nested more than 64 levels deep"):
        read(opening * depth)


def test_aliases_that_nest_deeply_are_refused(read: Callable[[str], Document]) -> None:
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 3000))]
    with pytest.raises(DefinitionError, match="nested more than 64 levels deep"):
        read("\n".join(lines))


@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b"? ")
@example(b"{a: &x {<<: *x}}")
@example(b"- - - ? -\n")
@example("\u2028a: b".encode())
def test_any_bytes_are_a_document_or_a_definition_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    try:
        document = read_yaml(path)
        parse(document, SiteFormat, describe_pattern)
    except DefinitionError as error:
        for each in (error, *error.others):
            assert "\n" not in each.what and "Traceback" not in each.what


_FIELDS = sorted(
    {info.encode_name for kind in vars(definitions).values() if _is_format(kind) for info in fields(kind)}
)
_DATA = st.recursive(
    st.sampled_from(["a", "6.10", "=6.12", "true", "1", "", "a\n", "A b", "../x", True, False, None]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([*_FIELDS, "nonsense", "Ab"]), inner, max_size=5),
    ),
    max_leaves=12,
)


@given(_DATA, st.sampled_from(sorted(definitions.FORMATS)))
def test_any_data_is_valid_or_has_problems_in_words(data: object, name: str) -> None:
    document = Document(Path("x"), "x", "", data)
    try:
        parse(document, definitions.FORMATS[name], describe_pattern)
    except DefinitionError as error:
        for each in (error, *error.others):
            assert "$" not in each.what, "msgspec's own words"


@pytest.mark.parametrize("name", [".", "missing.yaml"])
def test_site_file_that_is_not_there_is_named(site: Site, imgbuild: Imgbuild, name: str) -> None:
    found = imgbuild("plan", "-f", name)
    assert found.code == 2
    assert found.err.startswith("error: ") and name in found.err


# --- every problem at once --------------------------------------------------------------------------

BROKEN_LAYER = """\
sumary: many mistakes
tier: 4
packages: [good, "bad; rm -rf /", {a: b}]
kmods:
  Toy:
    summary: toy
    source: {package: toy, url: http://mirror.example/toy.tar.gz}
    modules: []
    package: {name: kmod-toy, provides: kmod}
units: {enable: [toy]}
firmware: ../../etc
"""


def test_layer_with_many_mistakes_shows_all_of_them_at_once(site: Site, imgbuild: Imgbuild) -> None:
    site.write("layers/toy/layer.yaml", BROKEN_LAYER)
    found = imgbuild("plan", "--with", "toy")
    assert found.code == 2
    heads = re.findall(r"^error: (.*)\n  --> (.*)$", found.err, re.MULTILINE)
    assert heads == [
        ("unknown field `sumary`", "layers/toy/layer.yaml:1:1  sumary"),
        ("`packages[1]` has a form that is not allowed: 'bad; rm -rf /'",
         "layers/toy/layer.yaml:3:18  packages[1]"),
        ("`packages[2]` must be text, not a mapping", "layers/toy/layer.yaml:3:35  packages[2]"),
        ("`kmods.Toy` has a form that is not allowed: 'Toy'", "layers/toy/layer.yaml:5:3  kmods.Toy"),
        ("`kmods.Toy.source` is not right: give one of `package`, `url` or `directory`",
         "layers/toy/layer.yaml:7:13  kmods.Toy.source"),
        ("`kmods.Toy.build` is missing", "layers/toy/layer.yaml:6:5  kmods.Toy"),
        ("`kmods.Toy.modules` must have at least 1 entries",
         "layers/toy/layer.yaml:8:14  kmods.Toy.modules"),
        ("`kmods.Toy.package.provides` must be a list, not `kmod`",
         "layers/toy/layer.yaml:9:41  kmods.Toy.package.provides"),
        ("`units.enable[0]` has a form that is not allowed: 'toy'",
         "layers/toy/layer.yaml:10:18  units.enable[0]"),
        ("`firmware` has a form that is not allowed: '../../etc'", "layers/toy/layer.yaml:11:11  firmware"),
        ("`summary` is missing", "layers/toy/layer.yaml:1:1"),
        ("`tier` must be one of 2, 3, not '4'", "layers/toy/layer.yaml:2:7  tier"),
    ]  # fmt: skip


def test_misspelt_field_whole_message(site: Site, imgbuild: Imgbuild) -> None:
    site.write(
        "layers/toy/compat.yaml",
        "rules:\n  - kmod: toy\n    verdct: patch\n    reason: it is so\n",
    )
    site.write("layers/toy/layer.yaml", "summary: toy\n")
    found = imgbuild("plan", "--with", "toy")
    assert (
        found.err
        == """\
error: unknown field `verdct`
  --> layers/toy/compat.yaml:3:5  rules[0].verdct
3 |     verdct: patch
  |     ^^^^^^
help: did you mean `verdict`? There is: driver, kernel, kmod, link, patch, reason, unblock, verdict
error: `rules[0].verdict` is missing
  --> layers/toy/compat.yaml:2:5  rules[0]
2 |   - kmod: toy
  |     ^
"""
    )


def test_name_with_a_space_whole_message(site: Site, imgbuild: Imgbuild) -> None:
    site.write("imgbuild.yaml", 'name: fleet\nvendor: "none; reboot"\n')
    found = imgbuild("plan")
    assert (found.code, found.out) == (2, "")
    assert (
        found.err
        == """\
error: `vendor` has a form that is not allowed: 'none; reboot'
  --> imgbuild.yaml:2:9  vendor
2 | vendor: "none; reboot"
  |         ^^^^^^^^^^^^^^
help: it takes lower-case letters, digits, dot, dash and underscore, at most 64
"""
    )


def test_list_instead_of_mapping_whole_message(site: Site, imgbuild: Imgbuild) -> None:
    site.write("imgbuild.yaml", "- name: fleet\n")
    assert (
        imgbuild("plan").err
        == """\
error: `the file` must be a mapping (key: value), not a list
  --> imgbuild.yaml:1:1
1 | - name: fleet
  | ^
"""
    )


def test_broken_yaml_whole_message(site: Site, imgbuild: Imgbuild) -> None:
    site.write("imgbuild.yaml", "name: fleet\nwith: [zfs\nbase: debian\n")
    assert (
        imgbuild("plan").err
        == """\
error: not valid YAML: did not find expected ',' or ']'
  --> imgbuild.yaml:3:5
3 | base: debian
  |     ^
"""
    )


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (SiteFormat, "name:\n", "`name` must be text, not empty"),
        (SiteFormat, f"name: {'a' * 65}\n", "`name` must have at most 64 characters"),
        (SiteFormat, "name: true\n", "`name` must be text, not `true`"),
        (SiteFormat, "with: zfs\n", "`with` must be a list, not `zfs`"),
        (SiteFormat, "with: [[zfs]]\n", "`with[0]` must be text, not a list"),
        (SiteFormat, "kmods: []\n", "`kmods` must be a mapping (key: value), not a list"),
        (SiteFormat, "mirrors: {repositories: {a: {uri: 3}}}\n",
         "`mirrors.repositories.a.uri` has a form that is not allowed: '3'"),
        (SiteFormat, "mirrors: {repositories: {a: [x]}}\n",
         "`mirrors.repositories.a` must be a mapping (key: value), not a list"),
        (Compat, "rules: [{kmod: a, verdict: maybe, reason: b}]\n",
         "`rules[0].verdict` must be one of ok, patch, blocked, not 'maybe'"),
        (Compat, "rules: [{kmod: a, verdict: patch, reason: b}]\n",
         "`rules[0]` is not right: `patch` goes with `verdict: patch`, and only with it"),
        (Compat, "rules: [{kmod: a, verdict: ok, reason: b, kernel: 6.12}]\n",
         "`rules[0].kernel` has a form that is not allowed: '6.12'"),
        (Layer, "summary: |\n  two\n  lines\n",
         "`summary` has a form that is not allowed: 'two\\nlines\\n'"),
        (Layer, "summary: a\nbases: [debian, 3, Debian]\n",
         "`bases[2]` has a form that is not allowed: 'Debian'"),
    ],
)  # fmt: skip
def test_value_of_the_wrong_kind_says_what_it_takes(
    read: Callable[[str], Document], kind: type, text: str, says: str
) -> None:
    assert [problem.what for problem in problems(read(text), kind)] == [says]
