"""The whole line, the same for every base: lock, build, check, no work, small changes.

What differs between bases is in lines.py, and nothing of it is here. Each driver is compiled once per
session, in the first build of its base; the tests run on what that left, in the order below.
"""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imagebuild import images
from imagebuild.load import shipped

from ..rehearsal.look_alike import Rehearsal
from .lines import LINES, Line
from .workshop import Site

UNIT = "files/usr/lib/systemd/system/imgbuild-cdi.service"
LOOKED_AT = {
    "depmod-current", "initramfs", "modprobe-resolves", "modules-owned", "no-build-tools", "one-kernel",
    "package-files", "symbol-crcs", "vermagic",
}  # fmt: skip
COMPILERS = ("usr/bin/*gcc*", "usr/bin/cc", "usr/bin/make", "usr/src/*", "usr/lib/modules/*/build", "boot/*")
# Made from packages where they are installed: initramfs, indexes, the database of packages.
MADE = re.compile(
    r"/usr/lib/modules/[^/]+/(initramfs\.img|vmlinuz|System\.map|modules\.[a-z.]+)"
    r"|/usr/lib/udev/hwdb\.bin|/usr/lib/sysimage/rpm/rpmdb\.sqlite"
)


@pytest.fixture(scope="session")
def host_mirror() -> tuple[str, ...]:
    """Packages come from where this machine's own come from."""
    return ()


@pytest.fixture(scope="session")
def look_alike(rehearsal: Rehearsal) -> tuple[str, ...]:
    """Packages and base image come from the rehearsal."""
    return ("--mirror-map", str(rehearsal.mirror_map))


@pytest.fixture(scope="session", params=LINES, ids=lambda line: line.base)
def line(request: pytest.FixtureRequest) -> Line:
    """A base with a vendor."""
    found: Line = request.param
    return found


@dataclass(frozen=True)
class Built:
    """What the first build of a line left."""

    site: Site
    words: tuple[str, ...]
    """The command line after the command."""
    result: Any
    said: str

    @property
    def image(self) -> str:
        """The name of the finished image."""
        name: str = self.result["image"]
        return name


def site_of(line: Line, make_site: Callable[[str], Site]) -> Site:
    """A site with the definitions of a line that are not shipped."""
    site = make_site(line.base)
    for place, folder in line.definitions.items():
        shutil.copytree(folder, site.folder / place, dirs_exist_ok=True)
    return site


@pytest.fixture(scope="session")
def built(line: Line, request: pytest.FixtureRequest, make_site: Callable[[str], Site]) -> Built:
    """The line, built for the first time."""
    words = (*line.words, *request.getfixturevalue(line.upstream))
    site = site_of(line, make_site)
    outcome = site.run("build", "--json", *words)
    return Built(site, words, outcome.json, outcome.err)


def in_image(image: str, command: str) -> str:
    """Output of a shell command run in an image."""
    made = subprocess.run(
        ["buildah", "from", "--pull=never", image], check=True, capture_output=True, text=True
    )
    name = made.stdout.strip()
    try:
        ran = subprocess.run(
            ["buildah", "run", "--isolation", "chroot", name, "--", "sh", "-c", command],
            capture_output=True,
            text=True,
            check=False,
        )
        return ran.stdout + ran.stderr
    finally:
        subprocess.run(["buildah", "rm", name], check=True, capture_output=True)


def reasons(plan: Any) -> dict[str, tuple[str, ...]]:
    """Why each node of a plan would be built."""
    return {node["name"]: tuple(node["rebuild"]) for node in plan["nodes"]}


