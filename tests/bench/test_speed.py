"""How fast the line is, beside what it is compared with. Nothing here is a timed assertion."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from imagebuild import images
from imagebuild.load import shipped
from tests.integration.registries import Registry, remove_storage
from tests.integration.workshop import TOY_BUILD, Site, toy_site

from .conftest import note, record

NVIDIA = ("--tier", "2", "--vendor", "nvidia")
BARE = "import click, jinja2, yaml"


def timed(argv: Sequence[str], cwd: Path, env: dict[str, str] | None = None, rounds: int = 7) -> float:
    """Median wall time of a command, in seconds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        done = subprocess.run(
            argv, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
        )
        found.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr[-2000:]
    return statistics.median(found)


def imgbuild(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "imagebuild", *arguments]


def test_reading_commands_beside_bare_imports(make_site: Callable[[str], Site], toy_lock: str) -> None:
    site = make_site("bench-plan")
    toy_site(site.folder, site.env)
    site.write("imgbuild.lock", toy_lock)
    bare = timed([sys.executable, "-c", BARE], site.folder)
    record("imgbuild --help / bare imports", timed(imgbuild("--help"), site.folder), bare, "<= 1.5")
    for command in ("plan", "render"):
        ours = timed(imgbuild(command, *TOY_BUILD), site.folder, site.env)
        record(f"imgbuild {command} / bare imports", ours, bare, "<= 2.5")
    lock = json.loads(toy_lock)
    (section,) = lock["sections"].values()
    tier2 = section["transactions"]["tier2"]
    sample = section["transactions"]["tier1"][0]
    tier2 += [{**sample, "name": f"filler-{i}", "sha256": f"{i:064x}"} for i in range(1500)]
    site.write("imgbuild.lock", json.dumps(lock))
    for command in ("plan", "render"):
        ours = timed(imgbuild(command, *TOY_BUILD), site.folder, site.env)
        record(f"imgbuild {command}, lock of 1500 packages / bare imports", ours, bare, "<= 2.5")


def test_nothing_to_do_beside_buildah_layers(
    make_site: Callable[[str], Site], toy_lock: str, tmp_path: Path
) -> None:
    site = make_site("bench-nothing")
    toy_site(site.folder, site.env)
    site.write("imgbuild.lock", toy_lock)
    site.build(*TOY_BUILD)
    out = tmp_path / "contexts"
    site.run("render", *TOY_BUILD, "--out", str(out))
    lines = [line for line in (out / "build.sh").read_text().splitlines() if line.startswith("buildah")]
    layered = tmp_path / "layered.sh"
    commands = [re.sub(r"--tag \S+", f"--tag bench:{i}", line) for i, line in enumerate(lines)]
    layered.write_text("set -e\n" + "\n".join(c.replace("--layers=false", "--layers") for c in commands))
    subprocess.run(["sh", str(out / "tier1/bootstrap.sh")], check=True, capture_output=True)
    subprocess.run(["sh", str(layered)], cwd=out, check=True, capture_output=True)
    ours = timed(imgbuild("build", *TOY_BUILD), site.folder, site.env, rounds=5)
    other = timed(["sh", str(layered)], out, rounds=3)
    record("imgbuild build, nothing to do / buildah build --layers", ours, other, "<= 0.5 and <= 0.5 s")


