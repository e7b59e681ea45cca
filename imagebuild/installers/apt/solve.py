"""apt's own library as a solver: package specs in, exact packages out, as JSON.

Runs under the system's Python, which has python-apt, never under imgbuild's own. Reads one JSON
object on stdin and writes one on stdout:

    in   {"folder": str, "arch": str, "sources": [line], "promises": [stanza], "prefer": {name: version},
          "repositories": {name: uri}, "update": bool, "release_from": pattern, "releases_of": [pattern],
          "transactions": [{"name": str, "after": [name], "install": [spec], "essential": bool,
                            "required": bool}],
          "done": {transaction: [package]}, "candidates": [spec], "offered": [name]}
    out  {"transactions": {name: [package]}, "releases": {transaction: [kernel release]},
          "candidates": {spec: package}, "offered": {name: [version]},
          "releases_of": {pattern: {release: version}}}
         or {"error": {"kind": "unreachable" | "unresolvable", "what": str, "lines": [str]}}

A transaction is solved on top of those it comes `after`, so its result is what it adds to them;
`done` are the results of some that were solved before.
Promises are dpkg status stanzas of packages that do not exist yet (kmods before they are compiled).
"""

import json
import os
import re
import sys

import apt_pkg


class SolveError(Exception):
    def __init__(self, kind, what, lines=()):
        super().__init__(what)
        self.kind, self.what, self.lines = kind, what, list(lines)


