"""The part of a driver that no kernel has a say in, on the small module: compiled once, linked into each."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from imagebuild import images
from imagebuild.load import shipped

from ..rehearsal import contents
from ..rehearsal.look_alike import Rehearsal
from .registries import Registry
from .workshop import TOY_BUILD, TOY_CENTOS, Site, toy_centos_site

CORE = """\
    core:
      build: |
        test ! -e /usr/include/linux && test ! -e "/usr/lib/modules/$(uname -r)/build"
        test -e /usr/include/stdio.h && test ! -e main.c
        cc -c -O2 -ffreestanding -fno-pic -mcmodel=kernel -mno-red-zone -fcf-protection=branch \
            -mfunction-return=thunk-extern -fno-asynchronous-unwind-tables -o core/answer.o core/answer.c
      sources: [core]
      outputs: {core/answer.o: answer.o_binary}
    build_packages: [libc6-dev]
    package:
"""
KBUILD = """\
obj-m := toy.o
toy-y := main.o answer.o
targets += answer.o
$(obj)/answer.o: $(src)/answer.o_binary FORCE
\t$(call if_changed,copy)
"""
ANSWER = "int toy_core_answer(void);\nint toy_core_answer(void)\n{\n\treturn 42;\n}\n"
PATCH = """\
--- a/core/answer.c
+++ b/core/answer.c
@@ -1,5 +1,5 @@
 int toy_core_answer(void);
 int toy_core_answer(void)
 {
-\treturn 42;
+\treturn 43;
 }
--- a/main.c
+++ b/main.c
@@ -1,4 +1,4 @@
-// A real kernel module that compiles in seconds: exports a symbol, uses some of the kernel's.
+// A real kernel module.
 #include <linux/kernel.h>
 #include <linux/module.h>
 #include <linux/pci.h>
"""
RULE = """\
rules:
  - kmod: toy
    kernel: ">=6.12"
    verdict: patch
    patch: patches/answer.patch
    reason: a rule of this test
"""


def with_core(site: Site, base: str = "debian", headers: str = "libc6-dev") -> Site:
    """Give the toy module a core; `headers` is the package of the C library's."""
    site.write("source/core/answer.c", ANSWER)
    site.write("source/Kbuild", KBUILD)
    (site.folder / "source/toy.c").rename(site.folder / "source/main.c")
    site.edit("source/main.c", "int toy_answer(void);", "int toy_answer(void);\nint toy_core_answer(void);")
    site.edit("source/main.c", "return 42;", "return toy_core_answer();")
    site.edit(f"base/{base}/toy/vendor.yaml", "    package:\n", CORE.replace("libc6-dev", headers))
    return site


@pytest.fixture(scope="module")
def first(make_site: Callable[[str], Site], toy_lock: str) -> tuple[Site, Any]:
    """A site whose module has a core, and the result of its first build."""
    from .workshop import toy_site

    site = make_site("core")
    toy_site(site.folder, site.env)
    with_core(site).write("imgbuild.lock", toy_lock)
    return site, site.build(*TOY_BUILD)


@pytest.fixture
def cored(first: tuple[Site, Any], toy: Site) -> Site:
    """A fresh site whose module has a core, all of it built."""
    with_core(toy).write("imgbuild.lock", (first[0].folder / "imgbuild.lock").read_text())
    return toy


def symbols(image: str) -> dict[str, str]:
    """The symbols of the module in an image → the section each is in."""
    with images.mounted(image) as root:
        (module,) = root.glob("usr/lib/modules/*/extra/toy/toy.ko.xz")
        elf = ELFFile(io.BytesIO(lzma.decompress(module.read_bytes())))
    return {
        symbol.name: str(symbol["st_shndx"]) for symbol in elf.get_section_by_name(".symtab").iter_symbols()
    }


def test_core_is_compiled_without_kernel_headers_and_linked_in(first: tuple[Site, Any]) -> None:
    site, built = first
    assert site.nodes(built) == {
        "tier1": "cached", "kernel": "cached", "builder": "cached",
        "toolchain": "built", "kmod-toy-core": "built", "kmod-toy": "built", "tier2": "built",
    }  # fmt: skip
    found = symbols(built["image"])
    assert "toy_core_answer" in found and found["toy_core_answer"] != "SHN_UNDEF"
    assert found["pci_num_vf"] == "SHN_UNDEF"
    report = site.run("check", "--json", built["image"]).json
    assert {"symbol-crcs", "vermagic", "modprobe-resolves"} <= set(report["passed"])
    (core,) = [node["image"] for node in built["nodes"] if node["name"] == "kmod-toy-core"]
    with images.mounted(core) as root:
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        assert files == ["files/answer.o_binary", "manifest.json"]
        assert json.loads((root / "manifest.json").read_text())["driver"] == "toy"


