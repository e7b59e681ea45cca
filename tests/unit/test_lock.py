"""The lock as a file and as a promise: stable text, damage refused, stale when what was asked for changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Outcome, Site
from hypothesis import given
from hypothesis import strategies as st
from synthetic_lock import locked_package, synthetic_section

from imagebuild.errors import DefinitionError
from imagebuild.lock import (
    LockedKmod,
    LockedPackage,
    Lockfile,
    Section,
    differences,
    dumps,
    fill,
    lock_path,
    read,
    request_of,
    section_of,
    upstream_version,
    write,
)

Imgbuild = Callable[..., Outcome]
COMBINATIONS = [(b, v) for b in ("debian", "centos") for v in ("nvidia", "amd", "none")]


# --- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "vendor"), COMBINATIONS)
def test_lock_written_and_read_is_the_same(site: Site, base: str, vendor: str) -> None:
    selection = site.load(base, vendor, with_layers=["zfs"])
    lock = Lockfile(sections={selection.section: synthetic_section(selection)})
    write(lock_path(selection), lock)
    assert read(lock_path(selection)) == lock
    assert section_of(read(lock_path(selection)), selection) is not None


def test_lock_has_one_package_per_line_and_sorted_keys(site: Site) -> None:
    selection = site.load("debian", "nvidia", with_layers=["zfs"])
    section = synthetic_section(selection, fillers=20)
    text = dumps(Lockfile(sections={"b": section, "a": section}))
    lines = text.splitlines()
    assert sum('"sha256"' in line for line in lines) == 2 * len(section.packages())
    assert all(line.count('"sha256"') <= 1 for line in lines)
    assert text.endswith("}\n") and not any(line.endswith(" ") for line in lines)
    data = json.loads(text)
    assert list(data["sections"]) == ["a", "b"]
    for each in data["sections"]["a"]["transactions"].values():
        assert all(list(package) == sorted(package) for package in each)


def test_lock_with_one_package_changed_differs_in_one_line(site: Site) -> None:
    selection = site.load("debian", "nvidia")
    one, two = (
        dumps(Lockfile(sections={"a": synthetic_section(selection, salts=salts)}))
        for salts in ({}, {"nvidia-smi": "rebuilt"})
    )
    changed = [(a, b) for a, b in zip(one.splitlines(), two.splitlines(), strict=True) if a != b]
    assert len(changed) == 1 and "nvidia-smi" in changed[0][0]


_KEY = st.text(alphabet='abz019.+~-é"\\ ', max_size=8)
_WORD = st.from_regex(r"[0-9][a-z0-9.+]{0,5}", fullmatch=True)
_PACKAGE = st.builds(
    LockedPackage,
    name=_WORD,
    version=_WORD,
    arch=_WORD,
    repository=_WORD,
    path=_WORD.map("./pool//{}.deb".format),
    size=st.integers(0, 10**12),
    sha256=st.sampled_from(["0" * 64, "ab" * 32]),
)
_SECTION = st.builds(
    Section,
    request=_KEY,
    kernel_release=_WORD,
    kmods=st.dictionaries(
        _KEY, st.builds(LockedKmod, version=_WORD, source=st.none() | _PACKAGE), max_size=2
    ),
    transactions=st.dictionaries(_KEY, st.lists(_PACKAGE, max_size=2).map(tuple), max_size=2),
)


@given(st.dictionaries(_KEY, _SECTION, max_size=2))
def test_any_lock_survives_being_text(sections: dict[str, Section]) -> None:
    lock = Lockfile(sections=sections)
    text = dumps(lock)
    assert msgspec.json.decode(text, type=Lockfile) == lock
    assert dumps(Lockfile(sections=dict(reversed(sections.items())))) == text


def test_missing_lock_is_an_empty_one(tmp_path: Path) -> None:
    assert read(tmp_path / "imgbuild.lock") == Lockfile()


def test_lock_of_1500_packages_is_read_and_written_fast(site: Site, tmp_path: Path) -> None:
    import time

    selection = site.load("debian", "nvidia")
    lock = Lockfile(sections={selection.section: synthetic_section(selection, fillers=1500)})
    began = time.process_time()
    write(tmp_path / "l", lock)
    assert read(tmp_path / "l") == lock
    assert time.process_time() - began < 2


# --- damage -----------------------------------------------------------------------------------------


def _package(data: Any) -> Any:
    return data["sections"]["debian/nvidia/cdi"]["transactions"]["tier2"][0]


def _kmod(data: Any) -> Any:
    return data["sections"]["debian/nvidia/cdi"]["kmods"]["nvidia"]


DAMAGE: dict[str, Callable[[Any], object]] = {
    "version of another format": lambda d: d.update(version=2),
    "sections is a list": lambda d: d.update(sections=[]),
    "no kernel release": lambda d: d["sections"]["debian/nvidia/cdi"].pop("kernel_release"),
    "size is text": lambda d: _package(d).update(size="12"),
    "size is negative": lambda d: _package(d).update(size=-1),
    "no SHA-256": lambda d: _package(d).pop("sha256"),
    "short SHA-256": lambda d: _package(d).update(sha256="abc"),
    "SHA-256 in capitals": lambda d: _package(d).update(sha256="AB" * 32),
    "SHA-256 with a line end": lambda d: _package(d).update(sha256="ab" * 32 + "\n"),
    "path that climbs": lambda d: _package(d).update(path="pool/../../../etc/passwd"),
    "path that is a folder": lambda d: _package(d).update(path="pool/x/"),
    "path that is empty": lambda d: _package(d).update(path=""),
    "path with a space": lambda d: _package(d).update(path="pool/a b.deb"),
    "path with a line end": lambda d: _package(d).update(path="pool/a.deb\n"),
    "path that ends in dots": lambda d: _package(d).update(path="pool/."),
    "name that climbs": lambda d: _package(d).update(name="../x"),
    "name with a command": lambda d: _package(d).update(name="x;id"),
    "name with a line end": lambda d: _package(d).update(name="x\n"),
    "version with a line end": lambda d: _package(d).update(version="1\nRUN id"),
    "kernel release with a line end": lambda d: d["sections"]["debian/nvidia/cdi"].update(
        kernel_release="6.12\nRUN id"
    ),
    "kernel release that climbs": lambda d: d["sections"]["debian/nvidia/cdi"].update(
        kernel_release="../../tmp"
    ),
    "base digest with an instruction": lambda d: d["sections"]["debian/nvidia/cdi"].update(
        base_digest="sha256:00\nRUN id"
    ),
    "driver version with a line end": lambda d: _kmod(d).update(version="1\nRUN id"),
    "driver version that climbs": lambda d: _kmod(d).update(version="../../etc"),
    "driver epoch with a line end": lambda d: _kmod(d).update(epoch="3\n"),
    "source package with a bad path": lambda d: _kmod(d)["source"].update(path="../x.deb"),
    "driver gone": lambda d: d["sections"]["debian/nvidia/cdi"].update(kmods={}),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_lock_is_refused_or_counts_as_stale(site: Site, what: str) -> None:
    selection = site.load("debian", "nvidia")
    path = lock_path(selection)
    write(path, Lockfile(sections={selection.section: synthetic_section(selection)}))
    data = json.loads(path.read_text())
    DAMAGE[what](data)
    path.write_text(json.dumps(data))
    try:
        section = section_of(read(path), selection)
    except DefinitionError as error:
        assert "imgbuild.lock" in error.what
    else:
        assert section is None


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"sections": {', b"[" * 100_000, b'{"x": ' * 5000]
)
def test_lock_that_is_no_lock_says_what_to_do(site: Site, imgbuild: Imgbuild, text: bytes) -> None:
    site.write("imgbuild.lock", text)
    found = imgbuild("plan", "--vendor", "nvidia")
    assert found.code == 2
    assert found.err.startswith("error: ") and "imgbuild.lock` is not a lock" in found.err
    assert "help: remove it; the next `imgbuild lock` writes it anew" in found.err


def test_truncated_lock_is_refused_wherever_it_was_cut(site: Site) -> None:
    selection = site.load("centos", "nvidia")
    text = dumps(Lockfile(sections={selection.section: synthetic_section(selection)}))
    for length in range(1, len(text) - 2, 97):
        site.write("imgbuild.lock", text[:length])
        with pytest.raises(DefinitionError, match="is not a lock"):
            read(site.folder / "imgbuild.lock")


# --- stale or not -----------------------------------------------------------------------------------

LAYER = "layers/zfs/layer.yaml"
VENDOR = "base/debian/nvidia/vendor.yaml"
BASE = "base/debian/base.yaml"
CHANGES: dict[str, tuple[bool, str, str, str]] = {
    "package added": (True, VENDOR, "  - nvidia-smi\n", "  - nvidia-smi\n  - nvtop\n"),
    "package of a layer": (True, LAYER, "[zfsutils-linux, zfs-zed]", "[zfsutils-linux]"),
    "source of a driver": (True, VENDOR, "package: nvidia-open-kernel-dkms", "package: other-dkms"),
    "version of a driver": (True, VENDOR, "    summary: NVIDIA open kernel modules\n",
                            '    summary: NVIDIA open kernel modules\n    version: "580.1"\n'),
    "what a driver provides": (True, VENDOR, "nvidia-kmod (= {version})", "nvidia-kmod"),
    "build packages": (True, VENDOR, "    modules: [", "    build_packages: [bc]\n    modules: ["),
    "kernel package": (True, BASE, "linux-image-amd64, dracut", "linux-image-cloud-amd64, dracut"),
    "toolchain": (True, BASE, "[gcc, make, patch, xz-utils]", "[gcc, make, patch, xz-utils, bc]"),
    "suite of a repository": (True, BASE, "[trixie, trixie-updates]", "[trixie]"),
    "bootstrap package": (True, BASE, "      - zstd\n", "      - zstd\n      - less\n"),
    "build text": (False, VENDOR, "make -j", "make V=1 -j"),
    "unit": (False, VENDOR, "enable: [nvidia-persistenced.service]", "enable: []"),
    "kernel argument": (False, VENDOR, "nvidia-drm.modeset=1", "nvidia-drm.modeset=0"),
    "summary": (False, VENDOR, "as packaged by Debian", "as Debian packages them"),
    "modules of a driver": (False, VENDOR, "nvidia-uvm, nvidia-peermem]", "nvidia-uvm]"),
    "compression of modules": (False, BASE, "module_compression: xz", "module_compression: zstd"),
    "file": (False, "layers/zfs/files/usr/lib/modules-load.d/zfs.conf", "zfs\n", "zfs\nspl\n"),
    "compat rule": (False, "base/debian/nvidia/compat.yaml", "<580.126.09", "<580.126.10"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_lock_is_stale_only_if_what_is_asked_for_changes(site: Site, change: str) -> None:
    stale, path, old, new = CHANGES[change]
    site.own_definitions()
    before = site.load("debian", "nvidia", with_layers=["zfs"])
    lock = Lockfile(sections={before.section: synthetic_section(before)})
    site.edit(path, old, new)
    after = site.load("debian", "nvidia", with_layers=["zfs"])
    assert (request_of(before) != request_of(after)) is stale
    assert (section_of(lock, after) is None) is stale


def test_request_does_not_depend_on_where_the_site_lies(site: Site, tmp_path: Path) -> None:
    text = "kmods: {nvidia: {version: 580.126.09, source: {directory: src}}}\npackages: []\n"
    requests = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "imgbuild.yaml").write_text(text)
        requests.append(request_of(site.load("debian", "nvidia", folder=folder)))
    assert requests[0] == requests[1]


def test_section_of_another_selection_is_none(site: Site) -> None:
    selection = site.load("debian", "nvidia")
    lock = Lockfile(sections={selection.section: synthetic_section(selection)})
    assert section_of(lock, site.load("debian", "nvidia", with_layers=["zfs"])) is None
    assert section_of(lock, site.load("centos", "nvidia")) is None


# --- small parts ------------------------------------------------------------------------------------


def test_differences_name_what_moved(site: Site) -> None:
    selection = site.load("centos", "nvidia")
    old = synthetic_section(selection)
    tier2 = old.transactions["tier2"]
    new = msgspec.structs.replace(
        old,
        kernel_release="6.12.0-151.el10.x86_64",
        base_digest=f"sha256:{'cd' * 32}",
        kmods={"nvidia": LockedKmod(version="580.2")},
        transactions={
            **old.transactions,
            "tier2": (
                *tier2[1:],
                locked_package(tier2[1].name, selection, version="2.0-1"),
                locked_package("brand-new", selection),
            ),
        },
    )
    found = differences(old, new)
    assert found[:3] == [
        f"base image sha256:{'ab' * 32} -> sha256:{'cd' * 32}",
        "kernel 6.12.0-150.el10.x86_64 -> 6.12.0-151.el10.x86_64",
        "driver nvidia 550.163.01 -> 580.2",
    ]
    assert "package brand-new 1.0-1 added" in found
    assert f"package {tier2[0].name} 1.0-1 removed" in found
    assert f"package {tier2[1].name} 1.0-1 -> 2.0-1" in found


def test_differences_of_nothing_are_none(site: Site) -> None:
    section = synthetic_section(site.load("debian", "nvidia"))
    assert differences(None, section) == []
    assert differences(section, section) == []


@pytest.mark.parametrize(
    ("version", "epoch", "upstream"),
    [
        ("550.163.01-4", "", "550.163.01"),
        ("3:550.163.01-1.el10", "3", "550.163.01"),
        ("2.3.4", "", "2.3.4"),
        ("1:2.3.4", "1", "2.3.4"),
        ("2.3.4-1-2", "", "2.3.4-1"),
        ("0:1-1", "0", "1"),
    ],
)
def test_upstream_version_is_without_epoch_and_revision(version: str, epoch: str, upstream: str) -> None:
    assert upstream_version(version) == (epoch, upstream)


def test_fill_leaves_other_braces_alone() -> None:
    assert fill("{a}-{b}-${a}", a="1") == "1-{b}-$1"
    assert fill("{version}", version="{epoch}") == "{epoch}"
