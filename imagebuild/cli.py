"""The command line: parse, call, print, exit. No logic; the only place that catches our errors."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from imagebuild.errors import EXIT_INTERRUPTED, DefinitionError, ImgbuildError

if TYPE_CHECKING:
    from imagebuild.gather import Offline
    from imagebuild.load import Selection
    from imagebuild.lock import Section
    from imagebuild.publish import PublishOptions
    from imagebuild.release import Group, Outcome, Release, Status
    from imagebuild.render import Rendered
    from imagebuild.report import Report
    from imagebuild.state import State

F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed (build, check, push, probe)
  2  wrong usage or invalid definition
  3  stopped by compat rules alone
  4  a program, mirror or registry is missing or unreachable
  130 interrupted"""


# --- options shared by commands ---------------------------------------------------------------------


def _complete(kind: str) -> Callable[..., list[str]]:
    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        from imagebuild.load import DEFAULT_BASE, Catalogue, load_site

        catalogue = Catalogue.of(Path.cwd())

        def named() -> list[str]:
            with suppress(ImgbuildError):  # of a site file with mistakes there is nothing to offer
                site_file = load_site(context.params.get("site_file"), Path.cwd())
                return [each.name for each in site_file.named if each.kind == kind]
            return []

        names = {
            "base": catalogue.bases,
            "vendor": lambda: catalogue.vendors(context.params.get("base") or DEFAULT_BASE),
            "layer": catalogue.layers,
            "host": named,
            "target": named,
        }[kind]()
        return [name for name in names if name.startswith(incomplete)]

    return complete


def _file_option(function: F) -> F:
    return click.option(
        "-f",
        "--file",
        "site_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Site file [default: imgbuild.yaml, if there].",
    )(function)


def _selection_options(function: F) -> F:
    for option in reversed(
        [
            click.option(
                "--tier", type=click.IntRange(1, 2), default=2, show_default=True, help="How far up."
            ),
            click.option(
                "--vendor",
                multiple=True,
                metavar="V",
                help="GPU vendor; several in one image are several options.",
                shell_complete=_complete("vendor"),
            ),
            click.option("--base", metavar="B", help="Distribution.", shell_complete=_complete("base")),
            _file_option,
            click.option(
                "--host",
                "hosts",
                multiple=True,
                metavar="H",
                help="The image of a host of the site file.",
                shell_complete=_complete("host"),
            ),
            click.option("--all-hosts", is_flag=True, help="The images of all its hosts."),
            click.option(
                "--target",
                "targets",
                multiple=True,
                metavar="T",
                help="A target of the site file [default: all, if --base and --vendor are not given].",
                shell_complete=_complete("target"),
            ),
            click.option(
                "--with",
                "with_layers",
                multiple=True,
                metavar="LAYER",
                help="Add a layer.",
                shell_complete=_complete("layer"),
            ),
            click.option(
                "--without",
                "without_layers",
                multiple=True,
                metavar="LAYER",
                help="Leave a layer out.",
                shell_complete=_complete("layer"),
            ),
            click.option(
                "--mirror-map",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="Other locations of repositories and registries.",
            ),
            click.option(
                "--allow-blocked", is_flag=True, help="Go on although a compat rule blocks a driver."
            ),
        ]
    ):
        function = option(function)
    return function


def _output_options(function: F) -> F:
    for option in reversed(
        [
            click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout."),
            click.option("-v", "--verbose", is_flag=True, help="Show all output of what runs."),
            click.option("-q", "--quiet", is_flag=True, help="Only the result and errors."),
        ]
    ):
        function = option(function)
    return function


class _Run:
    """What every command has: where to report, and the state folder."""

    def __init__(self, as_json: bool, verbose: bool, quiet: bool, *, result_on_stdout: bool = False) -> None:
        from imagebuild.report import Report
        from imagebuild.state import State, default_state_dir

        context = click.get_current_context()
        context.find_root().obj = {"json": as_json}
        stream = sys.stderr if as_json or result_on_stdout else sys.stdout
        self.as_json = as_json
        self.report: Report = Report(stream, quiet=quiet, verbose=verbose)
        self.state: State = State(default_state_dir())
        if self.state.sweep():  # a dead imgbuild left something: only then can it have left containers
            from imagebuild import images

            with suppress(ImgbuildError):
                images.sweep()

    def selections(self, arguments: dict[str, Any]) -> tuple[Selection, ...]:
        """Every image that is asked for."""
        from imagebuild.load import load_all

        arguments.pop("allow_blocked", None)
        found = load_all(**arguments)
        for selection in found:
            who = f"{selection.name}: " if selection.target or selection.host else ""
            self.report.say(f"{who}base {selection.base_name} ({selection.base_reason}), "
                            f"tier {selection.tier}, vendor {selection.vendor_name}")  # fmt: skip
        return found

    def selection(self, arguments: dict[str, Any]) -> Selection:
        """The one image that is asked for."""
        found = self.selections(arguments)
        if len(found) > 1:
            raise DefinitionError(
                f"{len(found)} images are asked for, and this command is for one",
                help="name one, by --target or --host",
            )
        return found[0]

    def print(self, data: Any, text: str) -> None:
        click.echo(json.dumps(data, indent=1, sort_keys=True) if self.as_json else text)


