"""Checks of the kernel and its modules: there is one, it boots, and it takes every module it is given."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from imagebuild.check.table import LABEL_RELEASE, Problem, Subject, check, some
from imagebuild.errors import ImgbuildError
from imagebuild.kernel_modules import (
    MODULES,
    Disagreement,
    Module,
    UnreadableError,
    disagreement,
    module_files,
    module_name,
)
from imagebuild.run import run


@check(
    "one-kernel",
    severity="fatal",
    reason="the boot loader takes one kernel, and every module is compiled for exactly that one",
    fix="remove the other kernel's packages in the layer that brought them, and build again",
)
def _one_kernel(subject: Subject) -> Iterator[Problem | str]:
    kernels = subject.kernels
    expected = subject.labels.get(LABEL_RELEASE)
    if len(kernels) > 1:
        yield f"{len(kernels)} kernels: {some(kernels)}"
    if not kernels and subject.tier > 1:
        yield Problem(f"no kernel: /{MODULES}/*/vmlinuz", fix="build on a tier that has a kernel")
    if len(kernels) == 1 and expected and kernels[0] != expected:
        yield f"the kernel is {kernels[0]}, the label {LABEL_RELEASE} says {expected}"
    modules = subject.path(MODULES)
    for folder in sorted(modules.iterdir()) if modules.is_dir() else []:
        has_modules = folder.is_dir() and bool(module_files(folder))
        if folder.name in kernels and not has_modules:
            yield f"kernel {folder.name} has no modules"
        if folder.name not in kernels and has_modules:
            yield f"modules of {folder.name}, which is not the kernel of this image"


@check(
    "initramfs",
    severity="fatal",
    reason="bootc installs /usr/lib/modules/RELEASE/initramfs.img; its own lint does not look for it",
    fix="run dracut for this kernel when the image is built",
)
def _initramfs(subject: Subject) -> Iterator[Problem | str]:
    if subject.tier < 2 or subject.release is None:
        return
    path = MODULES / subject.release / "initramfs.img"
    found = subject.path(path)
    if not found.is_file():
        yield f"/{path} is missing"
    elif found.stat().st_size == 0:
        yield f"/{path} is empty"


@check(
    "vermagic",
    severity="fatal",
    reason="the kernel refuses a module whose version magic differs from its own",
    fix="compile the modules against the headers of exactly this kernel",
)
def _vermagic(subject: Subject) -> Iterator[Problem | str]:
    tree = subject.tree
    for path, reason in tree.broken:
        yield f"{path} cannot be read: {reason}"
    own = Counter(module.vermagic for module in tree.modules if not module.out_of_tree)
    wrong: dict[str, list[PurePosixPath]] = {}
    for module in tree.modules:
        words = module.vermagic.split()
        right = bool(words) and words[0] == subject.release
        if right and module.out_of_tree and own:
            right = module.vermagic == own.most_common(1)[0][0]
        if not right:
            wrong.setdefault(module.vermagic, []).append(module.path)
    expected = own.most_common(1)[0][0] if own else subject.release
    for vermagic, paths in sorted(wrong.items()):
        yield f"vermagic is `{vermagic}`, the kernel's is `{expected}`: {some(paths)}"
    if tree.out_of_tree and not own:
        raise ImgbuildError("the kernel has no module of its own to compare with")


@check(
    "symbol-crcs",
    severity="fatal",
    reason="a module that was compiled against another interface is refused at load, or worse, is not",
    fix="compile the modules against the headers and Module.symvers of exactly this kernel",
)
def _symbol_crcs(subject: Subject) -> Iterator[Problem | str]:
    modules = subject.tree.out_of_tree
    if not modules:
        return
    available: dict[str, int | None] = dict(subject.exports)
    by_name = {module.name: module for module in subject.tree.modules if not module.out_of_tree}
    for module in modules:
        available |= subject.symbols(module).exports
    providers = set()
    for module in modules:
        needs = subject.symbols(module)
        for symbol in (needs.undefined | needs.weak | needs.versions.keys()) - available.keys():
            provider = subject.depmod.symbols.get(symbol)
            if provider in by_name:
                providers.add(provider)
    for name in sorted(providers):
        available = dict(subject.symbols(by_name[name]).exports) | available
    for module in modules:
        needs = subject.symbols(module)
        yield from _disagreements(module, bool(needs.versions), disagreement(needs, available))


def _disagreements(module: Module, has_versions: bool, found: Disagreement) -> Iterator[Problem | str]:
    if found.unknown:
        yield f"{module.path} needs symbols that nobody exports: {some(found.unknown)}"
    if found.mismatched:
        yield f"{module.path} was compiled against other versions of: {some(found.mismatched)}"
    if found.unversioned:
        # The kernel refuses a module without any versions, and lets single ones go unchecked.
        yield Problem(
            f"{module.path} has no version for: {some(found.unversioned)}",
            "warning" if has_versions else "fatal",
        )


@check(
    "depmod-current",
    severity="fatal",
    reason="modprobe and udev know only modules, dependencies and aliases that depmod has seen",
    fix="run `depmod -a RELEASE` as the last step that touches modules",
)
def _depmod_current(subject: Subject) -> Iterator[Problem | str]:
    if subject.release is None:
        return
    try:
        depmod = subject.depmod
    except UnreadableError as error:
        yield f"/{MODULES}/{subject.release}: {error.what}"
        return
    files = module_files(subject.tree.folder)
    listed = depmod.dependencies.keys()
    gone = listed - set(files)
    if gone:
        yield f"modules.dep lists files that are not there: {some(sorted(gone))}"
    # Of two modules with one name depmod lists the one that wins (updates/ before kernel/).
    names = {module_name(path) for path in listed}
    unlisted = [path for path in files if path not in listed and module_name(path) not in names]
    if unlisted:
        yield f"modules.dep does not list: {some(unlisted)}"
    for name in depmod.stale:
        yield f"{name} differs from the text file beside it"
    for module in subject.tree.out_of_tree:
        if module.path not in listed:
            continue
        have = {module_name(path) for path in depmod.dependencies[module.path]}
        wanted = {name.replace("-", "_") for name in module.first("depends").split(",") if name}
        if wanted - have:
            yield f"modules.dep lacks what {module.path} depends on: {some(sorted(wanted - have))}"
        missing = set(module.info.get("alias", ())) - depmod.aliases.get(module.name, frozenset())
        if missing:
            yield f"modules.alias lacks aliases of {module.path}: {some(sorted(missing))}"


@contextmanager
def _modprobe_config(subject: Subject) -> Iterator[Path]:
    """The image's modprobe.d as one folder. modprobe's `-d` moves the modules, not the configuration,
    and absolute links (Debian's alternatives) would lead into this machine's /etc.
    """
    with tempfile.TemporaryDirectory(prefix="imgbuild-check-") as name:
        folder = Path(name)
        for file, found in subject.config("modprobe.d").items():
            (folder / file).write_bytes(found.read_bytes())
        yield folder


@check(
    "modprobe-resolves",
    severity="fatal",
    reason="a module that modprobe does not find, or diverts, is not there when the unit wants it",
    fix="mend /usr/lib/modprobe.d or /etc/modprobe.d, or the modules that are missing",
)
def _modprobe_resolves(subject: Subject) -> Iterator[Problem | str]:
    modules = subject.tree.out_of_tree
    if not modules or subject.release is None:
        return
    known = {module.name for module in subject.tree.modules}
    with _modprobe_config(subject) as config:
        base: list[str | Path] = ["modprobe", "-C", config, "-S", subject.release, "-d", subject.root]
        installs = {}
        for line in run([*base, "--showconfig"]).stdout.splitlines():
            words = line.split(maxsplit=2)
            if words[:1] == ["install"] and len(words) == 3:
                installs[words[1].replace("-", "_")] = words[2]
        for module in modules:
            result = run([*base, "--dry-run", "--show-depends", module.name], check=False)
            if result.returncode != 0:
                yield f"modprobe {module.name}: {some(result.tail) or 'fails'}"
                continue
            inserted = [
                PurePosixPath(line.split()[1]).name
                for line in result.stdout.splitlines()
                if line.startswith("insmod ")
            ]
            if module.path.name not in inserted:
                yield f"modprobe {module.name} loads {some(inserted) or 'nothing'}, not {module.path.name}"
            # --show-depends ignores `install`, so it is judged here.
            command = installs.get(module.name)
            if command is not None:
                loaded = _modprobed(command)
                missing = [name for name in loaded if name not in known]
                if not loaded:
                    yield f"modprobe.d replaces the loading of {module.name} by `{command}`"
                elif missing:
                    yield f"modprobe.d diverts {module.name} to {some(missing)}, which does not exist"


def _modprobed(command: str) -> list[str]:
    """The module names that an `install` line of modprobe.d passes to modprobe."""
    names = []
    for part in re.split(r"[;&|]+", command):
        words = part.split()
        if words and PurePosixPath(words[0]).name == "modprobe":
            plain = [word for word in words[1:] if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", word)]
            names += [word.replace("-", "_") for word in plain[:1]]  # options of the module follow
    return names


@check(
    "unsigned-modules",
    severity="warning",
    reason="with Secure Boot the kernel locks itself down and refuses unsigned modules",
    fix="give a signing key to the build and enrol its certificate, or leave Secure Boot off",
)
def _unsigned_modules(subject: Subject) -> Iterator[Problem | str]:
    unsigned = [module.path.name for module in subject.tree.out_of_tree if not module.signed]
    if unsigned:
        yield f"not signed: {some(unsigned)}"
