"""Kernel × driver rules: versions compare as deep as the bound goes, the first rule decides."""

from __future__ import annotations

import pytest
from conftest import Site
from hypothesis import assume, example, given
from hypothesis import strategies as st

from imagebuild.compat import ORDERS, as_deep_as, blocked_error, covers, in_range, judge, judge_range, pins
from imagebuild.definitions import CompatRule
from imagebuild.errors import BlockedError, DefinitionError, Location
from imagebuild.lock import precheck
from imagebuild.plan import plan

APT, DNF = ORDERS["apt"], ORDERS["dnf"]
BLOCKED = {"verdict": "blocked", "reason": "it does not compile"}


def rules(*each: dict[str, str]) -> list[tuple[CompatRule, Location]]:
    return [
        (CompatRule(**{"kmod": "toy", "verdict": "ok", "reason": "so", **rule}), Location("c.yaml", i + 1))
        for i, rule in enumerate(each)
    ]


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("6.12.117+deb13-amd64", "<=6.12.117", True),
        ("6.12.117+deb13-amd64", "=6.12.117", True),
        ("6.12.117+deb13-amd64", ">6.12.117", False),
        ("6.12.117+deb13-amd64", ">=6.12.118", False),
        ("6.12.117+deb13-amd64", ">=6.12.97, <6.13", True),
        ("6.12.96+deb13-amd64", ">=6.12.97, <6.13", False),
        ("6.12.117+deb13-amd64", "<6.12.117+deb14", True),
        ("6.12.117+deb13-amd64", "=6.12", True),
        ("6.12.117+deb13-amd64", ">6.12", False),
        ("6.12.9+deb13-amd64", "<6.12.10", True),
        ("6.12~rc7-amd64", "<6.12.0", True),
        ("550.163.01", "=550.163.01", True),
        ("550.163.01", "=550.163.1", True),
        ("580.126.09", "<580.126.09", False),
        ("550.163.01", "!=550", False),
        ("550.163.01", "!=551", True),
    ],
)
def test_debian_version_is_in_range_as_deep_as_the_bound_goes(
    version: str, bounds: str, inside: bool
) -> None:
    assert in_range(version, bounds, APT) is inside


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("6.12.0-150.el10.x86_64", "<6.12.0-100", False),
        ("6.12.0-55.el10.x86_64", "<6.12.0-100", True),
        ("6.12.0-150.el10.x86_64", ">=6.12.0, <6.13", True),
        ("6.12.0-150.el10.x86_64", "=6.12.0-150", True),
        ("6.12.0-150.2.el10.x86_64", "<=6.12.0-150", True),
        ("6.12.0-150.2.el10.x86_64", "<6.12.0-150.3", True),
        ("580.126.09", ">=580.126.9", True),
    ],
)
def test_el_version_is_in_range_as_deep_as_the_bound_goes(version: str, bounds: str, inside: bool) -> None:
    assert in_range(version, bounds, DNF) is inside


@pytest.mark.parametrize(
    ("outer", "inner", "covered"),
    [
        (">=6.12", ">=6.12, <6.13", True),
        (">=6.12", ">=6.12.0, <6.13", True),
        (">=6.12.0, <6.13", ">=6.12.0, <6.13", True),
        (">=6.12.97, <6.13", ">=6.12, <6.13", False),
        (">=6.12, <6.12.50", ">=6.12, <=6.12", False),
        ("<6.12.50", "=6.12", False),
        (">6.12", ">=6.12.5", False),
        (">=6.12.97", ">6.12", True),
        ("<6.13.5", "<6.13", True),
        ("!=6.12.5", "!=6.12", True),
        ("!=6.12", "!=6.12.5", False),
        (">=6.12", "<6.13", False),
        ("=6.12", "=6.12.5", True),
        ("=6.12.5", "=6.12", False),
    ],
)
def test_range_covers_another_only_if_nothing_of_it_lies_outside(
    outer: str, inner: str, covered: bool
) -> None:
    assert covers(outer, inner, APT) is covered
    assert covers(outer, inner, DNF) is covered


