"""The formats: what ships is valid, editors are told the same as the loader says, and words stay words."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from imagebuild import definitions
from imagebuild.definitions import FORMATS, check_image_name, describe_pattern, field_docs, json_schema
from imagebuild.documents import parse, read_yaml
from imagebuild.errors import DefinitionError
from imagebuild.load import shipped

SHIPPED = [
    (path, kind)
    for kind, pattern in {
        "base": "base/*/base.yaml",
        "vendor": "base/*/*/vendor.yaml",
        "layer": "layers/*/layer.yaml",
        "compat": "**/compat.yaml",
    }.items()
    for path in sorted(shipped().glob(pattern))
    if ".venv" not in path.parts
]


@pytest.mark.parametrize(("path", "kind"), SHIPPED, ids=lambda x: x.parent.name if isinstance(x, Path) else x)
def test_shipped_definition_passes_loader_and_schema(path: Path, kind: str) -> None:
    import yaml

    parse(read_yaml(path), FORMATS[kind], describe_pattern)
    Draft202012Validator(json_schema(kind)).validate(yaml.safe_load(path.read_text()))


def test_every_shipped_kind_of_definition_was_looked_at() -> None:
    assert {kind for _, kind in SHIPPED} == {"base", "vendor", "layer", "compat"}


@pytest.mark.parametrize("kind", FORMATS)
def test_schema_is_a_valid_schema(kind: str) -> None:
    Draft202012Validator.check_schema(json_schema(kind))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("site", {"nmae": "x"}),
        ("site", {"name": "a b"}),
        ("site", {"name": "a\n"}),
        ("site", {"with": "zfs"}),
        ("site", {"tags": ["-x"]}),
        ("site", {"kmods": {"nvidia": {"source": {"sha256": "00"}}}}),
        ("layer", {}),
        ("layer", {"summary": "two\nlines"}),
        ("layer", {"summary": "a", "tier": 4}),
        ("layer", {"summary": "a", "packages": ["a; b"]}),
        ("layer", {"summary": "a", "units": {"enable": ["--now.service"]}}),
        ("vendor", {"summary": "a", "firmware": "../x"}),
        ("compat", {"rules": [{"kmod": "a", "verdict": "maybe", "reason": "b"}]}),
        ("compat", {"rules": [{"kmod": "a", "verdict": "patch", "patch": "/etc/x", "reason": "b"}]}),
        ("base", {"summary": "a"}),
        ("mirror-map", {"repositories": {"a": "ftp://x"}}),
    ],
)
def test_what_the_loader_refuses_the_schema_refuses(kind: str, data: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(data, FORMATS[kind], strict=False)
    assert not Draft202012Validator(json_schema(kind)).is_valid(data)


def test_schema_describes_fields_with_the_texts_below_them() -> None:
    vendor = json_schema("vendor")["$defs"]["Vendor"]["properties"]
    assert vendor["layers"]["description"] == "Layers that come with this vendor."
    assert vendor["kargs"]["description"] == "Kernel arguments, written to /usr/lib/bootc/kargs.d."
    assert "description" not in vendor["packages"]
    rule = json_schema("compat")["$defs"]["CompatRule"]["properties"]
    assert rule["unblock"]["description"] == "What still works, or which pin would lift the block."


def test_field_docs_use_the_names_of_yaml_and_only_fields_there_are() -> None:
    docs = field_docs()
    assert docs["Site"]["with"] == "Layers in addition to those of the vendor."
    assert docs["Layer"]["for"].startswith("What a base, or all bases")
    assert docs["Layer"]["kargs"] == docs["Part"]["kargs"], "inherited"
    for kind, texts in docs.items():
        known = {info.encode_name for info in msgspec.structs.fields(getattr(definitions, kind))}
        assert set(texts) <= known, kind


# --- words ------------------------------------------------------------------------------------------

PLAIN = {
    name: getattr(definitions, name)
    for name in ("Name", "PackageSpec", "RelativePath", "Pattern", "Uri", "Key", "KeyringPath", "Word",
                 "UnitName", "Sha256", "Version", "ImageName", "ImageReference")
}  # fmt: skip
ONE_SHELL_WORD = {"Name", "Word", "Sha256", "Version", "ImageName", "ImageReference", "Uri", "KeyringPath"}
NASTY = "\n\r\0\x1b\x85\u2028 \t'\"\\$`;&|<>(){}[]*?!#~%@:/.,=+-_^aZ0é"


@pytest.mark.parametrize("name", PLAIN)
@given(st.text(alphabet=NASTY, max_size=12))
def test_word_of_a_definition_has_no_character_that_ends_a_line_or_a_quote(name: str, text: str) -> None:
    try:
        msgspec.convert(text, PLAIN[name])
    except msgspec.ValidationError:
        return
    assert not set(text) & set("\n\r\0\x1b\x85\u2028\t'\"$`;&|#!?")
    assert not text.startswith("-")
    if name in ONE_SHELL_WORD:
        assert shlex.split(text) == [text]


@pytest.mark.parametrize("name", [*PLAIN, "Line", "Range", "HostPath", "Capability"])
@pytest.mark.parametrize("end", ["\n", "\r", "\0"])
def test_pattern_refuses_a_control_character_at_the_end(name: str, end: str) -> None:
    good = {"Sha256": "0" * 64, "UnitName": "a.service", "Uri": "http://a", "Pattern": "/a", "Range": "<1",
            "KeyringPath": "/a", "ImageReference": "a/b"}.get(name, "a")  # fmt: skip
    kind = getattr(definitions, name)
    msgspec.convert(good, kind)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(good + end, kind)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../x",
        "/etc/passwd",
        "a//b",
        "a/",
        "a/.",
        "./a",
        "~/x",
        "a\\b",
        "$HOME/x",
        "a b",
    ],
)
def test_relative_path_that_may_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(path, definitions.RelativePath)


@pytest.mark.parametrize(
    "path", ["a", "a/b.patch", "usr/src/nvidia-{version}", ".hidden/x", "a..b", "x86_64/*"]
)
def test_relative_path_below_its_folder_is_taken(path: str) -> None:
    assert msgspec.convert(path, definitions.RelativePath) == path


@pytest.mark.parametrize("name", ["gpu", "gpu:1", "localhost/gpu", "registry.example:5000/a/b:1.0-x"])
def test_image_name_that_can_be_is_taken(name: str) -> None:
    check_image_name(name)


@pytest.mark.parametrize("name", ["", "-gpu", "a b", "a\n", "a:", "a/B", "a;b", "$(id)", "a" * 256, "../a"])
def test_image_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(DefinitionError, match="is no image name"):
        check_image_name(name)


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://x.example/a.tar.gz", True),
        ("https://x.example/a.tgz", True),
        ("file:///srv/a.tar", True),
        ("https://x.example/archive/v1.0", False),
        ("https://x.example/a.zip", False),
        ("https://x.example/", False),
    ],
)
def test_source_url_that_names_no_tarball_is_refused(url: str, good: bool) -> None:
    data = {"url": url, "sha256": "0" * 64}
    if good:
        msgspec.convert(data, definitions.KmodSource)
    else:
        with pytest.raises(msgspec.ValidationError, match="must name a tarball"):
            msgspec.convert(data, definitions.KmodSource)
