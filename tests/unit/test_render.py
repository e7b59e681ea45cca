"""Node → Containerfile and build context: the same to the byte, clean for linters, whole on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import yaml
from conftest import Outcome, Site
from synthetic_lock import synthetic_section
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from imagebuild.errors import DefinitionError, ImgbuildError
from imagebuild.load import shipped
from imagebuild.lock import Lockfile, lock_path, write
from imagebuild.render import write_context

Imgbuild = Callable[..., Outcome]
REPOSITORY = Path(__file__).parent.parent.parent
TOOLS = Path(sys.executable).parent


def tool(name: str) -> str:
    """A linter of the test dependencies, from beside this Python."""
    found = shutil.which(name, path=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is a test dependency (pip install imgbuild[test])"
    return found


# --- the same to the byte ---------------------------------------------------------------------------


class ContainerfileExtension(SingleFileSnapshotExtension):
    """Snapshots that are what they are: Containerfiles one can read, lint and build."""

    _write_mode = WriteMode.TEXT
    file_extension = "Containerfile"
    _file_extension = "Containerfile"


@pytest.mark.parametrize("base", ["debian", "centos"])
def test_containerfiles_are_as_reviewed(site: Site, snapshot: SnapshotAssertion, base: str) -> None:
    nodes = site.rendered(base, "nvidia", section=None)
    text = "\n".join(item.containerfile for item in nodes.values())
    assert text == snapshot(extension_class=ContainerfileExtension)


def test_rendering_twice_gives_the_same_bytes(site: Site) -> None:
    for base in ("debian", "centos"):
        one, two = (site.rendered(base, "nvidia", with_layers=["zfs"]) for _ in range(2))
        assert one == two


@pytest.mark.parametrize("seed", ["1", "4242"])
def test_rendering_in_another_process_and_folder_gives_the_same_keys(
    site: Site, tmp_path: Path, seed: str
) -> None:
    here = {name: item.key for name, item in site.rendered("debian", "nvidia", with_layers=["zfs"]).items()}
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    code = """if True:
        import json, sys
        from imagebuild.load import load
        from imagebuild.plan import plan
        from imagebuild.render import render
        from synthetic_lock import synthetic_section
        selection = load(tier=2, base="debian", vendor="nvidia", with_layers=["zfs"])
        nodes = render(plan(selection, synthetic_section(selection)))
        json.dump({item.node.name: item.key for item in nodes}, sys.stdout)
    """
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{REPOSITORY}",
            "LC_ALL": "C",
            "TZ": "Asia/Kathmandu",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout) == here


def test_no_path_of_this_machine_is_in_what_is_rendered(site: Site) -> None:
    site.own_definitions()
    for item in site.rendered("debian", "nvidia", with_layers=["zfs"]).values():
        texts = [item.containerfile, *(str(v) for v in item.inputs.values()), *item.inputs]
        texts += [file.data.decode() for file in item.files if file.data is not None]
        for text in texts:
            assert str(site.folder) not in text and str(REPOSITORY) not in text


# --- linters ----------------------------------------------------------------------------------------

LAYER_SETS = [(), ("zfs",), ("container-toolkit",), ("zfs", "container-toolkit")]


def test_every_containerfile_passes_hadolint(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "containerfiles"
    folder.mkdir()
    for base in ("debian", "centos"):
        for vendor in ("nvidia", "amd", "none"):
            for layers in LAYER_SETS:
                nodes = site.rendered(base, vendor, with_layers=list(layers))
                for item in nodes.values():
                    name = "-".join([base, vendor, *layers, item.node.name])
                    (folder / f"{name}.Containerfile").write_text(item.containerfile)
    files = sorted(folder.iterdir())
    assert len(files) > 80
    config = REPOSITORY / ".hadolint.yaml"
    found = subprocess.run(
        [tool("hadolint"), "--no-color", "--config", config, *files], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout.replace(f"{folder}/", "")) == (0, "")


def test_hadolint_ignores_only_what_has_a_reason() -> None:
    text = (REPOSITORY / ".hadolint.yaml").read_text()
    ignored = yaml.safe_load(text)["ignored"]
    assert len(ignored) <= 5
    for rule in ignored:
        assert f"- {rule}  # " in text, f"{rule} has no reason beside it"


def test_every_shell_script_passes_shellcheck(site: Site, tmp_path: Path) -> None:
    scripts = sorted((REPOSITORY / "imagebuild/installers").rglob("*.sh"))
    scripts += [
        path
        for root in (shipped() / "layers", shipped() / "base")
        for path in sorted(root.rglob("files/**/*"))
        if path.is_file() and path.read_bytes()[:2] == b"#!"
    ]
    assert any(path.name == "cdi-generate" for path in scripts)
    for base in ("debian", "centos"):
        for item in site.rendered(base, "nvidia", with_layers=["zfs"]).values():
            for file in item.files:
                if file.data is not None and file.path.endswith(".sh"):
                    place = tmp_path / f"{base}-{item.node.name}-{Path(file.path).name}"
                    shell = b"" if file.data.startswith(b"#!") else b"#!/bin/sh\n"
                    place.write_bytes(shell + file.data)
                    scripts.append(place)
    assert any(path.name.endswith("bootstrap.sh") for path in scripts)
    assert sum(path.name.endswith("build.sh") for path in scripts) >= 4
    found = subprocess.run(
        [tool("shellcheck"), "--color=never", "--format=gcc", *scripts], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_shipped_units_pass_systemd_verify(tmp_path: Path) -> None:
    root = tmp_path / "root"
    units = root / "usr/lib/systemd/system"
    for files in sorted(shipped().glob("layers/*/files")):
        shutil.copytree(files, root, symlinks=True, dirs_exist_ok=True)
    names = sorted(path.name for path in units.glob("*.service"))
    assert "imgbuild-cdi.service" in names
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--generators=no", "--recursive-errors=no",
         f"--root={root}", *names],
        capture_output=True, text=True, env={**os.environ, "SYSTEMD_COLORS": "0"},
    )  # fmt: skip
    about = [line for line in (found.stdout + found.stderr).splitlines() if any(n in line for n in names)]
    assert [line for line in about if "Failed to load" not in line] == []


# --- on disk ----------------------------------------------------------------------------------------


@pytest.fixture
def contexts(site: Site, tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Write every node's context, with a stand-in for each package file; returns the folders."""

    def written(base: str = "debian", vendor: str = "nvidia", **options: object) -> dict[str, Path]:
        store = tmp_path / "store"
        store.mkdir(exist_ok=True)
        folders = {}
        for name, item in site.rendered(base, vendor, **options).items():  # type: ignore[arg-type]
            packages = {}
            for package in item.packages:
                packages[package.sha256] = store / package.sha256
                packages[package.sha256].write_text(package.name)
            if item.tarball:
                packages[item.tarball[1]] = store / item.tarball[1]
                packages[item.tarball[1]].write_text("tarball")
            folders[name] = tmp_path / "contexts" / name
            write_context(item, folders[name], packages)
        return folders

    return written