_NUMBER = st.integers(0, 3)
_BARE = st.lists(_NUMBER, min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
_FULL = st.builds(
    lambda bare, tail: bare + tail, _BARE, st.sampled_from(["", "+deb13-amd64", "-1.el10", "-2"])
)
_RANGE = st.lists(
    st.tuples(st.sampled_from(["<", "<=", ">", ">=", "=", "!="]), _BARE).map("".join), min_size=1, max_size=3
).map(", ".join)
_ORDER = st.sampled_from([APT, DNF])


@given(_FULL, _ORDER)
def test_version_is_in_the_range_of_itself_and_of_its_front(version: str, order: object) -> None:
    for bound in (version, as_deep_as(version, "1.1"), as_deep_as(version, "1")):
        assert in_range(version, f"={bound}", order)  # type: ignore[arg-type]
        assert in_range(version, f">={bound}, <={bound}", order)  # type: ignore[arg-type]
        assert not in_range(version, f"!={bound}", order)  # type: ignore[arg-type]
        assert not in_range(version, f"<{bound}", order)  # type: ignore[arg-type]


@given(_FULL, _BARE, _ORDER)
def test_version_is_below_at_or_above_a_bound(version: str, bound: str, order: object) -> None:
    held = [op for op in "<=>" if in_range(version, op + bound, order)]  # type: ignore[arg-type]
    assert len(held) == 1


@given(_RANGE, _RANGE, st.lists(_FULL, min_size=10, max_size=30), _ORDER)
@example("<6.12.50", "<=6.12", ["6.12.117"], APT)
@example(">6.12", ">=6.12.5", ["6.12.7"], APT)
def test_what_is_in_a_covered_range_is_in_the_covering_one(
    outer: str, inner: str, versions: list[str], order: object
) -> None:
    assume(covers(outer, inner, order))  # type: ignore[arg-type]
    for version in versions:
        if in_range(version, inner, order):  # type: ignore[arg-type]
            assert in_range(version, outer, order), version  # type: ignore[arg-type]


@given(_RANGE, _ORDER)
def test_range_covers_itself(text: str, order: object) -> None:
    assert covers(text, text, order)  # type: ignore[arg-type]


def test_version_the_distribution_cannot_compare_is_a_definition_error() -> None:
    with pytest.raises(DefinitionError, match="`main` and `1` cannot be compared"):
        in_range("main", "<1", APT)
    assert in_range("main", "<1", DNF), "rpm compares anything"


# --- verdicts ---------------------------------------------------------------------------------------


def test_first_rule_that_covers_the_pair_decides() -> None:
    found = rules(
        {"driver": "=1.5", "verdict": "patch", "patch": "x.patch"},
        {"driver": "<2", **BLOCKED},
        {"reason": "new enough"},
    )
    assert judge("toy", "1.5", "6.12", found, APT).kind == "patch"
    assert judge("toy", "1.4", "6.12", found, APT).kind == "blocked"
    verdict = judge("toy", "2.1", "6.12", found, APT)
    assert (verdict.kind, str(verdict.where)) == ("ok", "c.yaml:3:1")


def test_pair_no_rule_covers_is_attempted_and_says_so() -> None:
    found = rules({"kernel": "<6.0", **BLOCKED}, {"kmod": "other", **BLOCKED})
    verdict = judge("toy", "1.5", "6.12.1", found, APT)
    assert verdict.kind == "unknown"
    assert verdict.text == "toy 1.5 on kernel 6.12.1: no rule covers this pair; it is attempted"


def test_rule_about_drivers_says_nothing_of_an_unknown_driver() -> None:
    assert judge("toy", None, "6.12.1", rules({"driver": "<2", **BLOCKED}), APT).kind == "unknown"


@pytest.mark.parametrize(
    ("each", "driver", "kind"),
    [
        ([{"kernel": ">=6.12", **BLOCKED}], "1.5", "blocked"),
        ([{"kernel": ">=6.12.97", **BLOCKED}], "1.5", "unknown"),
        ([{"kernel": ">=6.12", "driver": "<2", **BLOCKED}], "1.5", "blocked"),
        ([{"kernel": ">=6.12", "driver": "<2", **BLOCKED}], "2.5", "unknown"),
        ([{"kernel": ">=6.12", "driver": "<2", **BLOCKED}], None, "unknown"),
        ([BLOCKED], None, "blocked"),
        ([{"kernel": ">=6.12.97"}, BLOCKED], "1.5", "unknown"),
        ([{"kernel": ">=6.12.97", **BLOCKED}, BLOCKED], "1.5", "blocked"),
        ([{"kernel": ">=6.12.97", **BLOCKED}, {"reason": "fine"}], "1.5", "unknown"),
        ([{"reason": "fine"}, BLOCKED], "1.5", "ok"),
    ],
)
def test_verdict_before_the_kernel_is_known_only_if_a_rule_covers_all_kernels(
    each: list[dict[str, str]], driver: str | None, kind: str
) -> None:
    assert judge_range("toy", driver, ">=6.12, <6.13", rules(*each), APT).kind == kind


@given(
    st.lists(
        st.fixed_dictionaries(
            {"verdict": st.sampled_from(["ok", "blocked"])},
            optional={"kernel": _RANGE, "driver": _RANGE},
        ),
        max_size=4,
    ),
    _BARE,
    _RANGE,
    st.lists(_FULL, min_size=5, max_size=15),
)
def test_early_verdict_is_the_one_every_kernel_gets(
    each: list[dict[str, str]], driver: str, kernels: str, releases: list[str]
) -> None:
    found = rules(*each)
    early = judge_range("toy", driver, kernels, found, APT).kind
    for release in releases:
        if early == "blocked" and in_range(release, kernels, APT):
            assert judge("toy", driver, release, found, APT).kind == "blocked"


def test_blocked_error_says_why_what_works_and_how_to_try() -> None:
    (rule, where), = rules({"link": "https://x.example/5111", "unblock": "driver 2", **BLOCKED})  # fmt: skip
    error = blocked_error(judge("toy", "1.5", "6.12.1", [(rule, where)], APT))
    assert (error.exit_code, error.what) == (3, "toy 1.5 is blocked on kernel 6.12.1")
    first, second, third = error.help.split("\n")
    assert first == "it does not compile (https://x.example/5111)"
    assert second == "what still works: driver 2"
    assert "--allow-blocked" in third


# --- pins ---


@pytest.mark.parametrize(
    ("each", "found"),
    [
        ([{"kernel": ">=6.12.97, <6.13", **BLOCKED}], ["kernel: <6.12.97"]),
        ([{"kernel": ">=6.12.97, <6.12.200", **BLOCKED}], ["kernel: <6.12.97", "kernel: >=6.12.200"]),
        ([{"kernel": "=6.12.117", **BLOCKED}], ["kernel: !=6.12.117"]),
        ([{"kernel": ">=6.12", "driver": "<2", **BLOCKED}], ["driver: >=2"]),
        ([{"driver": ">=1.2, <=1.7", **BLOCKED}], ["driver: <1.2", "driver: >1.7"]),
        ([BLOCKED], []),
        # A rule above lets a driver through, another below takes what this one leaves.
        ([{"driver": "=1.4", "verdict": "patch", "patch": "p"}, {"driver": "<2", **BLOCKED}],
         ["driver: =1.4", "driver: >=2"]),
        ([{"driver": "=1.4", "kernel": "<6.12.50"}, {"driver": "<2", **BLOCKED}], ["driver: >=2"]),
        ([{"driver": "<2", **BLOCKED}, {"driver": "<3", **BLOCKED}, {"driver": ">=2", **BLOCKED}], []),
        ([{"kernel": ">=6.12.97", **BLOCKED}, {"kernel": "<6.12.97", **BLOCKED}], []),
    ],
)  # fmt: skip
def test_pins_are_the_nearest_pairs_the_rule_does_not_cover(
    each: list[dict[str, str]], found: list[str]
) -> None:
    all_rules = rules(*each)
    verdict = judge("toy", "1.5", "6.12.117+deb13-amd64", all_rules, APT)
    assert verdict.kind == "blocked"
    assert list(pins(verdict, all_rules, ">=6.12, <6.13", APT)) == found


def test_pins_of_a_base_whose_kernels_are_all_blocked_name_drivers_alone() -> None:
    all_rules = rules({"kernel": ">=6.12", "driver": "<6.18", **BLOCKED})
    verdict = judge_range("toy", "6.16.13", ">=6.12, <6.13", all_rules, APT)
    assert pins(verdict, all_rules, ">=6.12, <6.13", APT) == ("driver: >=6.18",)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"verdict": st.sampled_from(["ok", "blocked"])}, optional={"kernel": _RANGE, "driver": _RANGE}
        ),
        min_size=1,
        max_size=4,
    ),
    _BARE,
    _FULL,
    st.lists(_FULL, min_size=5, max_size=15),
)
def test_pinned_kernel_or_driver_is_not_stopped_by_the_same_rule(
    each: list[dict[str, str]], driver: str, kernel: str, others: list[str]
) -> None:
    all_rules = rules(*each)
    verdict = judge("toy", driver, kernel, all_rules, APT)
    assume(verdict.kind == "blocked")
    for pin in pins(verdict, all_rules, ">=0", APT):
        kind, bound = pin.split(": ")
        for other in others:
            if in_range(other, bound, APT):
                pair = (driver, other) if kind == "kernel" else (other, kernel)
                after = judge("toy", *pair, all_rules, APT)
                assert after.kind != "blocked" or after.where != verdict.where


