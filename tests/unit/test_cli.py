"""The command line: help, exit codes, JSON, first line, completion, and what `init` writes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
import yaml
from conftest import Outcome, Site
from synthetic_lock import synthetic_section

from imagebuild import cli, run, starter
from imagebuild.definitions import FORMATS
from imagebuild.load import shipped
from imagebuild.lock import Lockfile, lock_path, write

Imgbuild = Callable[..., Outcome]
COMMANDS = sorted(cli.cli.commands)
PROGRAM = [sys.executable, "-m", "imagebuild"]


def _locked(site: Site, base: str = "debian", vendor: str = "nvidia", **options: Any) -> None:
    selection = site.load(base, vendor, **options)
    write(lock_path(selection), Lockfile(sections={selection.section: synthetic_section(selection)}))


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is run and no connection made: whoever tries fails the test."""

    def refuse(*arguments: object, **_: object) -> NoReturn:
        raise AssertionError(f"the outside world was asked: {arguments}")

    for name, module in list(sys.modules.items()):
        if name.startswith("imagebuild") and getattr(module, "run", None) is run.run:
            monkeypatch.setattr(module, "run", refuse)
    monkeypatch.setattr(run, "run", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


# --- help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_a_summary_and_an_example_that_parses(imgbuild: Imgbuild, command: str) -> None:
    found = imgbuild(*command.split(), "--help")
    assert (found.code, found.err) == (0, "")
    assert f"imgbuild {command}".strip() in found.out
    head, _, examples = found.out.partition("Example")
    assert head.strip() and examples, "no example"
    shown = [line.strip() for line in examples.splitlines() if line.strip().startswith("imgbuild ")]
    assert shown
    for line in shown:
        words = line.split(" > ")[0].split()[1:]
        name = words[0]
        assert name == command or not command
        cli.cli.commands[name].make_context(
            name, words[1:], parent=click.Context(cli.cli, **cli.cli.context_settings)
        )


def test_help_names_every_exit_code(imgbuild: Imgbuild) -> None:
    out = imgbuild("--help").out
    for code in (
        "0  done",
        "1  failed",
        "2  wrong usage",
        "3  stopped by",
        "4  a program",
        "130 interrupted",
    ):
        assert code in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    for parameter in cli.cli.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.show_default, f"{command} {parameter.name}"


def test_help_does_not_import_what_only_work_needs() -> None:
    code = "import sys, imagebuild.cli; print([m for m in sys.modules if m in %r])"
    heavy = ["requests", "jinja2", "rich", "msgspec", "sh", "elftools", "univers", "yaml"]
    found = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# --- exit codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["build", "--nonsense"],
        ["build", "--tier", "9"],
        ["build", "--jobs", "0"],
        ["plan", "--base"],
        ["push", "image"],
        ["check"],
        ["completion", "tcsh"],
        ["schema", "nonsense"],
        ["plan", "-f", "missing.yaml"],
        ["plan", "--mirror-map", "missing.yaml"],
        ["plan", "--vendor", "nvida"],
    ],
)
def test_wrong_usage_exits_with_2(imgbuild: Imgbuild, arguments: list[str]) -> None:
    found = imgbuild(*arguments)
    assert (found.code, found.out) == (2, "")
    assert "rror: " in found.err and "Traceback" not in found.err


@pytest.mark.parametrize("command", ["build", "lock", "plan", "render"])
@pytest.mark.parametrize("base", ["debian", "centos"])
@pytest.mark.usefixtures("isolated")
def test_blocked_vendor_exits_with_3_before_anything_is_asked(
    imgbuild: Imgbuild, command: str, base: str
) -> None:
    found = imgbuild(command, "--base", base, "--vendor", "amd")
    assert found.code == 3
    assert "error: amdgpu 6.16.13 is blocked on kernel" in found.err
    assert f"base/{base}/amd/compat.yaml:" in found.err
    assert "https://github.com/ROCm/" in found.err and "--allow-blocked" in found.err


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize(
    "command", [["plan"], ["render"], ["compat"], ["list"], ["schema", "site"], ["init", "x"]]
)
def test_pure_command_runs_no_program_and_asks_no_network(
    site: Site, imgbuild: Imgbuild, command: list[str]
) -> None:
    if command[0] in ("plan", "render", "compat"):
        _locked(site)
        command = [*command, "--vendor", "nvidia"]
    assert imgbuild(*command).code == 0


