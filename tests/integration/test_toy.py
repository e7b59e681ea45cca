"""What goes wrong and what is kept, shown on a small real module that compiles in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebuild import images
from tests.conftest import Storage

from .registries import Registry, remove_storage
from .workshop import TOY_BUILD, Site, toy_site

RULE = """\
rules:
  - kmod: toy
    driver: "=1.0"
    kernel: ">=6.12"
    verdict: {verdict}
{patch}    reason: a rule of this test
    link: https://example.com/toy
"""
GOOD_PATCH = """\
--- a/toy.c
+++ b/toy.c
@@ -6,7 +6,7 @@
 int toy_answer(void);
 int toy_answer(void)
 {
-\treturn 42;
+\treturn 43;
 }
 EXPORT_SYMBOL_GPL(toy_answer);
 
"""


def rule(site: Site, verdict: str, patch: str = "") -> None:
    """Give the toy vendor one compat rule."""
    line = f"    patch: {patch}\n" if patch else ""
    site.write("base/debian/toy/compat.yaml", RULE.format(verdict=verdict, patch=line))


def change_source(site: Site, marker: str) -> None:
    """Make the module's source differ, so that its kmod image does not exist yet."""
    site.edit("source/toy.c", "the answer is", f"the {marker} answer is")


def log_of(site: Site, node: str) -> Path:
    return Path(site.env["IMGBUILD_STATE_DIR"]) / "logs" / f"debian-{node}.log"


# --- rules, patches, compile errors ---


def test_pair_without_rule_is_attempted_and_says_so(toy: Site) -> None:
    assert "no rule covers this pair; it is attempted" in toy.run("plan", *TOY_BUILD).text


def test_patch_of_a_rule_is_applied_and_reported(toy: Site) -> None:
    rule(toy, "patch", "patches/answer.patch")
    toy.write("base/debian/toy/patches/answer.patch", GOOD_PATCH)
    assert "patch with patches/answer.patch" in toy.run("plan", *TOY_BUILD).text
    assert toy.nodes(toy.build(*TOY_BUILD))["kmod-toy"] == "built"
    assert "patching file toy.c" in log_of(toy, "kmod-toy").read_text()


def test_patch_that_does_not_apply_names_patch_and_hunk(toy: Site) -> None:
    rule(toy, "patch", "patches/answer.patch")
    toy.write("base/debian/toy/patches/answer.patch", GOOD_PATCH.replace("return 42;", "return 41;"))
    failed = toy.run("build", *TOY_BUILD, code=1)
    assert "answer.patch does not apply to toy 1.0" in failed.err
    assert "Hunk #1 FAILED" in failed.err


def test_compile_error_shows_it_with_log_and_command(toy: Site) -> None:
    toy.edit("source/toy.c", "return 42;", "return fourty_two;")
    failed = toy.run("build", *TOY_BUILD, code=1)
    assert "toy.c" in failed.err and "fourty_two" in failed.err and "error:" in failed.err
    assert "no compat rule covers this pair" in failed.err
    log = log_of(toy, "kmod-toy")
    assert str(log) in failed.err and "fourty_two" in log.read_text()
    (command,) = [line.split("repeat: ")[1] for line in failed.err.splitlines() if "repeat: " in line]
    again = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert again.returncode != 0 and "fourty_two" in again.stdout + again.stderr
    said = toy.run("build", "--json", *TOY_BUILD, code=1).json
    assert said["exit_code"] == 1 and any("fourty_two" in line for line in said["output"])


def test_blocked_rule_stops_with_3_and_can_be_overruled(toy: Site) -> None:
    rule(toy, "blocked")
    stopped = toy.run("build", *TOY_BUILD, code=3)
    assert "a rule of this test" in stopped.err and "https://example.com/toy" in stopped.err
    assert "--allow-blocked" in stopped.err
    toy.run("build", *TOY_BUILD, "--allow-blocked")


def test_probe_tells_that_a_block_no_longer_holds(toy: Site) -> None:
    rule(toy, "blocked")
    change_source(toy, "probed")
    probed = toy.run("compat", *TOY_BUILD, "--probe", code=1)
    assert "compiles" in probed.out and "no longer tells the truth" in probed.out


