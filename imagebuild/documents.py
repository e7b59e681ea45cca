"""YAML files with the place of every key and value, checked against a format.

All problems of a file are reported at once, each with line, column, field and the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from imagebuild.errors import DefinitionError, Location

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "map", "seq")
}
# What YAML 1.1 calls printable (section 5.1).
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MAX_DEPTH = 64
MAX_VALUES = 100_000

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A YAML file as plain data, with the place of every key and value.

    Only true/false and null are read as such; everything else stays text until a format says it is a
    number, so `6.10` stays 6.10, `no` stays no and `22:22` is no number. Duplicate keys are refused.
    """

    path: Path
    shown: str
    text: str
    data: Any
    keys: Mapping[Path_, tuple[int, int, int]] = field(default_factory=dict)
    values: Mapping[Path_, tuple[int, int, int]] = field(default_factory=dict)

    @cached_property
    def lines(self) -> list[str]:
        """The text, line by line."""
        return self.text.splitlines()

    def locate(self, loc: Iterable[str | int], *, key: bool = False) -> Location:
        """The place of a field, or of the nearest thing around it that is in the file."""
        wanted = tuple(loc)
        for length in range(len(wanted), -1, -1):
            table = self.keys if key and length == len(wanted) else self.values
            place = table.get(wanted[:length]) or self.values.get(wanted[:length])
            if place:
                line, column, width = place
                source = self.lines[line - 1] if line <= len(self.lines) else ""
                return Location(self.shown, line, column, dotted(wanted), source, width)
        return Location(self.shown, 1, 1, dotted(wanted))


