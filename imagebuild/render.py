"""Node → Containerfile text, build context and key. Pure, and the same to the byte for the same input.

A node's key is the SHA-256 over all that can change its bytes: the rendered Containerfile, every
context file, the locked hashes of its packages, and through the image names its parents' keys. The core
of a driver is made by a compiler, whatever that stands on: instead of its parent, the compiler's packages
count, so that a new kernel, or a new base image around it, leaves it alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from imagebuild.definitions import Units
from imagebuild.errors import DefinitionError, ImgbuildError
from imagebuild.load import Selection, shipped
from imagebuild.lock import LockedPackage, image_references
from imagebuild.plan import Node, Plan, fill_kmod
from imagebuild.sources import untagged

LAYER_TIME = 1_700_000_000
"""Seconds since the epoch that every file of every layer gets: one clamped time, so that the same
key gives the same digest. Not 0, which programs take for "no time"."""
REPOSITORY = "localhost/imgbuild"
LABEL_PREFIX = "io.imgbuild"
_INSTALLERS = Path(__file__).parent / "installers"


@dataclass(frozen=True)
class ContextFile:
    """One file of a build context: where it goes, and its bytes or where they lie."""

    path: str
    mode: int
    sha256: str
    data: bytes | None = None
    source: Path | None = None
    link: str | None = None


@dataclass(frozen=True)
class Rendered:
    """A node ready to build. `key` and `image` are None while the lock is missing.

    `inputs` names everything the key is made of, so that two builds can be compared by name.
    """

    node: Node
    containerfile: str
    files: tuple[ContextFile, ...]
    packages: tuple[LockedPackage, ...]
    key: str | None
    image: str | None
    inputs: Mapping[str, str] = field(default_factory=dict)
    tarball: tuple[str, str] | None = None
    """URL and SHA-256 of a source tarball."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Repository → SHA-256 of the key that its packages are verified with."""


def shell_quote(value: object) -> str:
    """One shell word that means exactly `value`, on one line: a RUN instruction ends with its line."""
    text = str(value)
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise DefinitionError(f"a control character cannot be in a command: {text!r}")
    return shlex.quote(text)


