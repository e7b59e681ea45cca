"""Plan → images: finds what is missing, fetches what it needs, builds it in parallel, names the result.

A node whose image is in local storage under its key is done. Work that was cut short goes on at the
first missing node; nothing half-made ever has a name.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from imagebuild import images, run
from imagebuild.compat import Verdict
from imagebuild.errors import ImgbuildError, UnavailableError
from imagebuild.gather import Offline
from imagebuild.load import Selection
from imagebuild.lock import offered
from imagebuild.plan import Node, Plan
from imagebuild.render import LABEL_PREFIX, LAYER_TIME, REPOSITORY, Rendered, render, write_context
from imagebuild.report import Report, Step, seconds, size
from imagebuild.sources import (
    GoneError,
    Location,
    Wanted,
    fetch,
    locate_locked,
    pinned_source,
    registry_reference,
    untagged,
    wanted_packages,
)
from imagebuild.state import State, sha256_of

Status = Literal["cached", "pulled", "built", "not needed"]


@dataclass(frozen=True)
class NodeResult:
    """What became of one node."""

    name: str
    status: Status
    key: str
    image: str
    seconds: float = 0.0


@dataclass(frozen=True)
class BuildResult:
    """What a build left behind. `digest` is that of the image's manifest in local storage."""

    image: str
    digest: str
    size_bytes: int
    tags: tuple[str, ...]
    nodes: tuple[NodeResult, ...]
    downloaded_files: int = 0
    downloaded_bytes: int = 0

    @property
    def worked(self) -> bool:
        """Tell whether anything had to be done."""
        return any(node.status in ("built", "pulled") for node in self.nodes)

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "image": self.image,
            "digest": self.digest,
            "size_bytes": self.size_bytes,
            "tags": list(self.tags),
            "downloaded_files": self.downloaded_files,
            "downloaded_bytes": self.downloaded_bytes,
            "nodes": [node.__dict__ for node in self.nodes],
        }


@dataclass(frozen=True)
class Options:
    """How to build; none of it changes what is built."""

    jobs: int = 2
    no_cache: bool = False
    cache: str | None = None
    tags: tuple[str, ...] | None = None
    """Names for the result; None means the default name, () none."""
    offline: Offline | None = None
    """Ask no network: everything is here, or in the folder this names."""


def default_name(selection: Selection) -> str:
    """The name a finished image gets when no other is asked for."""
    return f"{REPOSITORY}/{selection.name}:tier{selection.tier}"


