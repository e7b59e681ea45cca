"""Small but real files for tests: ELF modules, a bzImage around an ELF kernel, layers."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import zstandard

SHT = {".symtab": 2, ".strtab": 3, ".shstrtab": 3}
SIGNATURE = b"\0signature\0~Module signature appended~\n"
XZ_OPTIONS = {"format": lzma.FORMAT_XZ, "check": lzma.CHECK_CRC32}  # as the kernel's own build


def write_elf(
    sections: Mapping[str, bytes],
    symbols: Sequence[tuple[str, str | None, int, bool]] = (),
    addresses: Mapping[str, int] | None = None,
) -> bytes:
    """An ELF64 file; a symbol is name, section (None: undefined), value, weak."""
    names = ["", *sections, ".symtab", ".strtab", ".shstrtab"]
    strings, table = b"\0", bytes(24)
    for name, section, value, weak in symbols:
        index = names.index(section) if section else 0
        table += struct.pack("<IBBHQQ", len(strings), (2 if weak else 1) << 4, 0, index, value, 0)
        strings += name.encode() + b"\0"
    section_names = b"".join(name.encode() + b"\0" for name in names)
    contents = [b"", *sections.values(), table, strings, section_names]
    body, headers = b"", b""
    for i, (name, content) in enumerate(zip(names, contents, strict=True)):
        kind = SHT.get(name, 1 if name else 0)
        link, entry = (len(names) - 2, 24) if name == ".symtab" else (0, 0)
        headers += struct.pack(
            "<IIQQQQIIQQ",
            section_names.index(name.encode() + b"\0") if i else 0,
            kind,
            2,
            (addresses or {}).get(name, 0),
            64 + len(body),
            len(content),
            link,
            1 if name == ".symtab" else 0,
            8,
            entry,
        )
        body += content + bytes(-len(content) % 8)
    start = 64 + len(body)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, start, 0, 64, 0, 0, 64, len(names), len(names) - 1)
    return ident + header + body + headers


def modversions(versions: Mapping[str, int]) -> bytes:
    return b"".join(struct.pack("<Q56s", crc, name.encode()) for name, crc in versions.items())


def write_module(
    vermagic: str,
    *,
    info: Mapping[str, str] | None = None,
    versions: Mapping[str, int] | None = None,
    undefined: Sequence[str] | None = None,
    weak: Sequence[str] = (),
    exports: Mapping[str, int] | None = None,
    extended: Mapping[str, int] | None = None,
    signed: bool = False,
) -> bytes:
    """A module as modpost leaves it, as far as anyone here reads it."""
    fields = {"license": "GPL", **(info or {}), "vermagic": vermagic}
    sections = {".modinfo": b"".join(f"{k}={v}\0".encode() for k, v in fields.items())}
    versions = versions or {}
    sections["__versions"] = modversions(versions)
    if extended:
        sections["__version_ext_crcs"] = b"".join(struct.pack("<I", crc) for crc in extended.values())
        sections["__version_ext_names"] = b"".join(name.encode() + b"\0" for name in extended)
    names = [*versions, *(extended or {})] if undefined is None else undefined
    symbols = [(name, None, 0, False) for name in names if name != "module_layout"]
    symbols += [(name, None, 0, True) for name in weak]
    exports = exports or {}
    if exports:
        sections["__ksymtab"] = bytes(12 * len(exports))
        sections["__kcrctab"] = b"".join(struct.pack("<I", crc) for crc in exports.values())
        sections["__ksymtab_strings"] = b"".join(name.encode() + b"\0" for name in exports)
        # Not in the order of the table, as in real modules.
        symbols += [(f"__ksymtab_{name}", "__ksymtab", 12 * i, False) for i, name in enumerate(exports)][::-1]
    return write_elf(sections, symbols) + (SIGNATURE if signed else b"")


def write_kernel(exports: Mapping[str, int], gpl: Mapping[str, int] | None = None) -> bytes:
    """A linked kernel as ELF file: export tables with relative entries."""
    names = b"".join(name.encode() + b"\0" for name in [*exports, *(gpl or {})])
    addresses = {"__ksymtab": 0x1000, "__ksymtab_gpl": 0x2000, "__ksymtab_strings": 0x3000}
    sections: dict[str, bytes] = {}
    for table, symbols in (("__ksymtab", exports), ("__ksymtab_gpl", gpl or {})):
        entries = b""
        for name in symbols:
            target = addresses["__ksymtab_strings"] + names.index(name.encode() + b"\0")
            entries += struct.pack("<iii", 0, target - (addresses[table] + len(entries) + 4), 0)
        sections[table] = entries
        sections[table.replace("ksymtab", "kcrctab")] = b"".join(
            struct.pack("<I", crc) for crc in symbols.values()
        )
    return write_elf({**sections, "__ksymtab_strings": names}, addresses=addresses)


def compress(data: bytes, how: str) -> bytes:
    if how == "xz":
        return lzma.compress(data, **XZ_OPTIONS)  # type: ignore[arg-type]
    if how == "zst":
        return zstandard.ZstdCompressor().compress(data)
    return gzip.compress(data, mtime=0) if how == "gz" else data


def write_bzimage(kernel: bytes, how: str = "zst") -> bytes:
    """A boot image around a kernel, by the x86 boot protocol 2.15, with the size after the payload."""
    payload = compress(kernel, how) + (struct.pack("<I", len(kernel)) if how != "gz" else b"")
    setup_sectors, offset = 3, 100
    image = bytearray((setup_sectors + 1) * 512 + offset)
    image[0x1F1] = setup_sectors
    image[0x202:0x208] = b"HdrS\x0f\x02"
    struct.pack_into("<II", image, 0x248, offset, len(payload))
    return bytes(image) + payload + b"whatever follows"


def write_layer(path: Path, files: Mapping[str, bytes], how: str = "") -> Path:
    """A layer: a tar file, optionally compressed."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(compress(stream.getvalue(), how))
    return path
