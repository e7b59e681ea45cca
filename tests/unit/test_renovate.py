"""The Renovate configuration of docs/locks.md finds what it should in the files imgbuild reads and writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Site
from synthetic_lock import synthetic_section

from imagebuild import lock

TEXT = (Path(__file__).parents[2] / "docs/locks.md").read_text()


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def found_in(text: str, file: str) -> list[dict[str, str]]:
    managers: list[dict[str, Any]] = json.loads(block("json"))["customManagers"]
    (manager,) = [m for m in managers if re.search(m["managerFilePatterns"][0].strip("/"), file)]
    patterns = [re.compile(p.replace("(?<", "(?P<")) for p in manager["matchStrings"]]
    return [match.groupdict() for pattern in patterns for match in pattern.finditer(text)]


def test_lock_shows_base_image_and_container_images(site: Site) -> None:
    site.write(
        "layers/serving/layer.yaml",
        "summary: s\nimages: [quay.io/org/server:v1.2, registry.example:5000/proxy:2.11]\n",
    )
    selection = site.load(base="centos", vendor="nvidia", with_layers=("serving",))
    text = lock.dumps(lock.Lockfile(sections={selection.section: synthetic_section(selection)}))
    found = {item["depName"]: item for item in found_in(text, "fleet/imgbuild.lock")}
    assert set(found) == {
        "quay.io/centos-bootc/centos-bootc", "quay.io/org/server", "registry.example:5000/proxy",
    }  # fmt: skip
    assert found["quay.io/centos-bootc/centos-bootc"]["currentValue"] == "stream10"
    assert found["registry.example:5000/proxy"]["currentValue"] == "2.11"
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", item["currentDigest"]) for item in found.values())


def test_site_file_shows_the_version_of_a_driver() -> None:
    (item,) = found_in(block("yaml"), "imgbuild.yaml")
    assert item == {
        "datasource": "github-tags", "depName": "NVIDIA/open-gpu-kernel-modules",
        "currentValue": "580.126.09",
    }  # fmt: skip
    assert found_in("kmods:\n  nvidia:\n    version: 580.126.09\n", "imgbuild.yaml") == []


@pytest.mark.parametrize("digest", ["sha256:" + "ef" * 32])
def test_lock_with_another_base_digest_is_stale(site: Site, digest: str) -> None:
    selection = site.load(base="centos", vendor="nvidia")
    section = synthetic_section(selection)
    text = lock.dumps(lock.Lockfile(sections={selection.section: section}))
    path = site.write("imgbuild.lock", text.replace(section.base_digest, digest))
    assert lock.section_of(lock.read(path), selection) is None