def journal_name(plan: Plan, node: Node) -> str:
    """Where the journal keeps what a node of this selection was last built from."""
    name = f"{plan.selection.section.replace('/', '_')}-{node.name}"
    if len(name) <= 200:
        return name
    return f"{name[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"  # what a file name may hold


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The inputs in which two builds of a node differ, in words; `old` may be junk from a journal."""
    old = {k: v for k, v in old.items() if isinstance(v, str)} if isinstance(old, Mapping) else {}
    found = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            found.append(f"{name} added")
        elif name not in new:
            found.append(f"{name} removed")
        elif old[name] != new[name]:
            if name.startswith("package "):
                found.append(f"{name} {old[name].split(' ')[0]} -> {new[name].split(' ')[0]}")
            else:
                found.append(f"{name} changed")
    return found


def needed(rendered: Sequence[Rendered], there: Iterable[str]) -> list[Rendered]:
    """The nodes to make, parents first: those missing on the way from the target down to what is there."""
    have = set(there)
    by_name = {item.node.name: item for item in rendered}
    found: set[str] = set()
    queue = [rendered[-1]]
    while queue:
        item = queue.pop()
        if item.image in have or item.node.name in found:
            continue
        found.add(item.node.name)
        queue += [by_name[parent] for parent in item.node.parents]
    return [item for item in rendered if item.node.name in found]


def build(
    plan: Plan, rendered: Sequence[Rendered], state: State, report: Report, options: Options
) -> BuildResult:
    """Make the target of a plan.

    Raises:
        UnavailableError: a tool, right, mirror or registry is missing.
        ImgbuildError: a node failed; the error shows its last lines, its log and how to repeat it.
    """
    assert plan.locked
    tags = (default_name(plan.selection),) if options.tags is None else options.tags
    there = images.by_name()
    if options.no_cache:
        there = {}
    todo = needed(rendered, there)
    results = {
        item.node.name: NodeResult(
            item.node.name,
            "cached" if item.image in there else "not needed",
            item.key or "",
            item.image or "",
        )
        for item in rendered
    }
    files = bytes_ = 0
    if todo:
        builder = _Builder(plan, rendered, state, report, options)
        if options.cache and not options.offline:
            builder.pull_kmods(todo)
            todo = needed(rendered, {**there, **dict.fromkeys(builder.pulled)})
        if todo:
            files, bytes_ = builder.prepare(todo)
            builder.run(todo)
        results |= builder.results
    for item in rendered:
        if results[item.node.name].status == "cached":  # built for another image, perhaps
            _remember(plan, item, state)
    target = rendered[-1]
    assert target.image is not None
    if todo:
        there = images.by_name()
    missing = [t for t in tags if _full(t) not in there or there[_full(t)].id != there[target.image].id]
    images.tag(target.image, *missing)
    final = there[target.image]
    return BuildResult(
        target.image,
        final.digest,
        final.size_bytes,
        tuple(tags),
        tuple(results[item.node.name] for item in rendered),
        files,
        bytes_,
    )


def _remember(plan: Plan, item: Rendered, state: State, seconds_taken: float | None = None) -> None:
    """Note what a node of this selection was made from, and how long that took."""
    name = journal_name(plan, item.node)
    before = state.journal(name)
    if seconds_taken is None and before.get("key") == item.key:
        return
    took = before.get("seconds") if seconds_taken is None else round(seconds_taken, 1)
    state.remember(name, {"key": item.key, "inputs": dict(item.inputs), "seconds": took})


def _full(name: str) -> str:
    """A tag as local storage writes it."""
    if ":" not in name.rsplit("/", 1)[-1]:
        name += ":latest"
    first = name.split("/", 1)[0]
    return name if "." in first or ":" in first or first == "localhost" else f"localhost/{name}"


class _Builder:
    """One run of `build`: the nodes that are missing, and what became of them."""

    def __init__(
        self, plan: Plan, rendered: Sequence[Rendered], state: State, report: Report, options: Options
    ) -> None:
        self.plan = plan
        self.rendered = {item.node.name: item for item in rendered}
        self.state = state
        self.report = report
        self.options = options
        self.pulled: list[str] = []
        self.results: dict[str, NodeResult] = {}
        self.isolation = "chroot"

    # --- kmod images from a registry ---

    def cache_reference(self, item: Rendered) -> str:
        return f"{self.options.cache}:{item.node.name}-{item.key}"

    def _tls(self, which: str) -> list[str]:
        _, verify = registry_reference(str(self.options.cache), self.plan.selection.mirrors)
        return [f"--{which}-tls-verify={str(verify).lower()}"]

    def pull_kmods(self, todo: Sequence[Rendered]) -> None:
        """Take compiled kmods from the cache registry, and the cores of those that it has not.

        A registry that is down is said and passed over.
        """
        for item in sorted(todo, key=lambda item: item.node.kind == "core"):
            if item.node.kind not in ("kmod", "core"):
                continue
            if item.node.kind == "core" and f"kmod-{item.node.kmod}" in self.results:
                continue
            with self.report.step(item.node.name, "looking in the cache registry") as step:
                # It gets its name when it was looked at: an image under its key counts as done.
                pulled = f"{REPOSITORY}/pulled:{os.urandom(16).hex()}"
                try:
                    images.copy(
                        f"docker://{self.cache_reference(item)}",
                        f"containers-storage:{pulled}",
                        "--quiet",
                        *self._tls("src"),
                        attempts=2,
                    )
                    found = images.labels(pulled).get(f"{LABEL_PREFIX}.key")
                    if found != item.key:
                        step.outcome = f"the cache holds something else under this key ({found}): not used"
                        continue
                    images.tag(pulled, str(item.image))
                except ImgbuildError as error:
                    step.outcome = (
                        f"cache registry unreachable: {error.lines[-1][:160] if error.lines else error.what}"
                        if isinstance(error, UnavailableError)
                        else "not in the cache"
                    )
                    continue
                finally:
                    images.remove([pulled])
                step.outcome = "pulled from the cache"
            self.pulled.append(str(item.image))
            self.results[item.node.name] = NodeResult(
                item.node.name, "pulled", str(item.key), str(item.image), step.elapsed_s
            )

    def push_kmod(self, item: Rendered, step: Step) -> None:
        """Put a compiled kmod or core into the cache registry; failing to is said, not fatal."""
        if not self.options.cache or self.options.offline or item.node.kind not in ("kmod", "core"):
            return
        try:
            images.copy(
                f"containers-storage:{item.image}",
                f"docker://{self.cache_reference(item)}",
                "--quiet",
                *self._tls("dest"),
            )
            step.outcome = "pushed to the cache"
        except ImgbuildError as error:
            reason = error.lines[-1] if error.lines else error.what
            self.report.say(f"warning: {item.node.name} is not in the cache: {reason}")

    # --- before minute one ---

    def prepare(self, todo: Sequence[Rendered]) -> tuple[int, int]:
        """Check tools, rights, storage and disk, say what to expect, and fetch.

        Returns:
            Files and bytes downloaded.
        """
        programs = ["buildah", "unshare"]
        if any(item.node.kind == "bootstrap" for item in todo):
            programs += ["mmdebstrap", "apt-ftparchive"]
        if any(item.node.kind == "upstream" for item in todo):
            programs.append("skopeo")
        missing = [program for program in programs if not run.available(program)]
        if missing:
            packages = " ".join(sorted({run.PACKAGES[program] for program in missing}))
            raise UnavailableError(
                f"not installed: {', '.join(missing)}", help=f"install: apt-get install -y {packages}"
            )
        if os.geteuid() != 0:
            raise UnavailableError(
                "building needs root: it mounts file systems and makes namespaces",
                help="run it as root, in a root CI container, or with sudo",
            )
        self.isolation, why = images.isolation(self.state)
        info = images.storage_info()
        root = Path(info["store"]["GraphRoot"])
        wanted = self._wanted(todo)
        offline = self.options.offline
        pull = any(item.node.kind == "upstream" for item in todo)
        if offline:
            with self.report.step("take", offline.place) as taken:
                files = offline.take(wanted, self._upstream() if pull else None, self.state)
                taken.outcome = f"{files} files verified and copied" if files else "all is here"
            wanted = []
        download = sum(w.size for w in wanted if not self.state.has(w.sha256))
        installed = sum(p.size for item in todo for p in item.packages)
        # Packages unpack to about three times their size; storage holds layer and working copy.
        disk = 3 * 2 * installed + download + sum(1_500_000_000 for i in todo if i.node.kmod)
        free = min(_free(root), _free(self.state.root))
        guess = f"about {seconds(sum(self._expected_s(item) for item in todo))}"
        self.report.say(
            f"to build: {', '.join(i.node.name for i in todo)} ({guess}); "
            f"download {size(download)}, disk up to {size(disk)} of {size(free)} free"
        )
        self.report.say(
            f"isolation {self.isolation} ({why}); storage driver {info['store']['GraphDriverName']} in {root}"
        )
        if info["store"]["GraphDriverName"] == "vfs":
            self.report.say("warning: storage driver vfs copies every layer: slow, and much disk")
        if free < disk / 3:
            raise UnavailableError(
                f"not enough disk: {size(free)} free, up to {size(disk)} needed",
                help=f"free some in {root} or {self.state.root}; `buildah rmi --prune` may help",
            )
        reported = self.report.step("fetch", f"{len(wanted)} files") if wanted else nullcontext()
        with reported as step:
            got = 0

            def on_file(item: Wanted) -> None:
                nonlocal got
                got += item.size
                if step is not None:
                    step.line(f"{size(got)} of {size(download)}: {item.what}")

            try:
                files, bytes_ = fetch(wanted, self.state, on_file)
            except GoneError as error:
                raise self._offered_now(error) from None
            if step is not None:
                step.outcome = f"{files} files, {size(bytes_)} downloaded and verified"
        if pull:
            self._pull_upstream()
        return files, bytes_

    def _upstream(self) -> tuple[str, str]:
        """Name and digest of the upstream image of tier 1."""
        image, section = self.plan.selection.base.tier1.image, self.plan.section
        assert image is not None and section is not None
        return untagged(image), section.base_digest

    def _pull_upstream(self) -> None:
        """Bring the upstream image of tier 1 into local storage, under the name that FROM uses."""
        name, digest = self._upstream()
        offline = self.options.offline
        with self.report.step("pull", f"{name}@{digest}") as step:
            if offline is None:
                image = self.plan.selection.base.tier1.image or name
                source, verify = pinned_source(image, digest, self.plan.selection.mirrors)
                pulled = images.ensure(name, digest, source, verify)
            elif offline.folder is not None and not images.has(name, digest):
                with offline.folder.image(digest, self.state) as source:
                    pulled = images.ensure(name, digest, source, True)
            else:
                pulled = False
            step.outcome = "pulled" if pulled else "there already"

    def _offered_now(self, error: GoneError) -> ImgbuildError:
        """The error for files that are gone, with the versions there are now."""
        names = {item.package for item in error.gone if item.package}
        try:
            assert self.plan.section is not None
            found = offered(self.plan.selection, self.plan.section, names, self.state)
        except ImgbuildError as other:
            found = {}
            error.lines = (*error.lines, f"what there is now cannot be told: {other.what}")
        locked = {p.name: p.version for p in self.plan.section.packages()} if self.plan.section else {}
        for name in sorted(found):
            now = ", ".join(found[name][-3:]) or "nothing of that name"
            error.lines = (*error.lines, f"{name}: locked {locked.get(name, '?')}, offered {now}")
        return error

    def _expected_s(self, item: Rendered) -> float:
        """Seconds a node took last time, else what its definition or its packages let expect."""
        last = self.state.journal(journal_name(self.plan, item.node)).get("seconds")
        if isinstance(last, int | float) and math.isfinite(last) and 0 <= last < 1e6:
            return float(last)
        if item.node.kmod:
            return self.plan.selection.kmods[item.node.kmod][0].cpu_s / (os.cpu_count() or 1)
        return 10 + sum(p.size for p in item.packages) / 10e6

    def _locations(self) -> dict[str, Location]:
        """Every repository the lock takes packages from."""
        section = self.plan.section
        own = {name: found.uri for name, found in section.repositories.items()} if section else {}
        return locate_locked(self.plan.selection, own, self.state)

    def _take_keys(self, todo: Sequence[Rendered]) -> None:
        """Have the locked repository keys in the store."""
        missing = {n: k for item in todo for n, k in item.keys.items() if not self.state.has(k)}
        if not missing:
            return
        locations = self._locations()
        for name, sha256 in sorted(missing.items()):
            key = locations[name].key if name in locations else None
            if key is None or sha256_of(key) != sha256:
                raise ImgbuildError(
                    f"the key of repository `{name}` is not the one that was locked",
                    help="`imgbuild lock` tells more",
                )
            self.state.keep(key, sha256)

    def _wanted(self, todo: Sequence[Rendered]) -> list[Wanted]:
        packages = [p for item in todo for p in item.packages]
        absent = [p for p in packages if not self.state.has(p.sha256)]
        damaged = [p.name for p in absent if os.path.lexists(self.state.stored(p.sha256))]
        if damaged:
            again = "" if self.options.offline else ", fetched again"
            self.report.say(f"warning: damaged in the store{again}: {', '.join(sorted(damaged))}")
        wanted: list[Wanted] = []
        if self.options.offline:
            keys = {name: sha256 for item in todo for name, sha256 in item.keys.items()}
            wanted += [Wanted(f"the key of repository {n}", "", k) for n, k in sorted(keys.items())]
            wanted += [Wanted(f"{p.name} {p.version}", "", p.sha256, p.size) for p in absent]
        else:
            self._take_keys(todo)
            if absent:
                wanted += wanted_packages(absent, self._locations())
        for item in todo:
            if item.tarball:
                uri, sha256 = item.tarball
                wanted.append(Wanted(f"source of {item.node.kmod}", uri, sha256))
        return wanted

    # --- the builds ---

    def run(self, todo: Sequence[Rendered]) -> None:
        """Build nodes as soon as their parents are there, at most `jobs` at a time."""
        waiting = {item.node.name: set(item.node.parents) for item in todo}
        names = set(waiting)
        for parents in waiting.values():
            parents &= names
        running: dict[Future[None], str] = {}
        with ThreadPoolExecutor(max(1, self.options.jobs)) as pool:
            try:
                while waiting or running:
                    for name in [n for n, parents in waiting.items() if not parents]:
                        del waiting[name]
                        running[pool.submit(self._node, self.rendered[name])] = name
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        name = running.pop(future)
                        future.result()
                        for parents in waiting.values():
                            parents.discard(name)
            except BaseException:
                run.stop_all()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _node(self, item: Rendered) -> None:
        assert item.key is not None and item.image is not None
        with (
            self.report.step(item.node.name, item.node.summary) as step,
            self.state.lock(f"node-{item.key}", lambda text: self._waits(step, text)) as waited,
        ):
            # It may have been made since we looked, whether or not we had to wait.
            if (waited or not self.options.no_cache) and item.image in images.by_name():
                step.outcome = "built by another imgbuild"
                status: Status = "cached"
            else:
                self._build(item, step)
                status = "built"
                self.push_kmod(item, step)
        self.results[item.node.name] = NodeResult(
            item.node.name, status, item.key, item.image, round(step.elapsed_s, 2)
        )
        if status == "built":
            _remember(self.plan, item, self.state, step.elapsed_s)

    def _waits(self, step: Step, text: str) -> None:
        step.line(text)
        self.report.say(f"{step.name}: {text}")

    def _build(self, item: Rendered, step: Step) -> None:
        assert item.key is not None and item.image is not None
        name = f"{self.plan.selection.base_name}-{item.node.name}"
        log = self.state.logs / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        labels = {f"{LABEL_PREFIX}.key": item.key, f"{LABEL_PREFIX}.node": item.node.name}
        with self.state.work(item.node.name) as work:
            context = work / "context"
            paths = {sha256: self.state.stored(sha256) for sha256 in item.keys.values()}
            paths |= {p.sha256: self.state.stored(p.sha256) for p in item.packages}
            if item.tarball:
                paths[item.tarball[1]] = self.state.stored(item.tarball[1])
            for sha256, path in paths.items():
                if not self.state.has(sha256):
                    raise ImgbuildError(f"`{path}` changed since it was verified", help="build again")
            write_context(item, context, paths)
            try:
                if item.node.kind == "bootstrap":
                    self._bootstrap(context, log, step)
                images.build(
                    context,
                    name=item.image,
                    isolation=self.isolation,
                    timestamp=LAYER_TIME,
                    labels=labels,
                    scratch=work / "tmp",
                    log=log,
                    on_line=step.line,
                )
            except UnavailableError:
                raise
            except ImgbuildError as error:
                raise self._failure(item, error, context, log, step, labels) from None

    def _bootstrap(self, context: Path, log: Path, step: Step) -> None:
        images.run_alone(
            ["sh", context / "bootstrap.sh"],
            env={"SOURCE_DATE_EPOCH": str(LAYER_TIME), "TMPDIR": str(context)},
            log=log,
            on_line=step.line,
            merge=True,
        )

    def _failure(
        self,
        item: Rendered,
        error: ImgbuildError,
        context: Path,
        log: Path,
        step: Step,
        labels: Mapping[str, str],
    ) -> ImgbuildError:
        """A node's failure as a person needs it: last lines, log, and the command to repeat it."""
        kept = self.state.root / "failed" / f"{self.plan.selection.base_name}-{item.node.name}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.move(context, kept)
        except OSError:
            kept = context
        command = images.build_command(
            kept, name=str(item.image), isolation=self.isolation, timestamp=LAYER_TIME, labels=labels
        )
        advice = [f"log: {log}", f"repeat: {run.pasteable(command)}"]
        text = "\n".join(error.lines)
        if "no space left on device" in text.lower():
            advice.insert(
                0, "the disk is full: free some space; the next run goes on from the last finished node"
            )
        verdict = next((v for v in self.plan.verdicts if v.kmod == item.node.kmod), None)
        missed = item.node.kind == "kmod" and "does not compile" in text
        if verdict is not None and verdict.kind == "unknown" and missed:
            advice.insert(0, "no compat rule covers this pair; add one with a patch, see `imgbuild compat`")
        said = [line for line in error.lines if line.startswith("imgbuild: ")]
        what = f"{item.node.name} failed after {seconds(step.elapsed_s)}"
        if said and not said[-1].endswith("..."):
            what += f": {said[-1].removeprefix('imgbuild: ')}"
        return ImgbuildError(what, lines=error.lines, help="\n".join(advice))


