"""The core of a driver: a node of its own, which a new kernel leaves alone."""

from __future__ import annotations

import io
import re
import subprocess
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from conftest import Site
from synthetic_lock import synthetic_section
from test_render import REPOSITORY, tool

from imagebuild import build, images
from imagebuild.errors import DefinitionError
from imagebuild.load import Selection
from imagebuild.lock import Lockfile, Section, request_of, section_of
from imagebuild.plan import plan
from imagebuild.render import Rendered
from imagebuild.report import Report

CORE = """\
    core:
      build: make core
      sources: [src, version.mk]
      outputs: {src/core.o: mod/core.bin}
"""
VENDOR = "base/{}/nvidia/vendor.yaml"
NEWER = {"debian": "6.12.118+deb13-amd64", "centos": "6.12.0-151.el10.x86_64"}
KEPT = {"toolchain", "kmod-nvidia-core"}
PATCH = "base/debian/nvidia/patches/pci_resize_resource.patch"


@pytest.fixture
def cored(site: Site) -> Site:
    """A site whose NVIDIA driver has a core that needs g++."""
    site.own_definitions()
    for base in ("debian", "centos"):
        site.edit(VENDOR.format(base), "    cpu_s:", f"{CORE}    build_packages: [g++]\n    cpu_s:")
    return site


def salted(*names: str) -> Callable[[Selection], Section]:
    return lambda selection: synthetic_section(selection, salts=dict.fromkeys(names, "rebuilt"))


def moved(before: dict[str, Rendered], after: dict[str, Rendered]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name].key != after[name].key}


# --- the graph --------------------------------------------------------------------------------------


def test_core_stands_on_a_toolchain_beside_the_kernel(cored: Site) -> None:
    selection = cored.load("debian", "nvidia", with_layers=["zfs"])
    nodes = {node.name: node for node in plan(selection, synthetic_section(selection)).nodes}
    assert nodes["toolchain"].parents == ("tier1",)
    assert nodes["toolchain"].specs == selection.base.toolchain
    assert nodes["kmod-nvidia-core"].parents == ("toolchain",)
    assert nodes["kmod-nvidia"].parents == ("builder", "kmod-nvidia-core")
    assert nodes["kmod-zfs"].parents == ("builder",)
    assert nodes["tier2"].parents == ("kernel", "kmod-nvidia", "kmod-zfs")
    assert {p.name for p in nodes["kmod-nvidia-core"].packages} == {"g++"}


def test_core_sees_no_kernel_and_the_modules_see_the_core(cored: Site) -> None:
    items = cored.rendered("debian", "nvidia")
    text = items["kmod-nvidia-core"].containerfile
    assert "6.12.117" not in text and "headers-" not in text
    assert "sh /run/imgbuild/scripts/core.sh /out src/core.o mod/core.bin\n" in text
    assert "SOURCES='src version.mk'" in text and "USER_HEADERS=linux-libc-dev" in text
    mount = f"--mount=type=bind,from={items['kmod-nvidia-core'].image},target=/run/imgbuild/core"
    assert mount in items["kmod-nvidia"].containerfile
    paths = {file.path for file in items["kmod-nvidia-core"].files}
    scripts = {"core.sh", "compile.sh", "unpack.sh", "remove.sh", "install.sh"}
    assert paths == {"kmod/build.sh", *(f"scripts/{name}" for name in scripts)}


def test_containerfiles_with_a_core_pass_hadolint(cored: Site) -> None:
    files = []
    for base in ("debian", "centos"):
        for name, item in cored.rendered(base, "nvidia").items():
            files.append(cored.write(f"out/{base}-{name}.Containerfile", item.containerfile))
    config = str(REPOSITORY / ".hadolint.yaml")
    found = subprocess.run(
        [tool("hadolint"), "--no-color", "--config", config, *files], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, "")


