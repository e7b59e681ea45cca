"""dnf's own library as a solver: package specs in, exact packages out, as JSON.

Runs inside a throw-away container of the base image, under the Python that has dnf's library, never
under imgbuild's own. Reads one JSON object from the file in argv and writes one to stdout:

    in   {"arch": str, "environment": {name: value},
          "repositories": [{"name": str, "uri": str | null, "key": path | null, "signed": [what]}],
          "relocated": {id: {"uri": str, "key": path | null}},
          "promises": [{"name", "epoch", "version", "arch", "provides": [capability], "conflicts": [name]}],
          "prefer": {name: version}, "release_from": pattern, "releases_of": [pattern],
          "transactions": [{"name": str, "after": [name], "install": [spec], "promised": bool}],
          "done": {transaction: [package]}, "candidates": [spec], "offered": [name]}
    out  {"transactions": {name: [package]}, "releases": {transaction: [kernel release]},
          "candidates": {spec: package}, "offered": {name: [version]},
          "kernels": [release], "releases_of": {pattern: {release: version}},
          "repositories": {id: {"uri": str, "keys": [path]}}, "dropped": [name]}
         or {"error": {"kind": "unreachable" | "untrusted" | "unresolvable", "what": str, "lines": [str]}}

A transaction is solved on top of those it comes `after`, so its result is what it adds to them;
`done` are the results of some that were solved before.
Promises are packages that do not exist yet (kmods before they are compiled). A repository without a
location is one of the image's own, which may be switched off there.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from xml.sax.saxutils import quoteattr

PROMISES = "imgbuild-promises"
FLAGS = {"=": "EQ", "<": "LT", ">": "GT", "<=": "LE", ">=": "GE"}


class SolveError(Exception):
    def __init__(self, kind, what, lines=()):
        super().__init__(what)
        self.kind, self.what, self.lines = kind, what, list(lines)


def entry(capability):
    """A capability such as `nvidia-kmod = 3:550.163.01` as repository metadata writes it."""
    name, relation, version = [*capability.split(), "", ""][:3]
    text = f"<rpm:entry name={quoteattr(name)}"
    if relation:
        epoch, _, rest = version.rpartition(":")
        upstream, _, release = rest.partition("-")
        text += f' flags="{FLAGS[relation]}" epoch={quoteattr(epoch or "0")} ver={quoteattr(upstream)}'
        if release:
            text += f" rel={quoteattr(release)}"
    return text + "/>"


def promise(package):
    itself = f"{package['name']} = {package['epoch'] or '0'}:{package['version']}-0"
    provides = "".join(entry(c) for c in [*package["provides"], itself])
    conflicts = "".join(entry(name) for name in package["conflicts"])
    return (
        f'<package type="rpm"><name>{package["name"]}</name><arch>{package["arch"]}</arch>'
        f'<version epoch={quoteattr(package["epoch"] or "0")} ver={quoteattr(package["version"])} rel="0"/>'
        f'<checksum type="sha256" pkgid="YES">{"0" * 64}</checksum><summary>promise</summary><description/>'
        '<packager/><url/><time file="0" build="0"/><size package="0" installed="0" archive="0"/>'
        '<location href="none.rpm"/><format><rpm:license/><rpm:vendor/><rpm:group/><rpm:buildhost/>'
        '<rpm:sourcerpm/><rpm:header-range start="0" end="0"/>'
        f"<rpm:provides>{provides}</rpm:provides><rpm:conflicts>{conflicts}</rpm:conflicts>"
        "</format></package>"
    )


def promise_repository(packages):
    """A folder with the metadata of packages that are not there (createrepo_c's format, two files)."""
    folder = tempfile.mkdtemp(prefix="imgbuild-promises.")
    os.mkdir(os.path.join(folder, "repodata"))
    primary = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<metadata xmlns="http://linux.duke.edu/metadata/common"'
        f' xmlns:rpm="http://linux.duke.edu/metadata/rpm" packages="{len(packages)}">'
        + "".join(promise(package) for package in packages)
        + "</metadata>\n"
    )
    index = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<repomd xmlns="http://linux.duke.edu/metadata/repo">'
        '<revision>0</revision><data type="primary"><checksum type="sha256">'
        f'{hashlib.sha256(primary.encode()).hexdigest()}</checksum><location href="repodata/primary.xml"/>'
        f"<timestamp>0</timestamp><size>{len(primary.encode())}</size></data></repomd>\n"
    )
    for name, text in (("primary.xml", primary), ("repomd.xml", index)):
        with open(os.path.join(folder, "repodata", name), "w", encoding="utf-8") as file:
            file.write(text)
    return folder


