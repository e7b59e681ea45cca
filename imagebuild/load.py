"""Names and options → `Selection`: everything the later steps need, as plain data.

Reads files, touches no network and runs no program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import msgspec

from imagebuild.definitions import (
    Base,
    Compat,
    CompatRule,
    Kmod,
    KmodOverride,
    Layer,
    MirrorMap,
    Notice,
    Part,
    Repository,
    Site,
    Strict,
    Units,
    Vendor,
    describe_pattern,
)
from imagebuild.documents import nearest, parse, raise_all, read_yaml
from imagebuild.errors import DefinitionError, Location

T = TypeVar("T", bound=Strict)
DEFAULT_BASE = "debian"
SITE_FILE = "imgbuild.yaml"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def shipped() -> Path:
    """The folder that holds the shipped `base/`, `layers/` and `Containerfile.tmpl`."""
    inside = Path(__file__).parent / "_shipped"
    return inside if inside.is_dir() else Path(__file__).parent.parent


@dataclass(frozen=True)
class Catalogue:
    """Where definitions are looked up: a user's own folders first, then the shipped ones."""

    roots: tuple[Path, ...]

    @classmethod
    def of(cls, site_folder: Path) -> Catalogue:
        """The catalogue of a site: its own `base/` and `layers/`, then the shipped ones."""
        own, ours = site_folder.resolve(), shipped().resolve()
        return cls((own, ours) if own != ours else (ours,))

    def folder(self, *parts: str) -> Path | None:
        """The folder of the definition file `parts`, such as ("layers", "zfs", "layer.yaml"), or None."""
        if not all(_NAME.fullmatch(part) for part in parts):
            return None
        for root in self.roots:
            path = root.joinpath(*parts)
            if path.is_file():
                return path.parent
        return None

    def _names(self, marker: str, *parts: str) -> list[str]:
        found = {
            path.parent.name
            for root in self.roots
            if root.joinpath(*parts).is_dir()
            for path in root.joinpath(*parts).glob(f"*/{marker}")
            if _NAME.fullmatch(path.parent.name)
        }
        return sorted(found)

    def bases(self) -> list[str]:
        """Names of all bases."""
        return self._names("base.yaml", "base")

    def vendors(self, base: str) -> list[str]:
        """Names of all vendors of a base."""
        return self._names("vendor.yaml", "base", base)

    def layers(self) -> list[str]:
        """Names of all layers."""
        return self._names("layer.yaml", "layers")

    def shown(self, path: Path) -> str:
        """A path as a person knows it: relative to its root, or to the current folder."""
        for root in (Path.cwd(), *self.roots):
            try:
                return str(path.relative_to(root))
            except ValueError:
                continue
        return str(path)

    def read(self, path: Path, model: type[T]) -> T:
        """Load one definition file."""
        return parse(read_yaml(path, self.shown(path)), model, describe_pattern)