def test_context_has_everything_its_containerfile_mounts(contexts: Callable[..., dict[str, Path]]) -> None:
    for base in ("debian", "centos"):
        for folder in contexts(base, "nvidia", with_layers=["zfs"]).values():
            text = (folder / "Containerfile").read_text()
            for word in text.replace(",", " ").split():
                if word.startswith("source="):
                    assert (folder / word.removeprefix("source=")).is_dir(), word
            for script in set(text.split()):
                if script.startswith("/run/imgbuild/scripts/"):
                    assert (folder / "scripts" / script.rsplit("/", 1)[1]).is_file(), script
        shutil.rmtree(folder.parent)


def test_scripts_of_a_context_find_the_scripts_they_call(contexts: Callable[..., dict[str, Path]]) -> None:
    for base in ("debian", "centos"):
        for folder in contexts(base, "nvidia").values():
            for script in (folder / "scripts").glob("*.sh"):
                for line in script.read_text().splitlines():
                    if 'sh "$here/' in line:
                        assert (script.parent / line.split('"$here/')[1].split('"')[0]).is_file()
        shutil.rmtree(folder.parent)


def test_context_of_a_kmod_has_source_build_patch_and_package(
    contexts: Callable[..., dict[str, Path]],
) -> None:
    folder = contexts()["kmod-nvidia"]
    assert [path.read_text() for path in (folder / "source").iterdir()] == ["nvidia-open-kernel-dkms"]
    assert list((folder / "packages").iterdir()) == []
    assert (folder / "kmod/build.sh").read_text().startswith("make -j")
    assert (folder / "kmod/patches/pci_resize_resource.patch").is_file()
    control = (folder / "kmod/package/control").read_text()
    assert "Version: 550.163.01-1+6.12.117+deb13.amd64\n" in control
    assert "Depends: linux-image-6.12.117+deb13-amd64\n" in control
    assert "Provides: nvidia-open-kernel-550.163.01, nvidia-kmod (= 550.163.01)\n" in control