def test_first_build_says_base_writes_the_lock_and_makes_all(line: Line, built: Built) -> None:
    assert built.said.startswith(f"base {line.base} ({line.why_base}), tier 2, ")
    assert "wrote imgbuild.lock" in built.said
    assert "isolation " in built.said and "storage driver " in built.said
    made = built.site.nodes(built.result)
    assert tuple(made) == line.nodes and made[f"kmod-{line.kmod}"] == made["tier2"] == "built"
    # Nothing else came to be, and no definition but what the line brings.
    there = {path.name for path in built.site.folder.iterdir()}
    assert there == {"imgbuild.lock", *(Path(place).parts[0] for place in line.definitions)}
    lock = json.loads((built.site.folder / "imgbuild.lock").read_text())
    (section,) = lock["sections"].values()
    assert section["transactions"].keys() == line.locks and line.facts <= section.keys()
    assert re.fullmatch(line.release, section["kernel_release"])
    packages = [package for each in section["transactions"].values() for package in each]
    assert packages and all(re.fullmatch("[0-9a-f]{64}", package["sha256"]) for package in packages)


def test_image_holds_kernel_modules_and_userland_and_no_compiler(line: Line, built: Built) -> None:
    labels = images.labels(built.image)
    release = labels["io.imgbuild.kernel-release"]
    assert labels["io.imgbuild.base"] == line.base and re.fullmatch(line.release, release)
    with images.mounted(built.image) as root:
        assert [path.name for path in (root / "usr/lib/modules").iterdir()] == [release]
        folder = root / "usr/lib/modules" / release
        assert (folder / "vmlinuz").is_file() and (folder / "initramfs.img").is_file()
        modules = {path.name for path in (folder / "extra" / line.kmod).iterdir()}
        assert modules == {name + line.suffix for name in line.modules}
        for pattern in line.files:
            assert list(root.glob(pattern)), pattern
        for path, text in line.texts.items():
            assert text in (root / path).read_text(), path
        for unit in line.units:
            assert (root / "etc/systemd/system/multi-user.target.wants" / unit).is_symlink(), unit
        assert [str(path) for pattern in COMPILERS for path in root.glob(pattern)] == []


def test_package_database_knows_modules_and_userland(line: Line, built: Built) -> None:
    installed = set(in_image(built.image, line.installed).splitlines())
    assert {line.package, *line.wanted} <= installed
    assert not line.unwanted & installed
    release = images.labels(built.image)["io.imgbuild.kernel-release"]
    folder = f"/usr/lib/modules/{release}/extra/{line.kmod}"
    paths = [f"{folder}/{name}{line.suffix}" for name in line.modules]
    owners = in_image(built.image, f"{line.owner} {' '.join(paths)}").splitlines()
    assert len(owners) == len(paths) and all(owner.startswith(line.owner_says) for owner in owners), owners
    for command, pattern in line.answers.items():
        said = in_image(built.image, command)
        assert re.search(pattern, said), f"{command}: {said}"


def test_check_passes_with_the_expected_findings_only(line: Line, built: Built) -> None:
    report = built.site.run("check", "--json", built.image).json
    found = {(finding["check"], finding["severity"]) for finding in report["findings"]}
    assert found - line.by_machine == line.findings, report["findings"]
    assert report["ok"] and report["skipped"] == []
    assert set(report["passed"]) >= LOOKED_AT


def test_plan_reports_verdict_and_notices_and_nothing_to_rebuild(line: Line, built: Built) -> None:
    plan = built.site.run("plan", "--json", *built.words).json
    (verdict,) = plan["verdicts"]
    assert (verdict["kmod"], verdict["verdict"], verdict["patch"]) == (line.kmod, line.verdict, line.patch)
    assert len(plan["notices"]) == len(line.notices), plan["notices"]
    assert all(text in said for text, said in zip(line.notices, plan["notices"], strict=True))
    assert reasons(plan) == dict.fromkeys(line.nodes, ())


def test_second_build_does_no_work(line: Line, built: Built) -> None:
    before = images.images()
    again = built.site.run("build", *built.words)
    assert "nothing to do" in again.out and "fetch" not in again.out and ": done in" not in again.out
    assert images.images() == before
    data = built.site.build(*built.words)
    assert data["digest"] == built.result["digest"] and data["downloaded_files"] == 0
    assert built.site.nodes(data) == dict.fromkeys(line.nodes, "cached")


