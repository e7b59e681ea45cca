"""RPM packages and signed repositories, made by rpmbuild, rpmsign, createrepo_c and gpg."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .commands import run

RELEASE = "1.el10"
LICENSE = "see the Debian packages it is made of"


@dataclass(frozen=True)
class Rpm:
    """One package to be made; `tree` is moved into it and is gone afterwards (None: no files)."""

    repository: str
    name: str
    version: str
    release: str = RELEASE
    epoch: int = 0
    arch: str = "x86_64"
    tree: Path | None = None
    provides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    scriptlets: str = ""

    @property
    def evr(self) -> str:
        """Version as a dependency names it, with epoch and release."""
        return f"{f'{self.epoch}:' if self.epoch else ''}{self.version}-{self.release}"

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.version}-{self.release}.{self.arch}.rpm"


def build(rpm: Rpm, packages: Path, work: Path) -> Path:
    """Make the RPM in folder `packages`; `work` is a folder for the build's own files."""
    top = Path(tempfile.mkdtemp(prefix=f"{rpm.name}-", dir=work))
    spec = top / f"{rpm.name}.spec"
    spec.write_text(_spec(rpm))
    packages.mkdir(parents=True, exist_ok=True)
    run(
        [
            "rpmbuild",
            "-bb",
            "--quiet",
            f"--target={rpm.arch}",
            f"--define=_topdir {top}",
            f"--define=_rpmdir {top}",
            f"--define=_tmppath {top}",
            "--define=_rpmfilename %{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm",
            spec,
        ],
        env={"HOME": str(top)},  # macros of whoever runs this have no say
    )
    made = (top / rpm.file_name).replace(packages / rpm.file_name)
    shutil.rmtree(top)
    return made


def _spec(rpm: Rpm) -> str:
    lines = [
        "%define debug_package %{nil}",
        "%define __os_install_post %{nil}",
        "%define _build_id_links none",
        "%define _binary_payload w1T0.zstdio",
        # GSP firmware is an ELF file, and its package is noarch.
        "%define _binaries_in_noarch_packages_terminate_build 0",
        f"Name: {rpm.name}",
        f"Version: {rpm.version}",
        f"Release: {rpm.release}",
        *([f"Epoch: {rpm.epoch}"] if rpm.epoch else []),
        f"Summary: look-alike of the EL package {rpm.name}, for tests",
        f"License: {LICENSE}",
        # What Debian's files are linked to, no RPM provides.
        "AutoReqProv: no",
        *(["BuildArch: noarch"] if rpm.arch == "noarch" else []),
        *(f"Provides: {text}" for text in rpm.provides),
        *(f"Requires: {text}" for text in rpm.requires),
        "%description",
        f"Look-alike of {rpm.name}, made for tests.",
        "%install",
        'mkdir -p "%{buildroot}"',
    ]
    if rpm.tree is not None:
        lines.append(
            f"find '{rpm.tree}' -mindepth 1 -maxdepth 1 -exec mv --target-directory='%{{buildroot}}' {{}} +"
        )
    lines += [rpm.scriptlets.rstrip(), "%files", "%defattr(-,root,root)"]
    if rpm.tree is not None:
        lines += _files(rpm.tree)
    return "\n".join(lines) + "\n"


def _files(tree: Path) -> Iterator[str]:
    """The %files lines of a tree: every file, and folders that would be lost because they are empty."""
    for folder, folders, files in os.walk(tree):
        inside = Path(folder).relative_to(tree)
        place = "" if inside == Path() else f"/{inside}"
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            yield f'"{place}/{name}"'
        if not folders and not files:
            yield f'%dir "{place}"'


class Keys:
    """Throw-away signing keys in a GnuPG home of their own; `public(name)` is the armoured public half.

    GnuPG's sockets lie in a short folder, because their paths must not be long.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._home = Path(tempfile.mkdtemp(prefix="rehearsal-"))
        self._saved = folder / "gnupg"
        if self._saved.is_dir():
            shutil.copytree(self._saved, self._home, dirs_exist_ok=True)

    def __enter__(self) -> Keys:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the agent that serves the keys."""
        run(["gpgconf", "--homedir", self._home, "--kill", "all"])
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def env(self) -> dict[str, str]:
        return {"GNUPGHOME": str(self._home), "GPG_TTY": "none"}

    def public(self, name: str) -> Path:
        """The file of a public key."""
        return self.folder / f"{name}.asc"

    def make(self, names: Iterable[str]) -> None:
        """Make keys and keep them in the folder."""
        for name in names:
            generate = ["gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key"]
            run([*generate, _user(name), "rsa3072", "sign", "never"], env=self.env)
            self.public(name).write_text(run(["gpg", "--armor", "--export", _user(name)], env=self.env))
        run(["gpgconf", "--homedir", self._home, "--kill", "all"])
        shutil.copytree(self._home, self._saved, ignore=shutil.ignore_patterns("S.*", ".#*", "*.lock"))

    def sign_packages(self, name: str, files: Sequence[Path]) -> None:
        """Sign RPMs, instead of whatever signature they have."""
        if files:
            run(
                [
                    "rpmsign",
                    "--resign",
                    "--define=__gpg /usr/bin/gpg",
                    "--define=_gpg_digest_algo sha256",
                    f"--define=_gpg_name {_user(name)}",
                    *files,
                ],
                env=self.env,
            )

    def sign_metadata(self, name: str, repository: Path) -> None:
        """Sign a repository's repomd.xml beside it."""
        run(
            [
                "gpg",
                "--batch",
                "--quiet",
                "--yes",
                "--local-user",
                _user(name),
                "--armor",
                "--detach-sign",
                repository / "repodata/repomd.xml",
            ],
            env=self.env,
        )


def _user(name: str) -> str:
    return f"imgbuild rehearsal {name}"


def index(repository: Path) -> None:
    """Write a repository's metadata, unsigned; what is known of unchanged packages is kept."""
    repository.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (repository / "repodata/repomd.xml.asc").unlink()
    update = ["--update"] if (repository / "repodata/repomd.xml").exists() else []
    run(["createrepo_c", "--quiet", "--no-database", *update, repository])
