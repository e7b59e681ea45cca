"""Writes docs/reference.md from the formats, the command line and the checks. Run: python docs/generate.py

The reference is kept in git, so that it can be read without running anything; a test tells when it is old.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, get_origin

import click
import msgspec

from imagebuild import check, cli, definitions, state

PLACE = Path(__file__).with_name("reference.md")
TITLES = {
    "site": "Site file: `imgbuild.yaml`",
    "base": "Base: `base/BASE/base.yaml`",
    "vendor": "Vendor: `base/BASE/VENDOR/vendor.yaml`",
    "compat": "Compat rules: `compat.yaml` beside a `vendor.yaml` or `layer.yaml`",
    "layer": "Layer: `layers/LAYER/layer.yaml`",
    "mirror-map": "Mirror map: `--mirror-map FILE`, or `mirrors:` in the site file",
}
PLAIN = {"str": "text", "bool": "`true` or `false`", "int": "whole number"}


TREE = ast.parse(inspect.getsource(definitions)).body
CLASSES = {item.name: item for item in TREE if isinstance(item, ast.ClassDef)}
USED = {node.id for item in CLASSES.values() for node in ast.walk(item) if isinstance(node, ast.Name)}
FIELD_DOCS = definitions.field_docs()
TOP = {model.__name__: title for name, title in TITLES.items() for model in [definitions.FORMATS[name]]}


def anchor(heading: str) -> str:
    """The name that renderers of Markdown give a heading's place."""
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def lineage(model: type) -> list[str]:
    """Names of a format's classes, its own first."""
    return [base.__name__ for base in model.__mro__ if base.__name__ in CLASSES]