def _section(selection: Selection) -> Section | None:
    from imagebuild import lock

    return lock.section_of(lock.read(lock.lock_path(selection)), selection)


def _offline(folder: str | None) -> Offline | None:
    """What `--offline [DIR]` asks for; None where it was not given."""
    if folder is None:
        return None
    from imagebuild.gather import Folder, Offline

    if folder and not Path(folder).is_dir():
        raise DefinitionError(
            f"there is no folder `{folder}`", help="`imgbuild fetch DIR` makes one, where there is a network"
        )
    # The words that chose this image choose it there too.
    context = click.get_current_context()
    words = ["imgbuild", "fetch", folder or "DIR"]
    for option in fetch.params:
        name = str(option.name)
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in ("mirror_map", "as_json", "verbose", "quiet"):
            value = context.params[name]
            for one in value if isinstance(value, tuple) else (value,):
                words += [option.opts[-1]] if one is True else [option.opts[-1], str(one)]
    from imagebuild.run import pasteable

    command = pasteable(words)
    if not folder:
        command += "; then here: imgbuild build --offline DIR"
    return Offline(Folder(Path(folder).absolute()) if folder else None, command)


# --- commands ---------------------------------------------------------------------------------------


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EXIT_CODES
)
@click.version_option(package_name="imgbuild")
def cli() -> None:
    """Composes bootc/OCI images for GPU hosts, in tiers: locked, compiled, checked, published.

    \b
    Example:
      imgbuild build --tier 2 --vendor nvidia
    """


@cli.command()
@_selection_options
@click.option("-t", "--tag", "tags", multiple=True, metavar="TAG", help="Name of the finished image.")
@click.option("--push", "push_to", multiple=True, metavar="DEST", help="Push there; the last one moves last.")
@click.option("--cache", metavar="REGISTRY/REPO", help="Keep compiled kmod images there.")
@click.option("--tls-verify/--no-tls-verify", default=None, help="For --push [default: verify].")
@click.option("--authfile", type=click.Path(path_type=Path), metavar="FILE", help="Registry credentials.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Nodes built at once.")
@click.option("--no-cache", is_flag=True, help="Build every node again.")
@click.option(
    "--offline",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Ask no network: everything is here, or in DIR (see fetch).",
)
@_output_options
def build(
    tags: Sequence[str],
    push_to: Sequence[str],
    cache: str | None,
    tls_verify: bool | None,
    authfile: Path | None,
    jobs: int,
    no_cache: bool,
    offline: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    allow_blocked: bool,
    **arguments: Any,
) -> None:
    """Build an image, and lock what is not locked yet. Of several, one that fails stops no other.

    \b
    Examples:
      imgbuild build --tier 2 --vendor nvidia
      imgbuild build --vendor nvidia --with zfs -t gpu:1 --push registry.example/gpu:1
      imgbuild build --all-hosts --push registry.example/gpu:{target}
    """
    from imagebuild.build import Options
    from imagebuild.publish import PublishOptions
    from imagebuild.release import Request, check_request, make, release

    run = _Run(as_json, verbose, quiet)
    if offline is not None:
        from imagebuild.publish import parse_destination

        for destination in push_to:
            if parse_destination(destination).registry:
                raise DefinitionError(
                    f"--offline asks no network, and --push {destination} does",
                    help="`imgbuild push` pushes the image afterwards",
                )
    disconnected = _offline(offline)
    selections = run.selections(arguments)
    request = Request(
        Options(jobs=jobs, no_cache=no_cache, cache=cache, tags=tuple(tags), offline=disconnected),
        tuple(push_to),
        PublishOptions(tls_verify=tls_verify, authfile=authfile, site_folder=_site_folder()),
        allow_blocked,
    )
    check_request(selections, request)
    if len(selections) > 1:
        _print_release(run, release(selections, run.state, run.report, request))
        return
    made = make(selections, run.state, run.report, request)
    result, pushed = made.result, made.pushed
    lines = [
        f"image   {result.tags[0] if result.tags else result.image}",
        f"digest  {result.digest}",
        f"size    {_size(result.size_bytes)}, kernel {made.plan.kernel_release}",
    ]
    if not result.worked:
        lines.insert(0, "nothing to do: every node is there")
    if pushed:
        lines.append(f"pushed  {pushed.digest} to {', '.join(pushed.references)}")
    run.print(made.as_dict(), "\n".join(lines))


