"""What the fast tests share: a site in a folder of its own, and imgbuild's command line in this process."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from synthetic_lock import synthetic_section

from imagebuild import cli
from imagebuild.load import Selection, load, shipped
from imagebuild.plan import plan
from imagebuild.render import Rendered, render

__all__ = ["synthetic_section"]

settings.register_profile("fast", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("fast")


@dataclass(frozen=True)
class Site:
    """A folder that is a site, with everything a maintainer does in it."""

    folder: Path

    def write(self, path: str, text: str | bytes) -> Path:
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text.encode() if isinstance(text, str) else text)
        return place

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.folder / path).read_text()
        assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
        self.write(path, text.replace(old, new))

    def own_definitions(self) -> None:
        """Copy the shipped definitions, so that a test may change them."""
        for name in ("base", "layers"):
            shutil.copytree(shipped() / name, self.folder / name, symlinks=True)

    def load(self, base: str = "debian", vendor: str | list[str] = "none", **options: Any) -> Selection:
        return load(**{"tier": 2, "base": base, "vendor": vendor, "folder": self.folder, **options})

    def rendered(
        self,
        base: str = "debian",
        vendor: str | list[str] = "none",
        *,
        section: Any = synthetic_section,
        **options: Any,
    ) -> dict[str, Rendered]:
        """Every node by name; `section=None` leaves the plan unlocked."""
        selection = self.load(base, vendor, **options)
        locked = section(selection) if section else None
        return {r.node.name: r for r in render(plan(selection, locked, allow_blocked=True))}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Site(folder)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def imgbuild(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Iterator[Callable[..., Outcome]]:
    """imgbuild as a person calls it, in the folder of `site`; with a state folder of its own."""
    monkeypatch.setenv("IMGBUILD_STATE_DIR", str(tmp_path / "state"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["imgbuild", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), out, err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