def fields(model: type[msgspec.Struct]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type in words, default and meaning of each field of a format."""
    annotations = {
        statement.target.id: statement.annotation
        for name in reversed(lineage(model))
        for statement in CLASSES[name].body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    docs = FIELD_DOCS[model.__name__]
    for field in msgspec.structs.fields(model):
        name = field.encode_name
        yield name, words(annotations[field.name]), default(field), docs.get(name, "")


def default(field: msgspec.structs.FieldInfo) -> str:
    """A field's default as people read it."""
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()  # type: ignore[operator]
    return f"`{value}`" if isinstance(value, str | bool | int) else ""


def words(node: ast.expr) -> str:
    """A type annotation in words."""
    if isinstance(node, ast.Name):
        if node.id in CLASSES:
            return f"[{node.id}](#{anchor(TOP.get(node.id, node.id))})"
        if hasattr(definitions, node.id):
            return f"[{spaced(node.id)}](#kinds-of-text)"
        return PLAIN[node.id]
    if isinstance(node, ast.BinOp):
        sides = [side for side in (node.left, node.right) if not is_none(side)]
        return " or ".join(words(side) for side in sides)
    assert isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if node.value.id == "Literal":
        return " or ".join(f"`{part.value}`" for part in inner if isinstance(part, ast.Constant))
    if node.value.id == "Annotated":
        least = re.search(r"(?:min_length|ge)=(\d+)", ast.unparse(inner[1]))
        return words(inner[0]) + (f", at least {least[1]}" if least else "")
    if node.value.id == "tuple":
        return f"list of: {words(inner[0])}"
    assert node.value.id == "dict"
    return f"mapping of {words(inner[0])} to {words(inner[1])}"


def is_none(node: ast.expr) -> bool:
    """Tell whether an annotation is `None`."""
    return isinstance(node, ast.Constant) and node.value is None


def spaced(name: str) -> str:
    """`PackageSpec` → `package spec`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def used(model: type[msgspec.Struct]) -> list[str]:
    """Names of the classes that a format's fields are made of, in order of appearance."""
    found: list[str] = []
    for name in reversed(lineage(model)):
        for statement in CLASSES[name].body:
            if isinstance(statement, ast.AnnAssign):
                for node in ast.walk(statement.annotation):
                    if isinstance(node, ast.Name) and node.id in CLASSES and node.id not in found:
                        found.append(node.id)
    return found


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def format_section(model: type[msgspec.Struct], heading: str) -> Iterator[str]:
    """One format as a table."""
    yield from (heading, "", inspect.cleandoc(model.__doc__ or ""), "")
    yield from ("| field | takes | default | meaning |", "|---|---|---|---|")
    for name, kind, value, meaning in fields(model):
        yield f"| `{name}` | {cell(kind)} | {value} | {cell(meaning)} |"
    yield ""


def formats() -> Iterator[str]:
    """All formats, then the parts they share."""
    yield from ("## Formats", "")
    yield (
        "All files are YAML. Unknown fields and duplicate keys are refused. A value is text unless the field "
        "asks for something else: `6.10` stays 6.10, `no` stays no. `imgbuild schema NAME` prints the same "
        "as JSON Schema, for editors."
    )
    yield ""
    shared: list[str] = []
    for name, title in TITLES.items():
        model = definitions.FORMATS[name]
        yield from format_section(model, f"### {title}")
        shared += used(model)
    done: list[str] = []
    for name in shared:  # grows while it is walked
        model = getattr(definitions, name)
        if name not in done:
            done.append(name)
            if name not in TOP:
                yield from format_section(model, f"### {name}")
            shared += [other for other in used(model) if other not in done]
    yield from ("### Kinds of text", "")
    for name, text in kinds_of_text():
        yield f"- **{spaced(name)}**: {text}"
    yield ""


def kinds_of_text() -> Iterator[tuple[str, str]]:
    """Names of the kinds of text, and what each takes: in words, or as a pattern."""
    for statement, after in pairwise(TREE):
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name = statement.targets[0].id
        kind = getattr(definitions, name)
        if get_origin(kind) is not Annotated or name not in USED:
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
        else:
            pattern = kind.__metadata__[0].pattern
            text = definitions.describe_pattern(pattern).removeprefix("it takes ")
            bare = pattern.removeprefix("^(?:").removesuffix(r")$(?!\n)")
            text = text or f"text that matches `` {bare} ``"
        yield name, text[:1].upper() + text[1:].rstrip(".") + "."


def commands() -> Iterator[str]:
    """What `--help` says of every command."""
    yield from ("## Commands", "")
    settings = {"terminal_width": 100, "max_content_width": 100}
    root = click.Context(cli.cli, info_name="imgbuild", **settings, **{"help_option_names": ["-h", "--help"]})
    yield from ("```", cli.cli.get_help(root), "```", "")
    for name in cli.cli.list_commands(root):
        command = cli.cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, **settings)
        yield from (f"### imgbuild {name}", "", "```", command.get_help(context), "```", "")


def exit_codes() -> Iterator[str]:
    """The exit codes, as `imgbuild --help` lists them."""
    yield from ("## Exit codes", "", "| code | meaning |", "|---|---|")
    for code, meaning in re.findall(r"^ +(\d+) +(.+)$", cli.EXIT_CODES, re.MULTILINE):
        yield f"| {code} | {meaning} |"
    yield ""


def checks() -> Iterator[str]:
    """The checks there are."""
    yield from ("## Checks", "")
    yield (
        "`imgbuild check IMAGE` runs them all, in this order. A check that cannot run is a finding "
        "`could-not-run`, which counts like a fatal one. Warnings and notices do not fail the command."
    )
    yield from ("", "| check | severity | why | what helps |", "|---|---|---|---|")
    for one in check.list_checks():
        yield f"| `{one.name}` | {one.severity} | {cell(one.reason)} | {cell(one.fix)} |"
    yield ""


def state_folder() -> Iterator[str]:
    """What lies in the state folder."""
    yield from ("## State folder", "")
    yield from (inspect.cleandoc(state.default_state_dir.__doc__ or ""), "")
    yield from ("```", inspect.cleandoc(state.__doc__ or "").split("\n\n", 1)[1], "```", "")


def reference() -> str:
    """The whole reference."""
    lines = ["# Reference", "", "Made by `python docs/generate.py`: change the code, not this file.", ""]
    for part in (formats, commands, exit_codes, checks, state_folder):
        lines += part()
    text = "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())
    return text.rstrip("\n") + "\n"


if __name__ == "__main__":
    PLACE.write_text(reference(), encoding="utf-8")
