"""Fixtures of the rehearsal, for any test that needs the world of base `centos`.

rehearsal          one for the session, unharmed: break it only in `with` blocks (see look_alike.Fault)
private_rehearsal  one's own, to be broken at will
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .look_alike import Rehearsal
from .look_alike import rehearsal as started


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """The look-alike of CentOS Stream and its repositories, running; made once, then kept in a cache."""
    with started(tmp_path_factory.mktemp("rehearsal")) as found:
        yield found


@pytest.fixture
def private_rehearsal(rehearsal: Rehearsal) -> Iterator[Rehearsal]:
    """A rehearsal for one test, with mirror map, servers and base image of its own."""
    with rehearsal.private() as found:
        yield found