def label_quote(value: object) -> str:
    """A value for a LABEL instruction: quoted, with nothing a Containerfile parser would expand."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise DefinitionError(f"a control character cannot be in a label: {text!r}")
    return f'"{text}"'


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=False,
        autoescape=False,
    )
    environment.filters["sh"] = shell_quote
    environment.filters["label"] = label_quote
    return environment


def _template(name: str) -> str:
    return Path(name).read_text(encoding="utf-8")


def render(plan: Plan) -> tuple[Rendered, ...]:
    """Render every node of a plan, in the plan's order.

    Raises:
        DefinitionError: a template or file of a definition is not right.
    """
    done: dict[str, Rendered] = {}
    for node in plan.nodes:
        done[node.name] = _render_node(plan, node, done)
    return tuple(done.values())


def _render_node(plan: Plan, node: Node, done: Mapping[str, Rendered]) -> Rendered:
    selection = plan.selection
    files = {file.path: file for file in _context(plan, node)}
    images = {name: done[name].image or _unlocked_image(plan, name) for name in node.parents}
    packages = (*node.packages, node.source) if node.source else node.packages
    keys = _keys(plan, packages)
    if plan.selection.base.package_manager == "dnf" and node.kind in _SCRIPTS:
        files["keys/packages"] = _text("keys/packages", _signatures(plan, packages))
    values = {
        "node": node,
        "keyed": "keys/packages" in files,
        "origin": _origin(selection, node),
        "image": images,
        "upstream": _upstream(plan),
        "kernel_release": plan.kernel_release,
        "compression": selection.base.module_compression,
        "bootc": selection.base.bootc,
        "kmod": _kmod_values(plan, node),
        "kmod_images": [(name, images[name]) for name in node.parents[1:]],
        "units": _units(selection) if node.kind == "tier" else Units(),
        "labels": _labels(plan, files) if node.kind == "tier" else [],
    }
    text = _environment().get_template(str(shipped() / "Containerfile.tmpl")).render(values)
    tarball = _tarball(plan, node)
    if not plan.locked:
        return Rendered(node, text, tuple(files.values()), (), None, None, {}, tarball)
    counted, parents = packages, {name: done[name].key or "" for name in node.parents}
    if node.kind == "core":
        with_compiler = (*packages, *(p for name in parents for p in done[name].node.packages))
        counted = tuple(p for p in with_compiler if p.name not in selection.base.kernel.user_headers)
        parents = {}
    inputs = _inputs(text, files, images, counted, parents, tarball, keys)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return Rendered(
        node,
        text,
        tuple(files[path] for path in sorted(files)),
        packages,
        key,
        f"{REPOSITORY}/{selection.base_name}-{node.name}:{key}",
        inputs,
        tarball,
        keys,
    )


def _keys(plan: Plan, packages: Sequence[LockedPackage]) -> dict[str, str]:
    """SHA-256 of the keys that sign some of these packages, by repository."""
    if plan.section is None or plan.selection.base.package_manager != "dnf":
        return {}
    used = {package.repository for package in packages}
    unsigned = {r.name for r, _ in plan.selection.repositories if "packages" not in r.signed}
    return {name: key for name, key in sorted(plan.section.keys.items()) if name in used - unsigned}


def _signatures(plan: Plan, packages: Sequence[LockedPackage]) -> str:
    """Which key each package file has to be signed with, a line each: FILE KEY...

    KEY is a path inside the builder, or `metadata` where not the packages but the list of their SHA-256
    is signed, which was verified when they were locked.
    """
    if plan.section is None:
        return ""
    defined = {r.name: r for r, _ in plan.selection.repositories}
    lines = []
    for package in packages:
        repository = defined.get(package.repository)
        own = plan.section.repositories.get(package.repository)
        if package.repository in plan.section.keys:
            signed = repository is None or "packages" in repository.signed
            keys = [f"/run/imgbuild/keys/{package.repository}.asc"] if signed else ["metadata"]
        elif own is not None:
            keys = list(own.keys) or ["metadata"]
        else:
            raise DefinitionError(
                f"nothing vouches for package `{package.name}` of repository `{package.repository}`",
                help="give the repository a `key`",
            )
        lines.append(" ".join([Path(package.path).name, *keys]))
    return "\n".join(sorted(lines)) + "\n"


def _inputs(
    text: str,
    files: Mapping[str, ContextFile],
    images: Mapping[str, str],
    packages: Sequence[LockedPackage],
    parents: Mapping[str, str],
    tarball: tuple[str, str] | None,
    keys: Mapping[str, str],
) -> dict[str, str]:
    """Everything that can change the node's bytes, by a name a person understands."""
    for name, image in images.items():  # parents count by their own entries
        text = text.replace(image, name)
    found = {"Containerfile": hashlib.sha256(text.encode()).hexdigest(), "layer time": str(LAYER_TIME)}
    for path, file in files.items():
        found[f"file {path}"] = f"{file.mode:o} {file.link or file.sha256}"
    for package in packages:
        name, what = f"package {package.name}:{package.arch}", f"{package.version} {package.sha256}"
        found[name] = f"{found[name]}, {what}" if name in found else what
    for name, sha256 in keys.items():
        found[f"key of {name}"] = sha256
    for name, key in parents.items():
        found[f"parent {name}"] = key
    if tarball:
        found["tarball"] = tarball[1]
    return found


def _unlocked_image(plan: Plan, name: str) -> str:
    return f"{REPOSITORY}/{plan.selection.base_name}-{name}:<unlocked: key>"


def _origin(selection: Selection, node: Node) -> str:
    names = [f"base/{selection.base_name}"]
    if node.kind == "tier":
        names += [
            f"base/{selection.base_name}/{p.name}" if p.kind == "vendor" else f"layers/{p.name}"
            for p in selection.pieces
        ]
    elif node.kmod:
        piece = selection.kmods[node.kmod][1]
        names = [f"{'base/' + selection.base_name if piece.kind == 'vendor' else 'layers'}/{piece.name}"]
    return ", ".join(names)


def _upstream(plan: Plan) -> str:
    image = plan.selection.base.tier1.image
    if image is None:
        return ""
    digest = plan.section.base_digest if plan.section else "<unlocked: base_digest>"
    return f"{untagged(image)}@{digest}"


def _kmod_values(plan: Plan, node: Node) -> dict[str, Any]:
    if not node.kmod:
        return {}
    kmod = plan.selection.kmods[node.kmod][0]
    locked = plan.kmod(node.kmod)
    # A directory lies in the context as source/tree; people name paths as seen from the directory.
    within = "tree/" if kmod.source.directory else ""
    return {
        "name": node.kmod,
        "version": locked.version,
        "path": within + fill_kmod(kmod.source.path or ".", locked, plan.kernel_release),
        "modules": kmod.modules,
        "licences": [within + fill_kmod(path, locked, plan.kernel_release) for path in kmod.licences],
        "package": kmod.package.name,
        "sources": kmod.core.sources if kmod.core else (),
        "outputs": [path for pair in kmod.core.outputs.items() for path in pair] if kmod.core else [],
        "user_headers": plan.selection.base.kernel.user_headers,
    }