def _print_release(run: _Run, done: Release) -> None:
    """What became of several images: a table, below each row what belongs to it, and the exit code."""
    from imagebuild.report import columns

    rows = [("target", "base", "vendors", "result")]
    for each in done.outcomes:
        first = each.group[0]
        status = "nothing to do" if each.status == "cached" else each.status
        rows.append((first.name, first.base_name, first.vendor_name, status))
    head, *table = columns(rows)
    lines = [head]
    for row, each in zip(table, done.outcomes, strict=True):
        lines += [row, *(f"    {line}" for line in _details(each))]
    counts = Counter(row[-1] for row in rows[1:])
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    run.print(done.as_dict(), "\n".join(lines))
    click.get_current_context().exit(done.exit_code)


def _details(outcome: Outcome) -> list[str]:
    """What a person needs to know of one image."""
    result, blocked = outcome.result, outcome.blocked
    lines = [f"is for  {', '.join(outcome.names)}"] if len(outcome.group) > 1 else []
    if "image" in result:
        lines += [f"image   {result['tags'][0] if result['tags'] else result['image']}"]
        lines += [f"digest  {result['digest']}", f"kernel  {result['kernel_release']}"]
    if "pushed" in result:
        lines.append(f"pushed  {result['pushed']['digest']} to {', '.join(result['pushed']['references'])}")
    if "section" in result:
        lines += [f"section {result['section']}", f"kernel  {result['kernel_release']}"]
        lines += [f"  {line}" for line in result["changes"]]
    if blocked and outcome.error:
        lines += [outcome.error.what, f"rule    {blocked['rule']}", f"reason  {blocked['reason']}"]
        lines += [f"link    {blocked['link']}"] if blocked["link"] else []
        lines += [f"pin     {pin}" for pin in blocked["pins"]]
        lines += [f"unblock {blocked['unblock']}"] if blocked["unblock"] else []
    elif outcome.error:
        lines += show_error(outcome.error).splitlines()
    return lines


def _size(value: int) -> str:
    from imagebuild.report import size

    return size(value)


def _publish(run: _Run, image: str, to: Sequence[str], options: PublishOptions) -> dict[str, Any]:
    from imagebuild import publish

    destinations = [publish.parse_destination(text) for text in to]
    return publish.publish(image, destinations, run.state, run.report, options).as_dict()


def _site_folder() -> Path | None:
    """The current folder, if it is a site: its revision is what an image was made from."""
    from imagebuild.load import SITE_FILE

    return Path.cwd() if Path(SITE_FILE).is_file() else None


