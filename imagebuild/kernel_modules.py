"""Kernel modules and kernel images as files: what they say of themselves, what they export and need.

Nothing here runs a program or loads a module. Sources: the kernel's `include/linux/export-internal.h`,
`kernel/module/version.c`, `scripts/module-common.lds` and `Documentation/arch/x86/boot.rst`; kmod's
`libkmod/libkmod-index.c`.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import zstandard

from imagebuild.errors import ImgbuildError

MODULES = PurePosixPath("usr/lib/modules")
MODULE_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
SYMVERS_NAMES = ("Module.symvers", "symvers", "symvers.gz", "symvers.xz", "symvers.zst")
SIGNATURE_TRAILER = b"~Module signature appended~\n"  # kernel: include/linux/module_signature.h
MAX_LINKS = 40  # as path_resolution(7)
_PREL32_ENTRY = 12  # struct kernel_symbol with CONFIG_HAVE_ARCH_PREL32_RELOCATIONS: three ints
_MODVERSION = struct.Struct("<Q56s")  # struct modversion_info on 64-bit machines


class UnreadableError(ImgbuildError):
    """A file is damaged, or in a form that this module does not know."""


# --- files of a mounted image -----------------------------------------------------------------------


def inside(root: Path, path: str | PurePosixPath) -> Path:
    """Where `path` of an image lies on this machine, links followed as if `root` were `/`.

    The last part need not exist. Raises UnreadableError for links in a circle.
    """
    parts = [part for part in PurePosixPath(path).parts if part != "/"][::-1]
    found = root
    links = 0
    while parts:
        part = parts.pop()
        if part == "..":
            found = found.parent if found != root else root
            continue
        step = found / part
        if step.is_symlink():
            links += 1
            if links > MAX_LINKS:
                raise UnreadableError(f"`{path}` is a circle of links")
            target = step.readlink()
            if target.is_absolute():
                found = root
            parts += [piece for piece in target.parts if piece != "/"][::-1]
        else:
            found = step
    return found


def unpack(data: bytes) -> bytes:
    """Decompress by what the data starts with; anything else comes back as it is.

    Whatever follows the compressed stream is ignored: a kernel payload has its size there.
    Raises UnreadableError for damaged data and for LZ4 and LZO, which nothing here reads.
    """
    stream: Any
    if data.startswith(b"\xfd7zXZ\0"):
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    elif data.startswith(b"\x28\xb5\x2f\xfd"):
        stream = zstandard.ZstdDecompressor().decompressobj()
    elif data.startswith(b"\x1f\x8b"):
        stream = zlib.decompressobj(31)
    elif data.startswith(b"BZh"):
        stream = bz2.BZ2Decompressor()
    elif data.startswith(b"\x5d\0\0"):
        stream = lzma.LZMADecompressor(lzma.FORMAT_ALONE)
    elif data.startswith((b"\x02\x21\x4c\x18", b"\x04\x22\x4d\x18", b"\x89LZO")):
        raise UnreadableError("LZ4 and LZO compression cannot be read")
    else:
        return data
    try:
        plain: bytes = stream.decompress(data)
    except (lzma.LZMAError, zstandard.ZstdError, zlib.error, OSError, ValueError) as error:
        raise UnreadableError(f"damaged compressed data: {error}") from None
    if not stream.eof:
        raise UnreadableError("the compressed data ends too early")
    return plain


# --- modules ----------------------------------------------------------------------------------------


def module_name(path: PurePosixPath) -> str:
    """The name modprobe knows a module file by: no suffix, underscores for dashes."""
    return path.name.split(".ko")[0].replace("-", "_")


@dataclass(frozen=True)
class Module:
    """One module file, as its `.modinfo` section describes it. `path` is relative to the module tree."""

    path: PurePosixPath
    info: Mapping[str, tuple[str, ...]]
    signed: bool

    @property
    def name(self) -> str:
        return module_name(self.path)

    @property
    def vermagic(self) -> str:
        return self.first("vermagic").strip()

    @property
    def version(self) -> str:
        return self.first("version")

    @property
    def out_of_tree(self) -> bool:
        """Compiled apart from the kernel: modpost marks what it builds with the kernel `intree=Y`.

        The folder alone does not tell: NVIDIA's own makefile installs below `kernel/`.
        """
        return "intree" not in self.info or self.path.parts[0] != "kernel"

    def first(self, field: str) -> str:
        """The first value of a `.modinfo` field; empty if there is none."""
        return self.info.get(field, ("",))[0]


@dataclass(frozen=True)
class ModuleTree:
    """All modules of one kernel, by path; `broken` are files that cannot be read, with the reason."""

    folder: Path
    modules: tuple[Module, ...]
    broken: tuple[tuple[PurePosixPath, str], ...] = ()

    @property
    def out_of_tree(self) -> tuple[Module, ...]:
        return tuple(module for module in self.modules if module.out_of_tree)


def module_files(folder: Path) -> list[PurePosixPath]:
    """Every module file below a module tree, relative to it, sorted."""
    found = []
    for where, _, names in os.walk(folder):
        for name in names:
            if name.endswith(MODULE_SUFFIXES):
                found.append(PurePosixPath(Path(where, name).relative_to(folder)))
    return sorted(found)


def read_module_file(root: Path, release: str, path: PurePosixPath) -> bytes:
    """A module, decompressed. Raises UnreadableError."""
    try:
        return unpack(inside(root, MODULES / release / path).read_bytes())
    except OSError as error:
        raise UnreadableError(f"{error.strerror}") from None


def scan_modules(root: Path, release: str, jobs: int | None = None) -> ModuleTree:
    """Read `.modinfo` of every module of a kernel.

    Threads, because the decompressors run without Python's lock: 4230 xz modules of Debian take
    5 s on 2 cores, nearly all of it decompression.
    """
    folder = inside(root, MODULES / release)
    files = module_files(folder)

    def read(path: PurePosixPath) -> Module | tuple[PurePosixPath, str]:
        try:
            data = read_module_file(root, release, path)
            return Module(path, read_modinfo(data), data.endswith(SIGNATURE_TRAILER))
        except UnreadableError as error:
            return path, error.what

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        results = list(pool.map(read, files))
    return ModuleTree(
        folder,
        tuple(result for result in results if isinstance(result, Module)),
        tuple(result for result in results if not isinstance(result, Module)),
    )


def read_modinfo(data: bytes) -> dict[str, tuple[str, ...]]:
    """The fields of a module's `.modinfo` section, each with all its values in order.

    Walks the section headers with `struct`: for a whole kernel that takes 0.1 s, with pyelftools 7 s.
    Raises UnreadableError.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise UnreadableError("not a 64-bit little-endian ELF file")
    try:
        (offset,) = struct.unpack_from("<Q", data, 0x28)
        size, count, names = struct.unpack_from("<HHH", data, 0x3A)
        headers = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
        base = headers[names][4]
        section = next((h for h in headers if data.startswith(b".modinfo\0", base + h[0])), None)
    except (struct.error, IndexError):
        raise UnreadableError("the ELF section headers are damaged") from None
    if section is None:
        raise UnreadableError("no .modinfo section")
    info: dict[str, tuple[str, ...]] = {}
    for entry in data[section[4] : section[4] + section[5]].split(b"\0"):
        name, equals, value = entry.decode("utf-8", "replace").partition("=")
        if equals:
            info[name] = (*info.get(name, ()), value)
    return info


