"""Progress for people and for machines. Steps report here and never print.

On a terminal every running step keeps one live line: name, time, last line of output. Elsewhere a
step prints when it starts and when it ends. With `--json` all of it goes to stderr.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def seconds(value: float) -> str:
    """A duration as people read it: `4.2 s`, `3m57s`."""
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value) // 60}m{int(value) % 60:02d}s"


def size(value: float) -> str:
    """A size in bytes as people read it: `75.3 MB` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of short texts, one below the other; plain text that stays readable in a log."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def short(path: Path) -> str:
    """A path as a person writes it: relative to the current folder where it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Text of others as a terminal may get it: control characters, line ends aside, become `?`."""
    return _CONTROL.sub("?", text)


class Step:
    """One running step; `line` takes its output."""

    def __init__(self, name: str, detail: str, verbose: TextIO | None) -> None:
        self.name = name
        self.detail = detail
        self.started = time.monotonic()
        self.last = ""
        self.outcome = ""
        self._verbose = verbose

    def line(self, text: str) -> None:
        """Take one line of output: the live display shows the last one, `-v` shows all."""
        # Without colours, and of a line that was written over (a progress bar) the last state.
        text = harmless(re.sub("\x1b\\[[0-9;]*[mK]", "", text).rstrip("\r").rsplit("\r", 1)[-1])
        self.last = text
        if self._verbose:
            print(f"  {self.name} | {text}", file=self._verbose, flush=True)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.started


class Report:
    """Where every step tells what it does."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, verbose: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.verbose = verbose
        self._lock = threading.Lock()
        self._steps: list[Step] = []
        self._live: Any = None
        self._fancy = not quiet and not verbose and self.stream.isatty()

    def say(self, text: str) -> None:
        """One line for the person who reads along."""
        if self.quiet:
            return
        text = harmless(text)
        with self._lock:
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, emoji=False)
            else:
                print(text, file=self.stream, flush=True)

    @contextmanager
    def step(self, name: str, detail: str = "") -> Iterator[Step]:
        """A step with a beginning and an end; set `outcome` on it for the closing line."""
        step = Step(name, detail, self.stream if self.verbose and not self.quiet else None)
        self._begin(step)
        try:
            yield step
        except BaseException:
            self._end(step, "failed")
            raise
        self._end(step, "done")

    def _begin(self, step: Step) -> None:
        if self._fancy:
            with self._lock:
                self._steps.append(step)
                if self._live is None:
                    from rich.console import Console
                    from rich.live import Live

                    self._live = Live(
                        get_renderable=self._table,
                        console=Console(file=self.stream),
                        refresh_per_second=4,
                        transient=True,
                    )
                    self._live.start()
        else:
            self.say(f"{step.name}: {step.detail or 'started'}")

    def _end(self, step: Step, how: str) -> None:
        if self._fancy:
            with self._lock:
                self._steps.remove(step)
                live = self._live
                if not self._steps:
                    self._live = None
            if not self._steps:
                live.stop()
        outcome = f", {step.outcome}" if step.outcome else ""
        self.say(f"{step.name}: {how} in {seconds(step.elapsed_s)}{outcome}")

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        width = max((len(step.name) for step in list(self._steps)), default=1)
        table.add_column(no_wrap=True, min_width=width)
        table.add_column(no_wrap=True, min_width=7, justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis")
        for step in list(self._steps):
            # As text: what a compiler writes in brackets is no markup.
            table.add_row(step.name, seconds(step.elapsed_s), Text(step.last or step.detail))
        return table