@cli.command()
@click.argument("image")
@click.argument("destinations", nargs=-1, required=True, metavar="DEST...")
@click.option("--tls-verify/--no-tls-verify", default=None, help="[default: verify]")
@click.option("--image-version", default="", metavar="TEXT", help="Label org.opencontainers.image.version.")
@click.option("--source", default="", metavar="URL", help="Label org.opencontainers.image.source.")
@click.option(
    "--stamp/--no-stamp", default=True, show_default=True, help="Put revision and creation time on it."
)
@click.option("--authfile", type=click.Path(path_type=Path), metavar="FILE", help="Registry credentials.")
@_output_options
def push(
    image: str,
    destinations: Sequence[str],
    tls_verify: bool | None,
    image_version: str,
    source: str,
    stamp: bool,
    authfile: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Push an image to a registry; with several destinations the last one, the moving tag, moves last.

    \b
    Example:
      imgbuild push localhost/gpu:1 registry.example/gpu:2026.11 registry.example/gpu:latest
    """
    from imagebuild.publish import PublishOptions

    run = _Run(as_json, verbose, quiet)
    options = PublishOptions(
        stamp=stamp,
        version=image_version,
        source=source,
        site_folder=_site_folder(),
        authfile=authfile,
        tls_verify=tls_verify,
    )
    pushed = _publish(run, image, destinations, options)
    run.print(
        pushed, f"digest  {pushed['digest']}\n" + "\n".join(f"pushed  {r}" for r in pushed["references"])
    )


@cli.command()
@_selection_options
@click.option("--node", metavar="NAME", help="Only this node's Containerfile.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write every node's build context and the command that builds it.",
)
@_output_options
def render(
    node: str | None,
    out: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    allow_blocked: bool,
    **arguments: Any,
) -> None:
    """Print the Containerfiles, or write whole build contexts.

    \b
    Examples:
      imgbuild render --tier 2 --vendor nvidia
      imgbuild render --tier 2 --vendor nvidia --out contexts/
    """
    from imagebuild.documents import nearest
    from imagebuild.plan import plan as make_plan
    from imagebuild.render import render as render_plan

    run = _Run(as_json, verbose, quiet, result_on_stdout=True)
    selection = run.selection(arguments)
    items = render_plan(make_plan(selection, _section(selection), allow_blocked=allow_blocked))
    if node is not None:
        names = [item.node.name for item in items]
        if node not in names:
            raise DefinitionError(f"unknown node `{node}`", help=nearest(node, names))
        items = tuple(item for item in items if item.node.name == node)
    if out is not None:
        written = _write_contexts(run, items, out)
        run.print({"written": written}, "\n".join(written))
        return
    run.print(
        [
            {"node": i.node.name, "key": i.key, "image": i.image, "containerfile": i.containerfile}
            for i in items
        ],
        "\n".join(item.containerfile.rstrip() + "\n" for item in items).rstrip("\n"),
    )


def _write_contexts(run: _Run, items: Sequence[Rendered], out: Path) -> list[str]:
    """Contexts of all nodes in an empty folder; one that was begun does not stay."""
    import shutil

    try:
        if out.exists() and any(out.iterdir()):
            raise DefinitionError(f"`{out}` is not empty", help="name a new folder")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImgbuildError(f"cannot write `{out}`: {error.strerror}") from None
    try:
        return _fill_contexts(run, items, out)
    except BaseException:
        for item in items:
            shutil.rmtree(out / item.node.name, ignore_errors=True)
        raise


def _fill_contexts(run: _Run, items: Sequence[Rendered], out: Path) -> list[str]:
    from imagebuild.images import build_command
    from imagebuild.render import LABEL_PREFIX, LAYER_TIME, write_context
    from imagebuild.run import pasteable
    from imagebuild.state import write_whole

    written = []
    commands = [
        "#!/bin/sh",
        "# Builds every node in order, once packages/ and keys/ are filled: they hold what was in the store.",
        "set -eu",
        'cd "$(dirname "$0")"',
    ]
    for item in items:
        folder = out / item.node.name
        known = [*(p.sha256 for p in item.packages), *item.keys.values()]
        known += [item.tarball[1]] if item.tarball else []
        there = {sha256: run.state.stored(sha256) for sha256 in known if run.state.has(sha256)}
        write_context(item, folder, there)
        if item.node.kind == "bootstrap":
            commands.append(f"SOURCE_DATE_EPOCH={LAYER_TIME} sh {item.node.name}/bootstrap.sh")
        labels = {f"{LABEL_PREFIX}.key": item.key or "", f"{LABEL_PREFIX}.node": item.node.name}
        commands.append(
            pasteable(
                build_command(
                    item.node.name,
                    name=item.image or f"localhost/imgbuild/{item.node.name}",
                    isolation=os.environ.get("BUILDAH_ISOLATION", "chroot"),
                    timestamp=LAYER_TIME,
                    labels=labels,
                )
            )
        )
        written.append(str(folder))
    write_whole(out / "build.sh", "\n".join(commands) + "\n")
    return [*written, str(out / "build.sh")]


@cli.command()
@_selection_options
@_output_options
def plan(as_json: bool, verbose: bool, quiet: bool, allow_blocked: bool, **arguments: Any) -> None:
    """Show the graph of images, their keys, and what would be rebuilt and why.

    \b
    Example:
      imgbuild plan --tier 2 --vendor nvidia
    """
    from imagebuild.build import changes, journal_name
    from imagebuild.plan import plan as make_plan
    from imagebuild.release import say_plan
    from imagebuild.render import render as render_plan

    run = _Run(as_json, verbose, quiet)
    selection = run.selection(arguments)
    made = make_plan(selection, _section(selection), allow_blocked=allow_blocked)
    if not as_json:
        say_plan(run.report, made)
    nodes: list[dict[str, Any]] = []
    for item in render_plan(made):
        before = run.state.journal(journal_name(made, item.node))
        if item.key is None:
            why = ["<unlocked: key>"]
        elif not before:
            why = ["never built here"]
        elif before.get("key") == item.key:
            why = []
        else:
            why = changes(before.get("inputs", {}), item.inputs)
        nodes.append(
            {
                "name": item.node.name,
                "summary": item.node.summary,
                "parents": list(item.node.parents),
                "key": item.key,
                "image": item.image,
                "packages": len(item.packages),
                "download_bytes": sum(p.size for p in item.packages),
                "rebuild": why,
                "seconds_last_time": before.get("seconds"),
            }
        )
    data = {
        "base": selection.base_name,
        "base_reason": selection.base_reason,
        "tier": selection.tier,
        "vendor": selection.vendor_name,
        "locked": made.locked,
        "kernel_release": made.kernel_release,
        "kernel_reason": made.kernel_reason,
        "verdicts": [verdict.as_dict() for verdict in made.verdicts],
        "notices": list(made.notices),
        "nodes": nodes,
    }
    lines = [made.kernel_reason or f"kernel {made.kernel_release}"]
    if not made.locked:
        lines.append("not locked: `imgbuild lock` or the first `imgbuild build` asks for versions")
    for entry in nodes:
        lines.append(_plan_line(entry))
        lines += [f"    {reason}" for reason in entry["rebuild"][:12]]
        if len(entry["rebuild"]) > 12:
            lines.append(f"    and {len(entry['rebuild']) - 12} more")
    run.print(data, "\n".join(lines))


def _plan_line(entry: dict[str, Any]) -> str:
    key = (entry["key"] or "")[:12]
    state = "as built" if not entry["rebuild"] else "to build"
    parents = f" <- {', '.join(entry['parents'])}" if entry["parents"] else ""
    packages = (
        f", {entry['packages']} packages, {_size(entry['download_bytes'])}" if entry["packages"] else ""
    )
    return f"{entry['name']:<16} {key:<12} {state}{packages}{parents}"


@cli.command()
@_selection_options
@click.option("--check", is_flag=True, help="Only tell what moved upstream; exit code 1 if anything did.")
@click.option(
    "--upgrade",
    "upgrades",
    is_flag=False,
    flag_value="",
    multiple=True,
    metavar="[NAME]",
    help="Move everything, or only NAME: base, kernel, a driver, vendor, layer, package or image.",
)
@_output_options
def lock(
    check: bool,
    upgrades: Sequence[str],
    as_json: bool,
    verbose: bool,
    quiet: bool,
    allow_blocked: bool,
    **arguments: Any,
) -> None:
    """Ask which versions there are and write imgbuild.lock; what is locked stays if it still can be had.

    \b
    Examples:
      imgbuild lock --tier 2 --vendor nvidia
      imgbuild lock --vendor nvidia --check
      imgbuild lock --vendor nvidia --upgrade kernel
    """
    from imagebuild import lock as locking
    from imagebuild.release import each_image
    from imagebuild.report import short

    run = _Run(as_json, verbose, quiet)
    if check and upgrades:
        raise click.UsageError("--check changes nothing, and --upgrade does")
    selections = run.selections(arguments)
    names = frozenset(name for name in upgrades if name)
    wanted = locking.Upgrade(everything="" in upgrades, names=names)

    def one(group: Group) -> tuple[Status, dict[str, Any]]:
        selection = group[0]
        path = locking.lock_path(selection)
        known = locking.read(path)
        if check:
            drifted = locking.drift(selection, known, run.state, run.report)
            if drifted:
                raise ImgbuildError(
                    f"section {selection.section} of the lock has drifted",
                    lines=drifted,
                    help="`imgbuild lock --upgrade [NAME]` moves it",
                )
            return "locked", {"lock": str(path), "section": selection.section, "changes": []}
        before = known.sections.get(selection.section)
        section = locking.resolve(
            selection, known, run.state, run.report, upgrade=wanted, allow_blocked=allow_blocked
        )
        locking.update(path, selection.section, section, run.state)
        moved = locking.differences(before, section)
        return "locked", {
            "lock": str(path),
            "section": selection.section,
            "kernel_release": section.kernel_release,
            "changes": moved,
        }

    if len(selections) > 1:
        _print_release(run, each_image(selections, run.report, one))
        return
    _, data = one(selections)
    did = "as locked" if check else f"wrote {short(Path(data['lock']))}"
    lines = [f"{did}: section {data['section']}"]
    run.print(data, "\n".join([*lines, *(f"  {line}" for line in data["changes"])]))


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@_selection_options
@_output_options
def fetch(
    folder: Path, as_json: bool, verbose: bool, quiet: bool, allow_blocked: bool, **arguments: Any
) -> None:
    """Gather all that a lock names into one folder, for `build --offline DIR`.

    Only what is missing is fetched, and another image can be added to the same folder.

    \b
    Example:
      imgbuild fetch usb/ --tier 2 --vendor nvidia
    """
    from imagebuild.gather import Folder, gather
    from imagebuild.plan import plan as make_plan
    from imagebuild.release import locked
    from imagebuild.render import render as render_plan

    run = _Run(as_json, verbose, quiet)
    selection = run.selection(arguments)
    section = locked(selection, run.state, run.report, allow_blocked=allow_blocked)
    plan = make_plan(selection, section, allow_blocked=allow_blocked)
    done = gather(plan, render_plan(plan), Folder(folder.absolute()), run.state, run.report)
    whole = sum(entry.size for entry in done.entries)
    run.print(
        {
            "folder": str(folder),
            "section": selection.section,
            "fetched": done.files,
            "fetched_bytes": done.bytes,
            "entries": len(done.entries),
            "bytes": whole,
        },
        f"{folder}: section {selection.section}, {len(done.entries)} entries, {_size(whole)}; "
        f"fetched now: {done.files}, {_size(done.bytes)}",
    )


@cli.command("list")
@_file_option
@_output_options
def list_command(site_file: Path | None, as_json: bool, verbose: bool, quiet: bool) -> None:
    """Show bases, vendors and layers, disabled ones with the reason; targets and hosts of the site file.

    \b
    Example:
      imgbuild list
    """
    from imagebuild.compat import ORDERS, judge_range
    from imagebuild.load import Catalogue, load_base, load_layer, load_rules, load_site, load_vendor

    run = _Run(as_json, verbose, quiet)
    site = load_site(site_file, Path.cwd())
    catalogue = Catalogue.of(site.folder)
    bases: list[dict[str, Any]] = []
    for name in catalogue.bases():
        base, _ = load_base(catalogue, name)
        vendors: list[dict[str, Any]] = []
        for vendor_name in catalogue.vendors(name):
            vendor, folder = load_vendor(catalogue, name, vendor_name)
            entry: dict[str, Any] = {"name": vendor_name, "summary": vendor.summary, "disabled": None}
            rules = load_rules(catalogue, folder)
            for kmod_name, kmod in vendor.kmods.items():
                order = ORDERS[base.package_manager]
                verdict = judge_range(kmod_name, kmod.version, base.kernel.range, rules, order)
                if verdict.kind == "blocked" and verdict.rule:
                    entry["disabled"] = {"reason": verdict.rule.reason, "link": verdict.rule.link}
            vendors.append(entry)
        bases.append({"name": name, "summary": base.summary, "vendors": vendors})
    layers = []
    for name in catalogue.layers():
        layer, _ = load_layer(catalogue, name)
        layers.append({"name": name, "tier": layer.tier, "summary": layer.summary})
    lines = []
    for item in bases:
        lines.append(f"base {item['name']}: {item['summary']}")
        for entry in item["vendors"]:
            lines.append(f"  vendor {entry['name']:<8} {entry['summary']}")
            if entry["disabled"]:
                lines.append(f"    disabled: {entry['disabled']['reason']}")
                lines.append(f"              {entry['disabled']['link']}")
    lines += [f"layer {entry['name']:<20} tier {entry['tier']}  {entry['summary']}" for entry in layers]
    data: dict[str, list[dict[str, Any]]] = {"bases": bases, "layers": layers, "targets": [], "hosts": []}
    for each in site.named:
        entry = each.as_dict()
        data[f"{each.kind}s"].append(entry)
        said = [f"base {entry['base']}", f"vendor {'+'.join(entry['vendors'])}"]
        said += [f"{word} {', '.join(entry[word])}" for word in ("with", "without") if entry[word]]
        said += [f"kernel {entry['kernel']}"] if entry["kernel"] else []
        lines.append(f"{each.kind} {each.name:<{25 - len(each.kind)}} {', '.join(said)}")
    run.print(data, "\n".join(lines))


@cli.command()
@_selection_options
@click.option("--probe", is_flag=True, help="Compile each driver and tell whether its rule holds.")
@click.option("--kmod", "only", metavar="NAME", help="Only this driver.")
@_output_options
def compat(
    probe: bool,
    only: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    allow_blocked: bool,
    **arguments: Any,
) -> None:
    """Show the kernel × driver rules, or try them out.

    \b
    Examples:
      imgbuild compat --vendor nvidia
      imgbuild compat --vendor nvidia --probe
    """
    from imagebuild.plan import plan as make_plan

    run = _Run(as_json, verbose, quiet)
    selection = run.selection(arguments)
    if probe:
        _probe(run, selection, only)
        return
    made = make_plan(selection, _section(selection), allow_blocked=True)
    rules = [
        {
            "kmod": rule.kmod,
            "driver": rule.driver or "any",
            "kernel": rule.kernel or "any",
            "verdict": rule.verdict,
            "reason": rule.reason,
            "link": rule.link,
            "rule": str(where),
        }
        for piece in selection.pieces
        for rule, where in piece.rules
        if only in (None, rule.kmod)
    ]
    lines = [
        f"{r['kmod']:<10} driver {r['driver']:<14} kernel {r['kernel']:<20} {r['verdict']:<8} {r['reason']}"
        for r in rules
    ]
    lines += [f"now: {verdict.text}" for verdict in made.verdicts if only in (None, verdict.kmod)]
    verdicts = [verdict.as_dict() for verdict in made.verdicts if only in (None, verdict.kmod)]
    data = {"rules": rules, "verdicts": verdicts}
    run.print(data, "\n".join(lines) or "no drivers, no rules")


def _probe(run: _Run, selection: Selection, only: str | None) -> None:
    from imagebuild.build import probe as probe_pair
    from imagebuild.documents import nearest
    from imagebuild.plan import plan as make_plan
    from imagebuild.release import locked

    if only is not None and only not in selection.kmods:
        raise DefinitionError(f"unknown kmod `{only}`", help=nearest(only, selection.kmods))
    section = locked(selection, run.state, run.report, allow_blocked=True)
    made = make_plan(selection, section, allow_blocked=True)
    found = [
        probe_pair(made, name, run.state, run.report) for name in selection.kmods if only in (None, name)
    ]
    run.print([p.as_dict() for p in found], "\n".join(p.text for p in found) or "no drivers to probe")
    if any(not p.rule_holds for p in found):
        click.get_current_context().exit(1)


@cli.command()
@click.argument("image", required=False)
@click.option("--list", "list_them", is_flag=True, help="Show the checks there are.")
@click.option("--skip", multiple=True, metavar="NAME", help="Leave a check out.")
@_output_options
def check(
    image: str | None, list_them: bool, skip: Sequence[str], as_json: bool, verbose: bool, quiet: bool
) -> None:
    """Hold an image to what it promises. A check that could not run is a finding.

    \b
    Example:
      imgbuild check localhost/imgbuild/debian-nvidia:tier2
    """
    from imagebuild import check as checking

    run = _Run(as_json, verbose, quiet)
    if list_them:
        known = checking.list_checks()
        rows = [{"name": c.name, "severity": c.severity, "reason": c.reason, "fix": c.fix} for c in known]
        run.print(rows, "\n".join(f"{r['name']:<22} {r['severity']:<8} {r['reason']}" for r in rows))
        return
    if image is None:
        raise click.UsageError("name an image, or use --list")
    report = checking.check_image(image, run.state, skip)
    lines = [
        f"{finding.severity}: {finding.check}: {finding.what}\n  fix: {finding.fix}"
        for finding in report.findings
    ]
    lines.append(
        f"{len(report.passed)} passed, {len(report.findings)} findings, {len(report.skipped)} skipped"
    )
    run.print(report.as_dict(), "\n".join(lines))
    if not report.ok:
        click.get_current_context().exit(1)


@cli.command()
@_output_options
def doctor(as_json: bool, verbose: bool, quiet: bool) -> None:
    """Tell what this machine lacks, and the command that installs it.

    \b
    Example:
      imgbuild doctor
    """
    from imagebuild import doctor as examine

    run = _Run(as_json, verbose, quiet)
    found = examine.examine(run.state)
    install = examine.install_command(found)
    lines = [
        f"{'ok' if item.ok else 'MISSING' if item.needed else 'note':<8} {item.name}: {item.detail}"
        for item in found
    ]
    if install:
        lines.append(f"install: {install}")
    data = {"checks": [item.__dict__ for item in found], "install": install}
    run.print(data, "\n".join(lines))
    if any(item.needed and not item.ok for item in found):
        click.get_current_context().exit(4)


@cli.command()
@click.option("--base", type=str, default=None, metavar="B", help="Distribution [asked, else centos].")
@click.option("--vendor", default=None, metavar="V", help="GPU vendor [default: nvidia].")
@click.option("--ci", type=click.Choice(["gitlab", "github"]), help="Write a pipeline too.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path())
@_output_options
def init(
    base: str | None,
    vendor: str | None,
    ci: str | None,
    folder: Path,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Write a commented starter site, and a CI pipeline.

    \b
    Example:
      imgbuild init --base debian --ci gitlab my-fleet/
    """
    from imagebuild import starter
    from imagebuild.load import Catalogue, load_base, load_vendor

    run = _Run(as_json, verbose, quiet)
    catalogue = Catalogue.of(folder if folder.is_dir() else Path.cwd())
    if base is None:
        names = sorted(catalogue.bases(), key=lambda name: (name != starter.FIRST_OFFER, name))
        base = names[0]
        if sys.stdin.isatty() and not as_json:
            base = click.prompt("base", type=click.Choice(names), default=base)
    load_base(catalogue, base)
    vendor = vendor or starter.FIRST_VENDOR
    load_vendor(catalogue, base, vendor)
    written = starter.write(folder, base=base, vendor=vendor, ci=ci)
    run.print({"written": [str(p) for p in written]}, "\n".join(f"wrote {path}" for path in written))


@cli.command()
@click.argument("name", required=False)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write all of them."
)
def schema(name: str | None, out: Path | None) -> None:
    """Print the JSON Schema of a format, for editors.

    \b
    Example:
      imgbuild schema site > imgbuild.schema.json
    """
    from imagebuild.definitions import FORMATS, json_schema
    from imagebuild.documents import nearest
    from imagebuild.state import write_whole

    if out is not None:
        for each in FORMATS:
            write_whole(
                out / f"{each}.schema.json", json.dumps(json_schema(each), indent=1, sort_keys=True) + "\n"
            )
        click.echo("\n".join(str(out / f"{each}.schema.json") for each in FORMATS))
        return
    if name is None:
        click.echo("\n".join(FORMATS))
        return
    if name not in FORMATS:
        raise DefinitionError(f"unknown format `{name}`", help=nearest(name, FORMATS))
    click.echo(json.dumps(json_schema(name), indent=1, sort_keys=True))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      imgbuild completion bash > /etc/bash_completion.d/imgbuild
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "imgbuild", "_IMGBUILD_COMPLETE").source())


