"""The graph of images, and which keys move when one thing changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Site
from synthetic_lock import synthetic_section

from imagebuild.errors import BlockedError
from imagebuild.load import Selection
from imagebuild.lock import Section
from imagebuild.plan import plan

WITH_KERNEL = {"debian": "kernel", "centos": "tier1"}


@pytest.mark.parametrize("base", ["debian", "centos"])
@pytest.mark.parametrize("vendor", ["nvidia", "amd", "none"])
@pytest.mark.parametrize("zfs", [False, True])
def test_graph_has_one_node_per_image_each_after_its_parents(
    site: Site, base: str, vendor: str, zfs: bool
) -> None:
    selection = site.load(base, vendor, with_layers=["zfs"] if zfs else [])
    made = plan(selection, synthetic_section(selection), allow_blocked=True)
    below = WITH_KERNEL[base]
    kmods = [f"kmod-{k}" for k in ({"nvidia": ["nvidia"], "amd": ["amdgpu"], "none": []}[vendor])]
    kmods += ["kmod-zfs"] if zfs else []
    expected = {"tier1": ()}
    if below == "kernel":
        expected["kernel"] = ("tier1",)
    if kmods:
        expected["builder"] = (below,)
    expected |= dict.fromkeys(kmods, ("builder",))
    expected["tier2"] = (below, *kmods)
    assert {node.name: node.parents for node in made.nodes} == expected
    assert made.target.name == "tier2"
    assert [node.name for node in made.nodes if node.final] == ["tier1", "tier2"]
    seen: set[str] = set()
    for node in made.nodes:
        assert seen.issuperset(node.parents)
        seen.add(node.name)


@pytest.mark.parametrize(("base", "kind"), [("debian", "bootstrap"), ("centos", "upstream")])
def test_tier1_is_one_node(site: Site, base: str, kind: str) -> None:
    made = plan(site.load(base, "nvidia", tier=1), None)
    assert [(node.name, node.kind) for node in made.nodes] == [("tier1", kind)]


def test_patch_of_a_rule_goes_to_the_kmod_it_is_for(site: Site) -> None:
    selection = site.load("debian", "nvidia", with_layers=["zfs"])
    nodes = {n.name: n for n in plan(selection, synthetic_section(selection)).nodes}
    assert nodes["kmod-nvidia"].patches == ("patches/pci_resize_resource.patch",)
    assert nodes["kmod-zfs"].patches == ()


def test_locked_driver_that_is_blocked_stops_the_plan(site: Site) -> None:
    selection = site.load("debian", "nvidia")
    section = synthetic_section(selection, release="6.12.117+deb13-amd64")
    site.own_definitions()
    site.edit("base/debian/nvidia/compat.yaml", '"=550.163.01"', '"=550.163.02"')
    selection = site.load("debian", "nvidia")
    with pytest.raises(BlockedError, match=r"nvidia 550\.163\.01 is blocked on kernel 6\.12\.117"):
        plan(selection, section)
    assert plan(selection, section, allow_blocked=True).verdicts[0].kind == "blocked"


def test_unlocked_plan_shows_what_is_not_known_and_has_no_keys(site: Site) -> None:
    nodes = site.rendered("debian", "nvidia", section=None)
    assert {(r.key, r.image) for r in nodes.values()} == {(None, None)}
    assert "'<unlocked: kernel_release>'" in nodes["kernel"].containerfile
    assert "'<unlocked: nvidia.version>'" in nodes["kmod-nvidia"].containerfile
    assert "FROM localhost/imgbuild/debian-kernel:<unlocked: key>" in nodes["tier2"].containerfile
    upstream = site.rendered("centos", "none", section=None)["tier1"].containerfile
    assert "FROM quay.io/centos-bootc/centos-bootc@<unlocked: base_digest>" in upstream


def test_locked_plan_has_nothing_unlocked_in_it(site: Site) -> None:
    for base in ("debian", "centos"):
        for item in site.rendered(base, "nvidia", with_layers=["zfs"]).values():
            assert "<unlocked" not in item.containerfile
            assert item.key is not None and len(item.key) == 64
            assert item.image == f"localhost/imgbuild/{base}-{item.node.name}:{item.key}"


# --- keys -------------------------------------------------------------------------------------------

BASE = "base/debian/base.yaml"
PATCH = "base/debian/nvidia/patches/pci_resize_resource.patch"
EVERYTHING = {"tier1", "kernel", "builder", "kmod-nvidia", "kmod-zfs", "tier2"}


def _salted(*names: str) -> Callable[[Selection], Section]:
    return lambda selection: synthetic_section(selection, salts=dict.fromkeys(names, "rebuilt"))


def _moved(site: Site, change: Callable[[], object], section: object = synthetic_section) -> set[str]:
    """The nodes whose key another input gives."""
    layers = ["zfs"]
    before = site.rendered("debian", "nvidia", with_layers=layers)
    change()
    after = site.rendered("debian", "nvidia", with_layers=layers, section=section)
    assert before.keys() == after.keys() == EVERYTHING
    return {name for name in before if before[name].key != after[name].key}


def _nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("packages", "moved"),
    [
        (["systemd"], EVERYTHING),
        (["linux-image-amd64"], EVERYTHING - {"tier1"}),
        (["gcc"], {"builder", "kmod-nvidia", "kmod-zfs", "tier2"}),
        (["nvidia-open-kernel-dkms"], {"kmod-nvidia", "tier2"}),
        (["zfs-dkms"], {"kmod-zfs", "tier2"}),
        (["nvidia-smi"], {"tier2"}),
        ([], set()),
    ],
)
def test_new_package_moves_the_keys_of_its_node_and_those_above(
    site: Site, packages: list[str], moved: set[str]
) -> None:
    assert _moved(site, _nothing, _salted(*packages)) == moved


@pytest.mark.parametrize(
    ("path", "old", "new", "moved"),
    [
        ("base/debian/nvidia/vendor.yaml", "make -j", "make V=1 -j", {"kmod-nvidia", "tier2"}),
        (PATCH, "Zero keeps", "0 keeps", {"kmod-nvidia", "tier2"}),
        ("layers/zfs/files/usr/lib/modules-load.d/zfs.conf", "zfs\n", "spl\nzfs\n", {"tier2"}),
        ("base/debian/files/usr/lib/dracut/dracut.conf.d/50-imgbuild.conf", "no graphics", "none", {"tier2"}),
        ("base/debian/nvidia/vendor.yaml", "modeset=1", "modeset=0", {"tier2"}),
        ("base/debian/nvidia/vendor.yaml", "enable: [nvidia-pers", "mask: [nvidia-pers", {"tier2"}),
        (BASE, "compression: xz", "compression: zstd", {"kmod-nvidia", "kmod-zfs", "tier2"}),
        (BASE, "      - /usr/share/info/*\n", "", EVERYTHING),
        ("base/debian/nvidia/compat.yaml", "<580.126.09", "<580.126.10", set()),
        ("base/debian/nvidia/compat.yaml", "which this driver does not pass", "alas", set()),
        ("layers/cdi/layer.yaml", "add --with", "take --with", set()),
    ],
)  # fmt: skip
def test_changed_definition_moves_only_the_keys_of_what_is_made_of_it(
    site: Site, path: str, old: str, new: str, moved: set[str]
) -> None:
    site.own_definitions()
    assert _moved(site, lambda: site.edit(path, old, new)) == moved


def test_new_kernel_release_moves_every_key_above_tier1(site: Site) -> None:
    def newer(selection: Selection) -> Section:
        return synthetic_section(selection, release="6.12.118+deb13-amd64")

    assert _moved(site, _nothing, newer) == EVERYTHING - {"tier1"}


def test_new_base_digest_moves_every_key(site: Site) -> None:
    from msgspec.structs import replace

    def newer(selection: Selection) -> Section:
        return replace(synthetic_section(selection), base_digest=f"sha256:{'cd' * 32}")

    before = site.rendered("centos", "nvidia")
    after = site.rendered("centos", "nvidia", section=newer)
    assert {name for name in before if before[name].key != after[name].key} == before.keys()


def test_another_layer_leaves_shared_nodes_as_they_are(site: Site) -> None:
    """So that images of one base share what they can."""
    without, with_zfs = (
        site.rendered("debian", "nvidia"),
        site.rendered("debian", "nvidia", with_layers=["zfs"]),
    )
    same = {name for name in without if without[name].key == with_zfs[name].key}
    assert same == {"tier1", "kernel", "builder", "kmod-nvidia"}


def test_umask_of_the_checkout_moves_no_key(site: Site) -> None:
    site.own_definitions()

    def chmod(mode: int) -> None:
        for folder, _, names in os.walk(site.folder):
            for name in names:
                path = Path(folder, name)
                executable = path.stat().st_mode & 0o100
                path.chmod(mode | (mode >> 2 & 0o111 if executable else 0))

    chmod(0o644)
    assert _moved(site, lambda: chmod(0o664)) == set()
    assert _moved(site, lambda: chmod(0o600)) == set()


def test_executable_bit_moves_the_key(site: Site) -> None:
    site.own_definitions()
    script = site.folder / "layers/cdi/files/usr/libexec/imgbuild/cdi-generate"
    assert _moved(site, lambda: script.chmod(0o644)) == {"tier2"}


def test_link_target_moves_the_key(site: Site) -> None:
    site.own_definitions()
    link = site.folder / "layers/zfs/files/etc/x"
    link.parent.mkdir()
    link.symlink_to("a")

    def change() -> None:
        link.unlink()
        link.symlink_to("b")

    assert _moved(site, change) == {"tier2"}


def test_renamed_file_moves_the_key(site: Site) -> None:
    site.own_definitions()
    file = site.folder / "layers/zfs/files/usr/lib/modules-load.d/zfs.conf"
    assert _moved(site, lambda: file.rename(file.with_name("openzfs.conf"))) == {"tier2"}


def test_source_folder_of_a_driver_moves_the_key_but_its_git_folder_does_not(site: Site) -> None:
    site.write(
        "imgbuild.yaml", "kmods: {nvidia: {version: 580.126.09, source: {directory: src}}}\npackages: []\n"
    )
    site.write("src/Kbuild", "obj-m += nvidia.o\n")
    site.write("src/.git/HEAD", "one\n")
    assert _moved(site, lambda: site.write("src/.git/HEAD", "two\n")) == set()
    assert _moved(site, lambda: site.write("src/Kbuild", "obj-m += other.o\n")) == {"kmod-nvidia", "tier2"}


def test_key_is_made_of_inputs_a_person_understands(site: Site) -> None:
    inputs = site.rendered("debian", "nvidia", with_layers=["zfs"])["tier2"].inputs
    assert {"Containerfile", "layer time", "parent kernel", "parent kmod-nvidia", "parent kmod-zfs"} < set(
        inputs
    )
    assert inputs["package nvidia-smi:amd64"].startswith("1.0-1 ")
    assert "file files/usr/libexec/imgbuild/cdi-generate" in inputs
    assert inputs["file files/usr/libexec/imgbuild/cdi-generate"].startswith("755 ")


def test_two_versions_of_one_package_both_count(site: Site) -> None:
    from msgspec.structs import replace
    from synthetic_lock import locked_package

    def twice(old: str) -> Callable[[Selection], Section]:
        def section(selection: Selection) -> Section:
            made = synthetic_section(selection)
            both = tuple(locked_package("kernel-devel", selection, version=v) for v in (old, "2.0-1"))
            return replace(made, transactions={**made.transactions, "builder": both})

        return section

    one = site.rendered("centos", "nvidia", section=twice("1.0-1"))["builder"]
    two = site.rendered("centos", "nvidia", section=twice("1.1-1"))["builder"]
    assert one.key != two.key
