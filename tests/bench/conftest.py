"""Benchmarks print one table at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
_rows: list[tuple[str, str, str, str, str]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is slow and rare."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.full)


def record(name: str, ours: float, other: float, goal: str, unit: str = "s") -> None:
    """Add a row to the closing table: two measurements of one run, and their ratio."""
    _rows.append((name, f"{ours:.3f} {unit}", f"{other:.3f} {unit}", f"{ours / other:.2f}", goal))


def note(name: str, value: str, goal: str = "") -> None:
    """Add a row with one figure."""
    _rows.append((name, value, "", "", goal))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    if not _rows:
        return
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(f"{'what':<58} {'ours':>12} {'other':>12} {'ratio':>7}  goal")
    for name, ours, other, ratio, goal in _rows:
        terminalreporter.write_line(f"{name:<58} {ours:>12} {other:>12} {ratio:>7}  {goal}")