# --- the shipped rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["debian", "centos"])
def test_amd_is_blocked_before_any_network(site: Site, base: str) -> None:
    with pytest.raises(BlockedError, match=r"amdgpu 6\.16\.13 is blocked"):
        precheck(site.load(base, "amd"))
    precheck(site.load(base, "amd"), allow_blocked=True)


@pytest.mark.parametrize("base", ["debian", "centos"])
def test_amd_returns_as_data_with_a_newer_driver(site: Site, base: str) -> None:
    site.write("imgbuild.yaml", "kmods: {amdgpu: {version: 6.18.1}}\n")
    precheck(site.load(base, "amd"))


@pytest.mark.parametrize(
    ("driver", "release", "kind"),
    [
        ("550.163.01", "6.12.117+deb13-amd64", "patch"),
        ("550.163.01", "6.12.96+deb13-amd64", "unknown"),
        ("550.163.02", "6.12.117+deb13-amd64", "blocked"),
        ("580.95.05", "6.12.97+deb13-amd64", "blocked"),
        ("580.126.09", "6.12.117+deb13-amd64", "unknown"),
    ],
)
def test_nvidia_on_debian_is_judged_by_driver_and_kernel(
    site: Site, driver: str, release: str, kind: str
) -> None:
    piece = site.load("debian", "nvidia").pieces[0]
    assert judge("nvidia", driver, release, piece.rules, APT).kind == kind


def test_unlocked_plan_of_a_driver_blocked_on_some_kernels_goes_on(site: Site) -> None:
    made = plan(site.load("debian", "nvidia"), None)
    assert [verdict.kind for verdict in made.verdicts] == ["unknown"]
