"""Modules and kernels as files, on small ELF files of our own making."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest
from elf_writer import SIGNATURE, compress, write_bzimage, write_elf, write_kernel, write_module

from imagebuild.kernel_modules import (
    ModuleSymbols,
    UnreadableError,
    disagreement,
    find_symvers,
    inside,
    module_files,
    module_name,
    read_depmod,
    read_index,
    read_kernel_exports,
    read_modinfo,
    read_module_symbols,
    read_symvers,
    scan_modules,
    unpack,
)

RELEASE = "6.12.1-test"
VERMAGIC = f"{RELEASE} SMP preempt mod_unload modversions "


def put(root: Path, path: str, content: bytes) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# --- paths and compression --------------------------------------------------------------------------


def test_inside_absolute_link_stays_in_image(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/real/file", b"")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/link").symlink_to("/usr/lib/real")
    (tmp_path / "etc/up").symlink_to("../../../../usr/lib")
    assert inside(tmp_path, "/etc/link/file") == tmp_path / "usr/lib/real/file"
    assert inside(tmp_path, "etc/up/real") == tmp_path / "usr/lib/real"
    assert inside(tmp_path, "etc/missing/x") == tmp_path / "etc/missing/x"


def test_inside_circle_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UnreadableError, match="circle"):
        inside(tmp_path, "a")


@pytest.mark.parametrize("how", ["xz", "zst", "gz", ""])
def test_unpack_known_compression_gives_the_data(how: str) -> None:
    assert unpack(compress(b"kernel" * 100, how)) == b"kernel" * 100


@pytest.mark.parametrize("how", ["xz", "zst", "gz"])
def test_unpack_ignores_what_follows_but_not_what_is_missing(how: str) -> None:
    data = compress(bytes(range(256)) * 10, how)
    assert unpack(data + b"tail") == bytes(range(256)) * 10
    with pytest.raises(UnreadableError):
        unpack(data[: len(data) // 2])


def test_unpack_lz4_is_refused() -> None:
    with pytest.raises(UnreadableError, match="LZ4"):
        unpack(b"\x02\x21\x4c\x18rest")


# --- modules ----------------------------------------------------------------------------------------


def test_module_name_is_what_modprobe_says() -> None:
    assert module_name(PurePosixPath("extra/nvidia-uvm.ko.xz")) == "nvidia_uvm"


def test_scan_reads_every_compression_and_names_broken_files(tmp_path: Path) -> None:
    tree = f"usr/lib/modules/{RELEASE}"
    in_tree = write_module(VERMAGIC, info={"intree": "Y"})
    put(tmp_path, f"{tree}/kernel/a.ko", in_tree + SIGNATURE)
    put(tmp_path, f"{tree}/kernel/b.ko.xz", compress(in_tree, "xz"))
    put(tmp_path, f"{tree}/kernel/c.ko.zst", compress(write_module(VERMAGIC), "zst"))
    put(tmp_path, f"{tree}/extra/d.ko.gz", compress(in_tree, "gz"))
    put(tmp_path, f"{tree}/extra/e.ko", b"no module")
    put(tmp_path, f"{tree}/build/readme.txt", b"")
    found = scan_modules(tmp_path, RELEASE)
    assert {str(m.path): (m.signed, m.out_of_tree) for m in found.modules} == {
        "kernel/a.ko": (True, False),
        "kernel/b.ko.xz": (False, False),
        "kernel/c.ko.zst": (False, True),  # no intree mark: NVIDIA installs below kernel/
        "extra/d.ko.gz": (False, True),
    }
    assert found.broken == ((PurePosixPath("extra/e.ko"), "not a 64-bit little-endian ELF file"),)
    assert {m.vermagic for m in found.modules} == {VERMAGIC.strip()}
    assert len(module_files(tmp_path / tree)) == 5


def test_modinfo_repeated_field_keeps_all_values() -> None:
    data = write_elf({".modinfo": b"alias=one\0alias=two=2\0\0name=x\0"})
    assert read_modinfo(data) == {"alias": ("one", "two=2"), "name": ("x",)}


def test_modinfo_missing_or_damaged_is_an_error() -> None:
    with pytest.raises(UnreadableError, match=r"no \.modinfo"):
        read_modinfo(write_elf({}))
    with pytest.raises(UnreadableError, match="damaged"):
        read_modinfo(write_module(VERMAGIC)[:-40])


def test_module_symbols_exports_needs_and_versions() -> None:
    data = write_module(
        VERMAGIC,
        versions={"module_layout": 1, "printk": 2},
        extended={"a_very_long_rust_symbol" * 4: 3},
        weak=["maybe"],
        exports={"first": 0xAAAAAAAA, "second": 0xBBBBBBBB},
    )
    symbols = read_module_symbols(data)
    assert symbols.exports == {"first": 0xAAAAAAAA, "second": 0xBBBBBBBB}
    assert symbols.versions == {"module_layout": 1, "printk": 2, "a_very_long_rust_symbol" * 4: 3}
    assert symbols.undefined == {"printk", "a_very_long_rust_symbol" * 4}
    assert symbols.weak == {"maybe"}


def test_module_symbols_stripped_names_are_an_error() -> None:
    data = write_elf({"__ksymtab": bytes(12), "__kcrctab": bytes(4)})
    with pytest.raises(UnreadableError, match="stripped"):
        read_module_symbols(data)


def test_disagreement_names_each_kind() -> None:
    module = ModuleSymbols(
        {}, {"module_layout": 1, "same": 2, "other": 3}, frozenset({"same", "other", "bare"})
    )
    exports: dict[str, int | None] = {"module_layout": 1, "same": 2, "other": 3, "bare": None}
    assert not disagreement(module, exports)
    found = disagreement(module, {"module_layout": 9, "same": 2, "bare": 7})
    assert found.mismatched == ("module_layout",)
    assert found.unknown == ("other",)
    assert found.unversioned == ("bare",)
    assert disagreement(module, {**exports, "bare": 5}).unversioned == ("bare",)


def test_disagreement_weak_symbol_need_not_exist() -> None:
    module = ModuleSymbols({}, {"maybe": 1}, frozenset(), frozenset({"maybe"}))
    assert not disagreement(module, {})
    assert disagreement(module, {"maybe": 2}).mismatched == ("maybe",)


# --- kernel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["xz", "zst", "gz", ""])
def test_kernel_exports_from_bzimage(how: str) -> None:
    kernel = write_kernel({"printk": 0xDEADBEEF, "module_layout": 1}, {"gpl_only": 3})
    expected = {"printk": 0xDEADBEEF, "module_layout": 1, "gpl_only": 3}
    assert read_kernel_exports(write_bzimage(kernel, how)) == expected
    assert read_kernel_exports(kernel) == expected


def test_kernel_exports_without_tables_is_an_error() -> None:
    with pytest.raises(UnreadableError, match="no export tables"):
        read_kernel_exports(write_bzimage(write_elf({".text": b"x"})))
    with pytest.raises(UnreadableError, match="ELF"):
        read_kernel_exports(b"MZ an arm64 image")


def test_kernel_exports_without_modversions_have_no_crc() -> None:
    full = write_kernel({"printk": 1})
    bare = full.replace(b"__kcrctab\0", b"__nothing\0")
    assert read_kernel_exports(bare) == {"printk": None}


@pytest.mark.parametrize("how", ["", "xz", "gz", "zst"])
def test_symvers_gives_what_the_kernel_itself_exports(tmp_path: Path, how: str) -> None:
    text = (
        "0xdeadbeef\tprintk\tvmlinux\tEXPORT_SYMBOL\t\n0x00000001\tdrm_x\tdrivers/drm\tEXPORT_SYMBOL_GPL\t\n"
    )
    name = f"symvers.{how}" if how else "Module.symvers"
    assert find_symvers(tmp_path) is None
    file = put(tmp_path, name, compress(text.encode(), how))
    assert find_symvers(tmp_path) == file
    assert read_symvers(file) == {"printk": 0xDEADBEEF}


def test_symvers_damaged_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError):
        read_symvers(put(tmp_path, "symvers", b"nonsense\n"))
    with pytest.raises(UnreadableError):
        read_symvers(put(tmp_path, "symvers", b""))


# --- depmod -----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("depmod") is None, reason="needs kmod")
def test_depmod_files_agree_with_their_indexes(tmp_path: Path) -> None:
    tree = tmp_path / "usr/lib/modules" / RELEASE
    (tmp_path / "lib").symlink_to("usr/lib")
    one = write_module(VERMAGIC, info={"alias": "pci:v1-d[a-f]*"}, exports={"one_fn": 1})
    put(tree, "kernel/one.ko", one)
    put(tree, "extra/two-b.ko.xz", compress(write_module(VERMAGIC, versions={"one_fn": 1}), "xz"))
    subprocess.run(["depmod", "-b", tmp_path, RELEASE], check=True)
    found = read_depmod(tree)
    assert found.stale == ()
    assert found.dependencies == {
        PurePosixPath("kernel/one.ko"): (),
        PurePosixPath("extra/two-b.ko.xz"): (PurePosixPath("kernel/one.ko"),),
    }
    assert found.aliases == {"one": {"pci:v1-d[a-f]*"}}
    assert found.symbols == {"one_fn": "one"}
    with (tree / "modules.dep").open("a") as file:
        file.write("extra/three.ko:\n")
    assert read_depmod(tree).stale == ("modules.dep.bin",)
    (tree / "modules.alias.bin").unlink()
    with pytest.raises(UnreadableError, match=r"modules\.alias\.bin"):
        read_depmod(tree)


def test_index_damaged_is_an_error() -> None:
    with pytest.raises(UnreadableError, match="not an index"):
        list(read_index(b"something else entirely"))
    with pytest.raises(UnreadableError, match="damaged"):
        list(read_index(bytes.fromhex("b007f457 00020001 2fffffff")))