def test_missing_buildah_exits_with_4_and_the_command_that_installs_it(site: Site, tmp_path: Path) -> None:
    _locked(site, vendor="none")
    (tmp_path / "bin").mkdir()
    found = subprocess.run(
        [*PROGRAM, "build"],
        cwd=site.folder,
        capture_output=True,
        text=True,
        env={
            "PATH": str(tmp_path / "bin"),
            "IMGBUILD_STATE_DIR": str(tmp_path / "state"),
            "PYTHONPATH": os.pathsep.join([str(shipped()), *filter(None, sys.path)]),
        },
    )
    assert found.returncode == 4, found.stderr
    assert re.search(
        r"^error: .*not installed.*buildah|^error: .*buildah.* is not installed", found.stderr, re.M
    )
    assert "apt-get install -y" in found.stderr
    assert "Traceback" not in found.stderr


def test_interrupted_command_exits_with_130(imgbuild: Imgbuild, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("imagebuild.load.load", interrupt)
    found = imgbuild("plan")
    assert found.code == 130
    assert found.err.strip() == "interrupted; the next run goes on from the last finished node"


# --- JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plan", "--vendor", "nvida"], 2),
        (["plan", "--vendor", "amd"], 3),
        (["lock", "--vendor", "amd"], 3),
        (["render", "--node", "x"], 2),
        (["init", "--base", "debain", "x"], 2),
    ],
)
def test_error_with_json_is_json_on_stdout_and_words_on_stderr(
    imgbuild: Imgbuild, arguments: list[str], code: int
) -> None:
    found = imgbuild(*arguments, "--json")
    data = json.loads(found.out)
    assert (found.code, data["exit_code"]) == (code, code)
    assert data["error"] in found.err
    if code == 3:
        assert data["file"].endswith("compat.yaml") and data["line"] > 1


def test_definition_error_with_json_has_the_place_of_every_problem(site: Site, imgbuild: Imgbuild) -> None:
    site.write("imgbuild.yaml", "nmae: x\ntags: [-a]\n")
    data = json.loads(imgbuild("plan", "--json").out)
    places = [(each["file"], each["line"], each["field"]) for each in (data, *data["others"])]
    assert places == [("imgbuild.yaml", 1, "nmae"), ("imgbuild.yaml", 2, "tags[0]")]


@pytest.mark.parametrize("locked", [True, False])
def test_plan_json_is_the_plan(site: Site, imgbuild: Imgbuild, locked: bool) -> None:
    if locked:
        _locked(site)
    data = json.loads(imgbuild("plan", "--vendor", "nvidia", "--json").out)
    assert data["locked"] is locked
    assert [node["name"] for node in data["nodes"]] == ["tier1", "kernel", "builder", "kmod-nvidia", "tier2"]
    assert all((node["key"] is not None) is locked for node in data["nodes"])
    assert data["verdicts"][0]["verdict"] == ("patch" if locked else "unknown")


@pytest.mark.parametrize(
    "arguments", [["list"], ["compat", "--vendor", "nvidia"], ["render"], ["check", "--list"]]
)
def test_json_is_all_there_is_on_stdout(imgbuild: Imgbuild, arguments: list[str]) -> None:
    found = imgbuild(*arguments, "--json")
    assert found.code == 0
    json.loads(found.out)


# --- words ------------------------------------------------------------------------------------------


def test_first_line_names_the_base_and_why(site: Site, imgbuild: Imgbuild) -> None:
    def first(*arguments: str) -> str:
        found = imgbuild("plan", *arguments)
        return (found.out or found.err).split("\n")[0]

    assert first() == "base debian (default; no --base, no site file names one), tier 2, vendor none"
    assert first("--base", "centos", "--tier", "1") == "base centos (--base), tier 1, vendor none"
    site.write("imgbuild.yaml", "base: centos\nvendor: nvidia\n")
    assert first() == "base centos (site file), tier 2, vendor nvidia"


