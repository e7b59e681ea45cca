"""Kernel × driver rules: which pairs compile, which need a patch, which are blocked.

Versions compare by the distribution's own order (deb-version(7), rpm-version(7)). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from imagebuild.definitions import CompatRule
from imagebuild.errors import BlockedError, DefinitionError, Location

Order = Callable[[str, str], int]
"""Compares two versions: negative, zero or positive."""


def _deb_order(a: str, b: str) -> int:
    from univers.debian import compare_versions

    try:
        return int(compare_versions(a, b))  # type: ignore[no-untyped-call]
    except ValueError:
        raise DefinitionError(
            f"`{a}` and `{b}` cannot be compared",
            help="a version of this base starts with a digit, see deb-version(7)",
        ) from None


def _rpm_order(a: str, b: str) -> int:
    from univers.rpm import vercmp

    return int(vercmp(a, b))  # type: ignore[no-untyped-call]


ORDERS: Mapping[str, Order] = {"apt": _deb_order, "dnf": _rpm_order}
"""The version order of each package manager."""

_BOUND = re.compile(r"(<=|>=|!=|<|>|=) *([^ ,]+)")
_TOKEN = re.compile(r"[^.+~_-]+")


def bounds(text: str) -> list[tuple[str, str]]:
    """`>=6.12.97, <6.13` → [(">=", "6.12.97"), ("<", "6.13")]."""
    return [(op, version) for op, version in _BOUND.findall(text)]


def as_deep_as(version: str, bound: str) -> str:
    """The front of `version` with as many parts as `bound` has.

    `<=6.12.117` is meant to hold for `6.12.117+deb13-amd64`, which deb-version(7) ranks higher, while
    `<6.12.0-100` still tells EL builds apart.
    """
    depth = _depth(bound)
    matches = list(_TOKEN.finditer(version))
    return version if len(matches) <= depth else version[: matches[depth - 1].end()]


def _depth(version: str) -> int:
    return len(_TOKEN.findall(version))


def in_range(version: str, text: str, order: Order) -> bool:
    """Tell whether a version lies within all bounds, compared as deep as each bound goes.

    Raises:
        DefinitionError: the distribution cannot compare these versions.
    """
    for op, bound in bounds(text):
        sign = order(as_deep_as(version, bound), bound)
        holds = {
            "<": sign < 0,
            "<=": sign <= 0,
            ">": sign > 0,
            ">=": sign >= 0,
            "=": sign == 0,
            "!=": sign != 0,
        }[op]
        if not holds:
            return False
    return True


def covers(outer: str, inner: str, order: Order) -> bool:
    """Tell whether everything in the range `inner` surely lies in the range `outer`."""
    have = bounds(inner)
    return all(any(_implies(other, bound, order) for other in have) for bound in bounds(outer))


def _implies(known: tuple[str, str], wanted: tuple[str, str], order: Order) -> bool:
    """Tell whether a version that keeps one bound must keep another.

    Bounds of unlike depth compare as deep as the shallower one: `<=6.12` allows 6.12.117, so it does
    not imply `<6.12.97`, while `<6.13` implies `<6.13.5`.
    """
    known_op, known_version = known
    op, version = wanted
    sign = order(as_deep_as(known_version, version), as_deep_as(version, known_version))
    known_depth, depth = _depth(known_version), _depth(version)
    if op in (">", ">="):
        if known_op not in (">", ">=", "="):
            return False
        if depth < known_depth or (depth == known_depth and op == ">="):
            return sign > 0 or (sign == 0 and op == ">=")
        return sign > 0 or (sign == 0 and known_op == ">")
    if op in ("<", "<="):
        if known_op not in ("<", "<=", "="):
            return False
        if depth < known_depth or (depth == known_depth and op == "<="):
            return sign < 0 or (sign == 0 and op == "<=")
        return sign < 0 or (sign == 0 and known_op == "<")
    if op == "=":
        return known_op == "=" and sign == 0 and depth <= known_depth
    return known_op == "!=" and sign == 0 and depth >= known_depth


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one driver on one kernel. `unknown`: no rule covers the pair."""

    kmod: str
    kind: Literal["ok", "patch", "blocked", "unknown"]
    driver: str | None
    kernel: str
    rule: CompatRule | None = None
    where: Location | None = None

    @property
    def text(self) -> str:
        """The verdict in one line."""
        pair = f"{self.kmod} {self.driver or '(any version)'} on kernel {self.kernel}"
        if self.rule is None:
            return f"{pair}: no rule covers this pair; it is attempted"
        extra = f" with {self.rule.patch}" if self.rule.patch else ""
        return f"{pair}: {self.kind}{extra} ({self.rule.reason})"

    def as_dict(self) -> dict[str, object]:
        """The verdict as plain data."""
        return {
            "kmod": self.kmod,
            "verdict": self.kind,
            "driver": self.driver,
            "kernel": self.kernel,
            "reason": self.rule.reason if self.rule else None,
            "link": self.rule.link if self.rule else None,
            "patch": self.rule.patch if self.rule else None,
            "rule": str(self.where) if self.where else None,
        }


