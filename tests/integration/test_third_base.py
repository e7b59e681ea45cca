"""A third distribution, told in YAML alone: Debian 12 with the toy driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from imagebuild import images

from .workshop import Site, toy_site

BASE = """\
summary: Debian 12, which nothing in Python knows
package_manager: apt
arch: amd64
bootc: false
module_compression: none
repositories:
  - name: debian
    label: Debian
    suites: [bookworm]
    components: [main]
    keyring: /usr/share/keyrings/debian-archive-keyring.gpg
tier1:
  bootstrap:
    suite: bookworm
    packages: [ca-certificates, dbus, iproute2, kmod, libpam-systemd, systemd, systemd-sysv, udev, zstd, less]
    exclude: [/usr/share/doc/*, /usr/share/man/*, /usr/share/locale/*]
kernel:
  range: ">=6.1, <6.2"
  packages: [linux-image-amd64, dracut]
  release_from: linux-image-{release}
  releases: '[0-9.]+-[0-9]+-amd64'
  headers: ["linux-headers-{release}"]
  image_package: linux-image-{release}
toolchain: [gcc, make, patch, xz-utils]
"""


def test_third_base_goes_the_whole_line(make_site: Callable[[str], Site]) -> None:
    site = make_site("third")
    toy_site(site.folder, site.env)
    site.write("base/third/base.yaml", BASE)
    shutil.copytree(site.folder / "base/debian/toy", site.folder / "base/third/toy")
    words = ("--base", "third", "--vendor", "toy")
    built = site.build(*words)
    assert built["nodes"][-1]["status"] == "built"
    labels = images.labels(built["image"])
    assert labels["io.imgbuild.base"] == "third"
    assert labels["io.imgbuild.kernel-release"].startswith("6.1.")
    report = site.run("check", "--json", built["image"]).json
    for name in ("one-kernel", "vermagic", "symbol-crcs", "modprobe-resolves", "modules-owned"):
        assert name in report["passed"], report["findings"]
    assert set(site.nodes(site.build(*words)).values()) == {"cached"}
