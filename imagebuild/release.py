"""Selections → images: each goes its way alone, so that one which cannot be made keeps no other back.

Hosts and targets that come to the same image are made once. Nodes that images share are made once anyway:
they are named by their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal

from imagebuild import lock
from imagebuild.build import BuildResult, Options, build, default_name
from imagebuild.compat import ORDERS, BlockedPair, pins
from imagebuild.definitions import check_image_name
from imagebuild.errors import BlockedError, DefinitionError, ImgbuildError, Location
from imagebuild.gather import Offline
from imagebuild.load import Selection
from imagebuild.lock import Section
from imagebuild.plan import Plan, plan
from imagebuild.publish import PublishOptions, PublishResult, parse_destination, publish
from imagebuild.render import render
from imagebuild.report import Report, short
from imagebuild.state import State

PLACEHOLDER = "{target}"
"""What stands for the name of the target or host in the name of an image."""
Group = tuple[Selection, ...]
"""What comes to the same image: never empty."""
Status = Literal["built", "cached", "locked", "stopped", "failed"]


@dataclass(frozen=True)
class Request:
    """How to make images, and where they go; none of it changes what is in them."""

    options: Options
    push_to: tuple[str, ...] = ()
    publish: PublishOptions = field(default_factory=PublishOptions)
    allow_blocked: bool = False


@dataclass(frozen=True)
class Made:
    """One finished image, and where it was pushed."""

    plan: Plan
    result: BuildResult
    pushed: PublishResult | None = None

    @property
    def status(self) -> Status:
        """Tell whether there was anything to do."""
        return "built" if self.result.worked else "cached"

    def as_dict(self) -> dict[str, Any]:
        """The image as plain data."""
        return self.result.as_dict() | ({"pushed": self.pushed.as_dict()} if self.pushed else {})


@dataclass(frozen=True)
class Outcome:
    """What became of one image. `result` is what there is when it went well, `error` why it did not."""

    group: Group
    status: Status
    result: Mapping[str, Any]
    error: ImgbuildError | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every target and host that this image is for."""
        return tuple(selection.name for selection in self.group)

    @property
    def blocked(self) -> dict[str, Any]:
        """Which rule stopped it, and what would lift that; empty when none did."""
        if not isinstance(self.error, BlockedPair):
            return {}
        verdict, base = self.error.verdict, self.group[0].base
        assert verdict.rule is not None
        rules = self.group[0].kmods[verdict.kmod][1].rules
        return {
            "kmod": verdict.kmod,
            "driver": verdict.driver,
            "kernel": verdict.kernel,
            "rule": f"{verdict.where.file}:{verdict.where.line}" if verdict.where else None,
            "reason": verdict.rule.reason,
            "link": verdict.rule.link,
            "unblock": verdict.rule.unblock,
            "pins": list(pins(verdict, rules, base.kernel.range, ORDERS[base.package_manager])),
        }

    def as_dict(self) -> dict[str, Any]:
        """The outcome as plain data."""
        first = self.group[0]
        data = {
            "name": first.name,
            "targets": [selection.target for selection in self.group if selection.target],
            "hosts": [selection.host for selection in self.group if selection.host],
            "base": first.base_name,
            "vendors": list(first.vendors),
            "layers": list(first.layers),
            "status": self.status,
        }
        return data | (self.error.as_dict() if self.error else {}) | self.blocked | dict(self.result)


@dataclass(frozen=True)
class Release:
    """What became of every image, in the order in which they were asked for."""

    outcomes: tuple[Outcome, ...]

    @property
    def exit_code(self) -> int:
        """0: all went well; 3: compat rules alone stopped the others; else 1."""
        bad = {outcome.status for outcome in self.outcomes} & {"stopped", "failed"}
        if not bad:
            return 0
        return BlockedError.exit_code if bad == {"stopped"} else ImgbuildError.exit_code

    def as_dict(self) -> dict[str, Any]:
        """The outcomes as plain data."""
        return {"targets": [each.as_dict() for each in self.outcomes], "exit_code": self.exit_code}


def images_of(selections: Sequence[Selection]) -> tuple[Group, ...]:
    """Selections, those together that come to the same image."""
    found: dict[tuple[Any, ...], list[Selection]] = {}
    for each in selections:
        pieces = tuple((piece.kind, piece.name) for piece in each.pieces)
        found.setdefault((each.tier, each.base_name, each.kernel, pieces), []).append(each)
    return tuple(tuple(group) for group in found.values())


def each_image(
    selections: Sequence[Selection],
    report: Report,
    work: Callable[[Group], tuple[Status, Mapping[str, Any]]],
) -> Release:
    """Do `work` for every image; one that fails is noted and does not stop the others."""
    outcomes: list[Outcome] = []
    groups = images_of(selections)
    for number, group in enumerate(groups, 1):
        names = ", ".join(selection.name for selection in group)
        report.say(f"--- {names} ({number} of {len(groups)})")
        try:
            outcome = Outcome(group, *work(group))
        except BlockedError as error:
            outcome = Outcome(group, "stopped", {}, error)
        except ImgbuildError as error:
            outcome = Outcome(group, "failed", {}, error)
        if outcome.error:
            report.say(f"{names}: {outcome.status}: {outcome.error.what}")
        outcomes.append(outcome)
    return Release(tuple(outcomes))