def configure(question):
    """Point the library at folders of our own: nothing of the host's apt state is read or written."""
    folder = question["folder"]
    for name in ("state/lists/partial", "cache/archives/partial"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    with open(os.path.join(folder, "sources.list"), "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in question["sources"])
    # A promise counts as installed: it needs no index, takes part in every solution, adds nothing.
    status = os.path.join(folder, "status")
    with open(status, "w", encoding="utf-8") as file:
        file.writelines(stanza + "\n\n" for stanza in question["promises"])
    apt_pkg.init_config()
    for key, value in {
        "APT::Architecture": question["arch"],
        "APT::Default-Release": "",
        "APT::Get::AllowUnauthenticated": "false",
        "APT::Install-Recommends": "false",
        "APT::Install-Suggests": "false",
        "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any",
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Acquire::http::Timeout": "30",
        "Dir::Cache": os.path.join(folder, "cache"),
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::sourcelist": os.path.join(folder, "sources.list"),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": os.path.join(folder, "state"),
        "Dir::State::status": status,
    }.items():
        apt_pkg.config.set(key, value)
    apt_pkg.config.clear("APT::Architectures")
    apt_pkg.config.set("APT::Architectures::", question["arch"])
    apt_pkg.init_system()


def update():
    sources = apt_pkg.SourceList()
    sources.read_main_list()
    cache = apt_pkg.Cache(None)
    try:
        cache.update(apt_pkg_progress(), sources, 500000)
    except apt_pkg.Error as error:
        lines = [part.strip() for part in re.split(r", (?=[EW]:)", str(error)) if part.strip()]
        raise SolveError("unreachable", "the package lists cannot be fetched", lines) from None


def apt_pkg_progress():
    from apt.progress.base import AcquireProgress

    return AcquireProgress()


class Solver:
    def __init__(self, question):
        self.question = question
        self.cache = apt_pkg.Cache(None)
        self.records = apt_pkg.PackageRecords(self.cache)
        self.sources = apt_pkg.SourceList()
        self.sources.read_main_list()
        self.arch = question["arch"]
        self.done = {
            name: [(p["name"], p["version"]) for p in packages] for name, packages in question["done"].items()
        }

    def package(self, version):
        """One package version as plain data: where it lies, how long it is, and its SHA-256."""
        for file, index in version.file_list:
            if file.not_source:
                continue
            self.records.lookup((file, index))
            sha256 = self.records.hashes.find("sha256")
            if sha256 is None:
                what = f"{version.parent_pkg.name} {version.ver_str} has no SHA-256 in its repository"
                raise SolveError("unresolvable", what)
            uri = self.sources.find_index(file).archive_uri(self.records.filename)
            for name, base in self.question["repositories"].items():
                base = re.sub(r"^file:/+", "file:/", base.rstrip("/")) + "/"  # as apt writes it
                if uri.startswith(base):
                    return {
                        "name": version.parent_pkg.name,
                        "version": version.ver_str,
                        "arch": version.arch,
                        "repository": name,
                        "path": uri[len(base) :],
                        "size": version.size,
                        "sha256": sha256.hashvalue.lower(),
                    }
        raise SolveError("unresolvable", f"{version.parent_pkg.name} {version.ver_str} is in no repository")

    def find(self, spec, depcache):
        """The package a spec means, with its candidate set to the version asked for."""
        match = re.fullmatch(r"([^ =<>]+)(?: ?(=|>=|<=|>>|<<|<|>) ?(.+))?", spec)
        name, relation, wanted = match.groups()
        package = self.cache[name] if (name, self.arch) in self.cache else None
        if package is None or not package.has_versions:
            providers = [p[2].parent_pkg for p in package.provides_list] if package is not None else []
            if not providers:
                raise SolveError("unresolvable", f"no repository has a package `{name}`")
            package = providers[0]
        if relation:
            relation = {"<<": "<", ">>": ">"}.get(relation, relation)
            fitting = [v for v in package.version_list if apt_pkg.check_dep(v.ver_str, relation, wanted)]
            if not fitting:
                offered = ", ".join(sorted({v.ver_str for v in package.version_list}))
                raise SolveError(
                    "unresolvable", f"no repository has `{spec}`", [f"offered: {offered or 'none'}"]
                )
            depcache.set_candidate_ver(package, fitting[0])
        return package

    def prefer(self, depcache):
        for name, wanted in self.question["prefer"].items():
            if (name, self.arch) not in self.cache:
                continue
            package = self.cache[name]
            for version in package.version_list:
                if version.ver_str == wanted:
                    depcache.set_candidate_ver(package, version)
                    break

    def solve(self, transaction):
        depcache = apt_pkg.DepCache(self.cache)
        depcache.init()
        self.prefer(depcache)
        below, earlier_packages = set(), []
        for earlier in transaction["after"]:
            for name, version in self.done[earlier]:
                package = self.cache[name]
                for candidate in package.version_list:
                    if candidate.ver_str == version:
                        depcache.set_candidate_ver(package, candidate)
                earlier_packages.append(package)
                below.add(name)
        wanted = []
        if transaction.get("essential"):
            # Priority 0 is none at all, which a repository's own packages may have.
            priorities = (apt_pkg.PRI_REQUIRED,) if transaction["required"] else ()
            for package in self.cache.packages:
                if package.architecture != self.arch or not package.has_versions:
                    continue
                candidate = depcache.get_candidate_ver(package)
                if candidate and (package.essential or candidate.priority in priorities):
                    wanted.append(package)
        for spec in transaction["install"]:
            wanted.append(self.find(spec, depcache))
        fixer = apt_pkg.ProblemResolver(depcache)
        with apt_pkg.ActionGroup(depcache):  # or every mark walks the whole cache
            for package in earlier_packages:
                depcache.mark_install(package, False, True)
            for package in wanted:
                if depcache.get_candidate_ver(package) is None:
                    raise SolveError("unresolvable", f"`{package.name}` has no version that can be installed")
                fixer.protect(package)
                depcache.mark_install(package, False, True)
            # Only now the dependencies, as apt-get does it: what was asked for satisfies alternatives.
            for package in wanted:
                depcache.mark_install(package, True, True)
        if depcache.broken_count:
            try:
                fixer.resolve(False)
            except apt_pkg.Error:
                raise SolveError(
                    "unresolvable",
                    f"the packages of {transaction['name']} cannot be installed together",
                    self.broken(depcache),
                ) from None
        chosen = [p for p in self.cache.packages if depcache.marked_install(p)]
        for package in wanted:
            if not depcache.marked_install(package) and package.current_ver is None:
                raise SolveError("unresolvable", f"`{package.name}` cannot be installed")
        versions = [depcache.get_candidate_ver(p) for p in chosen if p.name not in below]
        self.done[transaction["name"]] = [(v.parent_pkg.name, v.ver_str) for v in versions]
        for earlier in transaction["after"]:
            self.done[transaction["name"]] += self.done[earlier]
        added = [self.package(v) for v in versions]
        return sorted(added, key=lambda p: (p["name"], p["arch"]))

    def broken(self, depcache):
        lines = []
        for package in self.cache.packages:
            if not depcache.is_inst_broken(package):
                continue
            version = depcache.get_candidate_ver(package)
            for group in version.depends_list.get("Depends", []) + version.depends_list.get("PreDepends", []):
                if not any(depcache.marked_install(v.parent_pkg) for dep in group for v in dep.all_targets()):
                    needs = " | ".join(
                        f"{dep.target_pkg.name} ({dep.comp_type} {dep.target_ver})"
                        if dep.target_ver
                        else dep.target_pkg.name
                        for dep in group
                    )
                    lines.append(f"{package.name} {version.ver_str} needs {needs}")
        return lines

    def releases(self, pattern, names):
        """Kernel releases in the names of packages, such as `linux-image-{release}`."""
        front, _, back = pattern.partition("{release}")
        whole = re.compile(re.escape(front) + r"([0-9]+\.[0-9]+[A-Za-z0-9.+_~-]*)" + re.escape(back))
        return {match[1]: match[0] for match in map(whole.fullmatch, names) if match}

    def releases_of(self, pattern):
        names = (p.name for p in self.cache.packages if p.architecture == self.arch and p.has_versions)
        found = self.releases(pattern, names)
        return {release: self.offered(name)[-1] for release, name in found.items() if self.offered(name)}

    def offered(self, name):
        """Versions a repository has of a package, oldest first."""
        if (name, self.arch) not in self.cache:
            return []
        versions = [v for v in self.cache[name].version_list if any(not f.not_source for f, _ in v.file_list)]
        return [v.ver_str for v in reversed(versions)]  # apt has the newest first

    def candidate(self, spec):
        depcache = apt_pkg.DepCache(self.cache)
        depcache.init()
        self.prefer(depcache)
        return self.package(depcache.get_candidate_ver(self.find(spec, depcache)))


def answer(question):
    configure(question)
    if question["update"]:
        update()
    apt_pkg.init_system()
    solver = Solver(question)
    transactions = {t["name"]: solver.solve(t) for t in question["transactions"]}
    return {
        "transactions": transactions,
        "releases": {
            name: sorted(solver.releases(question["release_from"], (p["name"] for p in packages)))
            for name, packages in transactions.items()
        },
        "candidates": {spec: solver.candidate(spec) for spec in question["candidates"]},
        "releases_of": {pattern: solver.releases_of(pattern) for pattern in question["releases_of"]},
        "offered": {name: solver.offered(name) for name in question["offered"]},
    }


if __name__ == "__main__":
    real_stdout = os.dup(1)
    os.dup2(2, 1)  # the library prints progress; stdout is for the answer
    try:
        result = answer(json.load(sys.stdin))
    except SolveError as error:
        result = {"error": {"kind": error.kind, "what": error.what, "lines": error.lines}}
    except apt_pkg.Error as error:
        result = {
            "error": {"kind": "unreachable", "what": "apt cannot use these sources", "lines": [str(error)]}
        }
    with os.fdopen(real_stdout, "w") as out:
        json.dump(result, out)
