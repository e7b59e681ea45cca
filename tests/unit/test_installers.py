"""The shell scripts that run inside builds, on fake package managers: our logic, not the managers'."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import imagebuild

INSTALLERS = Path(imagebuild.__file__).parent / "installers"


def fake(folder: Path, name: str, script: str) -> None:
    """Put a fake program into a folder."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def install_rpms(tmp_path: Path, dnf: str) -> subprocess.CompletedProcess[str]:
    programs, packages = tmp_path / "bin", tmp_path / "packages"
    programs.mkdir()
    packages.mkdir()
    (packages / "driver.rpm").touch()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/packages").write_text("driver.rpm metadata\n")
    fake(programs, "dnf", dnf)
    fake(programs, "rpm", "echo driver-1-1.x86_64")
    return subprocess.run(
        ["sh", str(INSTALLERS / "dnf/install.sh"), str(packages)],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "KEYS": str(tmp_path / "keys")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_dnf_that_succeeds_is_believed(tmp_path: Path) -> None:
    assert install_rpms(tmp_path, "echo Complete!").returncode == 0


@pytest.mark.parametrize(
    "line",
    [
        "warning: %post(nvidia-driver-cuda-3:550-1.x86_64) scriptlet failed, exit status 127",
        "Error in POSTIN scriptlet in rpm package nvidia-kmod-common",
        "Error in PREIN scriptlet in rpm package x",
    ],
)
def test_scriptlet_failing_while_dnf_exits_0_fails_the_build(tmp_path: Path, line: str) -> None:
    ran = install_rpms(tmp_path, f"echo '{line}'; echo Complete!")
    assert ran.returncode == 1
    assert line in ran.stdout and "a package's scriptlet failed" in ran.stdout


def test_dnf_that_fails_shows_what_it_said(tmp_path: Path) -> None:
    ran = install_rpms(tmp_path, "echo 'Error: GPG check FAILED'; exit 1")
    assert ran.returncode == 1 and "GPG check FAILED" in ran.stdout


def test_nothing_to_install_runs_no_package_manager(tmp_path: Path) -> None:
    for manager in ("apt", "dnf"):
        ran = subprocess.run(
            ["sh", str(INSTALLERS / manager / "install.sh"), str(tmp_path)], check=False, capture_output=True
        )
        assert ran.returncode == 0


def test_deb_not_installed_as_locked_fails_the_build(tmp_path: Path) -> None:
    programs, packages = tmp_path / "bin", tmp_path / "packages"
    programs.mkdir()
    packages.mkdir()
    (packages / "driver.deb").touch()
    script = (
        (INSTALLERS / "apt/install.sh").read_text().replace("/usr/sbin/policy-rc.d", f"{tmp_path}/policy")
    )
    (tmp_path / "install.sh").write_text(script)
    fake(programs, "apt-get", "echo apt is content; exit 0")
    fake(programs, "dpkg-deb", '[ "$3" = Package ] && echo driver || echo 2.0-1')
    fake(programs, "dpkg-query", "printf 'iF 2.0-1'")
    ran = subprocess.run(
        ["sh", str(tmp_path / "install.sh"), str(packages)],
        env={"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "driver is not installed as locked: iF 2.0-1, wanted 2.0-1" in ran.stdout