def test_another_site_writes_the_same_lock_and_gets_the_same_image(
    line: Line, built: Built, make_site: Callable[[str], Site]
) -> None:
    site = site_of(line, make_site)
    site.run("lock", *built.words)
    assert (site.folder / "imgbuild.lock").read_text() == (built.site.folder / "imgbuild.lock").read_text()
    data = site.build(*built.words)
    assert (data["image"], data["digest"]) == (built.image, built.result["digest"])
    assert site.nodes(data) == dict.fromkeys(line.nodes, "cached")


def test_rendered_contexts_build_the_same_image(line: Line, built: Built, tmp_path: Path) -> None:
    out = tmp_path / "contexts"
    built.site.run("render", *built.words, "--out", str(out))
    assert {path.name for path in out.iterdir()} == {*line.nodes, "build.sh"}
    (tier2,) = [text for text in (out / "build.sh").read_text().splitlines() if text.endswith(" tier2")]
    before = images.by_name()[built.image]
    done = subprocess.run(["sh", "-c", tier2], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert images.by_name()[built.image].digest == before.digest == built.result["digest"]


def test_no_large_file_without_an_owner(line: Line, built: Built) -> None:
    """Files above 1 MB belong to a package, are made from packages, or came with the upstream image."""
    owned = set(in_image(built.image, line.owned).splitlines())
    image = {node["name"]: node["image"] for node in built.result["nodes"]}
    strays = []
    with ExitStack() as stack:
        given = [stack.enter_context(images.mounted(image[node])) for node in line.given]
        root = stack.enter_context(images.mounted(built.image))
        large = [
            path
            for path in root.rglob("*")
            if not path.is_symlink() and path.is_file() and path.stat().st_size > 1_000_000
        ]
        assert len(large) > 10
        for path in large:
            name = f"/{path.relative_to(root)}"
            if name in owned or name.replace("/usr/", "/", 1) in owned or MADE.fullmatch(name):
                continue
            there = [other / name[1:] for other in given]
            if not any(other.is_file() and filecmp.cmp(path, other, shallow=False) for other in there):
                strays.append(f"{name}: {path.stat().st_size} bytes")
    assert strays == []


def test_changed_unit_rebuilds_only_tier2(line: Line, built: Built, make_site: Callable[[str], Site]) -> None:
    site = site_of(line, make_site)
    site.write("imgbuild.lock", (built.site.folder / "imgbuild.lock").read_text())
    shutil.copytree(shipped() / "layers/cdi", site.folder / "layers/cdi")
    site.edit(f"layers/cdi/{UNIT}", "TimeoutStartSec=60", "TimeoutStartSec=61")
    changed = {**dict.fromkeys(line.nodes, ()), "tier2": (f"file {UNIT} changed",)}
    assert reasons(site.run("plan", "--json", *built.words).json) == changed
    data = site.build(*built.words, "-t", f"localhost/imgbuild-test/unit-{line.base}:1")
    assert site.nodes(data) == {**dict.fromkeys(line.nodes, "cached"), "tier2": "built"}
    assert data["digest"] != built.result["digest"] and data["downloaded_files"] == 0
    # The journal tells what was built last, so the plan of the original now names the same file.
    assert reasons(built.site.run("plan", "--json", *built.words).json) == changed


@pytest.mark.full
def test_driver_compiled_again_is_the_same_bit_for_bit(line: Line, built: Built) -> None:
    kmod = f"kmod-{line.kmod}"
    nodes = {node["name"]: node for node in built.result["nodes"]}
    before = images.by_name()[nodes[kmod]["image"]].digest
    images.remove([built.image, *built.result["tags"], nodes[kmod]["image"]])
    again = built.site.build(*built.words)
    assert built.site.nodes(again) == {**dict.fromkeys(line.nodes, "cached"), kmod: "built", "tier2": "built"}
    assert images.by_name()[nodes[kmod]["image"]].digest == before
    assert again["digest"] == built.result["digest"]
