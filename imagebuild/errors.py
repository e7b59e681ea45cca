"""What can go wrong, and the exit code each kind owns.

    ImgbuildError           1   a build, check or push failed
    ├── DefinitionError     2   wrong usage, or definitions that are not valid
    ├── BlockedError        3   compat rules alone stopped the work
    └── UnavailableError    4   a program, mirror or registry is missing or unreachable

Only `cli.main` catches these. An error says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Location:
    """A place in a text file; `line` and `column` count from 1."""

    file: str
    line: int
    column: int = 1
    field: str = ""
    source: str = ""
    width: int = 1

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}"
        return f"{place}  {self.field}" if self.field else place


class ImgbuildError(Exception):
    """The work failed. `what` is one line, `lines` is evidence (program output), `help` is advice."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: Location | None = None,
        help: str = "",
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.help = help
        self.lines = tuple(lines)

    def as_dict(self) -> dict[str, object]:
        """The error as plain data, for `--json`."""
        data: dict[str, object] = {"error": self.what, "exit_code": self.exit_code}
        if self.where:
            data |= {
                "file": self.where.file,
                "line": self.where.line,
                "column": self.where.column,
                "field": self.where.field,
            }
        if self.help:
            data["help"] = self.help
        if self.lines:
            data["output"] = list(self.lines)
        return data


class DefinitionError(ImgbuildError):
    """A definition, site file or option is not valid. `others` are further problems of the same load."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: Location | None = None,
        help: str = "",
        lines: Sequence[str] = (),
        others: Sequence[DefinitionError] = (),
    ) -> None:
        super().__init__(what, where=where, help=help, lines=lines)
        self.others = tuple(others)

    def as_dict(self) -> dict[str, object]:
        data = super().as_dict()
        if self.others:
            data["others"] = [other.as_dict() for other in self.others]
        return data


class BlockedError(ImgbuildError):
    """Compat rules, and nothing else, stopped the work."""

    exit_code = 3


class UnavailableError(ImgbuildError):
    """A needed program, mirror or registry is missing or cannot be reached."""

    exit_code = 4