# --- symbols ----------------------------------------------------------------------------------------

Exports = Mapping[str, int | None]
"""Exported symbol → CRC; None where the kernel is built without CONFIG_MODVERSIONS."""


@dataclass(frozen=True)
class ModuleSymbols:
    """What a module exports and what it needs.

    `versions` are the CRCs recorded when it was compiled; `undefined` must be exported by someone for
    the module to load, `weak` need not.
    """

    exports: Exports
    versions: Mapping[str, int]
    undefined: frozenset[str]
    weak: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Disagreement:
    """How a module does not fit what is exported: symbols, sorted."""

    unknown: tuple[str, ...] = ()
    """Nobody exports them."""
    mismatched: tuple[str, ...] = ()
    """Exported, but with another CRC: the interface changed."""
    unversioned: tuple[str, ...] = ()
    """Needed without a CRC, though the kernel has them: compiled without the kernel's Module.symvers."""

    def __bool__(self) -> bool:
        return bool(self.unknown or self.mismatched or self.unversioned)


def disagreement(module: ModuleSymbols, exports: Exports) -> Disagreement:
    """Compare what a module needs with everything that is exported to it."""
    required = module.undefined | (module.versions.keys() & {"module_layout"})
    unknown = required - exports.keys()
    known = (required | module.weak | module.versions.keys()) & exports.keys()
    mismatched = set()
    unversioned = set()
    for symbol in known:
        exported = exports[symbol]
        if exported is None:
            continue
        if symbol not in module.versions:
            unversioned.add(symbol)
        elif module.versions[symbol] != exported:
            mismatched.add(symbol)
    return Disagreement(tuple(sorted(unknown)), tuple(sorted(mismatched)), tuple(sorted(unversioned)))


