"""Several images in one go: what is asked for, what becomes of each, and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from conftest import Outcome, Site
from synthetic_lock import synthetic_section

from imagebuild import build, lock, release
from imagebuild.errors import DefinitionError, ImgbuildError, UnavailableError
from imagebuild.load import Selection, load_all
from imagebuild.plan import Plan
from imagebuild.publish import Destination, PublishResult
from imagebuild.render import Rendered

Imgbuild = Callable[..., Outcome]

FLEET = """\
vendor: none
hosts:
  - {name: one}
  - {name: two}
  - {name: gpu, vendor: nvidia}
  - {name: old, vendor: amd}
"""


class World:
    """What stands for the steps that need a machine: no image is built, no mirror asked, nothing pushed."""

    def __init__(self) -> None:
        self.built: list[tuple[str, tuple[str, ...]]] = []
        self.pushed: list[list[str]] = []
        self.unreachable: set[str] = set()
        self.broken: set[str] = set()
        self.there: set[str] = set()
        self.options: list[build.Options] = []

    def resolve(self, selection: Selection, *_: Any, **options: Any) -> lock.Section:
        lock.precheck(selection, allow_blocked=options.get("allow_blocked", False))
        if selection.vendor_name in self.unreachable:
            raise UnavailableError("the package lists cannot be fetched", help="is the mirror right?")
        return synthetic_section(selection)

    def build(
        self,
        plan: Plan,
        rendered: Sequence[Rendered],
        _state: object,
        _report: object,
        options: build.Options,
    ) -> build.BuildResult:
        selection = plan.selection
        if selection.vendor_name in self.broken:
            raise ImgbuildError("kmod-x failed after 3.0 s", lines=["x.c:1: error"], help="log: /x.log")
        image = str(rendered[-1].image)
        status: build.Status = "cached" if selection.vendor_name in self.there else "built"
        node = build.NodeResult("tier2", status, str(rendered[-1].key), image)
        tags = options.tags or ()
        self.built.append((selection.vendor_name, tags))
        self.options.append(options)
        return build.BuildResult(image, f"sha256:{'1' * 64}", 1, tags, (node,))

    def publish(self, image: str, to: Sequence[Destination], *_: object) -> PublishResult:
        self.pushed.append([str(each) for each in to])
        return PublishResult(image, "sha256:2", tuple(map(str, to)), (), 1)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr(lock, "resolve", made.resolve)
    monkeypatch.setattr(release, "build", made.build)
    monkeypatch.setattr(release, "publish", made.publish)
    yield made


@pytest.fixture
def fleet(site: Site) -> Site:
    site.write("imgbuild.yaml", FLEET)
    return site


def _hosts(*names: str) -> list[str]:
    return [word for name in names for word in ("--host", name)]


def _statuses(found: Outcome) -> dict[str, str]:
    return {each["name"]: each["status"] for each in json.loads(found.out)["targets"]}


# --- one goes, others stay ---------------------------------------------------------------------------


def test_hosts_of_the_same_image_are_built_once_and_both_named(
    fleet: Site, imgbuild: Imgbuild, world: World
) -> None:
    found = imgbuild("build", "--json", *_hosts("one", "two", "gpu"))
    assert found.code == 0
    names = ("localhost/imgbuild/one:tier2", "localhost/imgbuild/two:tier2")
    assert world.built == [("none", names), ("nvidia", ("localhost/imgbuild/gpu:tier2",))]
    first, second = json.loads(found.out)["targets"]
    assert (first["name"], first["hosts"], first["targets"]) == ("one", ["one", "two"], [])
    assert (first["base"], first["vendors"], first["status"]) == ("debian", ["none"], "built")
    assert (second["hosts"], second["vendors"], second["layers"]) == (["gpu"], ["nvidia"], ["cdi"])
    assert first["image"].startswith("localhost/imgbuild/debian-tier2:")
    assert first["digest"].startswith("sha256:") and first["kernel_release"].startswith("6.12")


def test_rules_alone_stop_one_and_the_rest_is_built(fleet: Site, imgbuild: Imgbuild, world: World) -> None:
    found = imgbuild("build", "--json", "--all-hosts")
    assert (found.code, json.loads(found.out)["exit_code"]) == (3, 3)
    assert _statuses(found) == {"one": "built", "gpu": "built", "old": "stopped"}
    old = json.loads(found.out)["targets"][-1]
    assert (old["kmod"], old["driver"], old["kernel"]) == ("amdgpu", "6.16.13", ">=6.12, <6.13")
    assert old["rule"] == "base/debian/amd/compat.yaml:2"
    assert old["reason"].startswith("amdgpu-dkms does not compile")
    assert old["link"].startswith("https://github.com/ROCm/")
    assert old["pins"] == ["driver: >=6.18"] and "vendor none" in old["unblock"]
    assert old["exit_code"] == 3 and "image" not in old


def test_rule_on_the_locked_kernel_names_kernel_and_driver_that_would_do(
    site: Site, imgbuild: Imgbuild, world: World
) -> None:
    site.write("imgbuild.yaml", "kmods: {nvidia: {version: 560.1}}\ntargets: [{vendor: nvidia}, {}]\n")
    found = imgbuild("build", "--json")
    assert found.code == 3
    stopped = json.loads(found.out)["targets"][0]
    assert (stopped["driver"], stopped["kernel"]) == ("560.1", "6.12.117+deb13-amd64")
    assert stopped["pins"] == ["kernel: <6.12.97", "driver: =550.163.01", "driver: >=580.126.09"]


def test_one_that_fails_stops_no_other_and_exits_with_1(
    fleet: Site, imgbuild: Imgbuild, world: World
) -> None:
    world.broken = {"none"}
    found = imgbuild("build", "--json", "--all-hosts")
    assert found.code == 1
    assert _statuses(found) == {"one": "failed", "gpu": "built", "old": "stopped"}
    failed = json.loads(found.out)["targets"][0]
    assert (failed["error"], failed["output"], failed["help"]) == (
        "kmod-x failed after 3.0 s",
        ["x.c:1: error"],
        "log: /x.log",
    )


def test_mirror_out_of_reach_stops_one_and_leaves_the_sections_of_others(
    fleet: Site, imgbuild: Imgbuild, world: World
) -> None:
    world.unreachable = {"nvidia"}
    found = imgbuild("build", "--json", *_hosts("gpu", "one"))
    assert (found.code, _statuses(found)) == (1, {"gpu": "failed", "one": "built"})
    first = (fleet.folder / "imgbuild.lock").read_text()
    assert list(json.loads(first)["sections"]) == ["debian/none/-"]
    assert imgbuild("lock", *_hosts("gpu", "one")).code == 1
    assert (fleet.folder / "imgbuild.lock").read_text() == first


@pytest.mark.parametrize(
    ("broken", "unreachable", "names", "code"),
    [
        (set(), set(), ("one", "gpu"), 0),
        (set(), set(), ("old", "gpu"), 3),
        ({"nvidia"}, set(), ("one", "gpu"), 1),
        (set(), {"nvidia"}, ("one", "gpu"), 1),
        ({"nvidia"}, set(), ("old", "gpu"), 1),
    ],
)
def test_exit_code_of_several(
    fleet: Site,
    imgbuild: Imgbuild,
    world: World,
    broken: set[str],
    unreachable: set[str],
    names: tuple[str, ...],
    code: int,
) -> None:
    world.broken, world.unreachable = broken, unreachable
    assert imgbuild("build", *_hosts(*names)).code == code


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [("old", 3, "is blocked on kernel"), ("gpu", 4, "package lists cannot be"), ("one", 1, "kmod-x failed")],
)
def test_one_image_fails_as_it_does_without_hosts(
    fleet: Site, imgbuild: Imgbuild, world: World, name: str, code: int, says: str
) -> None:
    world.broken, world.unreachable = {"none"}, {"nvidia"}
    found = imgbuild("build", "--json", "--host", name)
    data = json.loads(found.out)
    assert (found.code, data["exit_code"]) == (code, code)
    assert says in data["error"] and says in found.err


def test_one_host_is_told_as_one_image(fleet: Site, imgbuild: Imgbuild, world: World) -> None:
    out = imgbuild("build", "--host", "one", "-q").out
    assert out.splitlines()[0] == "image   localhost/imgbuild/one:tier2"
    assert "targets" not in json.loads(imgbuild("build", "--host", "one", "--json").out)


def test_interrupt_ends_all_of_them(
    fleet: Site, imgbuild: Imgbuild, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(release, "build", interrupted)
    assert imgbuild("build", "--all-hosts").code == 130


def test_site_with_targets_builds_all_unless_told_otherwise(
    site: Site, imgbuild: Imgbuild, world: World
) -> None:
    site.write("imgbuild.yaml", "targets: [{}, {name: big, vendor: nvidia}]\n")
    assert imgbuild("build").code == 0
    assert [vendor for vendor, _ in world.built] == ["none", "nvidia"]
    world.built.clear()
    assert imgbuild("build", "--vendor", "nvidia").code == 0
    assert world.built == [("nvidia", ("localhost/imgbuild/debian-nvidia:tier2",))]


def test_table_is_plain_text_that_names_rule_pin_and_error(
    fleet: Site, imgbuild: Imgbuild, world: World
) -> None:
    world.broken, world.there = {"none"}, {"nvidia"}
    lines = imgbuild("build", "-q", "--all-hosts").out.splitlines()
    assert lines[:9] == [
        "target  base    vendors  result",
        "one     debian  none     failed",
        "    is for  one, two",
        "    error: kmod-x failed after 3.0 s",
        "      | x.c:1: error",
        "    help: log: /x.log",
        "gpu     debian  nvidia   nothing to do",
        "    image   localhost/imgbuild/gpu:tier2",
        f"    digest  sha256:{'1' * 64}",
    ]
    assert lines[10] == "old     debian  amd      stopped"
    assert "    rule    base/debian/amd/compat.yaml:2" in lines
    assert "    pin     driver: >=6.18" in lines
    assert lines[-1] == "1 failed, 1 nothing to do, 1 stopped"


def test_lock_of_several_tells_what_moved(fleet: Site, imgbuild: Imgbuild, world: World) -> None:
    found = imgbuild("lock", "--json", "--all-hosts")
    assert (found.code, _statuses(found)) == (3, {"one": "locked", "gpu": "locked", "old": "stopped"})
    assert sorted(json.loads((fleet.folder / "imgbuild.lock").read_text())["sections"]) == [
        "debian/none/-",
        "debian/nvidia/cdi",
    ]
    assert "section debian/nvidia/cdi" in imgbuild("lock", "--all-hosts").out
    assert json.loads(imgbuild("lock", "--json", "--host", "one").out)["section"] == "debian/none/-"


@pytest.mark.parametrize("command", ["plan", "render", "compat"])
def test_command_for_one_image_refuses_several(fleet: Site, imgbuild: Imgbuild, command: str) -> None:
    assert imgbuild(command, "--host", "one").code == 0
    found = imgbuild(command, *_hosts("one", "gpu"))
    assert found.code == 2
    assert "2 images are asked for, and this command is for one" in found.err


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("-t", "gpu:1"),
        ("--push", "registry.example/gpu:1"),
        ("--push", "oci:layout"),
        ("-t", "x-{target}", "--push", "registry.example/gpu:1"),
    ],
)
def test_name_that_several_images_would_get_is_refused_before_any_work(
    fleet: Site, imgbuild: Imgbuild, world: World, arguments: tuple[str, ...]
) -> None:
    found = imgbuild("build", *_hosts("one", "gpu"), *arguments)
    assert found.code == 2
    assert "2 images cannot all be called" in found.err and "write `{target}`" in found.err
    assert world.built == [] and not (fleet.folder / "imgbuild.lock").exists()


def test_tags_of_the_site_that_several_images_would_get_are_refused_at_their_place(
    fleet: Site, imgbuild: Imgbuild, world: World
) -> None:
    fleet.edit("imgbuild.yaml", "vendor: none\n", "vendor: none\ntags: ['a:{target}', 'b:1']\n")
    found = imgbuild("build", *_hosts("one", "gpu"))
    assert found.code == 2 and "imgbuild.yaml:2:22  tags[1]" in found.err
    assert imgbuild("build", *_hosts("one")).code == 0, "one image may have it"
    assert imgbuild("build", *_hosts("one", "gpu"), "-t", "{target}").code == 0, "-t goes before"


def test_placeholder_is_the_name_of_every_host(fleet: Site, imgbuild: Imgbuild, world: World) -> None:
    fleet.edit("imgbuild.yaml", "vendor: none\n", "vendor: none\ntags: ['gpu:{target}']\n")
    to = ("--push", "registry.example/{target}:1", "--push", "oci:out/{target}")
    assert imgbuild("build", *_hosts("one", "two", "gpu"), *to).code == 0
    assert world.built == [("none", ("gpu:one", "gpu:two")), ("nvidia", ("gpu:gpu",))]
    assert world.pushed == [
        ["registry.example/one:1", "registry.example/two:1", "oci:out/one", "oci:out/two"],
        ["registry.example/gpu:1", "oci:out/gpu"],
    ]


def test_placeholder_of_an_image_without_a_name_is_base_and_vendors(
    site: Site, imgbuild: Imgbuild, world: World
) -> None:
    assert imgbuild("build", "--vendor", "nvidia", "-t", "x/{target}:1").code == 0
    assert world.built == [("nvidia", ("x/debian-nvidia:1",))]


def test_images_that_are_the_same_may_share_a_name(fleet: Site, imgbuild: Imgbuild, world: World) -> None:
    assert imgbuild("build", *_hosts("one", "two"), "-t", "x:1").code == 0
    assert world.built == [("none", ("x:1",))]


@pytest.mark.parametrize("tag", ["a b", "{host}", "{target", "A/B", "x:{target}:y"])
def test_name_that_no_image_can_have_is_refused(imgbuild: Imgbuild, world: World, tag: str) -> None:
    found = imgbuild("build", "-t", tag)
    assert found.code == 2 and "is no image name" in found.err


@pytest.mark.parametrize("tag", ["gpu", "{target}", "r.example:5/{target}/x-{target}:{target}-1", "a:1"])
def test_template_of_the_site_is_taken(site: Site, tag: str) -> None:
    site.write("imgbuild.yaml", f"tags: ['{tag}']\n")
    assert site.load().site.tags == (tag,)


@pytest.mark.parametrize("tag", ["{host}", "{}", "a{target", "a:{target} b"])
def test_template_of_the_site_that_makes_no_name_is_refused(site: Site, tag: str) -> None:
    site.write("imgbuild.yaml", f"tags: ['{tag}']\n")
    with pytest.raises(DefinitionError, match="has a form that is not allowed"):
        site.load()


def test_cache_of_the_site_is_used_and_may_have_no_tag(site: Site, imgbuild: Imgbuild, world: World) -> None:
    site.write("imgbuild.yaml", "cache: r.example/c\n")
    assert imgbuild("build").code == 0
    assert world.options[0].cache == "r.example/c"
    assert imgbuild("build", "--cache", "r.example/c:1").code == 2


# --- grouping ---------------------------------------------------------------------------------------


def test_what_may_differ_makes_images_of_their_own(site: Site) -> None:
    hosts = ["{name: a}", "{name: b}", "{name: c, kernel: '>=6.12'}", "{name: d, with: [zfs]}",
             "{name: e, vendor: nvidia}", "{name: f, base: centos}"]  # fmt: skip
    site.write("imgbuild.yaml", "hosts:\n" + "".join(f"- {host}\n" for host in hosts))
    selections = load_all(tier=2, folder=site.folder, all_hosts=True)
    groups = [[each.name for each in group] for group in release.images_of(selections)]
    assert groups == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    first_tier = load_all(tier=1, folder=site.folder, hosts=["a", "d", "e", "f"])
    assert [len(group) for group in release.images_of(first_tier)] == [3, 1]
