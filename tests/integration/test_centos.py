"""What only a look-alike upstream of base centos can do: move, lie and fail (see docs/rehearsal.md).

The line that it goes when nothing is wrong is in test_line.py, as that of all bases.
"""

from __future__ import annotations

import json
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagebuild import images
from tests.conftest import fresh_storage

from ..rehearsal import contents
from ..rehearsal.image import UNSHARE_MACRO
from ..rehearsal.look_alike import Rehearsal
from .test_line import in_image
from .workshop import TOY_CENTOS, Site, toy_centos_site

OLD, NEW = (contents.release_of(contents.KERNELS[kernel]) for kernel in ("old", "new"))
NO_HEADERS = "has no headers in the repositories: moved"
NVIDIA = ("--base", "centos", "--vendor", "nvidia")


@pytest.fixture
def broken(private_rehearsal: Rehearsal) -> Rehearsal:
    """A copy of the look-alike, to be broken."""
    return private_rehearsal


@pytest.fixture
def site(make_site: Callable[[str], Site]) -> Site:
    """An empty site."""
    return make_site("centos")


def section(site: Site) -> Any:
    (found,) = json.loads((site.folder / "imgbuild.lock").read_text())["sections"].values()
    return found


def lock(site: Site, world: Rehearsal, *options: str, code: int = 0) -> str:
    return site.run("lock", *NVIDIA, "--mirror-map", str(world.mirror_map), *options, code=code).text


def test_no_agent_of_the_solver_outlives_it(site: Site, broken: Rehearsal) -> None:
    def agents() -> str:
        ran = subprocess.run(
            ["pgrep", "-f", "gpg-agent.*(cache|pubring|dnf)"], capture_output=True, text=True
        )
        return ran.stdout

    before = agents()
    broken.base_kernel("new", leaky_gpg=True)
    lock(site, broken)
    assert agents() == before


# --- what moves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "headers", "release", "reason"),
    [
        (
            "new",
            "old",
            OLD,
            f"the stock kernel {NEW} {NO_HEADERS} down to {OLD}",
        ),
        ("old", "new", NEW, f"the stock kernel {OLD} {NO_HEADERS} up to {NEW}"),
        ("both", "both", NEW, f"the base image has 2 kernels: {NEW} stays (newest"),
        ("old", "both", OLD, f"kernel {OLD} is the stock kernel"),
    ],
)
def test_kernel_and_headers_that_do_not_match_are_brought_together(
    site: Site, broken: Rehearsal, base: str, headers: str, release: str, reason: str
) -> None:
    broken.base_kernel(base)
    broken.kernel_devel(headers)
    lock(site, broken)
    found = section(site)
    assert found["kernel_release"] == release and found["kernel_reason"].startswith(reason)
    (headers_rpm,) = [p for p in found["transactions"]["builder"] if p["name"] == "kernel-devel"]
    assert release.startswith(headers_rpm["version"].split("-")[0])
    plan = site.run("plan", *NVIDIA, "--mirror-map", str(broken.mirror_map)).out
    assert reason in plan


def test_kernel_that_was_replaced_or_doubled_is_the_only_one(site: Site, broken: Rehearsal) -> None:
    broken.base_kernel("both")
    site.write("imgbuild.yaml", f'kernel: "{OLD}"\n')
    arguments = ("--base", "centos", "--vendor", "none", "--mirror-map", str(broken.mirror_map))
    result = site.build(*arguments, "-t", "localhost/imgbuild-test/kernel:1")
    report = site.run("check", "--json", result["image"]).json
    assert "one-kernel" in report["passed"] and "package-files" in report["passed"]
    with images.mounted(result["image"]) as root:
        assert [path.name for path in (root / "usr/lib/modules").iterdir()] == [OLD]


def test_moved_tag_is_drift_and_only_upgrade_follows_it(site: Site, broken: Rehearsal) -> None:
    lock(site, broken)
    digest = section(site)["base_digest"]
    assert "as locked" in lock(site, broken, "--check")
    broken.base_kernel("old")
    said = lock(site, broken, "--check", code=1)
    assert f"base image {digest} -> {broken.digest()}" in said
    lock(site, broken)
    assert section(site)["base_digest"] == digest
    lock(site, broken, "--upgrade", "base")
    assert section(site)["base_digest"] == broken.digest() and section(site)["kernel_release"] == OLD


def test_package_that_vanished_is_named_with_what_there_is_now(site: Site, broken: Rehearsal) -> None:
    lock(site, broken)
    site.env["IMGBUILD_STATE_DIR"] = str(site.folder / "state")
    old = {p["name"]: p["version"] for t in section(site)["transactions"].values() for p in t}
    broken.vanish("patch")
    # The image may be there from another test; what is not asked for is not missed.
    said = site.run("build", "--no-cache", *NVIDIA, "--mirror-map", str(broken.mirror_map), code=1).text
    assert f"patch: locked {old['patch']}, offered " in said and "Traceback" not in said
    lock(site, broken)
    new = {p["name"]: p["version"] for t in section(site)["transactions"].values() for p in t}
    assert {name for name in old if old[name] != new[name]} == {"patch"}