class Solver:
    def __init__(self, question):
        # Plug-ins are the host's business, not a solver's: some change what is found, some want a user.
        self.base = dnf.Base()
        conf = self.base.conf
        conf.read()
        conf.substitutions.update_from_etc("/")
        conf.substitutions["releasever"] = dnf.rpm.detect_releasever("/") or ""
        conf.skip_if_unavailable = False
        conf.install_weak_deps = False
        conf.best = True
        conf.assumeyes = True
        conf.keepcache = False
        conf.retries, conf.timeout, conf.minrate = 4, 30, 1
        self.question = question
        self.done = {}
        self.dropped = []
        self.repositories = {}

    def load(self):
        base = self.base
        base.read_all_repos()
        own = {repo.id: repo for repo in base.repos.iter_enabled()}
        for name, place in self.question["relocated"].items():
            repo = base.repos.get(name)
            if repo is None:
                continue
            repo.baseurl = [place["uri"]]
            # To set them to None changes nothing, and they would be asked first.
            for option in ("metalink", "mirrorlist"):
                if getattr(repo, option):
                    setattr(repo, option, "")
            if place["key"]:
                repo.gpgkey = ["file://" + place["key"]]
        for item in self.question["repositories"]:
            if item["uri"] is None:
                repo = base.repos.get(item["name"])
                if repo is None:
                    raise SolveError(
                        "unresolvable",
                        f"the base image has no repository `{item['name']}`",
                        [f"it has: {', '.join(sorted(r.id for r in base.repos.all()))}"],
                    )
                repo.enable()
                own[repo.id] = repo
                continue
            repo = base.repos.add_new_repo(item["name"], base.conf, baseurl=[item["uri"]])
            repo.gpgcheck = "packages" in item["signed"]
            repo.repo_gpgcheck = "metadata" in item["signed"]
            repo.gpgkey = ["file://" + item["key"]] if item["key"] else []
            if repo.repo_gpgcheck and not item["key"]:
                raise SolveError("untrusted", f"repository `{item['name']}` has no key")
            own.pop(item["name"], None)
        for repo in own.values():
            if not repo.gpgcheck and not repo.repo_gpgcheck:
                raise SolveError(
                    "untrusted",
                    f"the base image's own repository `{repo.id}` is not signed",
                    ["gpgcheck and repo_gpgcheck are both off in it"],
                )
        if self.question["promises"]:
            folder = promise_repository(self.question["promises"])
            repo = base.repos.add_new_repo(PROMISES, base.conf, baseurl=["file://" + folder])
            repo.gpgcheck = repo.repo_gpgcheck = False
        for repo in base.repos.iter_enabled():
            repo.skip_if_unavailable = False
            repo.deltarpm = False
        try:
            base.fill_sack(load_system_repo=True)
        except dnf.exceptions.RepoError as error:
            text = str(error)
            kind = "untrusted" if re.search("GPG|gpg|[Ss]ignature", text) else "unreachable"
            raise SolveError(kind, text.split(": ", 1)[0], [text]) from None
        self.own = own
        for name, packages in self.question["done"].items():
            wanted = {(p["name"], p["version"], p["arch"]) for p in packages}
            query = self.available().filter(name=[p["name"] for p in packages])
            found = [p for p in query if (p.name, p.evr, p.arch) in wanted]
            self.done[name] = {str(p): p for p in found}

    def package(self, found):
        kind, sha256 = found.returnIdSum() or ("", "")
        if kind != "sha256":
            raise SolveError("unresolvable", f"{found} has no SHA-256 in repository `{found.reponame}`")
        name = found.reponame
        if name in self.own and name not in self.repositories:
            place = found.remote_location(schemes=("https", "http", "file"))
            if not place or not place.endswith(found.location):
                raise SolveError("unresolvable", f"cannot tell where repository `{name}` lies: {place}")
            keys = [re.sub("^file://", "", key) for key in found.repo.gpgkey] if found.repo.gpgcheck else []
            self.repositories[name] = {"uri": place[: -len(found.location)].rstrip("/"), "keys": keys}
        return {
            "name": found.name,
            "version": found.evr,
            "arch": found.arch,
            "repository": name,
            "path": found.location,
            "size": found.downloadsize,
            "sha256": sha256.lower(),
        }

    def releases(self, pattern, packages):
        """Kernel releases that packages tell: {release: version of the package}, oldest first."""
        name, relation, _ = pattern.partition(" = ")
        found = {}
        for package in sorted(packages):
            if relation:
                for capability in package.provides:
                    have, equal, release = str(capability).partition(" = ")
                    if have == name and equal:
                        found[release] = package.evr
            else:
                front, _, back = name.partition("{release}")
                if package.name.startswith(front) and package.name.endswith(back):
                    found[package.name[len(front) : len(package.name) - len(back)]] = package.evr
        return found

    def available(self):
        return self.base.sack.query().available().filter(arch=[self.question["arch"], "noarch"])

    def releases_of(self, pattern):
        name, relation, _ = pattern.partition(" = ")
        query = self.available()
        found = (
            query.filter(provides=name)
            if relation
            else query.filter(name__glob=name.replace("{release}", "*"))
        )
        return self.releases(pattern, found)

    def prefer(self, on, settled=()):
        """Keep to the versions that were locked, where the repositories still have them.

        Names that are settled already are left alone: an earlier transaction may have dropped its preference.
        """
        self.base.sack.reset_excludes()
        if not on:
            return
        available = self.available()
        for name, version in self.question["prefer"].items():
            named = available.filter(name=name)
            if name not in settled and named.filter(evr=version):
                self.base.sack.add_excludes(named.difference(named.filter(evr=version)))

    def solve(self, transaction):
        below = {p.name for earlier in transaction["after"] for p in self.done.get(earlier, {}).values()}
        try:
            self.prefer(True, below)
            return self.attempt(transaction)
        except SolveError:
            if not self.question["prefer"]:
                raise
        self.dropped.append(transaction["name"])
        self.prefer(False)
        return self.attempt(transaction)

    def attempt(self, transaction):
        base = self.base
        base.reset(goal=True)
        below = {}
        for earlier in transaction["after"]:
            below |= self.done.get(earlier, {})
        for package in below.values():
            base.package_install(package)
        try:
            if transaction.get("promised"):
                # By name: another package may provide the same, such as the DKMS one.
                for package in self.base.sack.query().filter(reponame=PROMISES):
                    base.package_install(package)
            base.install_specs(transaction["install"])
            base.resolve(allow_erasing=False)
        except dnf.exceptions.MarkingErrors as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise SolveError(
                "unresolvable", lines[-1] if lines else str(error), self.hints(transaction)
            ) from None
        except dnf.exceptions.Error as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise SolveError(
                "unresolvable", f"the packages of {transaction['name']} cannot be installed together", lines
            ) from None
        chosen = sorted(base.transaction.install_set) if base.transaction else []
        added = {str(p): p for p in chosen if str(p) not in below and p.reponame != PROMISES}
        self.done[transaction["name"]] = below | added
        return list(added.values())

    def hints(self, transaction):
        """What there is of the names that were not found."""
        lines = []
        for spec in transaction["install"]:
            name = re.split(r"[ <>=]", spec)[0]
            offered = self.offered(name) or sorted(self.releases_of(name + " = {release}"))
            if offered and name != spec:
                lines.append(f"{spec}: offered {', '.join(offered[-6:])}")
            elif not offered and not self.base.sack.query().filter(provides=name):
                lines.append(f"{spec}: in no repository")
        return lines

    def offered(self, name):
        return [package.evr for package in sorted(self.available().filter(name=name))]

    def candidate(self, spec):
        self.prefer(True)
        query = dnf.subject.Subject(spec).get_best_query(self.base.sack, with_nevra=True, with_provides=True)
        found = query.available().filter(arch=[self.question["arch"], "noarch"], latest=1)
        if not found:
            raise SolveError("unresolvable", f"no repository has a package `{spec}`")
        return sorted(found)[-1]


