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


@pytest.mark.parametrize("kind", ["gitlab", "github"])
def test_pipeline_of_init_locks_builds_checks_and_pushes(
    toy: Site, registry: Registry, tmp_path: Path, kind: str
) -> None:
    (toy.folder / "imgbuild.lock").unlink()
    toy.run("init", "--base", "debian", "--vendor", "toy", "--ci", kind)
    path = {"gitlab": ".gitlab-ci.yml", "github": ".github/workflows/image.yml"}[kind]
    text = (toy.folder / path).read_text()
    assert len(text.splitlines()) <= 10
    pipeline = yaml.safe_load(text)
    steps = (
        pipeline["host-image"]["script"]
        if kind == "gitlab"
        else [step["run"] for step in pipeline["jobs"]["host-image"]["steps"] if "run" in step]
    )
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
        "IMAGE": f"{registry.address}/pipeline-{kind}",
        "PUSH_OPTIONS": "--no-tls-verify",
        {"gitlab": "CI_COMMIT_SHA", "github": "GITHUB_SHA"}[kind]: revision,
    }
    for step in steps:
        ran = subprocess.run(
            ["sh", "-c", step], cwd=checkout, env=env, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{step}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    assert sorted(registry.tags(f"pipeline-{kind}")) == sorted(["latest", revision])
    labels = registry.config(f"pipeline-{kind}", "latest")["config"]["Labels"]
    assert labels["org.opencontainers.image.revision"].startswith(revision)
    assert labels["io.imgbuild.vendor"] == "toy"