def _tarball(plan: Plan, node: Node) -> tuple[str, str] | None:
    if not node.kmod:
        return None
    kmod = plan.selection.kmods[node.kmod][0]
    if kmod.source.url is None or kmod.source.sha256 is None:
        return None
    locked = plan.kmod(node.kmod)
    return fill_kmod(kmod.source.url, locked, plan.kernel_release), kmod.source.sha256


def _units(selection: Selection) -> Units:
    every = [selection.base.units, *(piece.part.units for piece in selection.pieces)]
    masked = tuple(dict.fromkeys(unit for units in every for unit in units.mask))
    disabled = tuple(dict.fromkeys(unit for units in every for unit in units.disable))
    enabled = tuple(
        dict.fromkeys(u for units in every for u in units.enable if u not in masked and u not in disabled)
    )
    return Units(enable=enabled, disable=disabled, mask=masked)


def _labels(plan: Plan, files: Mapping[str, ContextFile]) -> list[tuple[str, str]]:
    """What an image says of itself; `check` holds it to that."""
    selection = plan.selection
    units = _units(selection)
    found = {
        "kernel-release": plan.kernel_release,
        "base": selection.base_name,
        "vendor": selection.vendor_name,
        "tier": str(selection.tier),
        "layers": " ".join(piece.name for piece in selection.pieces if piece.kind == "layer"),
        "kmods": " ".join(f"{name}={plan.kmod(name).version}" for name in selection.kmods),
        "units": json.dumps({"enable": list(units.enable), "mask": list(units.mask)}, sort_keys=True),
        "same-version": json.dumps(_same_version(plan), sort_keys=True),
        "rivals": " ".join(dict.fromkeys(name for p in selection.pieces for name in p.part.rivals)),
        "cdi-generator": " ".join(p.part.cdi_generator for p in selection.pieces if p.part.cdi_generator),
        # What of packages' files these replace is meant to be different.
        "files": json.dumps(sorted(f"/{path[6:]}" for path in files if path.startswith("files/usr/"))),
    }
    labels = [(f"{LABEL_PREFIX}.{key}", value) for key, value in sorted(found.items())]
    if selection.base.bootc:
        labels += [("containers.bootc", "1"), ("ostree.bootable", "1")]
    return labels


def _same_version(plan: Plan) -> dict[str, Any]:
    """Per driver: its version, its firmware folder, and the packages that must match it."""
    found: dict[str, Any] = {}
    installed = {p.name: p.version for p in plan.target.packages}
    for piece in plan.selection.pieces:
        for name in piece.part.kmods:
            locked = plan.kmod(name)
            entry: dict[str, Any] = {"version": locked.version}
            if piece.part.firmware:
                entry["firmware"] = fill_kmod(piece.part.firmware, locked, plan.kernel_release)
            packages = {p: installed[p] for p in piece.part.same_version if p in installed}
            if packages:
                entry["packages"] = packages
            if piece.part.libraries:
                entry["libraries"] = list(piece.part.libraries)
            found[name] = entry
    return found


# --- build contexts ---------------------------------------------------------------------------------


def _context(plan: Plan, node: Node) -> Iterator[ContextFile]:
    selection = plan.selection
    manager = selection.base.package_manager
    if node.kind == "bootstrap":
        yield _text("bootstrap.sh", _bootstrap_script(selection), 0o755)
        return
    if node.kind == "upstream":
        return
    for folder in ("common", manager):
        for path in sorted((_INSTALLERS / folder).glob("*.sh")):
            if path.name in _SCRIPTS[node.kind]:
                yield _file(f"scripts/{path.name}", path)
    if node.kmod:
        yield from _source_context(plan, node)
    if node.kind == "kmod":
        yield from _package_context(plan, node)
    if node.kind == "tier":
        yield from _tree_context(plan)


_SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "kernel": ("install.sh", "verify.sh", "kernel.sh", "clean.sh"),
    "builder": ("install.sh", "verify.sh"),
    "core": ("install.sh", "verify.sh", "remove.sh", "core.sh", "compile.sh", "unpack.sh"),
    "kmod": ("install.sh", "verify.sh", "kmod.sh", "compile.sh", "pack.sh", "unpack.sh"),
    "tier": ("install.sh", "verify.sh", "units.sh", "initramfs.sh", "clean.sh", "var.sh"),
}


