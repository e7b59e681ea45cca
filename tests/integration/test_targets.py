"""Several targets of one site, of which not all can be built."""

from __future__ import annotations

import json
import shutil

import pytest

from imagebuild import images

from .workshop import Site

FLEET = """\
base: debian
targets:
  - {name: fine, vendor: toy}
  - {name: old, vendor: old}
  - {name: broken, vendor: bad}
hosts:
  - {name: web-1, vendor: toy}
  - {name: web-2, vendors: [toy]}
"""
# Neither covers all kernels a base can have: the answer needs the locked kernel.
RULE = """\
rules:
  - kmod: toy
    driver: "<2"
    kernel: ">=6.12.1"
    verdict: blocked
    reason: a rule of this test
    link: https://example.com/toy
    unblock: driver 2 is said to work
"""


@pytest.fixture
def fleet(toy: Site) -> Site:
    """The toy vendor, one that a rule stops, and one whose module does not compile."""
    for name in ("old", "bad"):
        shutil.copytree(toy.folder / "base/debian/toy", toy.folder / "base/debian" / name)
    shutil.copytree(toy.folder / "source", toy.folder / "source-bad")
    toy.edit("source-bad/toy.c", "return 42;", "return not_declared;")
    toy.edit("base/debian/bad/vendor.yaml", "../../../source", "../../../source-bad")
    toy.write("base/debian/old/compat.yaml", RULE)
    toy.write("imgbuild.yaml", FLEET)
    return toy


def test_target_that_can_be_built_is_built_whatever_becomes_of_the_others(fleet: Site) -> None:
    before = json.loads((fleet.folder / "imgbuild.lock").read_text())["sections"]
    said = fleet.run("build", code=1)
    table = said.out[said.out.index("target  base") :]
    assert "localhost/imgbuild/fine:tier2" in table
    assert "base/debian/old/compat.yaml:2" in table and "https://example.com/toy" in table
    assert "pin     kernel: <6.12.1" in table and "pin     driver: >=2" in table
    assert "driver 2 is said to work" in table
    assert "not_declared" in table and "log: " in table and "repeat: " in table
    assert "\x1b" not in said.text
    assert "localhost/imgbuild/fine:tier2" in images.by_name()
    after = json.loads((fleet.folder / "imgbuild.lock").read_text())["sections"]
    assert after.keys() == {"debian/toy/-", "debian/bad/-"}
    assert {name: after[name] for name in before} == before

    again = fleet.run("build", "--json", "--target", "fine", "--target", "old", code=3).json
    fine, old = again["targets"]
    assert (fine["name"], fine["status"]) == ("fine", "cached")
    assert fine["digest"] == images.by_name()["localhost/imgbuild/fine:tier2"].digest
    assert (old["name"], old["status"], old["driver"]) == ("old", "stopped", "1.0")
    assert old["kernel"] == fine["kernel_release"] and old["pins"] == ["kernel: <6.12.1", "driver: >=2"]


def test_hosts_of_one_image_get_it_under_the_name_of_each(fleet: Site) -> None:
    (found,) = fleet.build("--all-hosts")["targets"]
    assert found["hosts"] == ["web-1", "web-2"]
    named = images.by_name()
    ids = {named[f"localhost/imgbuild/{host}:tier2"].id for host in found["hosts"]}
    assert ids == {named[found["image"]].id}


def test_image_of_two_vendors_has_the_modules_of_both(fleet: Site) -> None:
    """The second is the first under other names."""
    shutil.copytree(fleet.folder / "base/debian/toy", fleet.folder / "base/debian/second")
    shutil.rmtree(fleet.folder / "base/debian/second/files")
    shutil.copytree(fleet.folder / "source", fleet.folder / "source-second")
    (fleet.folder / "source-second/toy.c").rename(fleet.folder / "source-second/second.c")
    fleet.edit("source-second/second.c", "toy_answer", "second_answer")
    fleet.edit("source-second/Kbuild", "toy", "second")
    vendor = "base/debian/second/vendor.yaml"
    fleet.edit(vendor, "toy", "second")
    fleet.edit(vendor, "../../../source", "../../../source-second")
    built = fleet.build("--vendor", "second", "--vendor", "toy")
    assert built["tags"] == ["localhost/imgbuild/debian-second-toy:tier2"]
    assert {"kmod-second", "kmod-toy"} <= fleet.nodes(built).keys()
    report = fleet.run("check", "--json", built["tags"][0]).json
    assert not [f for f in report["findings"] if f["severity"] in ("fatal", "could-not-run")]
    assert images.labels(built["image"])["io.imgbuild.vendor"] == "second+toy"
    with images.mounted(built["image"]) as root:
        assert {p.name.split(".")[0] for p in root.glob("usr/lib/modules/*/**/*.ko*")} >= {"toy", "second"}
