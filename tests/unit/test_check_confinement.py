"""No definition and no script switches off SELinux or FIPS, and containers keep their SELinux label.

Not run here: a host that enforces a policy (see docs/checks.md).
"""

from __future__ import annotations

import os
import re
import subprocess
from configparser import RawConfigParser
from pathlib import Path

import pytest
import yaml

import imagebuild
from imagebuild.load import shipped

CDI = shipped() / "layers/cdi"
UNITS = CDI / "files/usr/lib/systemd/system"
BOOLEAN = "/sys/fs/selinux/booleans/container_use_devices"

# What would weaken a host, and a line that does.
WEAKENS = {
    r"\bSELINUX(TYPE)?\s*=": "SELINUX=permissive",
    r"\bsetenforce\b|\b(selinux|enforcing)=0": "kargs: [selinux=0]",
    r"\blabel[=:](disable|type)|SecurityLabel(Disable|Type|FileType)": "SecurityLabelDisable=true",
    r"\bsetsebool\b.*\s-[a-zA-Z]*P": "setsebool -P container_use_devices=on",
    r"\b(semodule|semanage|chcon|restorecon|setfiles|fixfiles)\b|file_contexts": "RUN chcon -t bin_t /x",
    r"crypto-policies|\bfips=|\bfips-mode-setup\b": "update-crypto-policies --set LEGACY",
}
TEXTS = [
    path
    for top in (shipped() / "base", shipped() / "layers", Path(imagebuild.__file__).parent / "installers")
    for path in sorted(top.rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
] + [shipped() / "Containerfile.tmpl"]


@pytest.mark.parametrize("pattern", WEAKENS)
def test_nothing_weakens_selinux_or_fips(pattern: str) -> None:
    assert re.search(pattern, WEAKENS[pattern]), "the pattern finds what it is for"
    assert len(TEXTS) > 30
    for path in TEXTS:
        found = [line for line in path.read_text().splitlines() if re.search(pattern, line)]
        assert found == [], path


def unit(name: str) -> RawConfigParser:
    parsed = RawConfigParser(strict=False, delimiters="=", interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment]
    parsed.read_string((UNITS / name).read_text())
    return parsed


@pytest.fixture
def selinux() -> RawConfigParser:
    return unit("imgbuild-cdi-selinux.service")


def test_switch_is_thrown_on_hosts_with_selinux_alone(selinux: RawConfigParser) -> None:
    assert selinux["Unit"]["ConditionSecurity"] == "selinux"
    assert selinux["Unit"]["ConditionPathExists"] == BOOLEAN
    # The minus: a base without the program passes `units-verify`. No -P: the image's policy stays as it is.
    assert selinux["Service"]["ExecStart"] == "-/usr/sbin/setsebool container_use_devices=on"


@pytest.mark.parametrize(("state", "ends_well"), [("1 1", True), ("0 0", False), ("0 1", False), ("", False)])
def test_switch_that_stays_off_fails_the_unit(
    selinux: RawConfigParser, tmp_path: Path, state: str, ends_well: bool
) -> None:
    script = CDI / "files" / selinux["Service"]["ExecStartPost"].lstrip("/")
    assert BOOLEAN in script.read_text()
    boolean = tmp_path / "boolean"
    boolean.write_text(state)
    environment = {"PATH": os.environ["PATH"], "IMGBUILD_SELINUX_BOOLEAN": str(boolean)}
    found = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert (found.returncode == 0) is ends_well
    assert ("container_use_devices is off" in found.stderr) is not ends_well


def test_switch_has_no_more_rights_than_it_needs(selinux: RawConfigParser) -> None:
    service = selinux["Service"]
    assert service["CapabilityBoundingSet"] == ""
    assert service["ProtectSystem"] == "strict" and service["PrivateNetwork"] == "yes"
    # Either would keep setsebool from its domain, or from the file it writes.
    assert "NoNewPrivileges" not in service and "ProtectKernelTunables" not in service


def test_no_container_starts_before_the_switch(selinux: RawConfigParser) -> None:
    before = selinux["Unit"]["Before"].split()
    assert {"imgbuild-cdi.service", "podman.service"} <= set(before)
    assert set(unit("imgbuild-cdi.service")["Unit"]["Before"].split()) <= set(before)
    waits = unit("user@.service.d/50-imgbuild-cdi.conf")["Unit"]["After"].split()
    assert waits == ["imgbuild-cdi.service", "imgbuild-cdi-selinux.service"]
    assert yaml.safe_load((CDI / "layer.yaml").read_text())["units"]["enable"] == waits