def test_probe_tells_that_a_block_still_holds(toy: Site) -> None:
    rule(toy, "blocked")
    toy.edit("source/toy.c", "return 42;", "return broken_for_probe;")
    probed = toy.run("compat", *TOY_BUILD, "--probe", "--json").json
    assert probed[0]["compiled"] is False and probed[0]["rule_holds"] is True
    assert any("broken_for_probe" in line for line in probed[0]["output"])


# --- sources ---


def test_tarball_source_is_verified_and_built(toy: Site, tmp_path: Path) -> None:
    tarball = tmp_path / "toy-1.0.tar.gz"
    subprocess.run(
        ["tar", "--transform", "s,^,toy-1.0/,", "-czf", str(tarball), "toy.c", "Kbuild", "COPYING"],
        cwd=toy.folder / "source",
        check=True,
    )
    sha256 = subprocess.run(["sha256sum", str(tarball)], capture_output=True, text=True, check=True).stdout[
        :64
    ]
    source = (
        f"url: file://{tmp_path}/toy-{{version}}.tar.gz\n      sha256: {sha256}\n      path: toy-{{version}}"
    )
    vendor = "base/debian/toy/vendor.yaml"
    toy.edit(vendor, "directory: ../../../source", source)
    toy.edit(vendor, "licences: [COPYING]", "licences: ['toy-{version}/COPYING']")
    assert toy.nodes(toy.build(*TOY_BUILD))["kmod-toy"] == "built"
    toy.edit(vendor, sha256, "0" * 64)
    failed = toy.run("build", *TOY_BUILD, code=1)
    assert "wrong SHA-256" in failed.err and "0" * 64 in failed.err


# --- the same again ---


def test_same_key_gives_same_digest_when_built_again(toy: Site) -> None:
    change_source(toy, "reproducible")
    first = toy.build(*TOY_BUILD)
    images.remove(
        [first["image"], *first["tags"], *(n["image"] for n in first["nodes"] if "kmod" in n["name"])]
    )
    second = toy.build(*TOY_BUILD)
    assert toy.nodes(second)["kmod-toy"] == toy.nodes(second)["tier2"] == "built"
    assert [n["key"] for n in second["nodes"]] == [n["key"] for n in first["nodes"]]
    assert second["digest"] == first["digest"]


def test_check_accepts_an_exporting_module_of_ours(toy: Site) -> None:
    built = toy.build(*TOY_BUILD)
    report = toy.run("check", "--json", built["image"]).json
    assert {"symbol-crcs", "vermagic", "modprobe-resolves"} <= set(report["passed"])


# --- kill, interrupt, two at once ---


def slow(site: Site, marker: str) -> None:
    """Make the compile last long, with a marker that finds its processes."""
    site.edit("base/debian/toy/vendor.yaml", "build: make", f"build: sleep 4{marker} && make")


def processes(marker: str) -> list[str]:
    found = subprocess.run(["pgrep", "-f", f"sleep 4{marker}"], capture_output=True, text=True, check=False)
    return found.stdout.split()


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def containers() -> list[dict[str, str]]:
    listed = subprocess.run(["buildah", "containers", "--json"], capture_output=True, text=True, check=True)
    found: list[dict[str, str]] = json.loads(listed.stdout or "null") or []
    return found