def check_request(selections: Sequence[Selection], request: Request) -> None:
    """Refuse, before any work, names that no image can have or that two images would get.

    Raises:
        DefinitionError: such a name, or a cache that is no repository.
    """
    first = selections[0]
    cache = request.options.cache or first.site.cache
    if cache:
        check_image_name(cache)
        if ":" in cache.rsplit("/", 1)[-1]:
            raise DefinitionError(
                f"cache `{cache}` is no REGISTRY/REPOSITORY",
                help="it takes no tag: each kmod image has one of its own",
            )
    groups = images_of(selections)
    _check_names(request.push_to, groups, parse_destination)
    if request.options.tags:
        _check_names(request.options.tags, groups, check_image_name)
    else:
        file, tags = first.site_file, first.site.tags
        places = [file.locate(("tags", i)) for i in range(len(tags))] if file else []
        _check_names(tags, groups, check_image_name, places)


def _check_names(
    templates: Sequence[str],
    groups: Sequence[Group],
    check: Callable[[str], object],
    places: Sequence[Location | None] = (),
) -> None:
    taken: dict[str, Group] = {}
    for template, where in zip_longest(templates, places):
        for group in groups:
            for name in _filled([template], group):
                check(name)
                if taken.setdefault(name, group) is not group:
                    raise DefinitionError(
                        f"{len(groups)} images cannot all be called `{name}`",
                        where=where,
                        help=f"write `{PLACEHOLDER}` where the name of the target or host shall stand,"
                        f" as in `gpu:{PLACEHOLDER}`",
                    )


def _filled(templates: Sequence[str], group: Group) -> tuple[str, ...]:
    """Names for an image: each template with the name of every target and host it is for, once."""
    return tuple(
        dict.fromkeys(
            template.replace(PLACEHOLDER, selection.name) for template in templates for selection in group
        )
    )


def locked(selection: Selection, state: State, report: Report, *, allow_blocked: bool) -> Section:
    """The lock's section for a selection; written now when there is none or definitions changed."""
    lock.precheck(selection, allow_blocked=allow_blocked)
    path = lock.lock_path(selection)
    known = lock.read(path)
    section = lock.section_of(known, selection)
    if section is not None:
        return section
    stale = known.sections.get(selection.section)
    section = lock.resolve(selection, known, state, report, allow_blocked=allow_blocked)
    lock.update(path, selection.section, section, state)
    why = "definitions changed since it was locked" if stale else "not locked before"
    report.say(f"wrote {short(path)}: section {selection.section} ({why})")
    return section


def locked_offline(
    selection: Selection, state: State, report: Report, offline: Offline, *, allow_blocked: bool
) -> Section:
    """The section for a selection, from its own lock or from the one in the folder; never resolved."""
    lock.precheck(selection, allow_blocked=allow_blocked)
    path = lock.lock_path(selection)
    known = lock.read(path)
    section = lock.section_of(known, selection)
    if section is None and offline.folder is not None:
        brought = offline.folder.root / lock.LOCK_FILE
        section = lock.section_of(lock.read(brought), selection)
        if section is not None:
            lock.update(path, selection.section, section, state)
            report.say(f"wrote {short(path)}: section {selection.section} (from {brought})")
    if section is None:
        stale = selection.section in known.sections
        raise DefinitionError(
            f"section `{selection.section}` "
            + ("was locked for other definitions" if stale else "is not locked")
            + ", and an offline build asks nobody",
            help=f"where there is a network: {offline.command}\n"
            "it locks too, and puts a copy of imgbuild.lock into the folder",
        )
    return section


def say_plan(report: Report, made: Plan) -> None:
    """Tell what the rules say of the drivers, and what the person who plans this should know."""
    for verdict in made.verdicts:
        report.say(f"compat: {verdict.text}")
    for notice in made.notices:
        report.say(f"notice: {notice}")


def make(group: Group, state: State, report: Report, request: Request) -> Made:
    """Lock what is not locked, build, and push if that is asked for.

    Raises:
        ImgbuildError: of any kind, from the step that failed.
    """
    selection = group[0]
    offline = request.options.offline
    if offline is None:
        section = locked(selection, state, report, allow_blocked=request.allow_blocked)
    else:
        section = locked_offline(selection, state, report, offline, allow_blocked=request.allow_blocked)
    planned = plan(selection, section, allow_blocked=request.allow_blocked)
    say_plan(report, planned)
    tags = _filled(request.options.tags or selection.site.tags, group)
    options = replace(
        request.options,
        cache=request.options.cache or selection.site.cache,
        tags=tags or tuple(default_name(each) for each in group),
    )
    result = build(planned, render(planned), state, report, options)
    pushed = None
    if request.push_to:
        to = [parse_destination(name) for name in _filled(request.push_to, group)]
        pushed = publish(result.image, to, state, report, request.publish)
    return Made(planned, result, pushed)


def release(selections: Sequence[Selection], state: State, report: Report, request: Request) -> Release:
    """Make every image that can be made. Never raises for what is wrong with one of them."""

    def work(group: Group) -> tuple[Status, Mapping[str, Any]]:
        made = make(group, state, report, request)
        return made.status, {**made.as_dict(), "kernel_release": made.plan.kernel_release}

    return each_image(selections, report, work)
