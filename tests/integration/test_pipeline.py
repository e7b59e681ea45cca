"""The pipeline that `imgbuild init` writes, run step by step in a clean checkout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from .registries import Registry
from .workshop import Site

REPOSITORY = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    ran = subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return ran.stdout.strip()


@pytest.mark.parametrize("kind", ["gitlab"])
def test_pipeline_of_init_locks_builds_checks_and_pushes(
    toy: Site, registry: Registry, tmp_path: Path, kind: str
) -> None:
    (toy.folder / "imgbuild.lock").unlink()
    toy.run("init", "--base", "debian", "--vendor", "toy", "--ci", kind)
    text = (toy.folder / ".gitlab-ci.yml").read_text()
    assert len(text.splitlines()) <= 10
    git(toy.folder, "init", "-q")
    git(toy.folder, "add", "-A")
    git(toy.folder, "commit", "-qm", "site")
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "-q", str(toy.folder), str(checkout))
    revision = git(checkout, "rev-parse", "HEAD")
    env = {
        **os.environ,
        **toy.env,
        "IMGBUILD": str(REPOSITORY),
        "IMAGE": f"{registry.address}/pipeline",
        "PUSH_OPTIONS": "--no-tls-verify",
        "CI_COMMIT_SHA": revision,
    }
    for step in yaml.safe_load(text)["image"]["script"]:
        ran = subprocess.run(
            ["sh", "-c", step], cwd=checkout, env=env, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{step}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    assert sorted(registry.tags("pipeline")) == sorted(["latest", revision])
    labels = registry.config("pipeline", "latest")["config"]["Labels"]
    assert labels["org.opencontainers.image.revision"].startswith(revision)
    assert labels["io.imgbuild.vendor"] == "toy"