@dataclass(frozen=True)
class Probe:
    """What compiling a pair showed. `rule_holds`: the rule still tells the truth."""

    verdict: Verdict
    compiled: bool
    rule_holds: bool
    seconds: float
    lines: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The outcome in a few lines."""
        pair = f"{self.verdict.kmod} {self.verdict.driver} on kernel {self.verdict.kernel}"
        did = "compiles" if self.compiled else "does not compile"
        as_is = " unpatched" if self.verdict.kind == "patch" else ""
        rule = f"the rule says {self.verdict.kind}" if self.verdict.rule else "no rule covers this pair"
        if self.verdict.rule:
            rule += ", which still holds" if self.rule_holds else ", which no longer tells the truth"
        lines = [f"{pair}:{as_is} {did} ({seconds(self.seconds)}); {rule}"]
        if self.verdict.where:
            lines.append(f"  rule: {self.verdict.where}")
        return "\n".join([*lines, *(f"  | {line}" for line in self.lines)])

    def as_dict(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return {
            **self.verdict.as_dict(),
            "compiled": self.compiled,
            "rule_holds": self.rule_holds,
            "seconds": round(self.seconds, 1),
            "output": list(self.lines),
        }


def probe(plan: Plan, kmod: str, state: State, report: Report) -> Probe:
    """Compile one driver as it is, without the patch of a rule, and compare with what the rule says.

    A rule `ok` holds if the driver compiles, `blocked` and `patch` if it does not.

    Raises:
        UnavailableError: what the compile needs is not to be had.
        ImgbuildError: something else than the compile failed.
    """
    verdict = next(v for v in plan.verdicts if v.kmod == kmod)
    bare = replace(
        plan,
        nodes=tuple(
            replace(node, patches=()) if node.kmod else node
            for node in plan.nodes
            if node.kmod == kmod or node.kind not in ("core", "kmod", "tier")
        ),
    )
    lines: tuple[str, ...] = ()
    began = time.monotonic()
    try:
        build(bare, render(bare), state, report, Options(tags=()))
        compiled = True
    except UnavailableError:
        raise
    except ImgbuildError as error:
        if not any("does not compile" in line for line in error.lines):
            raise
        compiled, lines = False, error.lines
    expected = verdict.kind in ("ok", "unknown")
    return Probe(verdict, compiled, compiled == expected, time.monotonic() - began, lines)


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