def test_kmod_stage_beside_bare_make(make_site: Callable[[str], Site]) -> None:
    site = make_site("bench-kmod")
    built = site.build(*NVIDIA)
    (kmod,) = [n for n in built["nodes"] if n["name"] == "kmod-nvidia"]
    (builder,) = [n for n in built["nodes"] if n["name"] == "builder"]
    images.remove([built["image"], *built["tags"], kmod["image"]])
    began = time.perf_counter()
    site.run("compat", "--vendor", "nvidia", code=None)  # warms caches of the reading side
    site.build(*NVIDIA)
    whole = time.perf_counter() - began
    log = (Path(site.env["IMGBUILD_STATE_DIR"]) / "logs/debian-kmod-nvidia.log").read_text()
    compiled = float(re.search(r"compiled in ([0-9.]+) s", log)[1])  # type: ignore[index]
    out = site.folder / "contexts"
    site.run("render", *NVIDIA, "--out", str(out))
    release = json.loads(site.run("plan", "--json", *NVIDIA).out)["kernel_release"]
    context = out / "kmod-nvidia"
    script = (
        "set -e; mkdir /w; for d in /run/ctx/source/*.deb; do dpkg-deb -x $d /w; done; "
        "cd /w/usr/src/nvidia-*; "
        "for p in /run/ctx/kmod/patches/*.patch; do patch -p1 < $p >/dev/null; done; "
        f"s=$(date +%s.%N); make -j$(nproc) modules KERNEL_UNAME={release} >/dev/null 2>&1; "
        "e=$(date +%s.%N); awk -v a=$s -v b=$e 'BEGIN { print b - a }'"
    )
    name = subprocess.run(
        ["buildah", "from", "--pull=never", builder["image"]], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        ran = subprocess.run(
            [
                *("buildah", "run", "--isolation", "chroot", "-v", f"{context}:/run/ctx:ro", name),
                *("--", "sh", "-c", script),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        subprocess.run(["buildah", "rm", name], check=True, capture_output=True)
    bare = float(ran.stdout.split()[-1])
    record("kmod stage of NVIDIA: compile / bare make modules", compiled, bare, "<= 1.10")
    note("kmod stage and tier 2, everything", f"{whole:.1f} s")


SOURCE = os.environ.get("IMGBUILD_NVIDIA_SRC", "")


@pytest.mark.skipif(not SOURCE, reason="$IMGBUILD_NVIDIA_SRC names no folder with NVIDIA's published source")
def test_new_kernel_beside_a_full_compile_of_published_source(make_site: Callable[[str], Site]) -> None:
    """Compiled as docs/driver-from-source.md has it; a new kernel compiles the modules, not the core.

    There is no userland of its version: the image has the modules alone, and nothing that needs more.
    """
    version = re.search(r"NVIDIA_VERSION = (\S+)", (Path(SOURCE) / "version.mk").read_text())[1]  # type: ignore[index]
    text = (Path(__file__).parents[2] / "docs/driver-from-source.md").read_text()
    (block,) = [b for b in re.findall(r"(?:^    .*\n|\n)+", text, re.M) if "core:" in b and "outputs:" in b]
    site = make_site("bench-core")
    override = textwrap.dedent(block).replace("580.126.09", version)
    site.write("imgbuild.yaml", override.replace("../open-gpu-kernel-modules", SOURCE))
    vendor = yaml.safe_load((shipped() / "base/debian/nvidia/vendor.yaml").read_text())
    alone = {name: vendor[name] for name in ("summary", "kmods", "kargs")}
    site.write("base/debian/published/vendor.yaml", yaml.safe_dump(alone))
    built = site.build("--tier", "2", "--vendor", "published", "--jobs", "1")
    seconds = {n["name"]: n["seconds"] for n in built["nodes"]}
    core, modules = seconds["kmod-nvidia-core"], seconds["kmod-nvidia"]
    record("published source: modules alone / core and modules", modules, core + modules, "<= 0.65")
    checked = site.run("check", "--json", built["image"], code=None)
    bad = [f for f in checked.json["findings"] if f["severity"] in ("fatal", "could-not-run")]
    (image,) = [n["image"] for n in built["nodes"] if n["name"] == "kmod-nvidia-core"]
    note("published source: digest of the core", images.by_name()[image].digest)
    note("published source: check", "; ".join(f"{f['check']}: {f['what']}" for f in bad) or "passes")


def test_unit_change_and_cold_builds(make_site: Callable[[str], Site], registry: Registry) -> None:
    site = make_site("bench-unit")
    built = site.build(*NVIDIA)
    for path in (shipped() / "layers/cdi").rglob("*"):
        if path.is_file():
            place = str(path.relative_to(shipped()))
            site.write(place, path.read_text(), path.stat().st_mode & 0o777)
    site.edit("layers/cdi/files/usr/lib/systemd/system/imgbuild-cdi.service", "=60", "=59")
    again = site.build(*NVIDIA, "-t", "bench-unit:1")
    seconds = {n["name"]: n["seconds"] for n in again["nodes"]}
    assert site.nodes(again)["kmod-nvidia"] == "cached"
    note("change of one unit file: tier 2 anew", f"{seconds['tier2']:.1f} s", "<= 30 s")
    note("image size in storage", f"{built['size_bytes'] / 1e6:.0f} MB")
    site.write("mirrors.yaml", f"insecure: ['{registry.address}']\n")
    site.run(
        "push", "--no-tls-verify", built["image"], f"{registry.address}/bench:1"
    )  # sizes as a registry has them
    layers = registry.manifest("bench", "1")["layers"]
    note("layers in a registry", " + ".join(f"{layer['size'] / 1e6:.0f}" for layer in layers) + " MB")
    cache = ("--cache", f"{registry.address}/bench-kmods", "--mirror-map", "mirrors.yaml")
    cold = {}
    for round_ in ("without", "with"):
        folder = site.folder / f"cold-{round_}"
        folder.mkdir()
        conf = folder / "storage.conf"
        conf.write_text(
            f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n'
        )
        fresh = Site(
            site.folder, {"IMGBUILD_STATE_DIR": str(folder / "state"), "CONTAINERS_STORAGE_CONF": str(conf)}
        )
        outcome = fresh.run("build", "--json", *NVIDIA, *cache)
        cold[round_] = outcome.seconds
        note(f"cold build {round_} the cache: downloads", f"{outcome.json['downloaded_bytes'] / 1e6:.0f} MB")
        remove_storage(folder)
    record("cold tier 2 with kmods from a registry / without", cold["with"], cold["without"], "<= 0.5")