@dataclass(frozen=True)
class Piece:
    """One thing stacked on the base: the vendor, or a layer, with what it needs on this base."""

    kind: Literal["vendor", "layer"]
    name: str
    summary: str
    tier: int
    folder: Path
    part: Part
    rules: tuple[tuple[CompatRule, Location], ...] = ()
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What one image is made of: the value that `lock`, `plan` and `render` work on."""

    tier: int
    base_name: str
    base_reason: str
    base: Base
    base_folder: Path
    vendor_name: str
    pieces: tuple[Piece, ...]
    site: Site
    site_folder: Path
    mirrors: MirrorMap
    mirrors_folder: Path
    kernel: str | None = None
    """Another kernel than the stock one, as `definitions.KernelChoice`."""
    left_out: tuple[str, ...] = ()
    """Layers that were asked for but belong to a higher tier."""

    @property
    def section(self) -> str:
        """Key of this selection in the lockfile: base × vendor × layer set."""
        if self.tier == 1:
            return self.base_name
        layers = [p.name for p in self.pieces if p.kind == "layer"]
        return "/".join([self.base_name, self.vendor_name, "+".join(sorted(layers)) or "-"])

    @property
    def kmods(self) -> dict[str, tuple[Kmod, Piece]]:
        """Every driver to compile, by name."""
        return {name: (kmod, piece) for piece in self.pieces for name, kmod in piece.part.kmods.items()}

    @property
    def repositories(self) -> tuple[tuple[Repository, Path], ...]:
        """Every repository with its definition's folder, the base's first; raises DefinitionError."""
        found = [(repository, self.base_folder) for repository in self.base.repositories]
        for piece in self.pieces:
            found += [(repository, piece.folder) for repository in piece.part.repositories]
        by_name: dict[str, tuple[Repository, Path]] = {}
        for repository, folder in found:
            known = by_name.setdefault(repository.name, (repository, folder))
            if known[0] != repository:
                raise DefinitionError(
                    f"two definitions of repository `{repository.name}` differ",
                    help=f"they are in {known[1]} and {folder}; give one of them another name",
                )
        return tuple(by_name.values())

    @property
    def notices(self) -> list[str]:
        """What the person who plans this image should know."""
        provided = {capability for piece in self.pieces for capability in piece.part.provides}
        said = [n.text for p in self.pieces for n in p.notices if n.unless not in provided]
        return said + [f"layer {name} belongs to a higher tier: not in this image" for name in self.left_out]


def _advice(name: str, known: Iterable[str]) -> str:
    """What to do about a name nobody has; a folder may be there that is passed over for its name."""
    form = "" if _NAME.fullmatch(name) else "a name has lower-case letters, digits and . _ -, at most 64\n"
    return form + nearest(name, known)


def load_base(catalogue: Catalogue, name: str) -> tuple[Base, Path]:
    """Load a base by name. Raises DefinitionError for an unknown one."""
    folder = catalogue.folder("base", name, "base.yaml")
    if folder is None:
        raise DefinitionError(f"unknown base `{name}`", help=_advice(name, catalogue.bases()))
    return catalogue.read(folder / "base.yaml", Base), folder


def load_rules(catalogue: Catalogue, folder: Path) -> tuple[tuple[CompatRule, Location], ...]:
    """The compat rules of a vendor or layer folder, each with its place; patches must exist."""
    path = folder / "compat.yaml"
    if not path.is_file():
        return ()
    document = read_yaml(path, catalogue.shown(path))
    compat = parse(document, Compat, describe_pattern)
    problems = []
    for i, rule in enumerate(compat.rules):
        if rule.patch and not (folder / rule.patch).is_file():
            problems.append(
                DefinitionError(
                    f"there is no patch file `{rule.patch}`", where=document.locate(("rules", i, "patch"))
                )
            )
    raise_all(problems)
    return tuple((rule, document.locate(("rules", i))) for i, rule in enumerate(compat.rules))


def load_vendor(catalogue: Catalogue, base: str, name: str) -> tuple[Vendor, Path]:
    """Load a vendor of a base. Raises DefinitionError for an unknown one."""
    folder = catalogue.folder("base", base, name, "vendor.yaml")
    if folder is None:
        raise DefinitionError(
            f"unknown vendor `{name}` for base `{base}`", help=_advice(name, catalogue.vendors(base))
        )
    return catalogue.read(folder / "vendor.yaml", Vendor), folder


def load_layer(catalogue: Catalogue, name: str) -> tuple[Layer, Path]:
    """Load a layer by name. Raises DefinitionError for an unknown one."""
    folder = catalogue.folder("layers", name, "layer.yaml")
    if folder is None:
        raise DefinitionError(f"unknown layer `{name}`", help=_advice(name, catalogue.layers()))
    path = folder / "layer.yaml"
    document = read_yaml(path, catalogue.shown(path))
    layer = parse(document, Layer, describe_pattern)
    known = [*get_args(get_type_hints(Base)["package_manager"]), *catalogue.bases()]
    raise_all(
        [
            DefinitionError(
                f"there is neither a base nor a package manager `{key}`",
                where=document.locate(("for", key), key=True),
                help=nearest(key, known),
            )
            for key in layer.for_
            if key not in known
        ]
    )
    return layer, folder


def _merge(layer: Layer, base_name: str, base: Base) -> Part:
    """A layer's common part and what it adds for this base or its package manager."""
    fields: dict[str, Any] = {name: getattr(layer, name) for name in Part.__struct_fields__}
    for key in (base.package_manager, base_name):
        extra = layer.for_.get(key)
        if extra is None:
            continue
        for name in Part.__struct_fields__:
            value = getattr(extra, name)
            if isinstance(value, tuple):
                fields[name] = (*fields[name], *value)
            elif isinstance(value, dict):
                fields[name] = {**fields[name], **value}
            elif isinstance(value, Units):
                old = fields[name]
                fields[name] = Units(
                    enable=(*old.enable, *value.enable),
                    disable=(*old.disable, *value.disable),
                    mask=(*old.mask, *value.mask),
                )
            elif value is not None:
                fields[name] = value
    return Part(**fields)