def test_second_kernel_takes_the_core_as_it_is(cored: Site, first: tuple[Site, Any]) -> None:
    cored.write("base/debian/base.yaml", (shipped() / "base/debian/base.yaml").read_text())
    cored.edit(
        "base/debian/base.yaml", "packages: [linux-image-amd64,", "packages: [linux-image-cloud-amd64,"
    )
    cored.edit("base/debian/base.yaml", r"deb13-amd64'", r"deb13-cloud-amd64'")
    built = cored.build(*TOY_BUILD)
    assert images.labels(built["image"])["io.imgbuild.kernel-release"].endswith("-cloud-amd64")
    nodes = cored.nodes(built)
    assert nodes.pop("toolchain") in ("cached", "not needed") and nodes.pop("tier1") == "cached"
    assert nodes.pop("kmod-toy-core") == "cached"
    assert nodes == {"kernel": "built", "builder": "built", "kmod-toy": "built", "tier2": "built"}
    assert symbols(built["image"])["toy_core_answer"] != "SHN_UNDEF"
    report = cored.run("check", "--json", built["image"]).json
    assert {"symbol-crcs", "vermagic", "modprobe-resolves"} <= set(report["passed"])


def test_core_comes_out_the_same_again(cored: Site, first: tuple[Site, Any]) -> None:
    image = {node["name"]: node["image"] for node in first[1]["nodes"]}
    before = images.by_name()[image["kmod-toy-core"]].digest
    images.remove([image[name] for name in ("kmod-toy-core", "kmod-toy", "tier2", "toolchain")])
    again = cored.build(*TOY_BUILD)
    assert cored.nodes(again)["kmod-toy-core"] == cored.nodes(again)["toolchain"] == "built"
    assert images.by_name()[image["kmod-toy-core"]].digest == before
    assert again["digest"] == first[1]["digest"]


def test_change_beside_the_core_leaves_it_and_a_change_in_it_does_not(cored: Site) -> None:
    cored.edit("source/main.c", "the answer is", "the only answer is")
    assert cored.nodes(cored.build(*TOY_BUILD))["kmod-toy-core"] == "cached"
    cored.edit("source/core/answer.c", "42", "41")
    assert cored.nodes(cored.build(*TOY_BUILD))["kmod-toy-core"] == "built"


def test_patch_that_touches_the_core_is_applied_in_it(cored: Site) -> None:
    cored.write("base/debian/toy/compat.yaml", RULE)
    cored.write("base/debian/toy/patches/answer.patch", PATCH)
    nodes = cored.nodes(cored.build(*TOY_BUILD))
    assert nodes["kmod-toy-core"] == nodes["kmod-toy"] == "built"
    log = Path(cored.env["IMGBUILD_STATE_DIR"]) / "logs"
    assert "patching file core/answer.c" in (log / "debian-kmod-toy-core.log").read_text()
    assert "taking the core" in (log / "debian-kmod-toy.log").read_text()


def test_core_that_does_not_compile_says_so(cored: Site) -> None:
    cored.edit("source/core/answer.c", "42", "fourty_two")
    failed = cored.run("build", *TOY_BUILD, code=1)
    assert "the core of toy 1.0 does not compile" in failed.err and "fourty_two" in failed.err


def test_probe_takes_the_core(cored: Site) -> None:
    cored.edit("source/main.c", "the answer is", "the probed answer is")
    probed = cored.run("compat", *TOY_BUILD, "--probe", "--json").json
    assert probed[0]["compiled"] is True


def test_cache_registry_holds_cores_too(cored: Site, registry: Registry) -> None:
    cored.write("mirrors.yaml", f"insecure: ['{registry.address}']\n")
    cache = ("--cache", f"{registry.address}/cores", "--mirror-map", "mirrors.yaml")
    cored.edit("source/core/answer.c", "42", "40")
    done = {node["name"]: node for node in cored.build(*TOY_BUILD, *cache)["nodes"]}
    wanted = [f"{name}-{done[name]['key']}" for name in ("kmod-toy", "kmod-toy-core")]
    assert sorted(registry.tags("cores")) == sorted(wanted)
    images.remove([done["kmod-toy-core"]["image"]])
    cored.edit("source/main.c", "the answer is", "the cached answer is")
    nodes = cored.nodes(cored.build(*TOY_BUILD, *cache))
    assert nodes["kmod-toy-core"] == "pulled" and nodes["kmod-toy"] == "built"


def test_core_on_an_rpm_base_has_a_compiler_without_kernel_headers(
    make_site: Callable[[str], Site], rehearsal: Rehearsal
) -> None:
    site = with_core(toy_centos_site(make_site("core-centos")), "centos", "glibc-devel")
    words = (*TOY_CENTOS, "--mirror-map", str(rehearsal.mirror_map))
    built = site.build(*words)
    nodes = {node["name"]: node for node in built["nodes"]}
    assert nodes["kmod-toy-core"]["status"] == nodes["kmod-toy"]["status"] == "built"
    assert symbols(built["image"])["toy_core_answer"] != "SHN_UNDEF"
    report = site.run("check", "--json", built["image"]).json
    assert {"symbol-crcs", "vermagic", "modules-owned", "package-files"} <= set(report["passed"])
    # The compiler's packages bring headers of the kernel, which only the core's own stage takes away.
    with images.mounted(nodes["toolchain"]["image"]) as root:
        assert (root / "usr/include/linux").is_dir()
    # Another kernel, the same core.
    site.write("imgbuild.yaml", f'kernel: "{contents.release_of(contents.KERNELS["old"])}"\n')
    site.run("lock", *words)
    planned = {node["name"]: node for node in site.run("plan", "--json", *words).json["nodes"]}
    assert planned["kmod-toy-core"]["key"] == nodes["kmod-toy-core"]["key"]
    assert planned["kmod-toy"]["key"] != nodes["kmod-toy"]["key"]