def installed_kernels():
    root = "/usr/lib/modules"
    names = os.listdir(root) if os.path.isdir(root) else []
    return sorted(name for name in names if os.path.isfile(os.path.join(root, name, "vmlinuz")))


def answer(question):
    solver = Solver(question)
    solver.load()
    found = {"kernels": installed_kernels(), "transactions": {}, "releases": {}, "candidates": {}}
    found["releases_of"] = {pattern: solver.releases_of(pattern) for pattern in question["releases_of"]}
    found["offered"] = {name: solver.offered(name) for name in question["offered"]}
    for transaction in question["transactions"]:
        packages = solver.solve(transaction)
        found["transactions"][transaction["name"]] = [solver.package(p) for p in packages]
        found["releases"][transaction["name"]] = sorted(solver.releases(question["release_from"], packages))
    found["candidates"] = {spec: solver.package(solver.candidate(spec)) for spec in question["candidates"]}
    return found | {"repositories": solver.repositories, "dropped": solver.dropped}


if __name__ == "__main__":
    real_stdout = os.dup(1)
    os.dup2(2, 1)  # the library prints progress; stdout is for the answer
    with open(sys.argv[1], encoding="utf-8") as file:
        asked = json.load(file)
    os.environ.update(asked["environment"])
    import dnf
    import dnf.exceptions
    import dnf.rpm
    import dnf.subject

    try:
        result = answer(asked)
    except SolveError as error:
        result = {"error": {"kind": error.kind, "what": error.what, "lines": error.lines}}
    except dnf.exceptions.Error as error:
        result = {"error": {"kind": "unresolvable", "what": "dnf refuses", "lines": [str(error)]}}
    with os.fdopen(real_stdout, "w") as out:
        json.dump(result, out)