def test_plan_of_a_vendor_without_generator_says_what_is_missing(imgbuild: Imgbuild) -> None:
    out = imgbuild("plan", "--vendor", "nvidia").out
    assert "notice: no CDI generator in this image" in out
    assert "not locked: `imgbuild lock`" in out
    assert "it is attempted" in out


def test_plan_names_the_input_that_changed_since_the_last_build(
    site: Site, imgbuild: Imgbuild, tmp_path: Path
) -> None:
    _locked(site, vendor="none")
    item = site.rendered("debian", "none")["tier2"]
    old = {**item.inputs, "file files/etc/gone": "644 00"}
    old.pop("layer time")
    journal = tmp_path / "state/journal/debian_none_--tier2.json"
    journal.parent.mkdir(parents=True)
    journal.write_text(json.dumps({"key": "other", "inputs": old, "seconds": 9.5}))
    node = json.loads(imgbuild("plan", "--json").out)["nodes"][-1]
    assert node["rebuild"] == ["file files/etc/gone removed", "layer time added"]
    assert node["seconds_last_time"] == 9.5


def test_list_shows_what_is_disabled_with_reason_and_link(imgbuild: Imgbuild) -> None:
    out = imgbuild("list").out
    assert out.count("disabled: amdgpu-dkms does not compile on kernel 6.12 and later") == 2
    assert out.count("https://github.com/ROCm/legacy-rocm-build/issues/5111") == 2


def test_list_shows_targets_and_hosts_with_what_the_site_adds(site: Site, imgbuild: Imgbuild) -> None:
    site.write(
        "fleet/imgbuild.yaml",
        "vendor: nvidia\nwith: [zfs]\ntargets: [{}]\n"
        "hosts: [{name: web, vendors: [nvidia, amd], without: [cdi], kernel: '>=6.12.100'}]\n",
    )
    found = imgbuild("list", "-f", "fleet/imgbuild.yaml").out.splitlines()
    assert found[-2:] == [
        "target debian-nvidia       base debian, vendor nvidia, with zfs",
        "host web                   base debian, vendor amd+nvidia, with zfs, without cdi, kernel >=6.12.100",
    ]
    data = json.loads(imgbuild("list", "-f", "fleet/imgbuild.yaml", "--json").out)
    assert data["targets"][0]["name"] == "debian-nvidia"
    assert data["hosts"][0]["vendors"] == ["amd", "nvidia"]
    assert json.loads(imgbuild("list", "--json").out)["hosts"] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(imgbuild: Imgbuild, shell: str) -> None:
    found = imgbuild("completion", shell)
    assert found.code == 0 and "_IMGBUILD_COMPLETE" in found.out


@pytest.mark.parametrize(
    ("line", "word", "offered"),
    [
        ("imgbuild plan --base ", "", {"debian", "centos"}),
        ("imgbuild plan --base centos --vendor ", "n", {"nvidia", "none"}),
        ("imgbuild plan --with ", "z", {"zfs"}),
        ("imgbuild b", "b", {"build"}),
        ("imgbuild build --host ", "", {"web", "gpu"}),
        ("imgbuild plan --target ", "b", {"big"}),
        ("imgbuild build -f broken.yaml --host ", "", set()),
    ],
)
def test_completion_offers_the_names_there_are(site: Site, line: str, word: str, offered: set[str]) -> None:
    from click.shell_completion import ShellComplete

    site.write("imgbuild.yaml", "targets: [{name: big}]\nhosts: [{name: web}, {name: gpu}]\n")
    site.write("broken.yaml", "hosts: [web\n")
    words = line.split()[1:]
    if word and words[-1] == word:
        words = words[:-1]
    found = ShellComplete(cli.cli, {}, "imgbuild", "_IMGBUILD_COMPLETE").get_completions(words, word)
    assert {item.value for item in found} == offered


@pytest.mark.parametrize("name", FORMATS)
def test_schema_is_printed_and_written(site: Site, imgbuild: Imgbuild, name: str) -> None:
    printed = imgbuild("schema", name).out
    assert json.loads(printed)["$schema"]
    assert imgbuild("schema", "--out", "schemas").code == 0
    assert (site.folder / f"schemas/{name}.schema.json").read_text() == printed


