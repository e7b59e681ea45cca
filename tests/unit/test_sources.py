"""Where repositories are found."""

from __future__ import annotations

from pathlib import Path

from imagebuild.definitions import MirrorMap, Repository
from imagebuild.sources import registry_reference, tool_location

TEMPLATE = """\
Suite: {series}
BaseURI: http://archive.example/os/
MatchURI: x

Suite: {series}-security
BaseURI: http://security.example/
"""


def test_tool_location_is_that_of_the_suite(tmp_path: Path) -> None:
    (tmp_path / "Os.info").write_text(TEMPLATE)
    main = Repository(name="os", label="Os", suites=("one", "one-updates"))
    security = Repository(name="os-security", label="Os-Security", suites=("one-security",))
    assert tool_location(main, tmp_path) == "http://archive.example/os"
    assert tool_location(security, tmp_path) == "http://security.example"
    assert tool_location(Repository(name="x", label="Other", suites=("one",)), tmp_path) is None
    assert tool_location(Repository(name="x"), tmp_path) is None


def test_registry_is_replaced_by_the_longest_prefix() -> None:
    mirrors = MirrorMap(
        registries={"quay.io": "registry.example/quay", "quay.io/centos-bootc": "127.0.0.1:5000/c"},
        insecure=("127.0.0.1:5000",),
    )
    assert registry_reference("quay.io/other/x:1", mirrors) == ("registry.example/quay/other/x:1", True)
    found = registry_reference("quay.io/centos-bootc/centos-bootc:stream10", mirrors)
    assert found == ("127.0.0.1:5000/c/centos-bootc:stream10", False)
    assert registry_reference("quay.io.evil.example/x", mirrors) == ("quay.io.evil.example/x", True)
