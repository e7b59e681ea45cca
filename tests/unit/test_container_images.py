"""Container images that layers name: locked by digest, and pinned in the files of an image."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import Site
from synthetic_lock import synthetic_section

from imagebuild import lock, solvers
from imagebuild.errors import DefinitionError, UnavailableError
from imagebuild.load import Selection
from imagebuild.run import Result

SERVER = "registry.example:5000/llm/server:v1"
PINNED = f"registry.example/proxy:2@sha256:{'7' * 64}"
A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
QUADLET = "files/usr/share/containers/systemd/server.container"


@pytest.fixture
def layered(site: Site) -> Site:
    """A site with a layer that names two images and writes one of them into a Quadlet."""
    site.write("layers/llm/layer.yaml", f"summary: serves\nimages: ['{SERVER}', '{PINNED}']\n")
    site.write(f"layers/llm/{QUADLET}.j2", f"[Container]\nImage={{{{ images['{SERVER}'] }}}}\n")
    return site


def selected(site: Site) -> Selection:
    return site.load("debian", "nvidia", with_layers=["llm"])


def test_file_template_gets_name_and_locked_digest(layered: Site) -> None:
    def section(selection: Selection) -> lock.Section:
        return msgspec.structs.replace(synthetic_section(selection), images={SERVER: A, PINNED: B})

    for given, digest in ((section, A), (None, "<unlocked: digest>")):
        nodes = layered.rendered("debian", "nvidia", section=given, with_layers=["llm"])
        (file,) = [file for file in nodes["tier2"].files if file.path == QUADLET]
        assert file.data == f"[Container]\nImage=registry.example:5000/llm/server@{digest}\n".encode()


@pytest.mark.parametrize(("moved", "why"), [(SERVER, [f"file {QUADLET}"]), (PINNED, [])])
def test_moved_digest_changes_the_key_of_nodes_that_write_it_and_no_other(
    layered: Site, moved: str, why: list[str]
) -> None:
    def salted(selection: Selection) -> lock.Section:
        return synthetic_section(selection, salts={moved: "moved"})

    one = layered.rendered("debian", "nvidia", with_layers=["llm"])
    two = layered.rendered("debian", "nvidia", with_layers=["llm"], section=salted)
    assert {name for name in one if one[name].key != two[name].key} == ({"tier2"} if why else set())
    inputs = one["tier2"].inputs.keys() | two["tier2"].inputs.keys()
    assert [i for i in inputs if one["tier2"].inputs.get(i) != two["tier2"].inputs.get(i)] == why


def test_image_that_no_definition_names_cannot_be_written(layered: Site) -> None:
    layered.write(f"layers/llm/{QUADLET}.j2", "Image={{ images['registry.example/other:1'] }}\n")
    with pytest.raises(DefinitionError, match=r"server\.container\.j2"):
        layered.rendered("debian", "nvidia", with_layers=["llm"])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every program call that asks a registry; each answers with digest A."""
    calls: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> Result:
        calls.append(argv)
        return Result(tuple(argv), 0, f"{A}\n", "", ())

    monkeypatch.setattr(solvers, "run", run)
    return calls


def test_registries_are_asked_where_the_mirror_map_says_and_only_for_what_is_not_kept(
    layered: Site, asked: list[list[str]]
) -> None:
    layered.write(
        "imgbuild.yaml",
        "mirrors: {registries: {'registry.example:5000': 'mirror:1/x'}, insecure: ['mirror:1']}\n",
    )
    found = lock.image_digests(selected(layered), {})
    assert found == {SERVER: A, PINNED: PINNED.partition("@")[2]}  # the second needs no asking
    ((*_, tls, _, _, place),) = asked
    assert (tls, place) == ("--tls-verify=false", "docker://mirror:1/x/llm/server:v1")
    assert lock.image_digests(selected(layered), {SERVER: B, "registry.example/gone:1": A})[SERVER] == B
    assert len(asked) == 1


def test_image_its_registry_does_not_have_is_named(layered: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        solvers, "run", lambda argv, **_: Result(tuple(argv), 1, "", "", ("manifest unknown",))
    )
    with pytest.raises(UnavailableError, match="llm/server:v1"):
        lock.image_digests(selected(layered), {})


def test_images_of_a_layer_of_a_higher_tier_are_not_locked(layered: Site, asked: list[list[str]]) -> None:
    layered.edit("layers/llm/layer.yaml", "summary", "tier: 3\nsummary")
    assert lock.image_digests(selected(layered), {}) == {} and not asked


def test_lock_is_stale_when_an_image_is_added_and_damaged_when_its_digest_is_gone(layered: Site) -> None:
    selection = selected(layered)
    section = synthetic_section(selection)
    known = lock.Lockfile(sections={selection.section: section})
    assert lock.section_of(known, selection) == section
    bare = msgspec.structs.replace(section, images={PINNED: B})
    with pytest.raises(DefinitionError, match=f"lacks packages or digests: image {SERVER}"):
        lock.section_of(lock.Lockfile(sections={selection.section: bare}), selection)
    layered.edit("layers/llm/layer.yaml", "server:v1", "server:v2")
    assert lock.section_of(known, selected(layered)) is None


def test_differences_name_images_that_moved(layered: Site) -> None:
    section = synthetic_section(selected(layered))
    old = msgspec.structs.replace(section, images={"r.example/a:1": A, "r.example/b:1": A})
    new = msgspec.structs.replace(section, images={"r.example/a:1": B, "r.example/c:1": A})
    assert lock.differences(old, new) == [
        f"image r.example/a:1 {A} -> {B}",
        f"image r.example/b:1 {A} removed",
        f"image r.example/c:1 {A} added",
    ]