def dotted(loc: Iterable[str | int]) -> str:
    """A field path as people write it: `rules[0].verdict`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def read_yaml(path: Path, shown: str | None = None) -> Document:
    """Read one YAML file.

    Raises:
        DefinitionError: the file is missing, not UTF-8, not YAML, or has duplicate keys.
    """
    shown = shown or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DefinitionError(f"there is no file `{shown}`") from None
    except IsADirectoryError:
        raise DefinitionError(f"`{shown}` is a folder, a file was expected") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DefinitionError(f"not UTF-8 text: {error.reason}", where=Location(shown, line)) from None
    except OSError as error:
        raise DefinitionError(f"`{shown}` cannot be read: {error.strerror}") from None
    lines = text.splitlines()

    def place(line: int, column: int, what: str = "", width: int = 1) -> Location:
        source = lines[line - 1] if 0 < line <= len(lines) else ""
        return Location(shown, line, column, what, source, width)

    bad = _UNPRINTABLE.search(text)
    if bad:
        line, column = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        raise DefinitionError(
            f"a control character (U+{ord(bad[0]):04X}) cannot be in a file",
            where=Location(shown, line, column),  # without the source line: no terminal shall get it
        )
    try:
        # Composing recurses in C: a file that is nested deeply enough would end the process.
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                start: Any = event.start_mark
                raise DefinitionError(
                    f"nested more than {MAX_DEPTH} levels deep", where=place(start.line + 1, start.column + 1)
                )
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place(mark.line + 1, mark.column + 1) if mark else None
        raise DefinitionError(f"not valid YAML: {error.problem}", where=where) from None
    except yaml.YAMLError as error:
        raise DefinitionError(f"`{shown}` is not valid YAML: {error}") from None
    keys: dict[Path_, tuple[int, int, int]] = {}
    values: dict[Path_, tuple[int, int, int]] = {}
    problems: list[DefinitionError] = []

    def span(node: Any) -> tuple[int, int, int]:
        start, end = node.start_mark, node.end_mark
        width = end.column - start.column if end.line == start.line else 1
        return start.line + 1, start.column + 1, max(width, 1)

    def plain(node: Any, loc: Path_, seen: tuple[int, ...]) -> Any:
        values[loc] = span(node)
        if id(node) in seen:
            raise DefinitionError("this alias contains itself", where=place(*span(node)[:2], dotted(loc)))
        seen = (*seen, id(node))
        if len(loc) > MAX_DEPTH:  # aliases nest where the text does not
            raise DefinitionError(
                f"nested more than {MAX_DEPTH} levels deep", where=place(*span(node)[:2], dotted(loc[:3]))
            )
        if len(values) > MAX_VALUES:
            raise DefinitionError(f"`{shown}` expands to more than {MAX_VALUES} values")
        if node.tag not in _TAGS:
            where = place(*span(node)[:2], dotted(loc))
            problems.append(DefinitionError(f"a tag (`{node.tag}`) means nothing here", where=where))
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line, column, width = span(key_node)
                if not isinstance(key_node, yaml.ScalarNode):
                    where = place(line, column, dotted(loc))
                    problems.append(DefinitionError("a key must be text", where=where))
                    continue
                key = str(key_node.value)
                if key in result:
                    problems.append(
                        DefinitionError(
                            f"duplicate key `{key}`",
                            where=place(line, column, dotted((*loc, key)), width),
                            help=f"it is already there in line {keys[(*loc, key)][0]}; keep one",
                        )
                    )
                    continue
                keys[(*loc, key)] = (line, column, width)
                result[key] = plain(value_node, (*loc, key), seen)
            return result
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, (*loc, i), seen) for i, item in enumerate(node.value)]
        value = str(node.value)
        if node.tag != "tag:yaml.org,2002:str":  # quotes make text of anything, and so does !!str
            if value in _NULLS:
                return None
            if value in _TRUE:
                return True
            if value in _FALSE:
                return False
        return value

    data = plain(root, (), ()) if root is not None else None
    raise_all(problems)
    return Document(path, shown, text, {} if data is None else data, keys, values)


def raise_all(problems: Sequence[DefinitionError]) -> None:
    """Raise all problems as one error; nothing to do without any."""
    if problems:
        first, *others = problems
        raise DefinitionError(
            first.what, where=first.where, help=first.help, lines=first.lines, others=others
        )


T = TypeVar("T", bound=msgspec.Struct)


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean …?` with what there is, for a name that is not known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean `{close[0]}`? " if close else ""
    return f"{hint}There is: {', '.join(names)}" if names else hint.strip()


def parse(document: Document, model: type[T], hint: Callable[[str], str] = lambda _: "") -> T:
    """Check a document against a format; `hint` explains in words what a pattern takes.

    Raises:
        DefinitionError: with every problem of the document, each at its place.
    """
    try:
        return msgspec.convert(document.data, model, strict=False)
    except msgspec.ValidationError as error:
        # msgspec stops at the first problem; people want all of them.
        problems = list(_problems(document, document.data, model, (), hint))
        raise_all(problems or [DefinitionError(str(error), where=document.locate(()))])
        raise AssertionError("unreachable") from error


def _problems(
    document: Document, data: Any, kind: Any, loc: Path_, hint: Callable[[str], str]
) -> Iterator[DefinitionError]:
    """Every problem of `data`, which should be of type `kind`, and of what is in it."""
    origin = get_origin(kind)
    if origin is Annotated:
        bare = get_args(kind)[0]
        if get_origin(bare) is not None:
            inner = list(_problems(document, data, bare, loc, hint))
            if inner:
                yield from inner
                return
    elif origin in (Union, UnionType):
        branch = _branch(data, get_args(kind))
        if branch is not None:
            yield from _problems(document, data, branch, loc, hint)
            return
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(data, dict):
        found = list(_struct_problems(document, data, kind, loc, hint))
        if found:
            yield from found
            return
    elif origin is tuple and isinstance(data, list):
        for i, item in enumerate(data):
            yield from _problems(document, item, get_args(kind)[0], (*loc, i), hint)
        return
    elif origin is dict and isinstance(data, dict):
        key_kind, value_kind = get_args(kind)
        for key, item in data.items():
            for problem in _problems(document, key, key_kind, (*loc, key), hint):
                yield DefinitionError(
                    problem.what, where=document.locate((*loc, key), key=True), help=problem.help
                )
            yield from _problems(document, item, value_kind, (*loc, key), hint)
        return
    try:
        msgspec.convert(data, kind, strict=False)
    except msgspec.ValidationError as error:
        what, advice = _in_words(str(error), data, kind, hint)
        yield DefinitionError(
            f"`{dotted(loc) or 'the file'}` {what}", where=document.locate(loc), help=advice
        )


def _struct_problems(
    document: Document,
    data: dict[str, Any],
    kind: type[msgspec.Struct],
    loc: Path_,
    hint: Callable[[str], str],
) -> Iterator[DefinitionError]:
    fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    for key in data:
        if key not in fields:
            yield DefinitionError(
                f"unknown field `{key}`",
                where=document.locate((*loc, key), key=True),
                help=nearest(key, fields),
            )
    for name, info in fields.items():
        if name in data:
            yield from _problems(document, data[name], hints[info.name], (*loc, name), hint)
        elif info.required:
            yield DefinitionError(f"`{dotted((*loc, name))}` is missing", where=document.locate(loc))


def _branch(data: Any, kinds: Sequence[Any]) -> Any:
    """The branch of a union that data of this shape can only mean."""
    for kind in kinds:
        bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        structured = get_origin(bare) is dict or (isinstance(bare, type) and issubclass(bare, msgspec.Struct))
        if isinstance(data, dict) and structured:
            return kind
        if isinstance(data, list) and get_origin(bare) is tuple:
            return kind
        scalar = not structured and get_origin(bare) is not tuple and bare is not type(None)
        if isinstance(data, str | bool) and scalar:
            return kind
    return next((kind for kind in kinds if kind is not type(None)), None) if data is not None else None


_EXPECTED = {
    "str": "text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "array": "a list",
    "object": "a mapping (key: value)",
}


def _in_words(message: str, data: Any, kind: Any, hint: Callable[[str], str]) -> tuple[str, str]:
    """What msgspec says of one value, as a person would say it, and advice."""
    message = message.split(" - at `")[0]
    bare = kind
    meta = None
    if get_origin(kind) is Annotated:
        bare, meta = get_args(kind)[0], get_args(kind)[1]
    if get_origin(bare) is Literal:
        choices = ", ".join(str(choice) for choice in get_args(bare))
        return f"must be one of {choices}, not {data!r}", ""
    expected = re.match(r"Expected `([a-z]+)( \| null)?`, got `([a-z]+)`", message)
    if expected:
        wanted = _EXPECTED.get(expected[1], expected[1])
        return f"must be {wanted}, not {_shape(data)}", ""
    if "matching regex" in message and meta is not None:
        return f"has a form that is not allowed: {data!r}", hint(str(meta.pattern))
    length = re.match(r"Expected `(str|array)` of length (>=|<=) (\d+)", message)
    if length:
        unit = "characters" if length[1] == "str" else "entries"
        return f"must have at {'least' if length[2] == '>=' else 'most'} {length[3]} {unit}", ""
    return f"is not right: {message}", ""


def _shape(data: Any) -> str:
    if isinstance(data, dict):
        return "a mapping"
    if isinstance(data, list):
        return "a list"
    return "empty" if data is None else f"`{str(data).lower() if isinstance(data, bool) else data}`"