def _bootstrap_script(selection: Selection) -> str:
    bootstrap = selection.base.tier1.bootstrap
    assert bootstrap is not None
    template = _INSTALLERS / selection.base.package_manager / "bootstrap.sh.j2"
    return str(
        _environment()
        .get_template(str(template))
        .render(
            bootstrap=bootstrap,
            arch=selection.base.arch,
        )
    )


def _source_context(plan: Plan, node: Node) -> Iterator[ContextFile]:
    """Build lines, patches, and a source that is a folder; for a core only what it is made of."""
    kmod, piece = plan.selection.kmods[node.kmod]
    core = kmod.core if node.kind == "core" else None
    build = core.build if core else kmod.build
    yield _text("kmod/build.sh", build if build.endswith("\n") else build + "\n")
    patched = {patch: _patched_files(piece.folder / patch) for patch in node.patches}
    if core and core.sources:
        patched = {
            patch: files
            for patch, files in patched.items()
            if not files or any(_lies_in(file, core.sources) for file in files)
        }
    for patch in patched:
        yield _file(f"kmod/patches/{Path(patch).name}", piece.folder / patch)
    if kmod.source.directory:
        root = Path(kmod.source.directory)
        if not root.is_dir():
            raise DefinitionError(f"the source of kmod `{node.kmod}` is not there: no folder {root}")
        wanted = (*core.sources, *(f for files in patched.values() for f in files)) if core else ()
        prefix = f"source/{_kmod_values(plan, node)['path'].removesuffix('/.')}/"
        places = [prefix + place for place in wanted] if core and core.sources else ["source"]
        yield from (f for f in _walk(root, "source/tree", keep_modes=True) if _lies_in(f.path, places))


def _patched_files(patch: Path) -> list[str]:
    """The files that a patch names, as `patch --strip=1` sees them; one too many does no harm."""
    text = patch.read_text(encoding="utf-8", errors="surrogateescape")
    named = re.findall(r"^(?:(?:---|\+\+\+) [^/\s]+/+|(?:rename|copy) (?:from|to) )(\S+)", text, re.M)
    return [str(PurePosixPath(name)) for name in named]


