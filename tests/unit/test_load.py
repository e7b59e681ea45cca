"""Names and options → a selection: what is found where, and what does not go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, Site
from hypothesis import given
from hypothesis import strategies as st
from synthetic_lock import synthetic_section

from imagebuild.build import default_name, journal_name
from imagebuild.definitions import check_image_name
from imagebuild.errors import DefinitionError
from imagebuild.load import DEFAULT_BASE, Catalogue, Selection, load_all, shipped
from imagebuild.lock import request_of
from imagebuild.plan import plan

Imgbuild = Callable[..., Outcome]

TOY = """\
summary: a toy
kmods:
  toy:
    summary: toy module
    version: "1.0"
    source: {directory: src}
    build: make
    modules: [toy]
    package: {name: kmod-toy}
"""


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        ({"base": "debain"}, "unknown base `debain`", "did you mean `debian`? There is: centos, debian"),
        ({"vendor": "nvida"}, "unknown vendor `nvida` for base `debian`",
         "did you mean `nvidia`? There is: amd, none, nvidia"),
        ({"with_layers": ["zsf"]}, "unknown layer `zsf`",
         "did you mean `zfs`? There is: cdi, container-toolkit, zfs"),
        ({"without_layers": ["cid"]}, "unknown layer `cid`",
         "did you mean `cdi`? There is: cdi, container-toolkit, zfs"),
    ],
)  # fmt: skip
def test_unknown_name_is_refused_with_the_nearest(
    site: Site, options: dict[str, object], says: str, hint: str
) -> None:
    with pytest.raises(DefinitionError) as raised:
        site.load(**options)  # type: ignore[arg-type]
    assert (raised.value.what, raised.value.help) == (says, hint)


def test_unknown_layer_left_out_by_the_site_file_is_refused(site: Site) -> None:
    site.write("imgbuild.yaml", "without: [cid]\n")
    with pytest.raises(DefinitionError, match="unknown layer `cid`"):
        site.load()


NO_NAMES = [
    "../../etc",
    "..",
    ".",
    "",
    "/etc",
    "a/b",
    "no\n",
    "none;id",
    "$(id)",
    "`id`",
    "none\0",
    "NONE",
    "-x",
]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("option", ["base", "vendor", "with_layers", "without_layers"])
def test_name_that_is_no_name_is_never_looked_up(site: Site, option: str, name: str) -> None:
    # What a lookup that trusted the name would find.
    place = {"base": "base/{}/base.yaml", "vendor": "base/debian/{}/vendor.yaml"}.get(
        option, "layers/{}/layer.yaml"
    )
    site.write(place.format("x"), "summary: x\n")
    if name and "\0" not in name and not name.startswith("/"):
        site.write(place.format(name), "summary: outside\n")
    value: object = [name] if option.endswith("layers") else name
    if name == "" and not option.endswith("layers"):
        return  # empty means: not given
    with pytest.raises(DefinitionError, match=r"^unknown (base|vendor|layer)"):
        site.load(**{option: value})  # type: ignore[arg-type]


@given(st.text(max_size=20))
def test_catalogue_finds_only_folders_below_its_roots(name: str) -> None:
    catalogue = Catalogue((shipped(),))
    for parts in (
        ("base", name, "base.yaml"),
        ("base", "debian", name, "vendor.yaml"),
        ("layers", name, "layer.yaml"),
    ):
        found = catalogue.folder(*parts)
        assert found is None or found.resolve().is_relative_to(shipped() / parts[0])


def test_base_comes_from_the_option_then_the_site_then_the_default(site: Site) -> None:
    assert (site.load(base=None).base_name, DEFAULT_BASE) == ("debian", "debian")
    assert site.load(base=None).base_reason == "default; no --base, no site file names one"
    site.write("imgbuild.yaml", "base: centos\nvendor: nvidia\n")
    assert (site.load(base=None).base_name, site.load(base=None).base_reason) == ("centos", "site file")
    assert site.load(base=None, vendor=None).vendor_name == "nvidia"
    assert (site.load(base="debian").base_name, site.load(base="debian").base_reason) == ("debian", "--base")


# --- layers -----------------------------------------------------------------------------------------


def _layers(site: Site, **requires: str) -> None:
    for name, text in requires.items():
        site.write(f"layers/{name}/layer.yaml", f"summary: {name}\n{text}\n")


def _names(selection: object) -> list[str]:
    return [piece.name for piece in selection.pieces if piece.kind == "layer"]  # type: ignore[attr-defined]


def test_required_layer_comes_along_and_before(site: Site) -> None:
    _layers(site, a="requires: [b]", b="requires: [c]", c="")
    assert _names(site.load(with_layers=["a"])) == ["c", "b", "a"]
    assert _names(site.load(with_layers=["c", "a"])) == ["c", "b", "a"]


def test_layer_order_does_not_change_the_section_of_the_lock(site: Site) -> None:
    _layers(site, a="", b="")
    one, two = site.load(with_layers=["a", "b"]), site.load(with_layers=["b", "a"])
    assert one.section == two.section == "debian/none/a+b"


def test_layers_that_require_each_other_are_refused(site: Site) -> None:
    _layers(site, a="requires: [b]", b="requires: [c]", c="requires: [b]")
    with pytest.raises(DefinitionError, match="circle: b -> c -> b"):
        site.load(with_layers=["a"])


def test_layer_that_requires_itself_is_refused(site: Site) -> None:
    _layers(site, a="requires: [a]")
    with pytest.raises(DefinitionError, match="circle: a -> a"):
        site.load(with_layers=["a"])


def test_required_layer_that_does_not_exist_is_named(site: Site) -> None:
    _layers(site, a="requires: [cid]")
    with pytest.raises(DefinitionError) as raised:
        site.load(with_layers=["a"])
    assert raised.value.what == "layer `a` requires layer `cid`, which does not exist"
    assert raised.value.help.startswith("did you mean `cdi`?")


def test_leaving_out_what_another_layer_requires_is_refused(site: Site) -> None:
    _layers(site, a="requires: [b]", b="")
    with pytest.raises(DefinitionError) as raised:
        site.load(with_layers=["a"], without_layers=["b"])
    assert raised.value.what == "layer `a` requires layer `b`, which is left out"
    assert raised.value.help == "leave out `a` too, or keep `b`"


def test_layers_that_conflict_are_refused(site: Site) -> None:
    _layers(site, a="conflicts: [b]", b="")
    with pytest.raises(DefinitionError) as raised:
        site.load(with_layers=["b", "a"])
    assert (raised.value.what, raised.value.help) == (
        "layers `a` and `b` cannot be in one image",
        "use --without b",
    )


def test_layer_for_other_bases_is_refused(site: Site) -> None:
    _layers(site, a="bases: [centos]")
    assert _names(site.load(base="centos", with_layers=["a"])) == ["a"]
    with pytest.raises(DefinitionError, match="layer `a` is not for base `debian`"):
        site.load(with_layers=["a"])


def test_layer_part_for_a_misspelt_base_is_refused_at_its_place(site: Site) -> None:
    _layers(site, a="for:\n  debain: {packages: [x]}")
    with pytest.raises(DefinitionError) as raised:
        site.load(with_layers=["a"])
    assert raised.value.what == "there is neither a base nor a package manager `debain`"
    assert str(raised.value.where) == "layers/a/layer.yaml:3:3  for.debain"
    assert raised.value.help.startswith("did you mean `debian`?")


def test_layer_parts_add_up_from_common_to_package_manager_to_base(site: Site) -> None:
    _layers(
        site,
        a="packages: [one]\nunits: {enable: [a.service]}\nfor:\n"
        "  debian: {packages: [three], units: {mask: [c.service]}}\n"
        "  apt: {packages: [two], units: {enable: [b.service]}, firmware: x}\n"
        "  dnf: {packages: [other]}",
    )
    part = site.load(with_layers=["a"]).pieces[-1].part
    assert part.packages == ("one", "two", "three")
    assert (part.units.enable, part.units.mask) == (("a.service", "b.service"), ("c.service",))
    assert part.firmware == "x"


def test_vendor_brings_its_layers_and_without_drops_them(site: Site) -> None:
    assert _names(site.load(vendor="nvidia")) == ["cdi"]
    assert _names(site.load(vendor="nvidia", without_layers=["cdi"])) == []


def test_option_with_beats_the_site_files_without(site: Site) -> None:
    site.write("imgbuild.yaml", "with: [zfs]\nwithout: [cdi]\n")
    assert _names(site.load(vendor="nvidia")) == ["zfs"]
    assert _names(site.load(vendor="nvidia", with_layers=["cdi"])) == ["cdi", "zfs"]


def test_tier1_takes_nothing_from_vendor_and_layers(site: Site) -> None:
    assert site.load(tier=1, vendor="nvidia", with_layers=["zfs"]).pieces == ()


def test_notice_is_given_until_something_provides_what_it_misses(site: Site) -> None:
    assert site.load(vendor="nvidia").notices[0].startswith("no CDI generator in this image")
    assert site.load(vendor="nvidia", with_layers=["container-toolkit"]).notices == []


def test_kmod_of_two_pieces_is_refused(site: Site) -> None:
    for name in ("a", "b"):
        site.write(f"layers/{name}/layer.yaml", TOY)
    with pytest.raises(DefinitionError, match="kmod `toy` is in layer `a` and in layer `b`"):
        site.load(with_layers=["a", "b"])


# --- a user's own definitions -----------------------------------------------------------------------


def test_own_layer_replaces_the_shipped_one_and_leaves_the_others(site: Site) -> None:
    _layers(site, zfs="")
    selection = site.load(vendor="nvidia", with_layers=["zfs"])
    folders = {piece.name: piece.folder for piece in selection.pieces}
    assert folders["zfs"] == site.folder / "layers/zfs"
    assert folders["cdi"] == shipped() / "layers/cdi"
    assert list(selection.kmods) == ["nvidia"]


def test_own_vendor_extends_a_shipped_base(site: Site) -> None:
    site.write("base/debian/toyvendor/vendor.yaml", TOY)
    selection = site.load(vendor="toyvendor")
    assert selection.base_folder == shipped() / "base/debian"
    assert list(selection.kmods) == ["toy"]
    assert Catalogue.of(site.folder).vendors("debian") == ["amd", "none", "nvidia", "toyvendor"]


def test_own_base_replaces_the_shipped_one_but_keeps_its_vendors(site: Site) -> None:
    text = (shipped() / "base/debian/base.yaml").read_text()
    site.write("base/debian/base.yaml", text.replace("Debian 13 (trixie)", "our own"))
    selection = site.load(vendor="nvidia")
    assert selection.base.summary.startswith("our own")
    assert selection.pieces[0].folder == shipped() / "base/debian/nvidia"


def test_new_distribution_needs_no_python(site: Site) -> None:
    text = (shipped() / "base/debian/base.yaml").read_text()
    site.write("base/toyix/base.yaml", text.replace("linux-image-amd64", "linux-toy"))
    site.write("base/toyix/none/vendor.yaml", "summary: nothing\n")
    nodes = site.rendered("toyix", "none")
    assert list(nodes) == ["tier1", "kernel", "tier2"]
    assert nodes["kernel"].image.startswith("localhost/imgbuild/toyix-kernel:")  # type: ignore[union-attr]
    assert "linux-toy" in nodes["kernel"].node.specs


def test_patch_file_that_is_not_there_is_named_at_its_place(site: Site) -> None:
    site.write("base/debian/toyvendor/vendor.yaml", TOY)
    site.write(
        "base/debian/toyvendor/compat.yaml",
        "rules:\n  - {kmod: toy, verdict: patch, patch: patches/x.patch, reason: so}\n",
    )
    with pytest.raises(DefinitionError) as raised:
        site.load(vendor="toyvendor")
    assert raised.value.what == "there is no patch file `patches/x.patch`"
    assert str(raised.value.where) == "base/debian/toyvendor/compat.yaml:2:40  rules[0].patch"


# --- what a site may change of a driver -------------------------------------------------------------


def test_site_gives_a_driver_another_source_relative_to_its_file(site: Site) -> None:
    site.write(
        "imgbuild.yaml",
        "kmods:\n  nvidia:\n    version: 580.126.09\n    source: {directory: ../open-gpu-kernel-modules}\n",
    )
    kmod, _ = site.load(vendor="nvidia").kmods["nvidia"]
    assert kmod.version == "580.126.09"
    assert kmod.source.directory == str(site.folder.parent / "open-gpu-kernel-modules")
    assert kmod.source.package is None
    assert kmod.package.name == "kmod-nvidia", "the rest is the definition's"


def test_site_pins_a_version_of_the_packaged_driver(site: Site) -> None:
    site.write("imgbuild.yaml", "kmods: {nvidia: {version: 580.1}}\n")
    kmod, _ = site.load(vendor="nvidia").kmods["nvidia"]
    assert (kmod.version, kmod.source.package) == ("580.1", "nvidia-open-kernel-dkms")


def test_new_source_without_a_version_forgets_the_old_one(site: Site) -> None:
    site.write("imgbuild.yaml", "kmods: {amdgpu: {source: {package: other-dkms}}}\n")
    assert site.load(vendor="amd").kmods["amdgpu"][0].version is None


def test_change_of_a_driver_that_is_not_there_is_refused(site: Site) -> None:
    site.write("imgbuild.yaml", "kmods: {nvdia: {version: 580.1}}\n")
    with pytest.raises(DefinitionError) as raised:
        site.load(vendor="nvidia")
    assert raised.value.what == "the site file changes kmod `nvdia`, which this image does not have"
    assert raised.value.help.startswith("did you mean `nvidia`?")


def test_site_replaces_the_vendors_userland(site: Site) -> None:
    site.write("imgbuild.yaml", "packages: [libcuda-of-ours]\n")
    vendor, _ = site.load(vendor="nvidia").pieces
    assert vendor.part.packages == ("libcuda-of-ours",)


def test_mirror_map_of_the_option_replaces_the_site_files(site: Site) -> None:
    site.write("imgbuild.yaml", "mirrors: {registries: {quay.io: one.example}}\n")
    other = site.write("maps/m.yaml", "registries: {quay.io: two.example}\n")
    assert dict(site.load().mirrors.registries) == {"quay.io": "one.example"}
    selection = site.load(mirror_map=other)
    assert dict(selection.mirrors.registries) == {"quay.io": "two.example"}
    assert selection.mirrors_folder == site.folder / "maps"


def test_site_file_named_by_option_makes_its_folder_the_site(site: Site, tmp_path: Path) -> None:
    other = tmp_path / "other site"
    (other / "layers/own").mkdir(parents=True)
    (other / "layers/own/layer.yaml").write_text("summary: own\n")
    (other / "imgbuild.yaml").write_text("with: [own]\n")
    selection = site.load(site_file=other / "imgbuild.yaml")
    assert (selection.site_folder, _names(selection)) == (other, ["own"])


# --- several vendors --------------------------------------------------------------------------------


def _vendor(site: Site, name: str, text: str = "") -> None:
    site.write(f"base/debian/{name}/vendor.yaml", f"summary: {name}\n{text}")
    site.write(f"base/debian/{name}/src/Kbuild", "obj-m = x.o\n")


def _toy(name: str) -> str:
    return TOY.split("\n", 1)[1].replace("toy", name)


def test_vendors_are_pieces_of_one_image_with_their_drivers_and_layers(site: Site) -> None:
    _vendor(site, "other", _toy("other"))
    selection = site.load(vendor=["other", "nvidia"])
    assert [(p.kind, p.name) for p in selection.pieces] == [
        ("vendor", "nvidia"),
        ("vendor", "other"),
        ("layer", "cdi"),
    ]
    assert list(selection.kmods) == ["nvidia", "other"]
    assert selection.pieces[1].folder == site.folder / "base/debian/other"
    assert (selection.vendor_name, selection.section) == ("nvidia+other", "debian/nvidia+other/cdi")
    nodes = site.rendered(vendor=["nvidia", "other"])
    assert {"kmod-nvidia", "kmod-other"} <= set(nodes["tier2"].node.parents)


def test_order_of_vendors_changes_nothing(site: Site) -> None:
    _vendor(site, "other", _toy("other"))
    keys = [
        {name: item.key for name, item in site.rendered(vendor=vendor).items()}
        for vendor in (["other", "nvidia"], ["nvidia", "other", "nvidia"])
    ]
    assert keys[0] == keys[1]


def test_image_of_several_vendors_has_names_that_can_be(site: Site) -> None:
    _vendor(site, "other")
    selection = site.load(vendor=["nvidia", "other"])
    assert default_name(selection) == "localhost/imgbuild/debian-nvidia-other:tier2"
    check_image_name(default_name(selection))
    made = plan(selection, synthetic_section(selection))
    assert journal_name(made, made.target) == "debian_nvidia+other_cdi-tier2"


def test_site_file_names_several_vendors(site: Site) -> None:
    _vendor(site, "other")
    site.write("imgbuild.yaml", "vendors: [other, nvidia]\n")
    assert site.load(vendor=None).vendors == ("nvidia", "other")
    assert site.load(vendor="none").vendors == ("none",)


def test_vendors_with_the_same_kmod_are_refused(site: Site) -> None:
    _vendor(site, "one", _toy("same"))
    _vendor(site, "two", _toy("same"))
    with pytest.raises(DefinitionError, match="kmod `same` is in vendor `one` and in vendor `two`"):
        site.load(vendor=["one", "two"])


def test_vendors_that_define_a_repository_differently_are_refused(site: Site) -> None:
    for name in ("one", "two"):
        _vendor(site, name, f"repositories: [{{name: r, uri: 'http://{name}.example', suites: [x]}}]\n")
    site.load(vendor="one")
    with pytest.raises(DefinitionError, match="two definitions of repository `r` differ") as raised:
        site.load(vendor=["one", "two"])
    assert "base/debian/one and " in raised.value.help


def test_vendors_that_bring_the_same_file_are_refused(site: Site) -> None:
    _vendor(site, "one")
    _vendor(site, "two")
    site.write("base/debian/one/files/usr/lib/a.conf", "1")
    site.write("base/debian/two/files/usr/lib/b.conf", "2")
    site.load(vendor=["one", "two"])
    site.write("base/debian/two/files/usr/lib/a.conf.j2", "2")
    with pytest.raises(DefinitionError, match=r"vendors `one` and `two` both bring `files/usr/lib/a\.conf`"):
        site.load(vendor=["one", "two"])


def test_none_beside_another_vendor_is_refused_at_its_place(site: Site) -> None:
    with pytest.raises(DefinitionError, match="vendor `none` cannot be beside `nvidia`"):
        site.load(vendor=["none", "nvidia"])
    site.write("imgbuild.yaml", "vendors: [nvidia, none]\n")
    with pytest.raises(DefinitionError) as raised:
        site.load(vendor=None)
    assert str(raised.value.where) == "imgbuild.yaml:1:19  vendors[1]"


def test_packages_of_the_site_replace_those_of_its_own_vendor(site: Site) -> None:
    _vendor(site, "other", "packages: [libother]\n")
    site.write(
        "imgbuild.yaml",
        "vendor: nvidia\npackages: [libours]\n"
        "targets: [{vendors: [nvidia, other]}, {vendor: other}]\nhosts: [{name: a}]\n",
    )
    both, other, host = load_all(tier=2, folder=site.folder, targets=["debian-nvidia-other", "debian-other"],
                                 hosts=["a"])  # fmt: skip
    assert [p.part.packages for p in both.pieces if p.kind == "vendor"] == [("libours",), ("libother",)]
    assert [p.part.packages for p in other.pieces] == [("libother",)]
    assert host.pieces[0].part.packages == ("libours",)


@pytest.mark.parametrize("text", ["vendors: [nvidia, other]", "targets: [{vendor: nvidia}]"])
def test_packages_that_could_be_of_several_vendors_are_refused(site: Site, text: str) -> None:
    _vendor(site, "other")
    site.write("imgbuild.yaml", f"packages: [libours]\n{text}\n")
    with pytest.raises(DefinitionError) as raised:
        load_all(tier=2, folder=site.folder)
    assert raised.value.what == "`packages` does not tell which vendor's packages it replaces"
    assert str(raised.value.where) == "imgbuild.yaml:1:11  packages"


# --- targets and hosts ------------------------------------------------------------------------------

FLEET = """\
base: debian
vendor: nvidia
with: [zfs, a]
without: [cdi]
kernel: ">=6.12"
targets:
  - {}
  - {name: big, base: centos, with: [b]}