Rules = Iterable[tuple[CompatRule, Location]]


def judge(kmod: str, driver: str | None, kernel: str, rules: Rules, order: Order) -> Verdict:
    """The verdict of the first rule that covers this driver on this kernel release."""
    for rule, where in rules:
        if rule.kmod != kmod or (rule.kernel and not in_range(kernel, rule.kernel, order)):
            continue
        if rule.driver and (driver is None or not in_range(driver, rule.driver, order)):
            continue
        return Verdict(kmod, rule.verdict, driver, kernel, rule, where)
    return Verdict(kmod, "unknown", driver, kernel)


def judge_range(kmod: str, driver: str | None, kernels: str, rules: Rules, order: Order) -> Verdict:
    """What can be said before the kernel release is known: a block of the base's whole range.

    A rule that covers only part of the range decides nothing yet; after one that blocks that part, only
    a block of the whole does.
    """
    partly_blocked = False
    for rule, where in rules:
        if rule.kmod != kmod:
            continue
        if rule.driver and driver is not None and not in_range(driver, rule.driver, order):
            continue
        certain = rule.driver is None or driver is not None
        whole = certain and (rule.kernel is None or covers(rule.kernel, kernels, order))
        if whole and (rule.verdict == "blocked" or not partly_blocked):
            return Verdict(kmod, rule.verdict, driver, kernels, rule, where)
        if rule.verdict != "blocked":
            break
        partly_blocked = True
    return Verdict(kmod, "unknown", driver, kernels)


class BlockedPair(BlockedError):
    """A rule blocks a driver on a kernel; `verdict` says which."""

    def __init__(self, verdict: Verdict, what: str, *, where: Location | None, help: str) -> None:
        super().__init__(what, where=where, help=help)
        self.verdict = verdict


_OPPOSITE = {">=": "<", ">": "<=", "<": ">=", "<=": ">", "=": "!=", "!=": "="}


def pins(verdict: Verdict, rules: Rules, kernels: str, order: Order) -> tuple[str, ...]:
    """The nearest kernels and drivers that a rule which blocks does not cover: `kernel: <6.12.97`.

    What another rule blocks, and kernels outside `kernels`, the range a base can have, are left out.
    """
    blocking = verdict.rule
    assert blocking is not None
    own = [rule for rule, _ in rules if rule.kmod == verdict.kmod]
    found: dict[str, None] = {}
    for op, bound in bounds(blocking.kernel or ""):
        pin = f"{_OPPOSITE[op]}{bound}"
        after = judge_range(verdict.kmod, verdict.driver, f"{kernels}, {pin}", rules, order)
        if not covers(f"{op}{bound}", kernels, order) and after.kind != "blocked":
            found[f"kernel: {pin}"] = None
    # Rules above the one that blocks let drivers through; those below see what it leaves.
    above = own[: own.index(blocking)]
    drivers = [rule.driver for rule in above if rule.driver and rule.verdict != "blocked"]
    drivers += [f"{_OPPOSITE[op]}{bound}" for op, bound in bounds(blocking.driver or "")]
    for pin in drivers:
        first = next((rule for rule in own if _decides(rule, pin, verdict.kernel, order)), None)
        if first is None or first.verdict != "blocked":
            found[f"driver: {pin}"] = None
    return tuple(found)


def _decides(rule: CompatRule, drivers: str, kernel: str, order: Order) -> bool:
    """Tell whether a rule surely covers all these drivers on a kernel release, or on a range of them."""
    if rule.driver and not covers(rule.driver, drivers, order):
        return False
    if not rule.kernel:
        return True
    if bounds(kernel):
        return covers(rule.kernel, kernel, order)
    return in_range(kernel, rule.kernel, order)


def blocked_error(verdict: Verdict) -> BlockedPair:
    """The error for a blocked pair: why, what still works, and how to try anyway."""
    assert verdict.rule is not None
    rule = verdict.rule
    parts = [rule.reason + (f" ({rule.link})" if rule.link else "")]
    if rule.unblock:
        parts.append(f"what still works: {rule.unblock}")
    parts.append(
        "to try anyway: --allow-blocked, or `imgbuild compat --probe` to see whether the rule still holds"
    )
    return BlockedPair(
        verdict,
        f"{verdict.kmod} {verdict.driver or ''} is blocked on kernel {verdict.kernel}".replace("  ", " "),
        where=verdict.where,
        help="\n".join(parts),
    )
