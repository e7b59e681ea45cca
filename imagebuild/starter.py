"""What `imgbuild init` writes: a commented site file and a CI pipeline."""

from __future__ import annotations

from pathlib import Path

from imagebuild.errors import DefinitionError
from imagebuild.load import SITE_FILE
from imagebuild.state import write_whole

FIRST_OFFER = "centos"
FIRST_VENDOR = "nvidia"

SITE = """\
# What this fleet's images are made of. `imgbuild plan` shows what follows from it.
# Editors: `imgbuild schema site` prints the JSON Schema of this file.
name: "{name}"

# centos: CentOS Stream 10 bootc from its registry; debian: bootstrapped from a package mirror.
base: {base}
# nvidia, amd (disabled, `imgbuild list` says why) or none
vendor: {vendor}

# Layers in addition to those the vendor brings, and layers to leave out.
with: []
#  - zfs
#  - container-toolkit
without: []

# A registry that keeps compiled kernel modules, so that each is compiled once:
# cache: registry.example/imgbuild-cache

# Another source of a driver, for example NVIDIA's published tree:
# kmods:
#   nvidia:
#     version: 580.126.09
#     source: {{directory: ../open-gpu-kernel-modules}}

# Other places of package repositories and registries:
# mirrors:
#   repositories:
#     debian: http://mirror.example/debian
#   registries:
#     quay.io: registry.example/quay
"""

# $IMGBUILD is what pip installs; $IMAGE where the image goes, without a tag.
STEPS = (
    "apt-get update && apt-get install -y git python3-venv python3-apt buildah skopeo mmdebstrap"
    " apt-utils crun kmod netavark systemd",
    'python3 -m venv .venv && .venv/bin/pip install "${IMGBUILD:?what pip installs}"',
    "test -f imgbuild.lock || .venv/bin/imgbuild lock",
    '.venv/bin/imgbuild build -t image:ci ${CACHE:+--cache "$CACHE"}',
    ".venv/bin/imgbuild check image:ci",
    '.venv/bin/imgbuild push ${PUSH_OPTIONS:-} image:ci "$IMAGE:$CI_COMMIT_SHA" "$IMAGE:latest"',
)


def pipeline(kind: str) -> tuple[str, str]:
    """Path and text of a pipeline for `gitlab` or `github`: lock, build, check, push."""
    if kind == "gitlab":
        # `image` is a keyword of GitLab, not a name that a job may have.
        lines = [
            "host-image:",
            "  image: debian:13",
            "  script:",
            *(f"    - {_yaml(step)}" for step in STEPS),
        ]
        return ".gitlab-ci.yml", "\n".join(lines) + "\n"
    steps = " && ".join(step.replace("$CI_COMMIT_SHA", "$GITHUB_SHA") for step in STEPS)
    lines = [
        "on: push",
        "jobs:",
        "  host-image:",
        "    runs-on: ubuntu-latest",
        "    container: {image: 'debian:13', options: --privileged}",
        "    env: {IMAGE: '${{ vars.IMAGE }}'}",
        "    steps:",
        "      - uses: actions/checkout@v5",
        f"      - run: {_yaml(steps)}",
    ]
    return ".github/workflows/image.yml", "\n".join(lines) + "\n"


def _yaml(text: str) -> str:
    """A YAML scalar in single quotes."""
    return "'" + text.replace("'", "''") + "'"


def write(folder: Path, *, base: str, vendor: str, ci: str | None) -> list[Path]:
    """Write the starter files.

    Raises:
        DefinitionError: one of them is there already; nothing is written then.
    """
    name = folder.resolve().name.lower()
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in name).strip("-") or "site"
    files = {folder / SITE_FILE: SITE.format(name=name[:64], base=base, vendor=vendor)}
    if ci:
        name, text = pipeline(ci)
        files[folder / name] = text
    there = [path for path in files if path.exists()]
    if there:
        raise DefinitionError(f"`{there[0]}` is already there", help="remove it, or name another folder")
    for path, text in files.items():
        write_whole(path, text)
    return list(files)