def _ordered(wanted: Mapping[str, Layer]) -> Iterator[str]:
    """Layer names so that each comes after what it requires. Raises on a cycle."""
    done: list[str] = []

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in chain:
            circle = " -> ".join([*chain[chain.index(name) :], name])
            raise DefinitionError(f"layers require each other in a circle: {circle}")
        for needed in wanted[name].requires:
            visit(needed, (*chain, name))
        done.append(name)

    for name in wanted:
        visit(name, ())
    return iter(done)


def _select_layers(
    catalogue: Catalogue, base_name: str, names: Iterable[str], without: Iterable[str]
) -> dict[str, tuple[Layer, Path]]:
    left_out = set(without)
    chosen: dict[str, tuple[Layer, Path]] = {}
    queue = [(name, "") for name in names if name not in left_out]
    while queue:
        name, because = queue.pop(0)
        if name in chosen:
            continue
        if name in left_out:
            raise DefinitionError(
                f"layer `{because}` requires layer `{name}`, which is left out",
                help=f"leave out `{because}` too, or keep `{name}`",
            )
        layer, folder = load_layer(catalogue, name)
        if layer.bases and base_name not in layer.bases:
            raise DefinitionError(
                f"layer `{name}` is not for base `{base_name}`", help=f"it is for: {', '.join(layer.bases)}"
            )
        chosen[name] = (layer, folder)
        for needed in layer.requires:
            if catalogue.folder("layers", needed, "layer.yaml") is None:
                raise DefinitionError(
                    f"layer `{name}` requires layer `{needed}`, which does not exist",
                    help=nearest(needed, catalogue.layers()),
                )
            queue.append((needed, name))
    for name, (layer, _) in chosen.items():
        for other in layer.conflicts:
            if other in chosen:
                raise DefinitionError(
                    f"layers `{name}` and `{other}` cannot be in one image", help=f"use --without {other}"
                )
    order = _ordered({name: layer for name, (layer, _) in chosen.items()})
    return {name: chosen[name] for name in order}


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # Python before 3.13 has the second for links that go in circles
        raise DefinitionError(f"`{path}` is a link that leads back to itself") from None


def _override(kmod: Kmod, change: KmodOverride | None, site_folder: Path) -> Kmod:
    if change is None:
        return kmod
    source = change.source or kmod.source
    if change.source and change.source.directory:
        place = _resolved(site_folder / change.source.directory)
        source = msgspec.structs.replace(change.source, directory=str(place))
    fresh = change.source is not None
    build_packages = kmod.build_packages if change.build_packages is None else change.build_packages
    return msgspec.structs.replace(
        kmod,
        version=change.version or (None if fresh else kmod.version),
        source=source,
        build=change.build or kmod.build,
        core=change.core or (None if fresh else kmod.core),
        build_packages=build_packages,
        licences=change.licences if change.licences is not None else () if fresh else kmod.licences,
    )


def load_site(path: Path | None, folder: Path) -> tuple[Site, Path]:
    """Load the site file: the one named, else `imgbuild.yaml` in `folder`, else an empty one."""
    if path is None:
        path = folder / SITE_FILE
        if not path.is_file():
            return Site(), folder
    shown = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    document = read_yaml(path, shown)
    return parse(document, Site, describe_pattern), path.resolve().parent