def test_context_of_an_el_kmod_has_a_spec_file(contexts: Callable[..., dict[str, Path]]) -> None:
    spec = (contexts("centos")["kmod-nvidia"] / "kmod/package/kmod.spec").read_text()
    assert "\nEpoch: 3\nVersion: 550.163.01\nRelease: 1.6.12.0_150.el10.x86_64\n" in spec
    assert "\nProvides: nvidia-kmod = 3:550.163.01\n" in spec
    assert "\nRequires: kernel-uname-r = 6.12.0-150.el10.x86_64\n" in spec


def test_context_of_the_bootstrap_has_packages_and_script(contexts: Callable[..., dict[str, Path]]) -> None:
    folder = contexts()["tier1"]
    names = {path.read_text() for path in (folder / "packages").iterdir()}
    assert {"apt", "systemd", "zstd"} <= names
    script = folder / "bootstrap.sh"
    assert script.stat().st_mode & 0o777 == 0o755
    assert "--variant=minbase" in script.read_text()  # of a repository in which all is required


def test_context_modes_do_not_depend_on_the_umask(contexts: Callable[..., dict[str, Path]]) -> None:
    old = os.umask(0o077)
    try:
        folders = contexts(vendor="nvidia", with_layers=["zfs"])
    finally:
        os.umask(old)
    files = folders["tier2"] / "files"
    for path in files.rglob("*"):
        expected = 0o755 if path.is_dir() or path.name.startswith("cdi-") else 0o644
        assert stat.S_IMODE(path.lstat().st_mode) == expected, path


def test_tarball_goes_to_the_source_folder(site: Site, contexts: Callable[..., dict[str, Path]]) -> None:
    site.write(
        "imgbuild.yaml",
        "kmods:\n  nvidia:\n    version: 580.126.09\n    source:\n      url: https://x.example/v1.tar.gz\n"
        f"      sha256: {'0' * 64}\n      path: open-{{version}}\n",
    )
    folder = contexts()["kmod-nvidia"]
    assert [path.name for path in (folder / "source").iterdir()] == ["v1.tar.gz"]
    assert "SOURCE_PATH=open-580.126.09 " in (folder / "Containerfile").read_text()


def test_source_folder_is_copied_without_git(site: Site, contexts: Callable[..., dict[str, Path]]) -> None:
    site.write(
        "imgbuild.yaml", "kmods: {nvidia: {version: '580.1', source: {directory: src}}}\npackages: []\n"
    )
    site.write("src/kernel open/Kbuild", "x")
    site.write("src/.git/config", "secret")
    (site.folder / "src/link").symlink_to("/etc/passwd")
    tree = contexts()["kmod-nvidia"] / "source/tree"
    assert (tree / "kernel open/Kbuild").read_text() == "x"
    assert (tree / "link").is_symlink()
    assert not (tree / ".git").exists()


def test_source_folder_that_is_not_there_is_named(site: Site) -> None:
    site.write("imgbuild.yaml", "kmods: {nvidia: {version: '580.1', source: {directory: gone}}}\n")
    with pytest.raises(DefinitionError, match=r"the source of kmod `nvidia` is not there: no folder .*/gone"):
        site.rendered("debian", "nvidia")


