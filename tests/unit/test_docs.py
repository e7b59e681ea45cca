"""The documents hold true: the reference is current, links lead somewhere, and commands parse."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

from imagebuild.cli import cli

TOP = Path(__file__).parents[2]
DOCUMENTS = sorted([TOP / "README.md", *(TOP / "docs").glob("*.md")])
# Named in the documents as missing. A command that comes to be must leave this list.
NOT_YET = {"disk", "boot"}
# Places that definitions take things from, and that texts refer to; `.example` is nobody's (RFC 2606).
HOSTS = {
    "developer.download.nvidia.com",
    "download.zfsonlinux.org",
    "git.kernel.org",
    "github.com",
    "nvidia.github.io",
    "quay.io",
    "reproducible-builds.org",
    "www.apache.org",
}
HOST = re.compile(r"(?<![\w./-])(?:[a-z0-9-]+\.)+(?:org|com|net|io|dev)\b")
OWN_FOLDER = re.compile(r"(?<![\w.~])/(?:home|root|work|Users)/\w+")


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", TOP / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generate()


def _headings(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {generate.anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def _code(text: str) -> Iterator[str]:
    """Every line of code, in blocks (fenced or indented, continued lines joined) and within prose."""
    fenced = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for block in fenced.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    prose = fenced.sub("", text).replace("\\\n", " ")
    yield from (line for line in prose.splitlines() if line.startswith("    "))
    yield from (" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))


def _commands() -> list[Any]:
    """Every command line of imgbuild in the documents, once."""
    found: dict[tuple[str, ...], Any] = {}
    for document in DOCUMENTS:
        for line in _code(document.read_text()):
            match = re.match(r" *(?:\./imgbuild\.sh|imgbuild) ([a-z-][^>]*)", line)
            if match is None or re.search(r"\[|…|\.\.\.", line):
                continue
            words = shlex.split(match[1], comments=True)
            if words[0] != "test":
                found.setdefault(tuple(words), pytest.param(words, id=f"{document.name}: {line.strip()}"))
    return list(found.values())


def test_reference_is_what_generate_writes() -> None:
    # Line breaks in help texts depend on click's version, words do not.
    written = generate.PLACE.read_text().split()
    assert written == generate.reference().split(), "run: python docs/generate.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files_and_headings(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name} links to {link}, which is not there"
        assert not heading or heading in _headings(target), f"{document.name}: {link} names no heading"


@pytest.mark.parametrize("words", _commands())
def test_command_line_in_documents_parses(words: list[str]) -> None:
    name, *arguments = words
    if name in NOT_YET:
        assert name not in cli.commands, f"`imgbuild {name}` exists now: describe it"
        return
    assert name in cli.commands, f"there is no command `imgbuild {name}`"
    if not arguments:  # the bare name, as in a table
        return
    with click.Context(cli, info_name="imgbuild") as root:
        try:
            cli.commands[name].make_context(name, list(arguments), parent=root)
        except click.exceptions.Exit as done:  # --help ends it here
            assert done.exit_code == 0


def test_readme_names_every_command() -> None:
    text = (TOP / "README.md").read_text()
    assert [name for name in cli.commands if f"imgbuild {name}" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_no_foreign_host_and_no_folder_of_somebody(document: Path) -> None:
    text = document.read_text()
    assert sorted(set(HOST.findall(text)) - HOSTS) == []
    assert OWN_FOLDER.findall(text) == []


def test_every_document_is_linked_from_the_readme() -> None:
    text = (TOP / "README.md").read_text()
    assert [d.name for d in DOCUMENTS[1:] if d.parent.name == "docs" and f"(docs/{d.name})" not in text] == []