# --- what cannot be trusted or reached --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["metadata", "metadata-missing"])
def test_metadata_that_a_stranger_signed_is_refused(site: Site, broken: Rehearsal, kind: Any) -> None:
    broken.wrong_signature(contents.TOOLKIT, kind)
    said = lock(site, broken, code=1)
    assert contents.TOOLKIT in said and "nothing of it is used" in said
    assert not (site.folder / "imgbuild.lock").exists()


@pytest.mark.parametrize("kind", ["package", "package-unsigned"])
def test_package_that_a_stranger_signed_is_not_installed(site: Site, broken: Rehearsal, kind: Any) -> None:
    broken.wrong_signature(contents.BASE, kind, "patch")
    said = site.run("build", *NVIDIA, "--mirror-map", str(broken.mirror_map), code=1).text
    assert "not signed with the key of its repository: patch" in said


def test_package_with_other_bytes_is_refused(site: Site, broken: Rehearsal) -> None:
    broken.wrong_signature(contents.BASE, "bytes", "patch")
    site.env["IMGBUILD_STATE_DIR"] = str(site.folder / "state")
    said = site.run("build", "--no-cache", *NVIDIA, "--mirror-map", str(broken.mirror_map), code=1).text
    assert "wrong SHA-256" in said and "patch" in said


def test_scriptlet_that_fails_stops_the_build_although_dnf_is_content(site: Site, broken: Rehearsal) -> None:
    broken.broken_scriptlet("patch")
    said = site.run("build", *NVIDIA, "--mirror-map", str(broken.mirror_map), code=1).text
    assert "scriptlet failed" in said


def test_userland_of_another_version_than_the_modules_is_refused(site: Site, broken: Rehearsal) -> None:
    broken.split_driver(required=False)
    said = lock(site, broken, code=2)
    assert contents.DRIVER in said and "550.163.02" in said


def test_server_that_fails_half_the_time_is_asked_again(site: Site, broken: Rehearsal) -> None:
    broken.flaky(contents.CUDA)
    lock(site, broken)


def test_mirror_map_is_asked_and_nobody_else(
    site: Site, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(200))

    with socketserver.TCPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        lock(site, rehearsal)
        proxy.shutdown()
    assert asked == []


@pytest.mark.parametrize("refused", [False, True])
def test_repository_that_is_down_is_named_and_nothing_is_skipped(
    site: Site, broken: Rehearsal, refused: bool
) -> None:
    broken.down(contents.CUDA, refused=refused)
    said = lock(site, broken, code=4)
    assert contents.CUDA in said and not (site.folder / "imgbuild.lock").exists()


# --- a small driver: traps, another machine, a core -------------------------------------------------


def test_plugin_of_rpm_that_no_chroot_can_use_is_not_used(
    toy_centos: Site, site: Site, broken: Rehearsal
) -> None:
    broken.base_kernel("both", unshare_plugin=True)
    toy_centos_site(site)
    built = site.build(*TOY_CENTOS, "--mirror-map", str(broken.mirror_map))
    assert set(site.nodes(built).values()) == {"built"}
    # The trap is there, and left alone.
    with images.mounted(built["image"]) as root:
        assert (root / UNSHARE_MACRO).read_text().strip()
        assert not list((root / "etc/rpm").glob("macros.imgbuild*"))
        assert "libuutil.so" in (root / "etc/ld.so.cache").read_text(errors="replace")
        assert [path.name for path in (root / "usr/lib/modules").iterdir()] == [NEW]
    report = site.run("check", "--json", built["image"]).json
    assert "package-files" in report["passed"] and "modules-owned" in report["passed"]


def test_gathered_packages_build_the_same_image_with_the_network_cut(
    toy_centos: Site, rehearsal: Rehearsal, tmp_path: Path
) -> None:
    usb = tmp_path / "usb"
    toy_centos.run("fetch", str(usb), *TOY_CENTOS, "--mirror-map", str(rehearsal.mirror_map))
    with fresh_storage(tmp_path / "storage") as fresh:
        env = {
            "IMGBUILD_STATE_DIR": str(tmp_path / "state"),
            "CONTAINERS_STORAGE_CONF": str(fresh.conf),
        }
        shutil.copytree(toy_centos.folder, tmp_path / "site")
        (tmp_path / "site/imgbuild.lock").unlink()  # the folder has a copy
        apart = Site(tmp_path / "site", env, prefix=("unshare", "--net"))
        said = apart.run("build", "--json", *TOY_CENTOS, "--offline", str(usb))
    first = json.loads((toy_centos.folder / "first.json").read_text())
    assert set(apart.nodes(said.json).values()) == {"built"}
    assert said.json["digest"] == first["digest"] and said.json["downloaded_files"] == 0


@pytest.mark.full
def test_openzfs_compiles_and_checks(site: Site, rehearsal: Rehearsal) -> None:
    arguments = ("--base", "centos", "--vendor", "none", "--with", "zfs")
    built = site.build(*arguments, "--mirror-map", str(rehearsal.mirror_map))
    assert site.nodes(built)["kmod-zfs"] == "built"
    report = site.run("check", "--json", built["image"]).json
    severities = {finding["check"]: finding["severity"] for finding in report["findings"]}
    assert {"fatal", "could-not-run"}.isdisjoint(severities.values())
    for name in ("vermagic", "symbol-crcs", "modules-owned", "modprobe-resolves", "package-files"):
        assert name in report["passed"]
    assert in_image(built["image"], "rpm -V --nomtime zfs kmod-zfs") == ""