def read_module_symbols(data: bytes) -> ModuleSymbols:
    """What a module exports and needs. Raises UnreadableError."""
    elf = _Elf(data)
    exports: dict[str, int | None] = {}
    tables = {index: name for name in ("__ksymtab", "__ksymtab_gpl") if (index := elf.index(name))}
    crcs = {index: elf.crcs(name) for index, name in tables.items()}
    undefined: set[str] = set()
    weak: set[str] = set()
    for name, value, section, binding in elf.symbols():
        if section == "SHN_UNDEF":
            if name and name != "_GLOBAL_OFFSET_TABLE_":
                (weak if binding == "STB_WEAK" else undefined).add(name)
        elif section in tables and name.startswith("__ksymtab_"):
            values = crcs[section]
            entry = len(elf.data(tables[section])) // len(values) if values else _PREL32_ENTRY
            exports[name.removeprefix("__ksymtab_")] = values[value // entry] if values else None
    for index, name in tables.items():
        entries = len(crcs[index])
        if entries and not exports:
            raise UnreadableError(f"{entries} exports in {name}, but their names were stripped")
    return ModuleSymbols(exports, elf.versions(), frozenset(undefined), frozenset(weak))


def read_kernel_exports(vmlinuz: bytes) -> dict[str, int | None]:
    """What a kernel image exports to modules: bzImage, a compressed or a plain ELF file.

    An x86 bzImage carries the whole kernel as compressed ELF file whose section headers are kept,
    so that no System.map or Module.symvers is needed (the boot protocol ≥ 2.08 tells where).
    Raises UnreadableError where the image holds no such ELF file (arm64) or its symbols are not
    laid out as in kernels since 5.19.
    """
    elf = _Elf(unpack(_payload(vmlinuz)))
    strings, base = elf.data("__ksymtab_strings"), elf.address("__ksymtab_strings")
    exports: dict[str, int | None] = {}
    for table in ("__ksymtab", "__ksymtab_gpl"):
        entries, address = elf.data(table), elf.address(table)
        crcs: tuple[int | None, ...] = elf.crcs(table) or (None,) * (len(entries) // _PREL32_ENTRY)
        if len(entries) != len(crcs) * _PREL32_ENTRY:
            raise UnreadableError(f"{table} has {len(entries)} bytes for {len(crcs)} CRCs")
        for i, (_, name_offset, _) in enumerate(struct.iter_unpack("<iii", entries)):
            start = address + i * _PREL32_ENTRY + 4 + name_offset - base
            end = strings.find(b"\0", start)
            if not 0 <= start < end:
                raise UnreadableError(f"{table} points outside __ksymtab_strings")
            exports[strings[start:end].decode("ascii", "replace")] = crcs[i]
    if not exports:
        raise UnreadableError("the kernel image has no export tables")
    return exports


def _payload(vmlinuz: bytes) -> bytes:
    """The compressed kernel in an x86 bzImage; other data as it is."""
    if vmlinuz[0x202:0x206] != b"HdrS":
        return vmlinuz
    (protocol,) = struct.unpack_from("<H", vmlinuz, 0x206)
    if protocol < 0x208:
        raise UnreadableError(f"boot protocol {protocol >> 8}.{protocol & 255:02} does not tell the payload")
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    start = ((vmlinuz[0x1F1] or 4) + 1) * 512 + offset
    return vmlinuz[start : start + length]


def find_symvers(folder: Path) -> Path | None:
    """The kernel's list of exports beside its modules, if the distribution ships it (EL does)."""
    return next((folder / name for name in SYMVERS_NAMES if (folder / name).is_file()), None)


def read_symvers(path: Path) -> dict[str, int | None]:
    """What the kernel itself exports, from Module.symvers in any compression. Raises UnreadableError."""
    exports: dict[str, int | None] = {}
    try:
        text = unpack(path.read_bytes()).decode("ascii", "replace")
        for line in text.splitlines():
            crc, symbol, owner, *_ = line.split("\t")
            if owner == "vmlinux":
                exports[symbol] = int(crc, 16)
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{path.name} cannot be read: {error}") from None
    if not exports:
        raise UnreadableError(f"{path.name} names no export of the kernel")
    return exports


class _Elf:
    """The few things asked of one ELF file, through pyelftools."""

    def __init__(self, data: bytes) -> None:
        from elftools.common.exceptions import ELFError
        from elftools.construct import ConstructError
        from elftools.elf.elffile import ELFFile

        if data[:6] != b"\x7fELF\x02\x01":
            raise UnreadableError("not a 64-bit little-endian ELF file")
        try:
            self._file = ELFFile(io.BytesIO(data))
            self._indexes = {section.name: index for index, section in enumerate(self._file.iter_sections())}
        except (ELFError, ConstructError, ValueError) as error:
            raise UnreadableError(f"damaged ELF file: {error}") from None

    def index(self, name: str) -> int | None:
        return self._indexes.get(name)

    def _section(self, name: str) -> Any:
        index = self.index(name)
        return None if index is None else self._file.get_section(index)

    def data(self, name: str) -> bytes:
        section = self._section(name)
        return bytes(section.data()) if section is not None else b""

    def address(self, name: str) -> int:
        section = self._section(name)
        return int(section["sh_addr"]) if section is not None else 0

    def crcs(self, table: str) -> tuple[int, ...]:
        """The CRCs beside an export table, in its order; empty without CONFIG_MODVERSIONS."""
        name = table.replace("ksymtab", "kcrctab")
        if self.index(f".rela{name}"):
            raise UnreadableError(f"{name} holds relocations: a kernel before 5.19")
        data = self.data(name)
        return struct.unpack(f"<{len(data) // 4}I", data)

    def versions(self) -> dict[str, int]:
        """The CRCs a module was compiled against, in the classic and the extended form (≥ 6.14)."""
        data = self.data("__versions")
        if len(data) % _MODVERSION.size:
            raise UnreadableError("__versions has no whole number of entries")
        found = {
            name.split(b"\0")[0].decode("ascii", "replace"): int(crc)
            for crc, name in _MODVERSION.iter_unpack(data)
        }
        crcs = self.data("__version_ext_crcs")
        names = self.data("__version_ext_names").split(b"\0")
        for (crc,), name in zip(struct.iter_unpack("<I", crcs), names, strict=False):
            found[name.decode("utf-8", "replace")] = crc
        return found

    def symbols(self) -> Iterator[tuple[str, int, int | str, str]]:
        """Name, value, section index (or special name) and binding of every symbol."""
        table = self._section(".symtab")
        if table is None:
            raise UnreadableError("no symbol table")
        for symbol in table.iter_symbols():
            yield symbol.name, symbol["st_value"], symbol["st_shndx"], symbol["st_info"]["bind"]


# --- what depmod writes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class DepmodFiles:
    """`modules.dep`, `modules.alias` and `modules.symbols` as depmod wrote them.

    `stale` names the binary indexes that do not say what the text beside them says; modprobe reads
    only the binary form.
    """

    dependencies: Mapping[PurePosixPath, tuple[PurePosixPath, ...]]
    aliases: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Module name → its aliases."""
    symbols: Mapping[str, str] = field(default_factory=dict)
    """Exported symbol → name of the module that exports it."""
    stale: tuple[str, ...] = ()


def read_depmod(folder: Path) -> DepmodFiles:
    """Read what depmod wrote. Raises UnreadableError if a file is missing or damaged."""

    def lines(name: str) -> list[str]:
        try:
            text = (folder / name).read_text("utf-8", "replace")
        except OSError as error:
            raise UnreadableError(f"{name}: {error.strerror}") from None
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    def index(name: str) -> set[tuple[str, str]]:
        try:
            return set(read_index((folder / name).read_bytes()))
        except OSError as error:
            raise UnreadableError(f"{name}: {error.strerror}") from None

    dep_lines = lines("modules.dep")
    dependencies = {}
    for line in dep_lines:
        path, _, others = line.partition(":")
        dependencies[PurePosixPath(path)] = tuple(PurePosixPath(other) for other in others.split())
    aliases: dict[str, set[str]] = {}
    alias_pairs = set()
    for line in lines("modules.alias"):
        _, pattern, name = line.split(maxsplit=2)
        aliases.setdefault(name, set()).add(pattern)
        alias_pairs.add((pattern, name))
    symbols = {}
    for line in lines("modules.symbols"):
        _, pattern, name = line.split(maxsplit=2)
        symbols[pattern.removeprefix("symbol:")] = name
    expected: dict[str, set[tuple[str, str]]] = {
        "modules.dep.bin": {(module_name(PurePosixPath(line.partition(":")[0])), line) for line in dep_lines},
        "modules.alias.bin": {(_with_underscores(pattern), name) for pattern, name in alias_pairs},
        "modules.symbols.bin": {(f"symbol:{symbol}", name) for symbol, name in symbols.items()},
    }
    return DepmodFiles(
        dependencies,
        {name: frozenset(patterns) for name, patterns in aliases.items()},
        symbols,
        tuple(name for name, pairs in expected.items() if index(name) != pairs),
    )


def _with_underscores(pattern: str) -> str:
    """An alias as kmod looks it up: dashes are underscores, except in `[a-z]`."""
    return re.sub(r"\[[^]]*\]|-", lambda match: "_" if match[0] == "-" else match[0], pattern)


def read_index(data: bytes) -> Iterator[tuple[str, str]]:
    """Keys and values of one of kmod's binary indexes (format 2.1). Raises UnreadableError."""
    try:
        magic, version, root = struct.unpack_from(">III", data)
        if (magic, version >> 16) != (0xB007F457, 2):
            raise UnreadableError("not an index of kmod")
        # The high bits of a node's offset tell what it holds: 8 a prefix, 4 values, 2 children.
        pending = [(b"", root)]
        while pending:
            key, offset = pending.pop()
            place = offset & 0x0FFFFFFF
            if offset & 0x80000000:
                end = data.index(b"\0", place)
                key += data[place:end]
                place = end + 1
            if offset & 0x20000000:
                first, last = data[place], data[place + 1]
                children = struct.unpack_from(f">{last - first + 1}I", data, place + 2)
                place += 2 + 4 * len(children)
                pending += [(key + bytes([first + i]), child) for i, child in enumerate(children) if child]
            if offset & 0x40000000:
                (count,) = struct.unpack_from(">I", data, place)
                place += 4
                for _ in range(count):
                    end = data.index(b"\0", place + 4)
                    yield key.decode("utf-8", "replace"), data[place + 4 : end].decode("utf-8", "replace")
                    place = end + 1
    except (struct.error, ValueError, IndexError):
        raise UnreadableError("the index of kmod is damaged") from None