# --- its key ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["debian", "centos"])
def test_new_kernel_leaves_the_core_alone(cored: Site, base: str) -> None:
    before = cored.rendered(base, "nvidia")
    after = cored.rendered(base, "nvidia", section=lambda s: synthetic_section(s, release=NEWER[base]))
    assert {"kmod-nvidia", "tier2"} <= moved(before, after) <= before.keys() - KEPT - {"tier1"}


def test_new_base_image_leaves_the_core_alone(cored: Site) -> None:
    def newer(selection: Selection) -> Section:
        section = synthetic_section(selection, release=NEWER["centos"])
        return msgspec.structs.replace(section, base_digest=f"sha256:{'cd' * 32}")

    before = cored.rendered("centos", "nvidia")
    assert moved(before, cored.rendered("centos", "nvidia", section=newer)) == before.keys() - {
        "kmod-nvidia-core"
    }


@pytest.mark.parametrize(
    ("base", "package", "counts"),
    [
        ("debian", "gcc", True),
        ("centos", "gcc", True),
        ("debian", "g++", True),
        ("debian", "nvidia-open-kernel-dkms", True),
        ("centos", "kmod-nvidia-open-dkms", True),
        ("debian", "linux-libc-dev", False),
        ("centos", "kernel-headers", False),
        ("debian", "systemd", False),
        ("debian", "nvidia-smi", False),
    ],
)
def test_packages_that_count_for_a_core(cored: Site, base: str, package: str, counts: bool) -> None:
    before, after = (cored.rendered(base, "nvidia", section=salted(*names)) for names in ([], [package]))
    assert ("kmod-nvidia-core" in moved(before, after)) is counts


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("make core", "make V=1 core", True),
        ("mod/core.bin", "mod/other.bin", True),
        ("[src, version.mk]", "[src]", True),
        ("modules KERNEL_UNAME", "V=1 modules KERNEL_UNAME", False),
        ("modeset=1", "modeset=0", False),
    ],
)
def test_definitions_that_count_for_a_core(cored: Site, old: str, new: str, counts: bool) -> None:
    before = cored.rendered("debian", "nvidia")
    cored.edit(VENDOR.format("debian"), old, new)
    assert ("kmod-nvidia-core" in moved(before, cored.rendered("debian", "nvidia"))) is counts


def test_inputs_of_a_core_name_the_compiler_and_no_parent(cored: Site) -> None:
    inputs = cored.rendered("debian", "nvidia")["kmod-nvidia-core"].inputs
    assert {"package gcc:amd64", "package g++:amd64", "package nvidia-open-kernel-dkms:amd64"} < set(inputs)
    assert not [name for name in inputs if name.startswith("parent ")]


def test_new_compiler_in_the_lock_reaches_the_modules_through_the_core(cored: Site) -> None:
    """Not only through the builder: what is linked in counts."""
    items = cored.rendered("debian", "nvidia")
    assert items["kmod-nvidia"].inputs["parent kmod-nvidia-core"] == items["kmod-nvidia-core"].key


# --- patches and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("--- a/src/x.c\n+++ b/src/x.c\n", True),
        ("--- a/version.mk\n+++ b/version.mk\n", True),
        ("--- /dev/null\n+++ b/src/new.c\n", True),
        ("--- a/./src//x.c\t2026-01-01\n+++ b/./src//x.c\n", True),
        ("--- a/mod/x.c\n+++ b/mod/x.c\n--- a/src/y/z.c\n+++ /dev/null\n", True),
        ("diff --git a/src/x b/mod/x\nrename from src/x\nrename to mod/x\n", True),
        ("*** nothing that one could read\n", True),
        ("--- a/mod/x.c\n+++ b/mod/x.c\n", False),
        ("--- a/srcs/x.c\n+++ b/srcs/x.c\n", False),
    ],
)
def test_patch_counts_for_the_core_that_it_touches(cored: Site, header: str, taken: bool) -> None:
    before = cored.rendered("debian", "nvidia")
    assert not any("patches" in file.path for file in before["kmod-nvidia-core"].files)
    cored.write(PATCH, header)
    after = cored.rendered("debian", "nvidia")
    assert ("kmod-nvidia-core" in moved(before, after)) is taken
    assert any("patches" in file.path for file in after["kmod-nvidia-core"].files) is taken
    assert any("patches" in file.path for file in after["kmod-nvidia"].files)


