"""The rehearsal itself: registry, repositories and mirror map, and the ways in which they can go wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Literal

from ..integration.registries import ProcessRegistry, process_registry
from . import contents, image, rpms
from .commands import RehearsalError, link, run
from .contents import KERNELS, SIGNERS
from .making import Say, cache_folder, made
from .rpms import Keys, Rpm
from .server import RepositoryServer

Wrong = Literal["metadata", "metadata-missing", "package", "package-unsigned", "bytes"]

SMALL = {
    contents.BASE: "patch",
    contents.APP: "rpm-build",
    contents.CUDA: "nvidia-persistenced",
    contents.TOOLKIT: "nvidia-container-toolkit-base",
    contents.ZFS_REPO: "libuutil3",
    contents.EPEL: "epel-release",
}
"""A small package of each repository that the definitions need: the one faults hit by default."""


class Fault:
    """Something that was made wrong. Undone by `undo`, or at the end of a `with` block."""

    def __init__(self, *undo: Callable[[], object]) -> None:
        self._undo = list(undo)

    def undo(self) -> None:
        """Make it right again; a second time does nothing. Faults end in the reverse of their order."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Fault:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class Rehearsal:
    """A running look-alike of the world that base `centos` is built from.

    mirror_map  file for `imgbuild --mirror-map`; its text can also stand in a site file under `mirrors:`.
    registry    the registry that stands for quay.io.
    servers     the HTTP server of each repository, by repository id, with the requests it got.
    keys        the signing keys, see `key`.

    Methods that make something wrong return a Fault. `private` gives a copy to break without harm for others.
    """

    def __init__(self, folder: Path, stock: Path, registry: ProcessRegistry, keys: Keys, prefix: str) -> None:
        self.folder = folder
        self.registry = registry
        self.keys = keys
        self.image = f"{prefix}{image.REPOSITORY}"
        self._prefix = prefix
        self._stock = stock
        self._names = count()
        self._variant = image.Variant()
        self._faults: list[Fault] = []
        self._layers = image.from_json((stock / "layers.json").read_text())
        self._rpms = {
            file: Rpm(
                **{**fields, "provides": tuple(fields["provides"]), "requires": tuple(fields["requires"])}
            )
            for file, fields in json.loads((stock / "rpms.json").read_text()).items()
        }
        self.servers = {name: RepositoryServer(name, stock / "repositories" / name) for name in SIGNERS}
        self.mirror_map = folder / "rehearsal.yaml"
        self.mirror_map.write_text(self._mirrors())
        self._publish(self._variant)

    def url(self, repository: str) -> str:
        """Where a repository is."""
        return self.servers[repository].uri

    def key(self, repository: str) -> Path:
        """The public key of a repository."""
        return self.keys.public(SIGNERS[repository])

    def digest(self) -> str:
        """What the base image's tag points to now."""
        return self.registry.digest(self.image, image.TAG)

    @contextlib.contextmanager
    def private(self) -> Iterator[Rehearsal]:
        """A copy with a mirror map, servers and a base image of its own, for faults that nobody else sees.

        Takes some 0.1 s. Repositories start as they are made, without this one's faults.
        """
        folder = self.folder / f"private-{next(self._names)}"
        folder.mkdir()
        prefix = f"{self._prefix}{folder.name}/"
        found = Rehearsal(folder, self._stock, self.registry, self.keys, prefix)
        try:
            yield found
        finally:
            found.close()
            shutil.rmtree(folder)

    def restore(self) -> None:
        """Undo all faults, the last one first."""
        while self._faults:
            self._faults.pop().undo()

    def close(self) -> None:
        """End the servers. The registry and the keys are their owner's."""
        for server in self.servers.values():
            server.stop()

    # --- faults of the base image ---

    def base_kernel(
        self, kernel: str = "new", *, leaky_gpg: bool = False, unshare_plugin: bool = False
    ) -> Fault:
        """Move the base image's tag to one with another kernel: `old`, `new`, or `both` of them.

        Args:
            leaky_gpg: gpg-agents that dnf starts to check metadata live on.
            unshare_plugin: in a chroot each scriptlet fails, and dnf still exits with 0.
        """
        before = self._variant
        self._publish(image.Variant(kernel, leaky_gpg, unshare_plugin))
        return self._fault(lambda: self._publish(before))

    # --- faults of what repositories offer ---

    def kernel_devel(self, headers: str, kernels: str | None = None) -> Fault:
        """Offer headers of some kernels only: `old`, `new` or `both`; and kernels, by default the same."""
        return self._fault(
            self._without(contents.APP, _of_others(headers), ("kernel-devel", "kernel-devel-matched")),
            self._without(contents.BASE, _of_others(kernels or headers), contents.KERNEL_RPMS),
        )

    def vanish(self, package: str, *, replaced: bool = True) -> Fault:
        """Take a package from the mirror, file and metadata; a newer release takes its place, or nothing."""
        repository, _ = self._find(package)

        def edit(packages: Path) -> None:
            old = self._file(package, packages)
            if replaced:
                rpm = self._rpms[old.name]
                self._rebuild(old, replace(rpm, release=_bumped(rpm.release)))
            old.unlink()

        return self._fault(self._change(repository, edit))

    def broken_scriptlet(self, package: str) -> Fault:
        """Offer a newer release of a package, whose %post fails; dnf says so, and exits with 0."""
        repository, _ = self._find(package)

        def edit(packages: Path) -> None:
            old = self._file(package, packages)
            rpm = self._rpms[old.name]
            failing = "%post\necho 'this scriptlet fails' >&2\nexit 7\n"
            self._rebuild(old, replace(rpm, release=_bumped(rpm.release), scriptlets=failing))
            old.unlink()

        return self._fault(self._change(repository, edit))

    def split_driver(
        self, version: str = "550.163.02", *, keep: bool = False, required: bool = True
    ) -> Fault:
        """Offer NVIDIA's userland in another version than the modules' source.

        The userland packages fit together, and have no files.

        Args:
            keep: the userland of the source's version stays on offer too.
            required: nvidia-kmod-common requires modules of its version, as it does; else nothing but
                imgbuild itself can tell.
        """

        def edit(packages: Path) -> None:
            for file in sorted(packages.glob("*.rpm")):
                rpm = self._rpms[file.name]
                if rpm.name == "kmod-nvidia-open-dkms":
                    continue
                requires = [text.replace(contents.DRIVER, version) for text in rpm.requires]
                if not required:
                    requires = [text for text in requires if not text.startswith("nvidia-kmod ")]
                self._build(replace(rpm, version=version, requires=tuple(requires), scriptlets=""), packages)
                if not keep:
                    file.unlink()

        return self._fault(self._change(contents.CUDA, edit))

    # --- faults of signatures and servers ---

    def wrong_signature(self, repository: str, kind: Wrong, package: str | None = None) -> Fault:
        """Break what is signed.

        Args:
            kind: `metadata`: repomd.xml signed by a stranger; `metadata-missing`: not signed;
                `package`: a package signed by a stranger; `package-unsigned`: not signed;
                `bytes`: a package that is another than the metadata say, of the same length.
            package: the package to break; by default a small one that images need (SMALL).
        """
        name = package or SMALL[repository]
        if kind == "metadata":
            return self._fault(self._change(repository, signer=contents.STRANGER))
        if kind == "metadata-missing":
            return self._fault(self._change(repository, signer=None))

        def sign(packages: Path) -> None:
            file = self._own_copy(self._file(name, packages))
            if kind == "package":
                self.keys.sign_packages(contents.STRANGER, [file])
            else:
                run(["rpmsign", "--delsign", file])

        def spoil(place: Path) -> None:
            file = self._own_copy(self._file(name, place / "Packages"))
            with file.open("r+b") as opened:
                opened.seek(-20, 2)
                (byte,) = opened.read(1)
                opened.seek(-1, 1)
                opened.write(bytes([byte ^ 0xFF]))

        if kind == "bytes":
            return self._fault(self._change(repository, after=spoil))
        return self._fault(self._change(repository, sign))

    def flaky(self, repository: str, share: float = 0.5) -> Fault:
        """Answer a share of the requests with 503, evenly: one half is every second one, from the first."""
        seen = count(1)

        def answer(_: str) -> int | None:
            n = next(seen)
            return 503 if int((n - 1) * share + 0.999) < int(n * share + 0.999) else None

        return self._answer(repository, answer)

    def down(self, repository: str, *, refused: bool = False) -> Fault:
        """Answer every request with 503, or refuse connections."""
        if not refused:
            return self._answer(repository, lambda _: 503)
        server = self.servers[repository]
        server.stop()
        return self._fault(server.start)

    # --- how they are done ---

    def _fault(self, *undo: Callable[[], object]) -> Fault:
        fault = Fault(*undo)
        self._faults.append(fault)
        return fault

    def _answer(self, repository: str, answer: Callable[[str], int | None]) -> Fault:
        server = self.servers[repository]
        before = server.answer
        server.answer = answer

        def undo() -> None:
            server.answer = before

        return self._fault(undo)

    def _publish(self, variant: image.Variant) -> None:
        image.publish(self.registry.address, self.image, image.TAG, self._layers, variant)
        self._variant = variant

    def _change(
        self,
        repository: str,
        edit: Callable[[Path], object] = lambda _: None,
        *,
        signer: str | None = "",
        after: Callable[[Path], object] = lambda _: None,
    ) -> Callable[[], None]:
        """Serve an edited copy of a repository; returns what undoes it.

        Package files are shared with the original: replace them, never write into them.

        Args:
            edit: changes the copy's folder of packages, before the metadata are made.
            signer: the key that signs the metadata: by default the right one, with None nobody.
            after: changes the copy when it is finished.
        """
        server = self.servers[repository]
        before = server.folder
        place = self.folder / f"{repository}-{next(self._names)}"
        copy_repository(before, place)
        edit(place / "Packages")
        rpms.index(place)
        if signer is not None:
            self.keys.sign_metadata(signer or SIGNERS[repository], place)
        after(place)
        server.folder = place

        def undo() -> None:
            server.folder = before
            shutil.rmtree(place)

        return undo

    def _without(self, repository: str, versions: Iterable[str], names: Iterable[str]) -> Callable[[], None]:
        gone = {f"{name}-{version}-{contents.FLAVOUR}.x86_64.rpm" for name in names for version in versions}

        def edit(packages: Path) -> None:
            for file in gone:
                (packages / file).unlink(missing_ok=True)

        return self._change(repository, edit)

    def _find(self, package: str) -> tuple[str, Path]:
        """The repository that has a package, and its file."""
        for name, server in self.servers.items():
            with contextlib.suppress(RehearsalError):
                return name, self._file(package, server.folder / "Packages")
        raise RehearsalError(f"no repository has a package {package}")

    def _file(self, package: str, packages: Path) -> Path:
        """The file of a package, of the last one if there are several versions."""
        found = [file for file in sorted(packages.glob("*.rpm")) if self._rpms[file.name].name == package]
        if not found:
            raise RehearsalError(f"{packages} has no package {package}")
        return found[-1]

    @staticmethod
    def _own_copy(file: Path) -> Path:
        """Make a file that may be shared one's own."""
        copy = file.with_suffix(".copy")
        shutil.copyfile(file, copy)
        return copy.replace(file)

    def _build(self, rpm: Rpm, packages: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            file = rpms.build(rpm, packages, Path(work))
        self.keys.sign_packages(SIGNERS[rpm.repository], [file])
        self._rpms[file.name] = replace(rpm, tree=None)

    def _rebuild(self, old: Path, rpm: Rpm) -> None:
        """Make an RPM of another one's files."""
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            run(["sh", "-euc", 'rpm2archive -n - < "$1" | tar --extract --directory "$2"', "sh", old, work])
            filled = next(Path(work).iterdir(), None) is not None
            self._build(replace(rpm, tree=Path(work) if filled else None), old.parent)

    def _mirrors(self) -> str:
        lines = ["repositories:"]
        for name, server in self.servers.items():
            # The base image has the keys of its own repositories, as the real one does.
            own = SIGNERS[name] == "centos"
            lines.append(f"  {name}: {server.uri}" if own else f"  {name}:")
            lines += [] if own else [f"    uri: {server.uri}", f"    key: {self.key(name)}"]
        lines += ["registries:", f"  quay.io: {f'{self.registry.address}/{self._prefix}'.rstrip('/')}"]
        lines += [f'insecure: ["{self.registry.address}"]']
        return "\n".join(lines) + "\n"


def _of_others(kernel: str) -> list[str]:
    """Versions of the kernels that `old`, `new` or `both` does not mean."""
    if kernel not in (*KERNELS, "both"):
        raise RehearsalError(f"there is no kernel `{kernel}`, only: {', '.join(KERNELS)}, both")
    return [version for name, version in KERNELS.items() if kernel not in (name, "both")]


def _bumped(release: str) -> str:
    """The release after this one: `1.el10` → `2.el10`."""
    number, dot, rest = release.partition(".")
    return f"{int(number) + 1}{dot}{rest}"


@contextlib.contextmanager
def rehearsal(folder: Path, say: Say = lambda _: None, cache: Path | None = None) -> Iterator[Rehearsal]:
    """Make (or take from the cache) and start a rehearsal; `folder` is for its own files.

    Raises RehearsalError if it cannot be made here.
    """
    finished = made(cache or cache_folder(), say)
    folder.mkdir(parents=True, exist_ok=True)
    # Files of its own, so that nothing happens to it when the cache is tidied.
    stock = folder / "stock"
    shutil.rmtree(stock, ignore_errors=True)
    shutil.copytree(finished / "keys", stock / "keys")
    for name in ("layers.json", "rpms.json"):
        shutil.copyfile(finished / name, stock / name)
    for name in SIGNERS:
        copy_repository(finished / "repositories" / name, stock / "repositories" / name)
    copy_registry(finished / "registry", folder / "registry/data")
    with process_registry(folder / "registry") as registry, Keys(stock / "keys") as keys:
        found = Rehearsal(folder, stock, registry, keys, "")
        try:
            yield found
        finally:
            found.close()


def copy_repository(source: Path, target: Path) -> None:
    """Copy a repository; package files are shared."""
    _copy(source, target, lambda file: file.suffix == ".rpm")


def copy_registry(source: Path, target: Path) -> None:
    """Copy a registry's data; blobs, which never change, are shared."""
    shutil.rmtree(target, ignore_errors=True)
    _copy(source, target, lambda file: file.name == "data")


def _copy(source: Path, target: Path, shared: Callable[[Path], bool]) -> None:
    def copy(old: str, new: str) -> None:
        if shared(Path(old)):
            link(Path(old), Path(new))
        else:
            shutil.copyfile(old, new)

    shutil.copytree(source, target, copy_function=copy)
