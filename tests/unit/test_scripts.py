"""The shell scripts, as shellcheck sees them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
SCRIPTS = sorted(
    [
        TOP / "imgbuild.sh",
        TOP / ".ci/run",
        *(TOP / "imagebuild/installers").rglob("*.sh"),
        *(TOP / "layers").glob("*/files/usr/libexec/imgbuild/*"),
    ]
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(TOP)))
def test_script_is_clean(script: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.is_file() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck comes with the extra `test`"
    said = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout
