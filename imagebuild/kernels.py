"""Which kernel an image gets: that of its base where modules can be compiled for it, else the nearest.

Pure: releases in, a choice and its reason out. Releases compare by the distribution's own order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cmp_to_key

from imagebuild.compat import Order, in_range
from imagebuild.errors import ImgbuildError


@dataclass(frozen=True)
class Choice:
    """A kernel release, why it is that one, and whether it takes the place of the stock kernel."""

    release: str
    reason: str
    replaced: bool = False


def is_package(wanted: str | None) -> bool:
    """Tell whether a site's `kernel` names a package, and not a version or range."""
    return wanted is not None and wanted[:1].isalpha()


def as_range(wanted: str) -> str:
    """A site's `kernel` as a range: a bare version means exactly that one."""
    return ", ".join(
        part if part[0] in "<>=!" else f"={part}" for part in (p.strip() for p in wanted.split(","))
    )


def allowed_range(base_range: str, wanted: str | None) -> str:
    """The kernels a base can have, narrowed to what a site asks for."""
    if wanted is None or is_package(wanted):
        return base_range
    return f"{base_range}, {as_range(wanted)}"


def choose(
    stock: Iterable[str],
    *,
    installable: Iterable[str],
    with_headers: Iterable[str] | None,
    allowed: str,
    flavour: str,
    order: Order,
    asked: str | None = None,
    keep: str = "",
) -> Choice:
    """Choose the kernel release.

    Args:
        stock: releases that come without asking: in the base image, or from the stock packages.
        installable: releases that the repositories can install in their place.
        with_headers: releases that modules can be compiled for; None if nothing is compiled.
        allowed: range of releases that may be taken.
        flavour: regular expression for whole releases of the stock flavour.
        asked: what the site says of it, if it does.
        keep: a release to stay with, if it still can be had.

    Raises:
        ImgbuildError: no release is left; the error says what there is.
    """

    def shown(releases: Iterable[str]) -> str:
        found = rank(r for r in releases if re.fullmatch(flavour, r))
        return (", ".join(found[:12]) + (" ..." if len(found) > 12 else "")) or "none"

    def rank(releases: Iterable[str]) -> list[str]:
        return sorted(set(releases), key=cmp_to_key(order), reverse=True)

    def fits(release: str) -> bool:
        return in_range(release, allowed, order) and (with_headers is None or release in buildable)

    buildable = set(with_headers or ())
    own = rank(stock)
    others = [r for r in rank(installable) if re.fullmatch(flavour, r) and r not in own]
    usable_own = [release for release in own if fits(release)]
    usable = [release for release in others if fits(release)]
    if usable_own:
        release = usable_own[0]
        if len(own) == 1:
            return Choice(release, f"kernel {release} is the stock kernel")
        gone = ", ".join(r for r in own if r != release)
        why = "newest" if release == own[0] else f"newest that headers are offered for and {allowed} allows"
        return Choice(release, f"the base image has {len(own)} kernels: {release} stays ({why}), {gone} goes")
    if not usable:
        raise ImgbuildError(
            "no kernel is left that an image could have",
            lines=[
                f"stock kernel: {', '.join(own) or 'none'}",
                f"offered: {shown(installable)}",
                *([f"with headers: {shown(buildable)}"] if with_headers is not None else []),
                f"allowed: {allowed}",
            ],
            help="`kernel:` in the site file may allow another; a mirror that is behind catches up by itself",
        )
    release = keep if keep in usable else usable[0]
    if asked is not None:
        return Choice(release, f"kernel {release}, because the site asks for {asked}", True)
    newest = own[0] if own else "none"
    direction = "down" if own and order(release, newest) < 0 else "up"
    return Choice(
        release,
        f"the stock kernel {newest} has no headers in the repositories: moved {direction} to {release}, "
        "the newest that has",
        True,
    )