hosts:
  - {name: silent}
  - name: own
    vendors: [none]
    with: [b, cdi]
    without: [zfs]
    kernel: "=6.12.117"
"""


@pytest.fixture
def fleet(site: Site) -> Site:
    _layers(site, a="", b="")
    site.write("imgbuild.yaml", FLEET)
    return site


def _load(site: Site, **options: object) -> Selection:
    return site.load(**{"base": None, "vendor": None, **options})  # type: ignore[arg-type]


def test_what_a_host_does_not_say_the_site_says(fleet: Site) -> None:
    host = _load(fleet, host="silent")
    assert (host.base_name, host.base_reason, host.vendors) == ("debian", "site file", ("nvidia",))
    assert (_names(host), host.kernel, host.name) == (["zfs", "a"], ">=6.12", "silent")


def test_what_a_host_says_goes_before_what_the_site_says(fleet: Site) -> None:
    host = _load(fleet, host="own")
    assert (host.vendors, host.kernel, _names(host)) == (("none",), "=6.12.117", ["a", "b", "cdi"])
    target = _load(fleet, target="big")
    assert (target.base_name, target.base_reason) == ("centos", "target big")
    assert _names(target) == ["container-toolkit", "zfs", "a", "b"], "centos brings the first"


def test_command_line_goes_before_what_a_host_says(fleet: Site) -> None:
    host = _load(fleet, host="own", vendor="nvidia", base="centos", with_layers=["zfs"])
    assert (host.base_name, host.vendors) == ("centos", ("nvidia",))
    assert "zfs" in _names(host)


def test_chosen_kernels_have_sections_of_their_own(fleet: Site) -> None:
    assert _load(fleet, host="silent").section == "debian/nvidia/a+zfs/>=6.12"
    assert _load(fleet, host="own").section == "debian/none/a+b+cdi/=6.12.117"


def test_section_of_a_lock_holds_for_layers_in_any_order(site: Site) -> None:
    _layers(site, a="packages: [a]", b="packages: [b]")
    requests = {request_of(site.load(with_layers=names)) for names in (["a", "b"], ["b", "a"])}
    assert len(requests) == 1


def _all(site: Site, **options: object) -> list[str]:
    return [each.name for each in load_all(tier=2, folder=site.folder, **options)]  # type: ignore[arg-type]


def test_targets_are_what_is_asked_for_when_nothing_is_named(fleet: Site) -> None:
    assert _all(fleet) == ["debian-nvidia", "big"]
    assert _all(fleet, with_layers=["b"]) == ["debian-nvidia", "big"]
    assert _all(fleet, vendor=["none"]) == ["debian-none"]
    assert _all(fleet, base="centos") == ["centos-nvidia"]
    assert _all(fleet, hosts=["own", "own"]) == ["own"]
    assert _all(fleet, targets=["big"], hosts=["own"]) == ["big", "own"]
    assert _all(fleet, all_hosts=True, hosts=["own"]) == ["own", "silent"]


def test_site_without_targets_is_one_image(site: Site) -> None:
    assert _all(site) == ["debian-none"]
    site.write("imgbuild.yaml", "hosts: [{name: a}]\n")
    assert _all(site) == ["debian-none"]


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        ({"hosts": ["onw"]}, "unknown host `onw`", "did you mean `own`? There is: own, silent"),
        ({"targets": ["own"]}, "unknown target `own`", "There is: big, debian-nvidia"),
    ],
)
def test_unknown_host_is_refused_with_the_nearest(
    fleet: Site, options: dict[str, object], says: str, hint: str
) -> None:
    with pytest.raises(DefinitionError) as raised:
        _all(fleet, **options)
    assert (raised.value.what, raised.value.help) == (says, hint)


def test_site_without_hosts_says_so(site: Site) -> None:
    for options in ({"hosts": ["a"]}, {"all_hosts": True}):
        with pytest.raises(DefinitionError) as raised:
            _all(site, **options)
        assert "`imgbuild.yaml` has no `hosts:`" in raised.value.what + raised.value.help


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("hosts:\n- name: a\n- name: b\n- name: a\n", "host `a` has the name of the host in line 2", "4:9"),
        ("targets:\n- name: a\nhosts:\n- name: a\n", "host `a` has the name of the target in line 2", "4:9"),
        ("targets:\n- {with: [zfs]}\n- {vendor: none}\n",
         "target `debian-none` has the name of the target in line 2", "3:3"),
    ],
)  # fmt: skip
def test_name_that_is_there_twice_is_refused_at_its_place(
    site: Site, text: str, what: str, where: str
) -> None:
    site.write("imgbuild.yaml", text)
    with pytest.raises(DefinitionError) as raised:
        site.load()
    assert raised.value.what == what
    assert str(raised.value.where).startswith(f"imgbuild.yaml:{where}  ")


@pytest.mark.parametrize("name", ["A", "a..b", "a-", "-a", "a/b", "a b", "", "a___b"])
def test_name_of_a_host_must_be_fit_for_images(site: Site, name: str) -> None:
    site.write("imgbuild.yaml", f"hosts: [{{name: '{name}'}}]\n")
    with pytest.raises(DefinitionError, match=r"`hosts\[0\]\.name` has a form that is not allowed"):
        site.load()


@pytest.mark.parametrize(
    ("own", "what", "where"),
    [
        ("base: debain", "unknown base `debain`", "imgbuild.yaml:4:9  hosts[0].base"),
        ("vendor: nvida", "unknown vendor `nvida` for base `debian`", "imgbuild.yaml:4:11  hosts[0].vendor"),
        ("vendors: [amd, nvida]", "unknown vendor `nvida` for base `debian`",
         "imgbuild.yaml:4:18  hosts[0].vendors[1]"),
        ("with: [zfs, zsf]", "unknown layer `zsf`", "imgbuild.yaml:4:15  hosts[0].with[1]"),
        ("without: [cid]", "unknown layer `cid`", "imgbuild.yaml:4:13  hosts[0].without[0]"),
        ("with: [x, y]", "layers `x` and `y` cannot be in one image", "imgbuild.yaml:3:3  hosts[0]"),
    ],
)  # fmt: skip
def test_mistake_of_a_host_is_told_at_its_place(site: Site, own: str, what: str, where: str) -> None:
    _layers(site, x="conflicts: [y]", y="")
    site.write("imgbuild.yaml", f"base: debian\nhosts:\n- name: a\n  {own}\n")
    with pytest.raises(DefinitionError) as raised:
        load_all(tier=2, folder=site.folder, hosts=["a"])
    assert (raised.value.what, str(raised.value.where)) == (what, where)
    site.load()  # nobody asked for that host


def test_mistake_on_the_command_line_is_not_blamed_on_the_host(fleet: Site) -> None:
    with pytest.raises(DefinitionError) as raised:
        _load(fleet, host="own", vendor="nvida")
    assert raised.value.where is None


def test_mistakes_of_several_hosts_are_told_together_and_shared_ones_once(site: Site) -> None:
    site.write("imgbuild.yaml", "vendor: nvida\nhosts: [{name: a}, {name: b}, {name: c, base: x}]\n")
    with pytest.raises(DefinitionError) as raised:
        load_all(tier=2, folder=site.folder, all_hosts=True)
    assert [raised.value.what, *(other.what for other in raised.value.others)] == [
        "unknown vendor `nvida` for base `debian`",
        "unknown base `x`",
    ]


def test_change_of_a_driver_that_only_other_targets_have_is_taken(site: Site) -> None:
    site.write(
        "imgbuild.yaml", "kmods: {nvidia: {version: 580.1}}\ntargets: [{vendor: none}, {vendor: nvidia}]\n"
    )
    none, nvidia = load_all(tier=2, folder=site.folder)
    assert (list(none.kmods), nvidia.kmods["nvidia"][0].version) == ([], "580.1")
    site.edit("imgbuild.yaml", "kmods: {nvidia", "kmods: {nvdia")
    with pytest.raises(DefinitionError, match="changes kmod `nvdia`") as raised:
        load_all(tier=2, folder=site.folder)
    assert str(raised.value.where) == "imgbuild.yaml:1:16  kmods.nvdia"