def test_killed_compile_leaves_nothing_that_lasts(toy: Site) -> None:
    slow(toy, "0071")
    names = {name for image in images.images() for name in image.names}
    process = toy.start("build", *TOY_BUILD)
    wait_for(lambda: processes("0071"))
    process.kill()
    process.wait()
    wait_for(lambda: not processes("0071"), 10)  # children die with it
    assert {name for image in images.images() for name in image.names} == names  # no half-made name
    left = containers()
    assert left, "the killed build should have left its working container"
    foreign = subprocess.run(
        ["buildah", "from", "scratch"], capture_output=True, text=True, check=True
    ).stdout.strip()
    toy.edit("base/debian/toy/vendor.yaml", "sleep 40071 && ", "")
    done = toy.build(*TOY_BUILD)  # the next command sweeps, and goes on from the last finished node
    assert toy.nodes(done)["tier1"] == toy.nodes(done)["builder"] == "cached"
    assert [c["containername"] for c in containers()] == [foreign]
    subprocess.run(["buildah", "rm", foreign], check=True, capture_output=True)
    assert not any((Path(toy.env["IMGBUILD_STATE_DIR"]) / "work").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_ends_with_130(toy: Site, number: signal.Signals) -> None:
    slow(toy, f"00{number:02d}")
    process = toy.start("build", *TOY_BUILD)
    wait_for(lambda: processes(f"00{number:02d}"))
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    wait_for(lambda: not processes(f"00{number:02d}"), 5)


def test_two_builds_of_one_key_at_once_both_succeed(toy: Site) -> None:
    change_source(toy, "twice wanted")
    slow(toy, "")  # sleep 4: long enough for the second to meet the first
    first = toy.start("build", "--json", *TOY_BUILD)
    second = toy.start("build", "--json", *TOY_BUILD)
    outs = [p.communicate(timeout=300) for p in (first, second)]
    assert first.returncode == second.returncode == 0, [err[-2000:] for _, err in outs]
    results = [json.loads(out) for out, _ in outs]
    assert results[0]["digest"] == results[1]["digest"]
    assert sum("kmod-toy: waiting: another imgbuild is at it" in err for _, err in outs) == 1
    assert sorted(toy.nodes(r)["kmod-toy"] for r in results) in (["built", "cached"], ["built", "not needed"])


# --- kmod images in a registry ---


def test_second_machine_compiles_nothing_with_a_cache(
    toy: Site, toy_lock: str, registry: Registry, storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    change_source(toy, "cached")
    toy.write("mirrors.yaml", f"insecure: ['{registry.address}']\n")
    cache = ("--cache", f"{registry.address}/kmods", "--mirror-map", "mirrors.yaml")
    done = toy.build(*TOY_BUILD, *cache)
    (key,) = [n["key"] for n in done["nodes"] if n["name"] == "kmod-toy"]
    assert registry.tags("kmods") == [f"kmod-toy-{key}"]
    # A second machine: its own storage and state, the same definitions and lock.
    folder = tmp_path_factory.mktemp("second-machine")
    conf = folder / "storage.conf"
    conf.write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n'
    )
    second = Site(
        toy.folder, {"IMGBUILD_STATE_DIR": str(folder / "state"), "CONTAINERS_STORAGE_CONF": str(conf)}
    )
    try:
        there = second.build(*TOY_BUILD, *cache)
        assert second.nodes(there) == {
            "tier1": "built",
            "kernel": "built",
            "builder": "not needed",
            "kmod-toy": "pulled",
            "tier2": "built",
        }
        assert there["digest"] == done["digest"]  # another machine, the same bytes
    finally:
        remove_storage(folder)


def test_cache_registry_down_is_said_and_passed_over(toy: Site) -> None:
    change_source(toy, "uncached")
    built = toy.run("build", "--json", *TOY_BUILD, "--cache", "127.0.0.1:1/kmods")
    assert toy.nodes(built.json)["kmod-toy"] == "built"
    assert "cache registry unreachable" in built.err and "warning: kmod-toy is not in the cache" in built.err


# --- mirrors and locks ---


def test_unreadable_mirror_ends_with_4(toy: Site) -> None:
    (toy.folder / "imgbuild.lock").unlink()
    toy.write("mirrors.yaml", "repositories: {debian: 'http://127.0.0.1:1/debian'}\n")
    failed = toy.run("lock", *TOY_BUILD, "--mirror-map", "mirrors.yaml", code=4)
    assert "127.0.0.1:1" in failed.err and "--mirror-map" in failed.err
    assert not (toy.folder / "imgbuild.lock").exists()


def lock_with(toy: Site, tmp_path: Path, **change: str) -> Site:
    """A machine with nothing downloaded, and a lock in which one package of tier 1 is changed."""
    lock = json.loads((toy.folder / "imgbuild.lock").read_text())
    (section,) = lock["sections"].values()
    (package,) = [p for p in section["transactions"]["tier1"] if p["name"] == "hostname"]
    package |= change
    toy.write("imgbuild.lock", json.dumps(lock))
    return Site(toy.folder, {**toy.env, "IMGBUILD_STATE_DIR": str(tmp_path / "state")})


def test_wrong_sha256_is_refused_and_nothing_of_it_used(toy: Site, tmp_path: Path) -> None:
    site = lock_with(toy, tmp_path, sha256="f" * 64)
    failed = site.run("build", *TOY_BUILD, code=1)
    assert "hostname" in failed.err and "wrong SHA-256" in failed.err and "f" * 64 in failed.err
    assert not (tmp_path / "state/store/ff" / ("f" * 64)).exists()


def test_locked_package_gone_from_the_mirror_is_named(toy: Site, tmp_path: Path) -> None:
    site = lock_with(toy, tmp_path, sha256="e" * 64, path="pool/main/h/hostname/hostname_0.1_amd64.deb")
    failed = site.run("build", *TOY_BUILD, code=1)
    assert "hostname: locked " in failed.err and "the mirror no longer has 1 of the files" in failed.err


def test_lock_is_the_same_when_written_again(toy: Site) -> None:
    before = (toy.folder / "imgbuild.lock").read_text()
    toy.run("lock", *TOY_BUILD)
    assert (toy.folder / "imgbuild.lock").read_text() == before


# --- machine ---


def test_missing_buildah_ends_with_4_and_the_install_command(toy: Site, tmp_path: Path) -> None:
    change_source(toy, "no buildah")
    for folder in ("/usr/sbin", "/usr/bin"):
        for program in Path(folder).iterdir():
            if program.name != "buildah" and not (tmp_path / program.name).is_symlink():
                (tmp_path / program.name).symlink_to(program)
    failed = toy.run("build", *TOY_BUILD, code=4, PATH=str(tmp_path))
    assert "`buildah` is not installed" in failed.err and "apt-get install -y buildah" in failed.err


def test_build_without_root_ends_with_4(toy: Site) -> None:
    change_source(toy, "no root")
    script = "import os; os.geteuid = lambda: 65534; from imagebuild.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", script, "build", *TOY_BUILD],
        cwd=toy.folder,
        env={**os.environ, **toy.env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 4, ran.stderr[-2000:]
    assert "building needs root" in ran.stderr


def test_full_disk_is_said_and_leaves_no_name(toy: Site, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    conf = tmp_path / "storage.conf"
    conf.write_text(f'[storage]\ndriver = "overlay"\nrunroot = "{mount}/run"\ngraphroot = "{mount}/graph"\n')
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140m", "none", str(mount)], check=True)
    site = Site(toy.folder, {**toy.env, "CONTAINERS_STORAGE_CONF": str(conf)})
    try:
        # Enough for the estimate of tier 1, too little for the image.
        failed = site.run("build", "--tier", "1", code=None)
        assert failed.code in (1, 4), failed.text
        assert "disk" in failed.err.lower()
        listed = subprocess.run(
            ["buildah", "images", "--json"], env={**os.environ, "CONTAINERS_STORAGE_CONF": str(conf)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert not (json.loads(listed.stdout or "null") or [])
    finally:
        subprocess.run(["umount", "-R", str(mount / "graph/overlay")], check=False, capture_output=True)
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.full
def test_zfs_layer_compiles_and_checks(make_site: Callable[[str], Site], toy_lock: str) -> None:
    site = make_site("zfs")
    built = site.build("--tier", "2", "--vendor", "none", "--with", "zfs")
    assert site.nodes(built)["kmod-zfs"] == "built"
    report = site.run("check", "--json", built["image"]).json
    assert not [f for f in report["findings"] if f["severity"] in ("fatal", "could-not-run")]


@pytest.mark.full
def test_probe_of_unpatched_nvidia_shows_that_the_patch_is_needed(make_site: Callable[[str], Site]) -> None:
    site = make_site("probe-nvidia")
    probed = site.run("compat", "--vendor", "nvidia", "--probe", "--json").json
    assert probed[0]["compiled"] is False and probed[0]["rule_holds"] is True
    assert any("pci_resize_resource" in line for line in probed[0]["output"])


def test_toy_site_is_not_shipped(tmp_path: Path) -> None:
    site = toy_site(tmp_path, {})
    assert "toy" in site.run("list").out
    assert "toy" not in Site(tmp_path.parent, {}).run("list").out
