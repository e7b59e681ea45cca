"""Names and options → `Selection`: everything the later steps need, as plain data.

Reads files, touches no network and runs no program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import msgspec

from imagebuild.definitions import (
    Base,
    Compat,
    CompatRule,
    Host,
    Kmod,
    KmodOverride,
    Layer,
    MirrorMap,
    Notice,
    Part,
    Repository,
    Site,
    Strict,
    Target,
    Units,
    Vendor,
    Wish,
    describe_pattern,
)
from imagebuild.documents import Document, nearest, parse, raise_all, read_yaml
from imagebuild.errors import DefinitionError, Location

T = TypeVar("T", bound=Strict)
DEFAULT_BASE = "debian"
NO_VENDOR = "none"
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


Kind = Literal["target", "host"]


@dataclass(frozen=True)
class Named:
    """A target or host of a site file. `wish` is what it says, and what the site says where it is silent."""

    kind: Kind
    name: str
    own: Wish
    wish: Wish
    loc: tuple[str | int, ...]
    """Where it stands in the site file."""

    def as_dict(self) -> dict[str, Any]:
        """What it is made of, as plain data."""
        return {
            "name": self.name,
            "base": self.wish.base or DEFAULT_BASE,
            "vendors": list(vendors_of(self.wish)),
            "with": list(self.wish.with_),
            "without": list(self.wish.without),
            "kernel": self.wish.kernel,
        }


@dataclass(frozen=True)
class SiteFile:
    """A site file: what it says, the folder it lies in, and where in it everything stands."""

    site: Site
    folder: Path
    document: Document | None = None

    @property
    def shown(self) -> str:
        """Its name as a person knows it."""
        return self.document.shown if self.document else SITE_FILE

    @property
    def named(self) -> tuple[Named, ...]:
        """Its targets and hosts."""
        found = [self._named("target", i, target) for i, target in enumerate(self.site.targets)]
        return (*found, *(self._named("host", i, host) for i, host in enumerate(self.site.hosts)))

    def _named(self, kind: Kind, number: int, own: Target | Host) -> Named:
        wish = _joined(self.site, own)
        name = own.name or "-".join([wish.base or DEFAULT_BASE, *vendors_of(wish)])
        return Named(kind, name, own, wish, (f"{kind}s", number))

    def locate(self, loc: Iterable[str | int]) -> Location | None:
        """The place of a field; None where there is no file."""
        return self.document.locate(loc) if self.document else None


def vendors_of(wish: Wish) -> tuple[str, ...]:
    """The vendors of a wish: each once, in an order that does not depend on how they were written."""
    named = wish.vendors or ((wish.vendor,) if wish.vendor is not None else ())
    return tuple(sorted(set(named))) or (NO_VENDOR,)


def _joined(site: Site, own: Wish) -> Wish:
    """What a target or host says, and what the site says where it is silent. Layers add up."""
    speaker = own if own.vendor is not None or own.vendors else site
    return Wish(
        base=own.base or site.base,
        vendor=speaker.vendor,
        vendors=speaker.vendors,
        with_=(*(name for name in site.with_ if name not in own.without), *own.with_),
        without=(*(name for name in site.without if name not in own.with_), *own.without),
        kernel=own.kernel or site.kernel,
    )


@dataclass(frozen=True)
class Selection:
    """What one image is made of: the value that `lock`, `plan` and `render` work on."""

    tier: int
    base_name: str
    base_reason: str
    base: Base
    base_folder: Path
    vendors: tuple[str, ...]
    pieces: tuple[Piece, ...]
    site: Site
    site_folder: Path
    mirrors: MirrorMap
    mirrors_folder: Path
    kernel: str | None = None
    """Another kernel than the stock one, as `definitions.KernelChoice`."""
    left_out: tuple[str, ...] = ()
    """Layers that were asked for but belong to a higher tier."""
    target: str = ""
    """The site's target this is; empty for none."""
    host: str = ""
    """The site's host this is for; empty for none."""
    site_file: SiteFile | None = field(default=None, repr=False, compare=False)
    """Where the site's fields stand."""

    @property
    def vendor_name(self) -> str:
        """Its vendors as one word."""
        return "+".join(self.vendors)

    @property
    def name(self) -> str:
        """What the finished image is called: the target or host, else base and vendors."""
        of_parts = [self.base_name, *(self.vendors if self.tier >= 2 else ())]
        return self.target or self.host or "-".join(of_parts)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its layers, each after those it requires."""
        return tuple(piece.name for piece in self.pieces if piece.kind == "layer")

    @property
    def section(self) -> str:
        """Key of this selection in the lockfile: base × vendors × layer set, and a kernel that was chosen."""
        parts = [self.base_name]
        if self.tier >= 2:
            parts += [self.vendor_name, "+".join(sorted(self.layers)) or "-"]
        return "/".join([*parts, *([self.kernel.replace(" ", "")] if self.kernel else [])])

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


def load_site(path: Path | None, folder: Path) -> SiteFile:
    """Load the site file: the one named, else `imgbuild.yaml` in `folder`, else an empty one.

    Raises:
        DefinitionError: it is not valid, or two of its targets or hosts have the same name.
    """
    if path is None:
        path = folder / SITE_FILE
        if not path.is_file():
            return SiteFile(Site(), folder)
    shown = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    document = read_yaml(path, shown)
    site_file = SiteFile(parse(document, Site, describe_pattern), path.resolve().parent, document)
    known: dict[str, Named] = {}
    problems = []
    for each in site_file.named:
        first = known.setdefault(each.name, each)
        if first is not each:
            line = document.locate(first.loc).line
            problems.append(
                DefinitionError(
                    f"{each.kind} `{each.name}` has the name of the {first.kind} in line {line}",
                    where=document.locate((*each.loc, "name")),
                    help="images are called after it: give one of them another `name`",
                )
            )
    raise_all(problems)
    return site_file


@contextmanager
def _asked_at(where: Location | None) -> Iterator[None]:
    """Give an error that has no place the place of what asked for it."""
    try:
        yield
    except DefinitionError as error:
        if where is None or error.where is not None:
            raise
        raise DefinitionError(
            error.what, where=where, help=error.help, lines=error.lines, others=error.others
        ) from None


def _chosen(site_file: SiteFile, kind: Kind, name: str) -> Named:
    """A target or host by name. Raises DefinitionError for an unknown one."""
    known = {each.name: each for each in site_file.named if each.kind == kind}
    if name not in known:
        help = nearest(name, known) or f"`{site_file.shown}` has no `{kind}s:`"
        raise DefinitionError(f"unknown {kind} `{name}`", help=help)
    return known[name]


def _place(site_file: SiteFile, chosen: Named | None, value: str, *fields: str) -> Location | None:
    """Where a site file says `value` in one of these fields; a target's or host's own words come first."""
    levels: list[tuple[Wish, tuple[str | int, ...]]] = [(site_file.site, ())]
    if chosen is not None:
        levels.insert(0, (chosen.own, chosen.loc))
    for wish, loc in levels:
        for name in fields:
            said = getattr(wish, "with_" if name == "with" else name)
            if said == value:
                return site_file.locate((*loc, name))
            if isinstance(said, tuple) and value in said:
                return site_file.locate((*loc, name, said.index(value)))
    return None


def load_all(
    *,
    base: str | None = None,
    vendor: str | Sequence[str] | None = None,
    site_file: Path | None = None,
    folder: Path | None = None,
    hosts: Sequence[str] = (),
    targets: Sequence[str] = (),
    all_hosts: bool = False,
    **options: Any,
) -> tuple[Selection, ...]:
    """Load every image that is asked for: hosts and targets by name, all hosts, else the site's targets.

    A site without targets, or a base or vendor by name, is one image. Arguments: see `load`.

    Raises:
        DefinitionError: anything that is not valid, in any of them.
    """
    read = load_site(site_file, folder or Path.cwd())
    asked: list[tuple[str | None, str | None]] = [(name, None) for name in dict.fromkeys(targets)]
    if all_hosts:
        if not read.site.hosts:
            raise DefinitionError(
                f"`{read.shown}` has no `hosts:`", help="add some, or leave out --all-hosts"
            )
        hosts = [*hosts, *(host.name for host in read.site.hosts)]
    asked += [(None, name) for name in dict.fromkeys(hosts)]
    if not asked and base is None and not _names(vendor):
        asked = [(each.name, None) for each in read.named if each.kind == "target"]
    found: list[Selection] = []
    problems: list[DefinitionError] = []
    for target, host in asked or [(None, None)]:
        try:
            found.append(
                load(
                    base=base,
                    vendor=vendor,
                    site_file=site_file,
                    folder=folder,
                    target=target,
                    host=host,
                    **options,
                )
            )
        except DefinitionError as error:
            for one in (error, *error.others):  # what several images share is wrong once
                if all((one.what, one.where) != (known.what, known.where) for known in problems):
                    problems.append(one)
    raise_all(problems)
    return tuple(found)


def load(
    *,
    tier: int,
    base: str | None = None,
    vendor: str | Sequence[str] | None = None,
    with_layers: Sequence[str] = (),
    without_layers: Sequence[str] = (),
    site_file: Path | None = None,
    mirror_map: Path | None = None,
    folder: Path | None = None,
    target: str | None = None,
    host: str | None = None,
) -> Selection:
    """Load everything that one image is made of.

    Args:
        tier: 1, 2 or 3.
        base, vendor: names, of vendors also several; else the site file's, else `debian` and `none`.
        with_layers, without_layers: added to the site file's own lists.
        site_file: else `imgbuild.yaml` in `folder`, if there.
        mirror_map: replaces the site file's mirrors.
        folder: where the site's own `base/` and `layers/` lie (default: the site file's folder).
        target, host: one of the site file's; what it says goes before what the site says.

    Raises:
        DefinitionError: anything that is not valid, with all problems of the file at once.
    """
    read = load_site(site_file, folder or Path.cwd())
    chosen = None
    if target is not None:
        chosen = _chosen(read, "target", target)
    elif host is not None:
        chosen = _chosen(read, "host", host)
    wish = chosen.wish if chosen else read.site
    catalogue = Catalogue.of(read.folder)
    where = None
    if base is not None:  # the empty text of a variable that nobody set is no base, not the default
        reason = "--base"
    elif wish.base:
        base, where = wish.base, _place(read, chosen, wish.base, "base")
        reason = f"{chosen.kind} {chosen.name}" if chosen and chosen.own.base else "site file"
    else:
        base, reason = DEFAULT_BASE, "default; no --base, no site file names one"
    with _asked_at(where):
        found_base, base_folder = load_base(catalogue, base)
    asked = _names(vendor)
    vendors = tuple(sorted(set(asked))) or vendors_of(wish)
    found_vendors: dict[str, tuple[Vendor, Path]] = {}
    for name in vendors:
        with _asked_at(None if asked else _place(read, chosen, name, "vendor", "vendors")):
            found_vendors[name] = load_vendor(catalogue, base, name)
            if name == NO_VENDOR and len(vendors) > 1:
                others = ", ".join(f"`{other}`" for other in vendors if other != name)
                raise DefinitionError(
                    f"vendor `{name}` cannot be beside {others}", help=f"leave out `{name}`"
                )
    if tier >= 2:
        for name in (*wish.with_, *with_layers, *wish.without, *without_layers):
            if name not in catalogue.layers():
                on_command_line = name in with_layers or name in without_layers
                raise DefinitionError(
                    f"unknown layer `{name}`",
                    where=None if on_command_line else _place(read, chosen, name, "with", "without"),
                    help=_advice(name, catalogue.layers()),
                )
    with _asked_at(read.locate(chosen.loc) if chosen else None):
        pieces, left_out = _pieces(
            read,
            catalogue,
            chosen,
            tier,
            (base, found_base),
            found_vendors,
            (*wish.with_, *with_layers),
            [n for n in (*wish.without, *without_layers) if n not in with_layers],
        )
        mirrors, mirrors_folder = read.site.mirrors, read.folder
        if mirror_map is not None:
            mirrors = parse(read_yaml(mirror_map), MirrorMap, describe_pattern)
            mirrors_folder = mirror_map.resolve().parent
        selection = Selection(
            tier=tier,
            base_name=base,
            base_reason=reason,
            base=found_base,
            base_folder=base_folder,
            vendors=vendors,
            pieces=pieces,
            site=read.site,
            site_folder=read.folder,
            mirrors=mirrors,
            mirrors_folder=mirrors_folder,
            kernel=wish.kernel,
            left_out=left_out,
            target=target or "",
            host=host or "",
            site_file=read,
        )
        _ = selection.repositories  # two that differ are told now, not when they are asked
    return selection


def _names(vendor: str | Sequence[str] | None) -> tuple[str, ...]:
    return (vendor,) if isinstance(vendor, str) else tuple(vendor or ())


def _pieces(
    site_file: SiteFile,
    catalogue: Catalogue,
    chosen: Named | None,
    tier: int,
    base: tuple[str, Base],
    vendors: Mapping[str, tuple[Vendor, Path]],
    with_layers: Sequence[str],
    without_layers: Sequence[str],
) -> tuple[tuple[Piece, ...], tuple[str, ...]]:
    """What is stacked on the base, with the site's changes; and layers that belong to a higher tier."""
    if tier < 2:
        return (), ()
    site = site_file.site
    brought = [name for vendor, _ in vendors.values() for name in vendor.layers]
    chosen_layers = _select_layers(
        catalogue, base[0], dict.fromkeys([*brought, *with_layers]), without_layers
    )
    _check_files({name: folder for name, (_, folder) in vendors.items()})
    replaced = _userland_of(site_file, tuple(vendors), chosen)
    pieces: list[Piece] = []
    for name, (vendor, folder) in vendors.items():
        part = Part(**{field: getattr(vendor, field) for field in Part.__struct_fields__})
        if name == replaced and site.packages is not None:
            part = msgspec.structs.replace(part, packages=site.packages)
        pieces.append(Piece("vendor", name, vendor.summary, 2, folder, part, load_rules(catalogue, folder)))
    left_out: list[str] = []
    for name, (layer, folder) in chosen_layers.items():
        if layer.tier > tier:
            left_out.append(name)
        else:
            pieces.append(
                Piece(
                    "layer",
                    name,
                    layer.summary,
                    layer.tier,
                    folder,
                    _merge(layer, *base),
                    load_rules(catalogue, folder),
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
    for name in site.kmods:
        # With targets or hosts, another image may have it.
        if name not in known and not (site_file.named and name in _all_kmods(catalogue)):
            raise DefinitionError(
                f"the site file changes kmod `{name}`, which this image does not have",
                where=site_file.locate(("kmods", name)),
                help=nearest(name, known),
            )
    changed = tuple(_with_overrides(piece, site, site_file.folder) for piece in pieces)
    for name, kmod in ((name, kmod) for piece in changed for name, kmod in piece.part.kmods.items()):
        if kmod.core and f"{name}-core" in known:
            raise DefinitionError(
                f"kmod `{name}-core` has the name of the core of kmod `{name}`", help="give it another name"
            )
    return changed, tuple(left_out)


def _userland_of(site_file: SiteFile, vendors: Sequence[str], chosen: Named | None) -> str | None:
    """The vendor whose packages the site replaces: its own `vendor`, else the image's only one."""
    site = site_file.site
    if site.packages is None:
        return None
    if site.vendor is not None:
        return site.vendor
    if len(vendors) == 1 and chosen is None:
        return vendors[0]
    raise DefinitionError(
        "`packages` does not tell which vendor's packages it replaces",
        where=site_file.locate(("packages",)),
        help="name that `vendor` at the top level of the site file; targets and hosts may name others",
    )


def _check_files(vendors: Mapping[str, Path]) -> None:
    """Refuse vendors of which one would overwrite a file of the other: no order among them is right."""
    files = {
        name: {
            str(path.relative_to(folder)).removesuffix(".j2")
            for path in (folder / "files").rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
        for name, folder in vendors.items()
    }
    for one, other in combinations(vendors, 2):
        for path in sorted(files[one] & files[other]):
            raise DefinitionError(
                f"vendors `{one}` and `{other}` both bring `{path}`",
                help="put it into one of them, or leave it to a layer",
            )


def _all_kmods(catalogue: Catalogue) -> set[str]:
    """Names of the kmods of all vendors and layers there are."""
    parts: list[Part] = [
        load_vendor(catalogue, base, name)[0]
        for base in catalogue.bases()
        for name in catalogue.vendors(base)
    ]
    for name in catalogue.layers():
        layer, _ = load_layer(catalogue, name)
        parts += [layer, *layer.for_.values()]
    return {name for part in parts for name in part.kmods}


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
