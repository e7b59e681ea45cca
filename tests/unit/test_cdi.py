"""The script that writes the CDI spec at boot: whole or not at all, on hosts with and without a card."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from imagebuild.load import shipped

SCRIPT = shipped() / "layers/cdi/files/usr/libexec/imgbuild/cdi-generate"
SPEC = """\
---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
    - name: "0"
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
    - name: all
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
containerEdits:
    deviceNodes:
        - path: /dev/nvidiactl
"""
GOOD = """\
for word; do case $word in --output=*) out=${word#--output=} ;; esac; done
cat "$(dirname "$0")/spec.yaml" > "$out"
"""


@dataclass(frozen=True)
class Host:
    """A host with a fake sysfs and a fake generator."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "run/cdi/nvidia.yaml"

    def card(self, name: str, vendor: str, kind: str) -> None:
        folder = self.root / "devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")

    def generator(self, text: str) -> None:
        folder = self.root / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "spec.yaml").write_text(SPEC)
        program = folder / "nvidia-ctk"
        program.write_text(f'#!/bin/sh\necho "$*" >> "{self.root}/calls"\n{text}')
        program.chmod(0o755)

    def boot(self, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", SCRIPT],
            capture_output=True,
            text=True,
            umask=umask,
            timeout=20,
            env={
                "PATH": f"{self.root}/bin:{os.environ['PATH']}",
                "RUNTIME_DIRECTORY": f"{self.root}/run/imgbuild-cdi",
                "IMGBUILD_PCI_DEVICES": f"{self.root}/devices",
                "IMGBUILD_CDI_SPEC": str(self.spec),
            },
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "devices").mkdir()
    made = Host(tmp_path)
    made.generator(GOOD)
    return made


@pytest.fixture
def gpu_host(host: Host) -> Host:
    host.card("0000:18:00.0", "0x10de", "0x030200")
    return host


def test_host_with_a_card_gets_a_spec_that_everybody_can_read(gpu_host: Host) -> None:
    found = gpu_host.boot(umask=0o077)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "CDI spec written: 2 devices\n"
    assert yaml.safe_load(gpu_host.spec.read_text())["kind"] == "nvidia.com/gpu"
    assert stat.S_IMODE(gpu_host.spec.stat().st_mode) == 0o644
    assert stat.S_IMODE(gpu_host.spec.parent.stat().st_mode) == 0o755
    assert (gpu_host.root / "calls").read_text().startswith("cdi generate --format=yaml --output=")
    assert list(gpu_host.spec.parent.iterdir()) == [gpu_host.spec], "nothing half-made beside it"


@pytest.mark.parametrize(
    ("vendor", "kind"),
    [("0x10de", "0x040300"), ("0x8086", "0x030000"), ("0x1002", "0x030200"), ("0x10de", "0x0c0330")],
)
def test_host_without_a_card_boots_and_says_so(host: Host, vendor: str, kind: str) -> None:
    host.card("0000:00:02.0", vendor, kind)
    found = host.boot()
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "no NVIDIA GPU on this host: no CDI spec is written\n"
    assert not host.spec.exists()
    assert not (host.root / "calls").exists(), "the generator is not asked"


def test_host_without_any_pci_device_boots(host: Host) -> None:
    assert host.boot().returncode == 0


def test_card_that_was_taken_out_takes_its_spec_along(host: Host) -> None:
    host.spec.parent.mkdir(parents=True)
    host.spec.write_text("old")
    assert host.boot().returncode == 0
    assert not host.spec.exists()


@pytest.mark.parametrize("kind", ["0x030000", "0x030200", "0x038000"])
def test_display_and_compute_cards_count(host: Host, kind: str) -> None:
    host.card("0000:18:00.0", "0x10de", kind)
    host.boot()
    assert host.spec.exists()


@pytest.mark.parametrize(
    "generator",
    [
        "exit 3",
        GOOD + "exit 1",
        'out=${4#--output=}; echo "kind: nvid" > "$out"; kill -9 $$',
        GOOD + "kill -9 $$",
        "for word; do case $word in --output=*) : > ${word#--output=} ;; esac; done",
        "for word; do case $word in --output=*) echo 'kind: other.com/gpu' > ${word#--output=} ;; esac; done",
        "exit 0",
    ],
)
@pytest.mark.parametrize("old", ["old spec\n", None])
def test_generator_that_fails_leaves_the_old_spec_and_no_half_one(
    gpu_host: Host, generator: str, old: str | None
) -> None:
    if old:
        gpu_host.spec.parent.mkdir(parents=True)
        gpu_host.spec.write_text(old)
    gpu_host.generator(generator)
    found = gpu_host.boot()
    assert found.returncode != 0
    assert (gpu_host.spec.read_text() if gpu_host.spec.exists() else None) == old


def test_boot_after_a_failure_writes_a_fresh_spec(gpu_host: Host) -> None:
    gpu_host.generator(GOOD + "exit 1")
    assert gpu_host.boot().returncode != 0
    gpu_host.generator(GOOD)
    assert gpu_host.boot().returncode == 0
    assert gpu_host.spec.read_text() == SPEC


def test_every_boot_replaces_the_spec(gpu_host: Host) -> None:
    gpu_host.spec.parent.mkdir(parents=True)
    gpu_host.spec.write_text("stale")
    inode = gpu_host.spec.stat().st_ino
    assert gpu_host.boot().returncode == 0
    assert gpu_host.spec.read_text() == SPEC
    assert gpu_host.spec.stat().st_ino != inode, "a reader of the old one keeps the old one"


@pytest.mark.parametrize("code", [0, 1])
def test_device_nodes_are_made_first_if_they_can_be(
    gpu_host: Host, code: int, record: Callable[[str, int], Path]
) -> None:
    calls = record("nvidia-modprobe", code)
    assert gpu_host.boot().returncode == 0
    assert calls.read_text() == "-c 0 -u\n"


@pytest.fixture
def record(host: Host) -> Callable[[str, int], Path]:
    """Put a program on PATH that notes its arguments."""

    def made(name: str, code: int) -> Path:
        program = host.root / "bin" / name
        program.write_text(f'#!/bin/sh\necho "$*" >> "{host.root}/{name}.calls"\nexit {code}\n')
        program.chmod(0o755)
        return host.root / f"{name}.calls"

    return made