def load(
    *,
    tier: int,
    base: str | None = None,
    vendor: str | None = None,
    with_layers: Sequence[str] = (),
    without_layers: Sequence[str] = (),
    site_file: Path | None = None,
    mirror_map: Path | None = None,
    folder: Path | None = None,
) -> Selection:
    """Load everything that one image is made of.

    Args:
        tier: 1, 2 or 3.
        base, vendor: names; else the site file's, else `debian` and `none`.
        with_layers, without_layers: added to the site file's own lists.
        site_file: else `imgbuild.yaml` in `folder`, if there.
        mirror_map: replaces the site file's mirrors.
        folder: where the site's own `base/` and `layers/` lie (default: the site file's folder).

    Raises:
        DefinitionError: anything that is not valid, with all problems of the file at once.
    """
    site, site_folder = load_site(site_file, folder or Path.cwd())
    catalogue = Catalogue.of(site_folder)
    if base is not None:  # the empty text of a variable that nobody set is no base, not the default
        reason = "--base"
    elif site.base:
        base, reason = site.base, "site file"
    else:
        base, reason = DEFAULT_BASE, "default; no --base, no site file names one"
    found_base, base_folder = load_base(catalogue, base)
    vendor = vendor if vendor is not None else site.vendor or "none"
    found_vendor, vendor_folder = load_vendor(catalogue, base, vendor)
    pieces: list[Piece] = []
    left_out: list[str] = []
    if tier >= 2:
        unknown = [n for n in (*site.without, *without_layers) if n not in catalogue.layers()]
        if unknown:
            raise DefinitionError(
                f"unknown layer `{unknown[0]}`", help=nearest(unknown[0], catalogue.layers())
            )
        chosen = _select_layers(
            catalogue,
            base,
            dict.fromkeys([*found_vendor.layers, *site.with_, *with_layers]),
            [n for n in (*site.without, *without_layers) if n not in with_layers],
        )
        part = Part(**{name: getattr(found_vendor, name) for name in Part.__struct_fields__})
        if site.packages is not None:
            part = msgspec.structs.replace(part, packages=site.packages)
        pieces.append(
            Piece(
                "vendor",
                vendor,
                found_vendor.summary,
                2,
                vendor_folder,
                part,
                load_rules(catalogue, vendor_folder),
            )
        )
        for name, (layer, layer_folder) in chosen.items():
            if layer.tier > tier:
                left_out.append(name)
            else:
                pieces.append(
                    Piece(
                        "layer",
                        name,
                        layer.summary,
                        layer.tier,
                        layer_folder,
                        _merge(layer, base, found_base),
                        load_rules(catalogue, layer_folder),
                        layer.notices,
                    )
                )
    known: dict[str, Piece] = {}
    for piece in pieces:
        for name in piece.part.kmods:
            if name in known:
                raise DefinitionError(
                    f"kmod `{name}` is in {known[name].kind} `{known[name].name}`"
                    f" and in {piece.kind} `{piece.name}`",
                    help="leave one of them out, or give its kmod another name",
                )
            known[name] = piece
    if tier >= 2:
        for name in site.kmods:
            if name not in known:
                raise DefinitionError(
                    f"the site file changes kmod `{name}`, which this image does not have",
                    help=nearest(name, known),
                )
    changed = [_with_overrides(piece, site, site_folder) for piece in pieces]
    for name, kmod in ((name, kmod) for piece in changed for name, kmod in piece.part.kmods.items()):
        if kmod.core and f"{name}-core" in known:
            raise DefinitionError(
                f"kmod `{name}-core` has the name of the core of kmod `{name}`", help="give it another name"
            )
    mirrors, mirrors_folder = site.mirrors, site_folder
    if mirror_map is not None:
        mirrors = parse(read_yaml(mirror_map), MirrorMap, describe_pattern)
        mirrors_folder = mirror_map.resolve().parent
    return Selection(
        tier=tier,
        base_name=base,
        base_reason=reason,
        base=found_base,
        base_folder=base_folder,
        vendor_name=vendor,
        pieces=tuple(changed),
        site=site,
        site_folder=site_folder,
        mirrors=mirrors,
        mirrors_folder=mirrors_folder,
        kernel=site.kernel,
        left_out=tuple(left_out),
    )


def _with_overrides(piece: Piece, site: Site, site_folder: Path) -> Piece:
    kmods = {
        name: _override(_directory(kmod, piece.folder), site.kmods.get(name), site_folder)
        for name, kmod in piece.part.kmods.items()
    }
    return replace(piece, part=msgspec.structs.replace(piece.part, kmods=kmods))


def _directory(kmod: Kmod, folder: Path) -> Kmod:
    """A kmod whose source directory, if it has one, is absolute."""
    if kmod.source.directory is None:
        return kmod
    place = str(_resolved(folder / kmod.source.directory))
    return msgspec.structs.replace(kmod, source=msgspec.structs.replace(kmod.source, directory=place))