def test_every_patch_counts_for_a_core_of_the_whole_source(cored: Site) -> None:
    cored.edit(VENDOR.format("debian"), "      sources: [src, version.mk]\n", "")
    before = cored.rendered("debian", "nvidia")
    cored.edit(PATCH, "Zero keeps", "0 keeps")
    assert "kmod-nvidia-core" in moved(before, cored.rendered("debian", "nvidia"))


def test_of_a_folder_only_what_the_core_is_made_of_counts(cored: Site) -> None:
    override = "kmods:\n  nvidia:\n    version: 550.163.01\n    source: {directory: tree}\n" + CORE
    cored.write("imgbuild.yaml", override + "packages: []\n")
    for path in ("src/a.c", "src/deep/b.c", "srcs/c.c", "version.mk", "mod/d.c"):
        cored.write(f"tree/{path}", "x")
    cored.write(PATCH, "--- a/mod/x.c\n+++ b/mod/x.c\n")
    before = cored.rendered("debian", "nvidia")
    paths = {file.path for file in before["kmod-nvidia-core"].files if file.path.startswith("source/")}
    assert paths == {"source/tree/src/a.c", "source/tree/src/deep/b.c", "source/tree/version.mk"}
    cored.write("tree/mod/d.c", "y")
    after = cored.rendered("debian", "nvidia")
    assert moved(before, after) == {"kmod-nvidia", "tier2"}
    cored.write("tree/src/a.c", "y")
    assert moved(after, cored.rendered("debian", "nvidia")) == {"kmod-nvidia-core", "kmod-nvidia", "tier2"}
    # A patch for both needs the files of both.
    cored.write(PATCH, "--- a/mod/d.c\n+++ b/mod/d.c\n--- a/src/a.c\n+++ b/src/a.c\n")
    files = cored.rendered("debian", "nvidia")["kmod-nvidia-core"].files
    assert "source/tree/mod/d.c" in {file.path for file in files}


# --- definitions and lock ---------------------------------------------------------------------------


def test_new_source_drops_the_core_and_brings_its_own(cored: Site) -> None:
    def core(text: str) -> Any:
        cored.write("imgbuild.yaml", f"kmods:\n  nvidia:\n{text}")
        return cored.load("debian", "nvidia").kmods["nvidia"][0].core

    assert core("    build: make\n").build == "make core"
    fresh = "    version: 1.0\n    source: {directory: x}\n"
    assert core(fresh) is None
    assert core(fresh + CORE.replace("make core", "make own")).build == "make own"
    assert core(CORE.replace("make core", "make own")).build == "make own"


def test_core_in_the_documents_is_as_definitions_want_it(site: Site) -> None:
    text = (REPOSITORY / "docs/driver-from-source.md").read_text()
    (block,) = [b for b in re.findall(r"(?:^    .*\n|\n)+", text, re.M) if "outputs:" in b]
    site.write("imgbuild.yaml", textwrap.dedent(block))
    kmod = site.load("debian", "nvidia").kmods["nvidia"][0]
    assert kmod.core is not None and len(kmod.core.outputs) == 2


def test_kmod_with_the_name_of_a_core_is_refused(cored: Site) -> None:
    vendor = (cored.folder / VENDOR.format("debian")).read_text()
    kmod = vendor[vendor.index("  nvidia:\n") : vendor.index("# Headless")].replace(
        "  nvidia:", "  nvidia-core:"
    )
    cored.edit(VENDOR.format("debian"), "# Headless", f"{kmod}# Headless")
    with pytest.raises(DefinitionError, match="`nvidia-core` has the name of the core of kmod `nvidia`"):
        cored.load("debian", "nvidia")