# --- entry ------------------------------------------------------------------------------------------


def show_error(error: ImgbuildError) -> str:
    """An error as people read it: what, where, the source line, help."""
    from imagebuild.report import harmless

    lines = [f"error: {error.what}"]
    if error.where:
        lines.append(f"  --> {error.where}")
        if error.where.source:
            number = str(error.where.line)
            indent = " " * (error.where.column - 1)
            width = min(error.where.width, max(1, len(error.where.source) - error.where.column + 1))
            lines.append(f"{number} | {error.where.source}")
            lines.append(f"{' ' * len(number)} | {indent}{'^' * width}")
    lines += [f"  | {line}" for line in error.lines]
    if error.help:
        first, *rest = error.help.split("\n")
        lines.append(f"help: {first}")
        lines += [f"      {line}" for line in rest]
    if isinstance(error, DefinitionError):
        lines += [show_error(other) for other in error.others]
    return harmless("\n".join(lines))


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line and exit with a documented code."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    as_json = "--json" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that a terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        if as_json:
            click.echo(json.dumps({"error": error.format_message(), "exit_code": error.exit_code}, indent=1))
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        from imagebuild.run import stop_all

        stop_all()
        click.echo("interrupted; the next run goes on from the last finished node", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except ImgbuildError as error:
        _fail(error, as_json)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:
        # Disks fill up, folders vanish, rights are missing: at any place that touches a file.
        _fail(_of_system(error), as_json)


def _fail(error: ImgbuildError, as_json: bool) -> NoReturn:
    if as_json:
        try:
            click.echo(json.dumps(error.as_dict(), indent=1))
        except OSError:
            _drop_output()
    click.echo(show_error(error), err=True)
    sys.exit(error.exit_code)


def _drop_output() -> None:
    """Let nothing more be written to stdout: it cannot take it, and Python would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _of_system(error: OSError) -> ImgbuildError:
    """What the system refused, as an error of ours."""
    try:
        Path.cwd()
    except OSError:
        return DefinitionError("the current folder is gone", help="change to one that is there")
    if error.filename is None:  # writing to a stream
        _drop_output()
    where = f" `{os.fsdecode(error.filename)}`" if isinstance(error.filename, str | bytes) else ""
    return ImgbuildError(f"the system refuses{where}: {error.strerror or error}")
