"""The line with NVIDIA's real modules, compiled once per session: build, check, no work, small changes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebuild import images
from imagebuild.load import shipped

from .workshop import Site

NVIDIA = ("--tier", "2", "--vendor", "nvidia")


@pytest.fixture(scope="session")
def nvidia(make_site: Callable[[str], Site]) -> Site:
    """A site whose NVIDIA image is built, with the result in `first.json` beside its lock."""
    site = make_site("nvidia")
    outcome = site.run("build", "--json", *NVIDIA)
    (site.folder / "first.json").write_text(outcome.out)
    (site.folder / "first.err").write_text(outcome.err)
    return site


@pytest.fixture(scope="session")
def result(nvidia: Site) -> dict[str, object]:
    """The JSON of the first build."""
    found: dict[str, object] = json.loads((nvidia.folder / "first.json").read_text())
    return found


def in_image(image: str, *command: str) -> str:
    """Output of a command run in an image."""
    name = f"test-{abs(hash((image, command)))}"
    subprocess.run(
        ["buildah", "from", "--pull=never", "--name", name, image], check=True, capture_output=True
    )
    try:
        ran = subprocess.run(
            ["buildah", "run", "--isolation", "chroot", name, "--", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        return ran.stdout + ran.stderr
    finally:
        subprocess.run(["buildah", "rm", name], check=True, capture_output=True)


def test_first_build_says_base_and_writes_the_lock(nvidia: Site) -> None:
    said = (nvidia.folder / "first.err").read_text()
    assert said.splitlines()[0].startswith("base debian (default; no --base")
    assert "wrote imgbuild.lock" in said
    assert "isolation " in said and "storage driver " in said
    lock = json.loads((nvidia.folder / "imgbuild.lock").read_text())
    (section,) = lock["sections"].values()
    assert {"tier1", "kernel", "builder", "tier2"} == set(section["transactions"])
    assert all(len(p["sha256"]) == 64 for t in section["transactions"].values() for p in t)


def test_image_holds_kernel_modules_and_userland_and_no_compiler(
    nvidia: Site, result: dict[str, str]
) -> None:
    image = result["image"]
    release = images.labels(image)["io.imgbuild.kernel-release"]
    said = in_image(image, "sh", "-c", f"ls /usr/lib/modules /usr/lib/modules/{release}/extra/nvidia /boot")
    for module in ("nvidia", "nvidia-modeset", "nvidia-drm", "nvidia-uvm", "nvidia-peermem"):
        assert f"{module}.ko.xz" in said
    owner = in_image(image, "dpkg", "-S", f"/usr/lib/modules/{release}/extra/nvidia/nvidia.ko.xz")
    assert owner.startswith("kmod-nvidia:")
    provides = in_image(image, "dpkg-query", "-f", "${Provides}", "-W", "kmod-nvidia")
    assert "nvidia-open-kernel-550" in provides
    with images.mounted(image) as root:
        assert (root / "usr/share/doc/kmod-nvidia/copyright").is_file()
        assert list((root / "usr/lib/firmware/nvidia").glob("*/gsp_*.bin"))
        assert "blacklist nouveau" in (root / "usr/lib/modprobe.d/imgbuild-nvidia.conf").read_text()
        assert (
            "modprobe.blacklist=nouveau"
            in (root / "usr/lib/bootc/kargs.d/10-imgbuild-nvidia.toml").read_text()
        )
        assert (root / "etc/systemd/system/multi-user.target.wants/imgbuild-cdi.service").is_symlink()
        assert not list((root / "usr/bin").glob("*gcc*")) and not (root / "usr/bin/make").exists()
        assert not list((root / "usr/src").glob("*"))
        assert not list((root / "boot").iterdir())
    assert "NVIDIA-SMI" in in_image(image, "nvidia-smi")  # runs; without a card it says so


def test_check_passes_and_names_what_it_must(nvidia: Site, result: dict[str, str]) -> None:
    report = nvidia.run("check", "--json", result["image"]).json
    severities = {finding["check"]: finding["severity"] for finding in report["findings"]}
    assert "fatal" not in severities.values() and "could-not-run" not in severities.values()
    assert severities["unsigned-modules"] == "warning"
    assert severities["cdi-generator"] == "notice"
    for name in ("one-kernel", "vermagic", "symbol-crcs", "modprobe-resolves", "depmod-current"):
        assert name in report["passed"]


def test_plan_reports_patch_and_missing_generator(nvidia: Site) -> None:
    plan = nvidia.run("plan", "--json", *NVIDIA).json
    (verdict,) = plan["verdicts"]
    assert verdict["verdict"] == "patch" and verdict["patch"] == "patches/pci_resize_resource.patch"
    assert any("no CDI generator" in notice for notice in plan["notices"])
    assert all(node["rebuild"] == [] for node in plan["nodes"])


def test_second_build_does_no_work(nvidia: Site, result: dict[str, str]) -> None:
    before = images.images()
    again = nvidia.run("build", *NVIDIA)
    assert "nothing to do" in again.out and "fetch" not in again.out and ": done in" not in again.out
    assert images.images() == before
    data = nvidia.build(*NVIDIA)
    assert data["digest"] == result["digest"] and data["downloaded_files"] == 0
    assert set(nvidia.nodes(data).values()) == {"cached"}


def test_changed_unit_rebuilds_only_tier2(
    nvidia: Site, make_site: Callable[[str], Site], result: dict[str, str]
) -> None:
    site = make_site("unit")
    site.write("imgbuild.lock", (nvidia.folder / "imgbuild.lock").read_text())
    unit = "layers/cdi/files/usr/lib/systemd/system/imgbuild-cdi.service"
    for path in (shipped() / "layers/cdi").rglob("*"):
        if path.is_file():
            relative = path.relative_to(shipped())
            site.write(str(relative), path.read_text(), path.stat().st_mode & 0o777)
    site.edit(unit, "TimeoutStartSec=60", "TimeoutStartSec=61")
    plan = site.run("plan", "--json", *NVIDIA).json
    why = {node["name"]: node["rebuild"] for node in plan["nodes"]}
    assert why.pop("tier2") == ["file files/usr/lib/systemd/system/imgbuild-cdi.service changed"]
    assert set(map(tuple, why.values())) == {()}
    data = site.build(*NVIDIA, "-t", "localhost/imgbuild-test/unit:1")
    assert site.nodes(data) == {
        "tier1": "cached", "kernel": "cached", "builder": "cached", "kmod-nvidia": "cached", "tier2": "built",
    }  # fmt: skip
    assert data["digest"] != result["digest"] and data["downloaded_files"] == 0
    # The journal tells what was built last, so the plan of the original now names the same file.
    back = {n["name"]: n["rebuild"] for n in nvidia.run("plan", "--json", *NVIDIA).json["nodes"]}
    assert back["tier2"] == ["file files/usr/lib/systemd/system/imgbuild-cdi.service changed"]


OWNED_BY_KERNEL = ("initramfs.img", "vmlinuz", "modules.", "System.map")


def test_no_large_file_without_an_owner(nvidia: Site, result: dict[str, str]) -> None:
    """Files above 1 MB belong to a package, or are made from packages: module index, initramfs, hwdb."""
    with images.mounted(result["image"]) as root:
        owned = set()
        for listing in (root / "var/lib/dpkg/info").glob("*.list"):
            owned |= set(listing.read_text().splitlines())
        for path in root.rglob("*"):
            if path.is_symlink() or not path.is_file() or path.stat().st_size <= 1_000_000:
                continue
            name = f"/{path.relative_to(root)}"
            if name in owned or name.replace("/usr/", "/", 1) in owned:
                continue
            made = path.name.startswith(OWNED_BY_KERNEL) or name == "/usr/lib/udev/hwdb.bin"
            assert made, f"{name}: {path.stat().st_size} bytes, owned by no package"


def test_render_out_writes_contexts_that_build(nvidia: Site, tmp_path: Path) -> None:
    out = tmp_path / "contexts"
    nvidia.run("render", *NVIDIA, "--out", str(out))
    assert {p.name for p in out.iterdir()} == {
        "tier1",
        "kernel",
        "builder",
        "kmod-nvidia",
        "tier2",
        "build.sh",
    }
    script = (out / "build.sh").read_text()
    tier2 = [line for line in script.splitlines() if line.endswith(" tier2")]
    done = subprocess.run(["sh", "-c", tier2[0]], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.full
def test_nvidia_compiled_again_is_the_same_bit_for_bit(nvidia: Site, result: dict[str, str]) -> None:
    nodes = {node["name"]: node for node in json.loads((nvidia.folder / "first.json").read_text())["nodes"]}
    images.remove([result["image"], *result["tags"], nodes["kmod-nvidia"]["image"]])
    again = nvidia.build(*NVIDIA)
    assert nvidia.nodes(again)["kmod-nvidia"] == nvidia.nodes(again)["tier2"] == "built"
    assert again["digest"] == result["digest"]