@pytest.mark.parametrize("bad", ["/etc/x", "../x", "a b", "$(x)"])
def test_paths_of_a_core_stay_in_the_source(cored: Site, bad: str) -> None:
    for old in ("src/core.o:", "mod/core.bin", "version.mk"):
        text = (cored.folder / VENDOR.format("debian")).read_text()
        cored.edit(VENDOR.format("debian"), old, f"'{bad}'" + ":" * old.endswith(":"))
        with pytest.raises(DefinitionError):
            cored.load("debian", "nvidia")
        cored.write(VENDOR.format("debian"), text)


def test_lock_without_a_toolchain_is_stale_when_a_core_comes(site: Site) -> None:
    site.own_definitions()
    before = site.load("debian", "nvidia")
    lock = Lockfile(sections={before.section: synthetic_section(before)})
    assert "toolchain" not in lock.sections[before.section].transactions
    site.edit(VENDOR.format("debian"), "    cpu_s:", f"{CORE}    cpu_s:")
    after = site.load("debian", "nvidia")
    assert request_of(before) != request_of(after) and section_of(lock, after) is None


@pytest.mark.parametrize("name", ["toolchain", "kmod-nvidia-core"])
def test_lock_that_lacks_packages_of_a_core_is_refused(cored: Site, name: str) -> None:
    selection = cored.load("debian", "nvidia")
    section = synthetic_section(selection)
    del section.transactions[name]
    with pytest.raises(DefinitionError, match=f"lacks packages or digests: {name}"):
        section_of(Lockfile(sections={selection.section: section}), selection)


# --- what is built ----------------------------------------------------------------------------------


def test_toolchain_is_not_needed_where_the_core_is_there(cored: Site) -> None:
    items = cored.rendered("debian", "nvidia")
    there = {str(items[name].image) for name in ("tier1", "kmod-nvidia-core")}
    names = [item.node.name for item in build.needed(list(items.values()), there)]
    assert names == ["kernel", "builder", "kmod-nvidia", "tier2"]


def test_probe_keeps_the_core_and_drops_its_patches(cored: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    cored.write(PATCH, "--- a/src/x.c\n+++ b/src/x.c\n")
    selection = cored.load("debian", "nvidia", with_layers=["zfs"])
    made = plan(selection, synthetic_section(selection))
    built: list[Any] = []
    monkeypatch.setattr(build, "build", lambda plan, rendered, *_: built.extend(rendered))
    build.probe(made, "nvidia", None, None)  # type: ignore[arg-type]
    names = [item.node.name for item in built]
    assert names == ["tier1", "kernel", "builder", "toolchain", "kmod-nvidia-core", "kmod-nvidia"]
    assert not [file for item in built for file in item.files if "patches" in file.path]


@pytest.mark.parametrize("has_kmod", [True, False])
def test_core_is_looked_for_only_without_its_kmod(
    cored: Site, monkeypatch: pytest.MonkeyPatch, has_kmod: bool
) -> None:
    items = cored.rendered("debian", "nvidia")
    asked = []

    def copy(source: str, *_: Any, **__: Any) -> None:
        asked.append(source.rsplit(":", 1)[1])
        if not has_kmod:
            raise build.ImgbuildError("no such tag")

    monkeypatch.setattr(images, "copy", copy)
    monkeypatch.setattr(images, "tag", lambda *_: None)
    monkeypatch.setattr(images, "remove", lambda *_: None)
    monkeypatch.setattr(images, "labels", lambda _: {"io.imgbuild.key": str(items["kmod-nvidia"].key)})
    made = SimpleNamespace(selection=cored.load("debian", "nvidia"))
    report = Report(io.StringIO(), quiet=True)
    builder = build._Builder(
        made,
        list(items.values()),
        None,
        report,
        build.Options(cache="r.example/c"),  # type: ignore[arg-type]
    )
    builder.pull_kmods(list(items.values()))
    wanted = ["kmod-nvidia"] if has_kmod else ["kmod-nvidia", "kmod-nvidia-core"]
    assert asked == [f"{name}-{items[name].key}" for name in wanted]
