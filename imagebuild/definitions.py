"""The YAML formats as frozen typed objects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from imagebuild.errors import DefinitionError

# --- words that definitions are made of -------------------------------------------------------------


def _whole(pattern: str, max_length: int | None = None) -> Meta:
    """A pattern for the whole text. `$` alone would let a line end through, in Python's `re`."""
    return Meta(pattern=rf"^(?:{pattern})$(?!\n)", max_length=max_length)


Name = Annotated[str, _whole(r"[a-z0-9][a-z0-9._-]*", max_length=64)]
"""Name of a base, vendor, layer, kmod or repository: lower case, digits, dot, dash, underscore."""
Line = Annotated[str, _whole(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*")]
"""One line of text."""
Script = Annotated[str, _whole(r"[^\x00-\x08\x0b-\x1f\x7f]*")]
"""Shell lines."""
PackageSpec = Annotated[
    str,
    _whole(r"[A-Za-z0-9][A-Za-z0-9+._:~{}^-]*( ?(=|>=|<=|>>|<<|<|>) ?[A-Za-z0-9+._:~{}^-]+)?"),
]
"""A package or capability, as the distribution writes it, with an optional version."""
Capability = Annotated[
    str, _whole(r"[A-Za-z0-9][A-Za-z0-9+._:~{}()-]*( ?\(?[<>=]+ ?[A-Za-z0-9+._:~{}^-]+\)?)?")
]
"""What a package provides, in the distribution's own syntax; `{version}` and `{epoch}` are filled in."""
RelativePath = Annotated[
    str,
    _whole(
        r"\.?[A-Za-z0-9@%+=:,_{}*-][A-Za-z0-9@%+=:,._{}*-]*(/\.?[A-Za-z0-9@%+=:,_{}*-][A-Za-z0-9@%+=:,._{}*-]*)*",
        max_length=255,
    ),
]
"""A path below a known folder: never absolute, never with `..`."""
HostPath = Annotated[str, _whole(r"[^\x00-\x1f'\"\\$`]+")]
KeyringPath = Annotated[str, _whole(r"/[A-Za-z0-9@%+=:,.~_/-]+")]
"""An absolute path that apt can take in a source line."""
Pattern = Annotated[str, _whole(r"/[A-Za-z0-9._/*+-]+")]
Uri = Annotated[str, _whole(r"(https?|file)://[A-Za-z0-9@%+=:,.~_/\[\]-]+")]
UriTemplate = Annotated[str, _whole(r"(https?|file)://[A-Za-z0-9@%+=:,.~_/\[\]{}-]+")]
"""An URL in which `{version}` is filled in."""
Key = Annotated[str, _whole(r"((https?|file)://)?(?!-)[A-Za-z0-9@%+=:,.~_/\[\]-]+")]
ImageReference = Annotated[
    str,
    _whole(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)+(:[A-Za-z0-9._-]+)?(@sha256:[0-9a-f]{64})?"),
]
ImageName = Annotated[
    str,
    _whole(
        r"[a-zA-Z0-9][a-zA-Z0-9.-]*(:[0-9]+)?(/[a-z0-9][a-z0-9._-]*)*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?"
    ),
]
ImageNameTemplate = Annotated[
    str,
    _whole(
        r"([a-zA-Z0-9]|\{target\})([a-zA-Z0-9.-]|\{target\})*(:[0-9]+)?"
        r"(/([a-z0-9]|\{target\})([a-z0-9._-]|\{target\})*)*"
        r"(:([A-Za-z0-9_]|\{target\})([A-Za-z0-9._-]|\{target\}){0,127})?"
    ),
]
"""An image name such as registry.example/name:tag; for `{target}` the name of the target or host is put."""
TargetName = Annotated[str, _whole(r"[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*", max_length=64)]
"""Name of a target or host, fit for image names: lower-case letters and digits, with . _ - between them."""
Word = Annotated[str, _whole(r"[A-Za-z0-9@%+=:,./_{}][A-Za-z0-9@%+=:,./_{}-]*")]
"""One shell word without anything a shell would expand, and never an option."""
UnitName = Annotated[
    str,
    _whole(
        r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]*"
        r"\.(service|socket|target|timer|path|mount|automount|swap|slice|scope|device)"
    ),
]
Sha256 = Annotated[str, _whole(r"[0-9a-f]{64}")]
Version = Annotated[str, _whole(r"[A-Za-z0-9][A-Za-z0-9+.:~_-]*")]
Range = Annotated[
    str,
    _whole(r" *(<=|>=|<|>|=|!=) *[0-9][A-Za-z0-9+.:~_-]*( *, *(<=|>=|<|>|=|!=) *[0-9][A-Za-z0-9+.:~_-]*)* *"),
]
"""Comma-separated bounds that all must hold, such as `>=6.12.97, <6.13`."""

KernelChoice = Annotated[
    str,
    _whole(
        r" *(<=|>=|<|>|=|!=)? *[0-9][A-Za-z0-9+.:~_-]*( *, *(<=|>=|<|>|=|!=) *[0-9][A-Za-z0-9+.:~_-]*)* *"
        r"|[A-Za-z][A-Za-z0-9+._-]*"
    ),
]
"""A kernel version or release, a range of them, or the name of a kernel package."""
# What a lock is made of: it comes from a file too, and ends in commands and file names.
PackageName = Annotated[str, _whole(r"[A-Za-z0-9][A-Za-z0-9+._:-]*")]
PackageVersion = Annotated[str, _whole(r"[A-Za-z0-9][A-Za-z0-9+.:~^_-]*")]
PackagePath = Annotated[
    str, _whole(r"((?!\.\./)[A-Za-z0-9@%+=:,.~^_()-]*/)*(?!\.\.?$)[A-Za-z0-9@%+=:,.~^_()-]+")
]
"""Where a package file lies below its repository; ends in a file name, never climbs."""
KernelRelease = Annotated[str, _whole(r"[0-9][A-Za-z0-9+._~-]*")]
ImageDigest = Annotated[str, _whole(r"(sha256:[0-9a-f]{64})?")]
Epoch = Annotated[str, _whole(r"[0-9]*")]
InnerPath = Annotated[str, _whole(r"/((?!\.\./)[A-Za-z0-9@%+=:,.~_-]+/)*(?!\.\.?$)[A-Za-z0-9@%+=:,.~_-]+")]
"""An absolute path inside an image."""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of every format: frozen, no unknown keys."""


class Repository(Strict, frozen=True, kw_only=True):
    """A package repository. apt takes `suites` and `components`, dnf the `uri` alone."""

    name: Name
    uri: Uri | None = None
    """Where it is; absent means: the mirror map, the host's own apt, or the bootstrap tool's default."""
    label: Line | None = None
    """The archive's label in its Release file; finds the same archive in the host's own apt sources."""
    suites: tuple[Word, ...] = ()
    components: tuple[Word, ...] = ()
    keyring: KeyringPath | None = None
    """Keyring file on the machine that builds."""
    key: Key | None = None
    """OpenPGP key: an URL, or a file beside the definition. Its SHA-256 is locked."""
    signed: Annotated[tuple[Literal["metadata", "packages"], ...], Meta(min_length=1)] = ("packages",)
    """What the key of a dnf repository signs, and so what is verified."""


class Bootstrap(Strict, frozen=True, kw_only=True):
    """Tier 1 made from a package mirror alone."""

    suite: Word
    variant: Literal["essential", "apt", "minbase"] = "minbase"
    """What is there beside `packages` and apt: essential packages, or (minbase) the required ones too."""
    packages: tuple[PackageSpec, ...] = ()
    exclude: tuple[Pattern, ...] = ()
    """Paths that no package may install, now or in later tiers."""
    include: tuple[Pattern, ...] = ()
    """Paths that stay although `exclude` covers them."""


class Tier1(Strict, frozen=True, kw_only=True):
    """Where tier 1 comes from: an upstream image, or a bootstrap."""

    image: ImageReference | None = None
    bootstrap: Bootstrap | None = None

    def __post_init__(self) -> None:
        if (self.image is None) == (self.bootstrap is None):
            raise ValueError("give either `image` or `bootstrap`")


class Kernel(Strict, frozen=True, kw_only=True):
    """The kernel of a base."""

    range: Range
    """Kernel releases this base can have at all; lets compat rules answer before any network."""
    packages: tuple[PackageSpec, ...] = ()
    """What installs the kernel; empty where the base image carries it."""
    release_from: PackageSpec
    """What tells a kernel's release: the name of its package, or a capability of it, with `{release}`."""
    releases: Line
    """Which releases are of the stock flavour: a regular expression for the whole release."""
    replace: tuple[PackageSpec, ...] = ()
    """What installs another kernel than the stock one; `{release}` is filled in."""
    headers: tuple[PackageSpec, ...]
    """What modules are compiled against; `{release}` is filled in."""
    user_headers: tuple[PackageName, ...] = ()
    """What a compiler brings of the kernel's own source; it is taken away where a `core` is compiled."""
    image_package: PackageSpec
    """What a kmod package depends on, so that it never outlives its kernel."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.releases)
        except re.error as error:
            raise ValueError(f"`releases` is no regular expression: {error}") from None


class KmodSource(Strict, frozen=True, kw_only=True):
    """Where module source comes from: a distribution package, a tarball, or a directory."""

    package: PackageSpec | None = None
    url: UriTemplate | None = None
    """A tarball; `{version}` is filled in."""
    sha256: Sha256 | None = None
    directory: HostPath | None = None
    """A directory of this machine, relative to the file that names it."""
    path: RelativePath | None = None
    """Folder of the source inside the package, tarball or directory; `{version}` is filled in."""

    def __post_init__(self) -> None:
        given = [n for n in ("package", "url", "directory") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("give one of `package`, `url` or `directory`")
        if self.url and not self.sha256:
            raise ValueError("a tarball needs its `sha256`")
        if self.sha256 and not self.url:
            raise ValueError("`sha256` goes with `url`")
        if self.url and not re.search(r"\.(tar(\.[a-z0-9]+)?|tgz)$", self.url):
            raise ValueError("`url` must name a tarball: .tar, .tar.gz, .tgz and the like")


class KmodPackage(Strict, frozen=True, kw_only=True):
    """The one .deb or .rpm that carries the compiled modules."""

    name: Name
    provides: tuple[Capability, ...] = ()
    conflicts: tuple[Name, ...] = ()


class KmodCore(Strict, frozen=True, kw_only=True):
    """The part of a driver that no kernel has a say in: compiled once per driver and compiler."""

    build: Script
    """Shell lines run in the source folder, without kernel headers; see $JOBS, $DRIVER_VERSION and
    $SOURCE_DATE_EPOCH."""
    sources: tuple[RelativePath, ...] = ()
    """The files and folders it is made of; nothing else of the source is there then. Empty: all of it."""
    outputs: Annotated[dict[RelativePath, RelativePath], Meta(min_length=1)]
    """The files that are kept → where they lie before the modules are built; both below the source folder."""


class Kmod(Strict, frozen=True, kw_only=True):
    """One out-of-tree driver: source, how it is built, what it leaves behind."""

    summary: Line
    version: Version | None = None
    """Driver version; with a package source it comes from the locked package."""
    source: KmodSource
    build: Script
    """Shell lines run in the source folder; see $KERNEL_RELEASE, $JOBS and $DRIVER_VERSION."""
    cpu_s: Annotated[int, Meta(ge=1, le=1_000_000)] = 120
    """CPU seconds a compile takes, about; only for telling people how long to wait."""
    core: KmodCore | None = None
    build_packages: tuple[PackageSpec, ...] = ()
    """What this build needs beyond the base's toolchain and the kernel headers."""
    modules: Annotated[tuple[Name, ...], Meta(min_length=1)]
    """Module names (files NAME.ko, anywhere in the built source)."""
    licences: tuple[RelativePath, ...] = ()
    """Licence files, seen from the root of the package, tarball or directory."""
    package: KmodPackage

    def __post_init__(self) -> None:
        if self.source.package is None and self.version is None:
            raise ValueError("a tarball or directory does not tell its version: give `version`")


class KmodOverride(Strict, frozen=True, kw_only=True):
    """What a site may change of a kmod. What is not named stays, but a new `source` brings its own
    version, licences and core."""

    version: Version | None = None
    """Driver version; needed when `source` is a tarball or a directory."""
    source: KmodSource | None = None
    """Where the source comes from instead."""
    build: Script | None = None
    """Other shell lines that build it."""
    core: KmodCore | None = None
    """A part of the new source that is compiled once for all kernels."""
    build_packages: tuple[PackageSpec, ...] | None = None
    """What this build needs beyond the base's toolchain and the kernel headers."""
    licences: tuple[RelativePath, ...] | None = None
    """Licence files of the new source."""


class Units(Strict, frozen=True, kw_only=True):
    """systemd units as the image shall have them."""

    enable: tuple[UnitName, ...] = ()
    """Units that start at boot; one that is not in the image fails the build."""
    disable: tuple[UnitName, ...] = ()
    """Units that packages enable and this image does not want."""
    mask: tuple[UnitName, ...] = ()
    """Units that nothing may start."""


class Part(Strict, frozen=True, kw_only=True):
    """What vendors and layers have in common: something stacked on a tier."""

    repositories: tuple[Repository, ...] = ()
    packages: tuple[PackageSpec, ...] = ()
    images: tuple[ImageReference, ...] = ()
    """Container images that this host runs; their digests are locked."""
    kmods: dict[Name, Kmod] = {}
    kargs: tuple[Word, ...] = ()
    """Kernel arguments, written to /usr/lib/bootc/kargs.d."""
    units: Units = Units()
    provides: tuple[Name, ...] = ()
    """Capabilities of the image that notices ask for."""
    same_version: tuple[PackageSpec, ...] = ()
    """Packages that must be of exactly the modules' version."""
    firmware: RelativePath | None = None
    """Folder of the firmware that belongs to the modules; `{version}` is filled in."""
    libraries: tuple[Name, ...] = ()
    """Libraries that carry the modules' version in their names: `libacme` for libacme.so.VERSION."""
    rivals: tuple[Name, ...] = ()
    """Modules of the kernel that would take the same cards, and must not load by themselves."""
    cdi_generator: RelativePath | None = None
    """The program that writes the CDI specification of the cards."""


class Vendor(Part, frozen=True, kw_only=True):
    """`base/<base>/<vendor>/vendor.yaml`."""

    summary: Line
    layers: tuple[Name, ...] = ()
    """Layers that come with this vendor."""


class Notice(Strict, frozen=True, kw_only=True):
    """One line for the person who plans an image."""

    unless: Name
    """The capability that makes the notice pointless."""
    text: Line


class Layer(Part, frozen=True, kw_only=True):
    """`layers/<name>/layer.yaml`."""

    summary: Line
    tier: Literal[2, 3] = 2
    requires: tuple[Name, ...] = ()
    conflicts: tuple[Name, ...] = ()
    notices: tuple[Notice, ...] = ()
    for_: dict[Name, Part] = field(default_factory=dict, name="for")
    """What a base, or all bases of one package manager, need in addition."""
    bases: tuple[Name, ...] = ()
    """Bases this layer is for; empty means all."""


class Base(Strict, frozen=True, kw_only=True):
    """`base/<base>/base.yaml`."""

    summary: Line
    package_manager: Literal["apt", "dnf"]
    arch: Name
    """Architecture as the package manager calls it."""
    bootc: bool
    module_compression: Literal["xz", "zstd", "gzip", "none"]
    """How the distribution compresses its kernel modules."""
    repositories: tuple[Repository, ...] = ()
    tier1: Tier1
    kernel: Kernel
    toolchain: tuple[PackageSpec, ...]
    """What compiles and packs kernel modules, beside the headers."""
    units: Units = Units()
    kargs: tuple[Word, ...] = ()


class CompatRule(Strict, frozen=True, kw_only=True):
    """What is known of one driver range on one kernel range."""

    kmod: Name
    driver: Range | None = None
    """Driver versions; absent means all."""
    kernel: Range | None = None
    """Kernel releases; absent means all."""
    verdict: Literal["ok", "patch", "blocked"]
    patch: RelativePath | None = None
    reason: Line
    link: Line | None = None
    unblock: Line | None = None
    """What still works, or which pin would lift the block."""

    def __post_init__(self) -> None:
        if (self.verdict == "patch") != (self.patch is not None):
            raise ValueError("`patch` goes with `verdict: patch`, and only with it")


class Compat(Strict, frozen=True, kw_only=True):
    """`compat.yaml`: the first rule that covers a pair decides."""

    rules: tuple[CompatRule, ...] = ()


class Mirror(Strict, frozen=True, kw_only=True):
    """Where a repository is found instead."""

    uri: Uri
    key: Key | None = None
    """Replaces the repository's own key or keyring (a file beside the mirror map, or an URL)."""


class MirrorMap(Strict, frozen=True, kw_only=True):
    """A mirror map: replaces the locations of repositories and registries, and nothing else."""

    repositories: dict[str, Mirror | Uri] = {}
    """Repository name (or `debian`-style archive name) → location."""
    registries: dict[str, Word] = {}
    """Registry host, optionally with a path → what stands in its place."""
    insecure: tuple[Word, ...] = ()
    """Registries reached without TLS verification."""


class Wish(Strict, frozen=True, kw_only=True):
    """What an image is made of, as far as a site says so."""

    base: Name | None = None
    """Distribution; `--base` overrules it, and where nothing names one it is debian."""
    vendor: Name | None = None
    """GPU vendor; `--vendor` overrules it, and where nothing names one it is none."""
    vendors: tuple[Name, ...] = ()
    """Several GPU vendors in one image, in place of `vendor`."""
    with_: tuple[Name, ...] = field(default=(), name="with")
    """Layers in addition to those of the vendor."""
    without: tuple[Name, ...] = ()
    """Layers to leave out."""
    kernel: KernelChoice | None = None
    """Another kernel than the stock one: a version, a range such as `>=6.12.100, <6.13`, or a package."""

    def __post_init__(self) -> None:
        if self.vendor is not None and self.vendors:
            raise ValueError("give either `vendor` or `vendors`")


class Target(Wish, frozen=True, kw_only=True):
    """One image of several that a site builds; what it does not say, the site says."""

    name: TargetName | None = None
    """What it is called, in reports and image names; without one, its base and vendors: `debian-nvidia`."""


class Host(Wish, frozen=True, kw_only=True):
    """One machine; what it does not say, the site says."""

    name: TargetName
    """What it is called, in reports and image names."""


class Site(Wish, frozen=True, kw_only=True):
    """`imgbuild.yaml`: what one fleet wants."""

    name: Name = "site"
    """What this fleet is called."""
    targets: tuple[Target, ...] = ()
    """The images that `build` makes when none is named."""
    hosts: tuple[Host, ...] = ()
    kmods: dict[Name, KmodOverride] = {}
    """Another source or version of a driver."""
    packages: tuple[PackageSpec, ...] | None = None
    """Replaces the userland packages of the site's `vendor`, for a driver from source."""
    mirrors: MirrorMap = MirrorMap()
    cache: ImageName | None = None
    """REGISTRY/REPOSITORY that keeps kmod images."""
    tags: tuple[ImageNameTemplate, ...] = ()
    """Names the finished image gets; several images need `{target}` in each."""


FORMATS: Mapping[str, type[Strict]] = {
    "base": Base,
    "vendor": Vendor,
    "compat": Compat,
    "layer": Layer,
    "mirror-map": MirrorMap,
    "site": Site,
}


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of one format, for editors. Raises KeyError for an unknown name."""
    schema = msgspec.json.schema(FORMATS[name])
    docs = field_docs()
    for kind, definition in schema["$defs"].items():
        for key, value in definition.get("properties", {}).items():
            if key in docs.get(kind, {}):
                value["description"] = docs[kind][key]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def field_docs() -> dict[str, dict[str, str]]:
    """What each field means, by type and by the field's name in YAML: the texts below the fields.

    Python does not keep them, so they are read from the source of this module; inherited fields count.
    """
    import ast
    import inspect
    import sys

    own: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[__name__])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        own[node.name] = {
            line.target.id: " ".join(str(text.value.value).split())
            for line, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        }
    found: dict[str, dict[str, str]] = {}
    for kind in own:
        bases = [base.__name__ for base in reversed(globals()[kind].__mro__)]
        texts = {field: text for base in bases for field, text in own.get(base, {}).items()}
        names = {info.name: info.encode_name for info in msgspec.structs.fields(globals()[kind])}
        found[kind] = {names[field]: text for field, text in texts.items()}
    return found


def check_image_name(name: str) -> None:
    """Raise DefinitionError for a name that no image can have."""
    pattern = ImageName.__metadata__[0].pattern  # type: ignore[attr-defined]
    if not re.fullmatch(pattern, name) or len(name) > 255:
        raise DefinitionError(f"`{name}` is no image name", help=describe_pattern(pattern))


def as_json(value: Strict) -> str:
    """A definition as canonical JSON: sorted keys, one line."""
    return msgspec.json.encode(value, order="deterministic").decode()


def describe_pattern(pattern: str) -> str:
    """What a pattern of this module takes, in words; empty for an unknown one."""
    for kind, text in (
        (Line, "one line of text (in YAML `>-` folds several into one)"),
        (Script, "shell lines, without control characters"),
        (KeyringPath, "an absolute path such as /usr/share/keyrings/debian-archive-keyring.gpg"),
        (Name, "lower-case letters, digits, dot, dash and underscore, at most 64"),
        (RelativePath, "a path below the folder of the definition: not absolute, no `..`"),
        (Range, "bounds such as `>=6.12.97, <6.13`"),
        (Uri, "a location such as http://mirror.example/debian or file:///srv/mirror"),
        (PackageSpec, "a package name, optionally with a version: `name` or `name = 1.2`"),
        (UnitName, "a systemd unit with its type, such as `sshd.service`"),
        (Word, "one word without quotes, spaces or shell characters"),
        (ImageReference, "an image such as registry.example/name:tag"),
        (ImageName, "an image name such as registry.example/name:tag"),
        (ImageNameTemplate, "an image name such as registry.example/name:tag or gpu:{target}"),
        (TargetName, "lower-case letters and digits, with single . or _ or dashes between them, at most 64"),
        (Version, "a version such as 550.163.01"),
        (Sha256, "64 hexadecimal digits"),
    ):
        if kind.__metadata__[0].pattern == pattern:  # type: ignore[attr-defined]
            return f"it takes {text}"
    return ""
