"""An image, read only: does it keep its promises? A table of small checks, each with a reason and a fix.

A check yields what is wrong. One that cannot run (a missing tool, a damaged file, a bug) becomes a
finding `could-not-run`, which counts as failed: silence always means that somebody looked.

The framework is in `table`; the checks are in `kernel`, `packages`, `driver`, `layers`, `filesystem` and
`system`.
"""

from __future__ import annotations

from collections.abc import Collection

from imagebuild import images
from imagebuild.check.table import (
    LABEL_KMODS,
    LABEL_RELEASE,
    LABEL_SAME_VERSION,
    LABEL_TIER,
    LABEL_UNITS,
    Check,
    CheckedImage,
    Finding,
    Problem,
    Report,
    check,
    list_checks,
    run_checks,
)
from imagebuild.state import State

# isort: off
# Importing a module puts its checks into the table: this is the order they run in.
from imagebuild.check import kernel as kernel
from imagebuild.check import packages as packages
from imagebuild.check import driver as driver
from imagebuild.check import layers as layers
from imagebuild.check import filesystem as filesystem
from imagebuild.check import system as system
# isort: on

__all__ = [
    "LABEL_KMODS",
    "LABEL_RELEASE",
    "LABEL_SAME_VERSION",
    "LABEL_TIER",
    "LABEL_UNITS",
    "Check",
    "CheckedImage",
    "Finding",
    "Problem",
    "Report",
    "check",
    "check_image",
    "list_checks",
    "run_checks",
]


def check_image(name: str, state: State, skip: Collection[str] = ()) -> Report:
    """Check an image of local storage: mounts it, unpacks its layers, and takes both away again.

    Raises:
        ImgbuildError: there is no such image.
        DefinitionError: `skip` names a check there is not.
    """
    labels = images.labels(name)
    with state.work("check") as folder, images.mounted(name) as root:
        layers = images.layer_files(name, folder / "layers")
        return run_checks(CheckedImage(root, labels, layers), skip)
