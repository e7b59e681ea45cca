"""The checks against the package database, on an image of RPMs: rpm makes the database, nothing is faked."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebuild.check import CheckedImage, Finding, list_checks, run_checks

pytestmark = pytest.mark.skipif(not shutil.which("rpmbuild"), reason="needs rpm and rpmbuild")

EXTRA = "usr/lib/modules/6.12.0-1.el10.x86_64/extra"
FILES = (
    *("usr/bin/hello", "usr/lib/libhello.so.1", "usr/lib/hello.conf", "usr/lib/verified"),
    *("etc/hello", "boot/hello", f"{EXTRA}/hello.ko.xz"),
)
SPEC = f"""\
%define __os_install_post %{{nil}}
Name: hello
Epoch: 3
Version: 1.0
Release: 1.el10
Summary: says hello
License: none
AutoReqProv: no
BuildArch: noarch
%description
%install
mkdir -p %{{buildroot}}
cp -a %{{stage}}/. %{{buildroot}}/
touch %{{buildroot}}/usr/lib/made-later
%files
%attr(0755, root, root) /usr/bin/hello
/usr/lib/libhello.so*
%config /usr/lib/hello.conf
%ghost /usr/lib/made-later
%verify(not filedigest size) /usr/lib/verified
/etc/hello
/boot/hello
%dir /usr/share/hello
/{EXTRA}
"""


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one RPM in it, as rpm and the steps after it leave it."""
    work = tmp_path_factory.mktemp("rpm")
    (work / "hello.spec").write_text(SPEC)
    root = work / "root"
    for path in FILES:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    (root / "usr/bin/hello").chmod(0o755)
    (root / "usr/lib/libhello.so").symlink_to("libhello.so.1")
    (root / "usr/share/hello").mkdir(parents=True)
    dbpath = work / "db"
    define = ["--define", f"_topdir {work}/top", "--define", "_rpmfilename hello.rpm"]
    define += ["--define", f"stage {root}"]
    rpm = work / "top/RPMS/hello.rpm"
    for argv in (
        ["rpmbuild", "-bb", "--quiet", *define, work / "hello.spec"],
        ["rpm", "--dbpath", dbpath, "-i", "--justdb", "--nodeps", "--ignorearch", "--ignoreos", rpm],
    ):
        subprocess.run(argv, check=True, capture_output=True)
    shutil.copytree(dbpath, root / "usr/lib/sysimage/rpm")
    shutil.rmtree(root / "boot")
    (root / EXTRA).with_name("vmlinuz").write_text("a kernel")
    (root / "usr/lib/hello.conf").write_text("changed on purpose")
    (root / "usr/lib/verified").write_text("made anew on every machine")
    (root / "etc/hello").write_text("changed on purpose")
    return root


def findings(root: Path, name: str, **labels: str) -> list[Finding]:
    others = [check.name for check in list_checks() if check.name != name]
    return list(run_checks(CheckedImage(root, {"io.imgbuild.tier": "2", **labels}), skip=others).findings)


def write(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text("changed")


def relink(path: str, target: str) -> Callable[[Path], object]:
    return lambda root: ((root / path).unlink(), (root / path).symlink_to(target))


BREAKS: dict[str, tuple[str, str, str, Callable[[Path], object]]] = {
    "changed": ("package-files", "fatal", "was changed since its package brought it", write("usr/bin/hello")),
    "gone": ("package-files", "warning", "it is gone", lambda root: (root / "usr/bin/hello").unlink()),
    "other kind": ("package-files", "warning", "no longer the kind", relink("usr/bin/hello", "sh")),
    "other link": ("package-files", "fatal", "leads elsewhere", relink("usr/lib/libhello.so", "/tmp/x")),
    "setuid": ("package-files", "fatal", "other rights", lambda root: (root / "usr/bin/hello").chmod(0o4755)),
    "module": ("modules-owned", "fatal", f"/{EXTRA}/mine.ko", write(f"{EXTRA}/mine.ko")),
    "no package": (
        "package-files",
        "could-not-run",
        "reads no package",
        lambda root: (
            shutil.rmtree(root / "usr/lib/sysimage/rpm"),
            subprocess.run(["rpm", "--dbpath", root / "usr/lib/sysimage/rpm", "--initdb"], check=True),
        ),
    ),
    "damaged": (
        "package-files",
        "could-not-run",
        "rpm",
        lambda root: (root / "usr/lib/sysimage/rpm/rpmdb.sqlite").write_bytes(b"rubbish" * 1000),
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_image_is_found_and_undone_passes(good: Path, tmp_path: Path, case: str) -> None:
    check, severity, what, do = BREAKS[case]
    assert findings(good, check) == []
    root = shutil.copytree(good, tmp_path / "root", symlinks=True)
    do(root)
    found = findings(root, check)
    assert [finding.severity for finding in found] == [severity], found
    assert what in found[0].what


def test_folder_behind_a_link_is_still_there(good: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good, tmp_path / "root", symlinks=True)
    (root / "usr/share/hello").rmdir()
    (root / "usr/share/hello").symlink_to("../../var/hello")
    assert findings(root, "package-files") == []


def test_database_is_read_and_not_written(good: Path) -> None:
    folder = good / "usr/lib/sysimage/rpm"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    findings(good, "package-files")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_missing_rpm_on_this_machine_could_not_run(
    good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = findings(good, "package-files")
    assert (found.severity, found.what) == ("could-not-run", "`rpm` is not installed")
    assert "apt-get install -y rpm" in found.fix


def test_versions_come_from_the_database(good: Path) -> None:
    declared = '{"x": {"packages": {"hello": "1.0-1.el10", "other": "1"}}}'
    found = [f.what for f in findings(good, "same-driver-version", **{"io.imgbuild.same-version": declared})]
    assert found == ["package other, which belongs to x, is not installed"]