# --- init -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["debian", "centos"])
@pytest.mark.parametrize("vendor", ["nvidia", "none"])
def test_init_writes_a_site_that_plans(site: Site, imgbuild: Imgbuild, base: str, vendor: str) -> None:
    found = imgbuild("init", "--base", base, "--vendor", vendor, "fleet")
    assert (found.code, found.out) == (0, "wrote fleet/imgbuild.yaml\n")
    planned = imgbuild("plan", "-f", "fleet/imgbuild.yaml")
    assert planned.code == 0
    assert planned.out.startswith(f"base {base} (site file), tier 2, vendor {vendor}")


def test_init_offers_centos_and_nvidia_first(site: Site, imgbuild: Imgbuild) -> None:
    assert imgbuild("init").code == 0
    data = yaml.safe_load((site.folder / "imgbuild.yaml").read_text())
    assert (data["base"], data["vendor"]) == ("centos", "nvidia")


def test_init_comments_become_valid_when_taken_out(site: Site, imgbuild: Imgbuild) -> None:
    imgbuild("init", "--base", "debian")
    lines = (site.folder / "imgbuild.yaml").read_text().splitlines()
    opened, on = [], False
    for line in lines:
        on = line.startswith(("# cache:", "# kmods:", "# mirrors:")) or (on and line.startswith("#   "))
        opened.append(line[2:] if on else line)
    site.write("imgbuild.yaml", "\n".join(opened) + "\n")
    selection = site.load(None, None)  # type: ignore[arg-type]
    assert selection.site.cache == "registry.example/imgbuild-cache"
    assert selection.kmods["nvidia"][0].version == "580.126.09"
    assert dict(selection.mirrors.registries) == {"quay.io": "registry.example/quay"}


@pytest.mark.parametrize(
    "name", ["null", "true", "My Fleet", "---", "1.0", "ÄÖ", "a" * 100, "-x-", "no", "$(id)"]
)
def test_init_in_a_folder_of_any_name_writes_a_site_that_loads(
    site: Site, imgbuild: Imgbuild, name: str
) -> None:
    assert imgbuild("init", "--base", "debian", "--", name).code == 0
    assert imgbuild("plan", "-f", f"{name}/imgbuild.yaml").code == 0


@pytest.mark.parametrize(
    ("kind", "path"), [("gitlab", ".gitlab-ci.yml"), ("github", ".github/workflows/image.yml")]
)
def test_init_writes_a_pipeline_of_at_most_ten_lines_that_does_every_step(
    site: Site, imgbuild: Imgbuild, kind: str, path: str
) -> None:
    assert imgbuild("init", "--ci", kind).code == 0
    text = (site.folder / path).read_text()
    assert len(text.splitlines()) <= 10
    data = yaml.safe_load(text)
    if kind == "gitlab":
        keywords = {"image", "services", "stages", "variables", "cache", "include", "pages"}
        assert not keywords & set(data), "a job must not be called like a keyword"
        (job,) = data.values()
        script = "\n".join(job["script"])
    else:
        (job,) = data["jobs"].values()
        script = job["steps"][-1]["run"]
        assert " ; " not in script, "a step that fails must stop those after it"
    for step in ("lock", "build", "check", "push"):
        assert f"imgbuild {step}" in script
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("there", ["imgbuild.yaml", ".gitlab-ci.yml"])
def test_init_overwrites_nothing_and_then_writes_nothing(site: Site, imgbuild: Imgbuild, there: str) -> None:
    site.write(there, "mine\n")
    found = imgbuild("init", "--ci", "gitlab")
    assert found.code == 2
    assert f"`{there}` is already there" in found.err
    assert [path.name for path in site.folder.iterdir()] == [there]
    assert (site.folder / there).read_text() == "mine\n"


def test_init_of_an_unknown_base_writes_nothing(site: Site, imgbuild: Imgbuild) -> None:
    assert imgbuild("init", "--base", "../x").code == 2
    assert imgbuild("init", "--vendor", "nvida").code == 2
    assert list(site.folder.iterdir()) == []


def test_starter_pipeline_installs_what_doctor_asks_for() -> None:
    installed = set(starter.STEPS[0].split("install -y ")[1].split())
    from imagebuild.doctor import PROGRAMS

    essential = {run.PACKAGES[program] for program in PROGRAMS} - {"util-linux", "dpkg"}
    assert essential <= installed