def _lies_in(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _package_context(plan: Plan, node: Node) -> Iterator[ContextFile]:
    """What describes the package of a driver's modules."""
    selection = plan.selection
    kmod = selection.kmods[node.kmod][0]
    locked = plan.kmod(node.kmod)
    release = plan.kernel_release
    values = {
        "name": node.kmod,
        "summary": kmod.summary,
        "package": kmod.package,
        "version": locked.version,
        "epoch": locked.epoch,
        "kernel_release": release,
        "arch": selection.base.arch,
        "kernel_package": fill_kmod(selection.base.kernel.image_package, locked, release),
        "provides": [fill_kmod(p, locked, release) for p in kmod.package.provides],
    }
    for template in sorted((_INSTALLERS / selection.base.package_manager / "package").glob("*.j2")):
        yield _text(
            f"kmod/package/{template.stem}", _environment().get_template(str(template)).render(values)
        )


def _tree_context(plan: Plan) -> Iterator[ContextFile]:
    """The files/ folders of base, vendor and layers, merged; a later one wins."""
    selection = plan.selection
    merged: dict[str, ContextFile] = {}
    folders = [selection.base_folder / "files", *(piece.folder / "files" for piece in selection.pieces)]
    for folder in folders:
        if folder.is_dir():
            for file in _walk(folder, "files"):
                if file.path.endswith(".j2") and file.link is None:
                    if file.path.endswith("/.j2"):
                        raise DefinitionError(f"`{file.source}` has no name without its suffix")
                    file = _rendered_file(plan, file)
                merged[file.path] = file
    for file in _kargs(selection):
        merged[file.path] = file
    for path, file in merged.items():
        for parent in list(PurePosixPath(path).parents)[:-1]:
            other = merged.get(str(parent))
            if other is not None:  # writing through a link would leave the context
                raise DefinitionError(
                    f"`{file.source or path}` lies below `{other.source or parent}`, which is no folder"
                )
    yield from merged.values()


@cache
def _sandbox() -> Any:
    """For templates in files/: without a way to other files of this machine, or into Python."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= {"sh": shell_quote, "label": label_quote}
    return sandbox


def _rendered_file(plan: Plan, file: ContextFile) -> ContextFile:
    assert file.source is not None
    try:
        text = (
            _sandbox()
            .from_string(file.source.read_text(encoding="utf-8"))
            .render(
                kernel_release=plan.kernel_release,
                base=plan.selection.base_name,
                vendor=plan.selection.vendor_name,
                vendors=plan.selection.vendors,
                site=plan.selection.site,
                images=_pinned_images(plan),
            )
        )
    except Exception as error:  # a template is a program: anything can go wrong in it
        raise DefinitionError(f"`{file.source}` cannot be rendered: {error}") from None
    return _text(file.path.removesuffix(".j2"), text, file.mode)


def _pinned_images(plan: Plan) -> dict[str, str]:
    """The container images of a plan: reference as written → NAME@DIGEST."""
    digests = plan.section.images if plan.section else {}
    return {
        name: f"{untagged(name)}@{digests.get(name, '<unlocked: digest>')}"
        for name in image_references(plan.selection)
    }


def _kargs(selection: Selection) -> Iterator[ContextFile]:
    pieces: list[tuple[str, Sequence[str]]] = [("00-imgbuild-base", selection.base.kargs)]
    for piece in selection.pieces:
        number = 10 if piece.kind == "vendor" else 20
        pieces.append((f"{number}-imgbuild-{piece.name}", piece.part.kargs))
    for name, kargs in pieces:
        if kargs:
            words = ", ".join(json.dumps(word) for word in kargs)
            yield _text(f"files/usr/lib/bootc/kargs.d/{name}.toml", f"kargs = [{words}]\n")


def _text(path: str, text: str, mode: int = 0o644) -> ContextFile:
    data = text.encode()
    return ContextFile(path, mode, hashlib.sha256(data).hexdigest(), data=data)


@cache
def _digest(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file(path: str, source: Path, mode: int | None = None) -> ContextFile:
    status = source.stat()
    if mode is None:
        # What git keeps of a mode; the rest is the umask of whoever cloned.
        mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
    return ContextFile(path, mode, _digest(source, status.st_size, status.st_mtime_ns), source=source)


def _walk(root: Path, prefix: str, *, keep_modes: bool = False) -> Iterator[ContextFile]:
    """Every file below a folder. Links stay links and are never followed; other kinds are refused."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        here = Path(folder)
        for name in sorted([*names, *(d for d in folders if (here / d).is_symlink())]):
            path = here / name
            within = str(path.relative_to(root))
            target = f"{prefix}/{within}"
            if keep_modes and path.relative_to(root).parts[0] == ".git":
                continue
            if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in within):
                raise DefinitionError(
                    f"a file name below `{root}` has a control character or is not UTF-8: {within!r}"
                )
            if not keep_modes and any(part.startswith(".wh.") for part in path.relative_to(root).parts):
                raise DefinitionError(f"`{path}`: in an image, `.wh.` in front of a name deletes that name")
            if path.is_symlink():
                link = str(path.readlink())
                yield ContextFile(target, 0o777, hashlib.sha256(link.encode()).hexdigest(), link=link)
            elif path.is_file():
                yield _file(target, path)
            else:
                raise DefinitionError(f"`{path}` is neither a file nor a link")


def write_context(rendered: Rendered, folder: Path, packages: Mapping[str, Path]) -> None:
    """Write a node's build context.

    Args:
        packages: path of each locked package's or key's file, by SHA-256; those not named are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Containerfile").write_text(rendered.containerfile, encoding="utf-8")
    for name in ("packages", "scripts", "source", "kmod", "files", "keys"):
        (folder / name).mkdir(exist_ok=True)
    for file in rendered.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.link is not None:
            target.symlink_to(file.link)
            continue
        target.write_bytes(file.data if file.data is not None else _bytes(file))
        target.chmod(file.mode)
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    source = rendered.node.source
    for package in rendered.packages:
        place = packages.get(package.sha256)
        if place is not None:
            within = "source" if source is not None and package == source else "packages"
            _place(place, folder / within / Path(package.path).name)
    for name, sha256 in rendered.keys.items():
        if sha256 in packages:
            _place(packages[sha256], folder / "keys" / f"{name}.asc")
    if rendered.tarball and rendered.tarball[1] in packages:
        name = rendered.tarball[0].rsplit("/", 1)[-1]
        _place(packages[rendered.tarball[1]], folder / "source" / name)
    # Newer buildah writes a digest of what a step mounts, times included, into the image's history.
    for path in folder.rglob("*"):
        with suppress(OSError):  # a stored file of another user, linked: `render --out` without root
            os.utime(path, (LAYER_TIME, LAYER_TIME), follow_symlinks=False)


def _bytes(file: ContextFile) -> bytes:
    assert file.source is not None
    return file.source.read_bytes()


def _place(source: Path, target: Path) -> None:
    """Link where it can be, copy where it cannot (another file system)."""
    import shutil

    if target.exists():  # it may be a link to another file of the store, which must not be written
        raise ImgbuildError(f"two files of one build context have the name `{target.name}`")
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
