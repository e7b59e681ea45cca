"""Runs the real command line in a folder of its own, as a person would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from imagebuild.load import shipped

TOY = Path(__file__).parent / "toy"
LIMIT_S = 1500


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)

    @property
    def text(self) -> str:
        """stdout and stderr."""
        return self.out + self.err


class Site:
    """A folder with a site file, definitions of its own and a lock; commands run in it."""

    def __init__(self, folder: Path, env: Mapping[str, str], prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self.env = dict(env)
        self.prefix = prefix

    def write(self, path: str, text: str, mode: int = 0o644) -> Path:
        """Write a file of the site."""
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
        place.chmod(mode)
        return place

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace text in a file of the site; it must be there."""
        place = self.folder / path
        text = place.read_text(encoding="utf-8")
        assert old in text
        place.write_text(text.replace(old, new), encoding="utf-8")

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start a command and do not wait for it."""
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "imagebuild", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int | None = 0, **env: str) -> Outcome:
        """Run a command to its end; `code` is the exit code it must have (None: any)."""
        began = time.monotonic()
        process = self.start(*arguments, **env)
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
        outcome = Outcome(process.returncode, out, err, time.monotonic() - began)
        if code is not None:
            assert outcome.code == code, f"exit {outcome.code}, expected {code}\n{out[-4000:]}\n{err[-4000:]}"
        return outcome

    def build(self, *arguments: str) -> Any:
        """`imgbuild build --json` that must succeed; returns its result."""
        return self.run("build", "--json", *arguments).json

    def nodes(self, result: Any) -> dict[str, str]:
        """Status of each node of a build result."""
        return {node["name"]: node["status"] for node in result["nodes"]}


def toy_site(folder: Path, env: Mapping[str, str]) -> Site:
    """A site with the vendor `toy` for base debian."""
    shutil.copytree(TOY, folder, dirs_exist_ok=True)
    return Site(folder, env)


def toy_centos_site(site: Site) -> Site:
    """Give a site the vendor `toy` for base centos, with a package of a repository that is signed."""
    shutil.copytree(TOY / "source", site.folder / "source")
    shutil.copytree(TOY / "base/debian/toy", site.folder / "base/centos/toy")
    site.edit("base/centos/toy/vendor.yaml", '"toy-kmod (= {version})"', '"toy-kmod = {version}"')
    layer = yaml.safe_load((shipped() / "layers/zfs/layer.yaml").read_text(encoding="utf-8"))
    # A library, whose scriptlet runs ldconfig.
    more = {"repositories": layer["for"]["centos"]["repositories"], "packages": ["libuutil3"]}
    place = site.folder / "base/centos/toy/vendor.yaml"
    place.write_text(place.read_text(encoding="utf-8") + yaml.safe_dump(more), encoding="utf-8")
    return site


TOY_BUILD = ("--tier", "2", "--vendor", "toy")
TOY_CENTOS = ("--base", "centos", "--vendor", "toy")