def test_package_files_are_linked_not_copied(
    contexts: Callable[..., dict[str, Path]],
) -> None:
    folder = contexts()["tier2"]
    for path in (folder / "packages").iterdir():
        assert path.stat().st_nlink > 1


def test_two_packages_with_one_file_name_do_not_damage_the_store(site: Site, tmp_path: Path) -> None:
    from dataclasses import replace

    from msgspec.structs import replace as replace_struct

    item = site.rendered("debian", "none")["tier1"]
    one, two = item.packages[:2]
    two = replace_struct(two, path=one.path)
    store = {one.sha256: tmp_path / "one", two.sha256: tmp_path / "two"}
    for place in store.values():
        place.write_text(place.name)
    with pytest.raises(ImgbuildError, match="two files of one build context have the name"):
        write_context(replace(item, packages=(one, two)), tmp_path / "context", store)
    assert [place.read_text() for place in store.values()] == ["one", "two"]


def test_render_out_writes_every_context_and_a_script_that_builds_them(
    site: Site, imgbuild: Imgbuild, tmp_path: Path
) -> None:
    selection = site.load("debian", "nvidia")
    section = synthetic_section(selection)
    digest = hashlib.sha256(b"bytes").hexdigest()
    package = msgspec.structs.replace(section.transactions["tier2"][0], sha256=digest)
    section.transactions["tier2"] = (package, *section.transactions["tier2"][1:])
    write(lock_path(selection), Lockfile(sections={selection.section: section}))
    stored = tmp_path / "state/store" / package.sha256[:2] / package.sha256
    stored.parent.mkdir(parents=True)
    stored.write_text("bytes")
    found = imgbuild("render", "--vendor", "nvidia", "--out", "my contexts")
    assert found.code == 0, found.err
    assert found.out.split("\n")[:2] == ["my contexts/tier1", "my contexts/kernel"]
    out = site.folder / "my contexts"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["tier1", "kernel", "builder", "kmod-nvidia", "tier2", "build.sh"]
    )
    assert [p.name for p in (out / "tier2/packages").iterdir()] == [Path(package.path).name]
    script = (out / "build.sh").read_text()
    assert script.count("buildah build") == 5
    checked = subprocess.run([tool("shellcheck"), out / "build.sh"], capture_output=True, text=True)
    assert checked.stdout == ""
    again = imgbuild("render", "--vendor", "nvidia", "--out", "my contexts")
    assert again.code == 2
    assert "error: `my contexts` is not empty" in again.err


def test_contexts_hold_the_keys_that_their_packages_are_verified_with(
    site: Site, imgbuild: Imgbuild, tmp_path: Path
) -> None:
    selection = site.load("centos", "nvidia")
    section = synthetic_section(selection)
    (repository,) = {package.repository for package in section.transactions["tier2"]}
    digest = hashlib.sha256(b"key").hexdigest()
    section.keys[repository] = digest
    write(lock_path(selection), Lockfile(sections={selection.section: section}))
    stored = tmp_path / "state/store" / digest[:2] / digest
    stored.parent.mkdir(parents=True)
    stored.write_text("key")
    found = imgbuild("render", "--base", "centos", "--vendor", "nvidia", "--out", "out")
    assert found.code == 0, found.err
    assert (site.folder / f"out/tier2/keys/{repository}.asc").read_text() == "key"


def test_render_prints_what_it_writes(site: Site, imgbuild: Imgbuild) -> None:
    printed = imgbuild("render", "--vendor", "nvidia", "--node", "tier2")
    assert printed.code == 0
    assert imgbuild("render", "--vendor", "nvidia", "--out", "out").code == 0
    assert (site.folder / "out/tier2/Containerfile").read_text().rstrip("\n") == printed.out.rstrip("\n")


def test_render_of_an_unknown_node_names_the_nearest(site: Site, imgbuild: Imgbuild) -> None:
    found = imgbuild("render", "--node", "teir2")
    assert (found.code, "help: did you mean `tier2`?" in found.err) == (2, True)
