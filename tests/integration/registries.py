"""Registries for tests: a real one (container or process), and a proxy that misbehaves on order.

The registry is a container, through testcontainers, where an engine answers. Where none does and podman
is there, its API is started for the tests in a mount namespace of its own, because crun refuses hosts with
hybrid cgroups. Where that is impossible too, the same registry program runs as a process.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BINARY = "docker-registry"
INSTALL = "apt-get install -y docker-registry"
PUBLIC_IMAGE = "docker.io/library/registry:2"
OWN_IMAGE = "localhost/imgbuild-test/registry:2"
# The user `imgbuild` with the password `secret`, as htpasswd(1) writes it.
HTPASSWD = "imgbuild:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
MANIFESTS = "application/vnd.oci.image.manifest.v1+json"


def free_port() -> int:
    """A port of 127.0.0.1 nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(answers: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    """Wait until `answers` is true. Raises TimeoutError, naming `what`."""
    until = time.monotonic() + timeout_s
    while not answers():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} does not answer after {timeout_s:.0f} s")
        time.sleep(0.05)


class Registry:
    """A running registry: `address` is HOST:PORT, plain HTTP."""

    kind = ""
    engine = ""

    def __init__(self, address: str) -> None:
        self.address = address

    def stop(self) -> None:
        """Take it down; what was pushed stays for the next `start`."""
        raise NotImplementedError

    def start(self) -> None:
        """Bring it up again at the same address."""
        raise NotImplementedError

    def get(self, path: str, accept: str = "*/*") -> tuple[bytes, dict[str, str]]:
        """Body and headers of GET /v2/PATH. Raises urllib.error.HTTPError."""
        request = urllib.request.Request(f"http://{self.address}/v2/{path}", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read(), {k.lower(): v for k, v in response.headers.items()}

    def answers(self) -> bool:
        """Tell whether it is up; one that asks for a password is."""
        try:
            self.get("")
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            return False
        return True

    def tags(self, repository: str) -> list[str]:
        """The tags of a repository, sorted; none when there is no such repository."""
        try:
            return sorted(json.loads(self.get(f"{repository}/tags/list")[0])["tags"] or [])
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return []
            raise

    def digest(self, repository: str, tag: str) -> str:
        """The digest the registry knows a tag's manifest by."""
        return self.get(f"{repository}/manifests/{tag}", MANIFESTS)[1]["docker-content-digest"]

    def manifest(self, repository: str, tag: str) -> dict[str, Any]:
        """A tag's manifest."""
        found: dict[str, Any] = json.loads(self.get(f"{repository}/manifests/{tag}", MANIFESTS)[0])
        return found

    def blob(self, repository: str, digest: str) -> bytes:
        """A layer or config, as it lies in the registry."""
        return self.get(f"{repository}/blobs/{digest}")[0]

    def put_manifest(self, repository: str, tag: str, text: str, kind: str) -> str:
        """Put a manifest, or a list of some, of media type `kind` under a tag; returns its digest."""
        request = urllib.request.Request(
            f"http://{self.address}/v2/{repository}/manifests/{tag}",
            data=text.encode(),
            headers={"Content-Type": kind},
            method="PUT",
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(response.headers["Docker-Content-Digest"])

    def config(self, repository: str, tag: str) -> dict[str, Any]:
        """A tag's image config."""
        found: dict[str, Any] = json.loads(
            self.blob(repository, self.manifest(repository, tag)["config"]["digest"])
        )
        return found


class ProcessRegistry(Registry):
    """The registry program as a child of the tests, its data in a folder."""

    kind = "process"

    def __init__(self, folder: Path, *, htpasswd: str = "") -> None:
        super().__init__(f"127.0.0.1:{free_port()}")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        text = config(folder / "data")
        if htpasswd:
            (folder / "htpasswd").write_text(htpasswd)
            text += f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n"
        (folder / "config.yml").write_text(text)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [BINARY, "serve", str(self.folder / "config.yml")],
                env={**os.environ, "REGISTRY_HTTP_ADDR": self.address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self.answers, f"registry {self.address}")
        except TimeoutError:
            self.stop()
            raise

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class ContainerRegistry(Registry):
    """The registry in a container, through testcontainers; on the host's network, at 127.0.0.1 only."""

    kind = "testcontainers"

    def __init__(self, image: str, engine: str) -> None:
        from testcontainers.core.container import DockerContainer

        super().__init__(f"127.0.0.1:{free_port()}")
        self.engine = engine
        self._container = (
            DockerContainer(image)
            .with_kwargs(network_mode="host")
            .with_env("REGISTRY_HTTP_ADDR", self.address)
            .with_env("REGISTRY_STORAGE_DELETE_ENABLED", "true")
        )
        self._container.start()
        try:
            wait_until(self.answers, f"registry {self.address} in its container")
        except TimeoutError:
            self.close()
            raise

    def start(self) -> None:
        self._container.get_wrapped_container().start()
        wait_until(self.answers, f"registry {self.address} in its container")

    def stop(self) -> None:
        self._container.get_wrapped_container().stop(timeout=1)
        wait_until(lambda: not self.answers(), f"the end of registry {self.address}")

    def close(self) -> None:
        """Remove the container and what was pushed into it."""
        self._container.stop()


def config(data: Path | str) -> str:
    """The registry's config file."""
    return (
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {data}}}, delete: {{enabled: true}}}}\n"
        'http: {addr: "127.0.0.1:5000", secret: test}\n'
    )


@contextlib.contextmanager
def process_registry(folder: Path, *, htpasswd: str = "") -> Iterator[ProcessRegistry]:
    """A registry of one's own, as a process; with `htpasswd` (see HTPASSWD) it asks for a password."""
    if shutil.which(BINARY) is None:
        raise RuntimeError(f"these tests need the program {BINARY}: {INSTALL}")
    registry = ProcessRegistry(folder, htpasswd=htpasswd)
    try:
        yield registry
    finally:
        registry.stop()


@contextlib.contextmanager
def container_registry(folder: Path) -> Iterator[ContainerRegistry]:
    """A registry in a container. Raises whatever makes that impossible here."""
    with engine(folder) as name:
        registry = ContainerRegistry(_registry_image(folder), name)
        try:
            yield registry
        finally:
            registry.close()


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[str]:
    """See that $DOCKER_HOST is an engine that answers, starting podman's API if need be; yields its name."""
    # testcontainers reads these when it is imported. Its reaper needs an image and a mounted socket; the
    # registry is on the host's network, so nothing has to be asked for an address.
    settings = {"TESTCONTAINERS_RYUK_DISABLED": "true", "TESTCONTAINERS_CONNECTION_MODE": "docker_host"}
    kept = {name: os.environ.get(name) for name in (*settings, "DOCKER_HOST")}
    os.environ.update(settings)
    process = None
    try:
        for host in _hosts():
            os.environ["DOCKER_HOST"] = host
            if name := _engine_name():
                break
        else:
            process = _start_podman(folder)
            os.environ["DOCKER_HOST"] = f"unix://{folder}/podman.sock"
            name = f"{_engine_name()}, started for the tests"
        yield name
    finally:
        if process is not None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            _unmount_below(folder)
        for variable, value in kept.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value


def _hosts() -> list[str]:
    """Engines that may be there: the named one alone, else the usual sockets."""
    if named := os.environ.get("DOCKER_HOST"):
        return [named]
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    sockets = ("/var/run/docker.sock", "/run/podman/podman.sock", f"{runtime}/podman/podman.sock")
    return [f"unix://{path}" for path in sockets if Path(path).exists()]


def _engine_name() -> str:
    """Name and version of the engine at $DOCKER_HOST; empty when none answers."""
    import docker

    try:
        client = docker.from_env(timeout=60)
        version = client.version()
        client.close()
    except Exception:  # whatever it is, there is no engine to use
        return ""
    return f"{version.get('Components', [{}])[0].get('Name', 'engine')} {version['Version']}"


def _start_podman(folder: Path) -> subprocess.Popen[bytes]:
    """Start podman's API service with a storage and a mount namespace of its own."""
    if shutil.which("podman") is None or os.geteuid() != 0:
        raise RuntimeError("no container engine answers, and podman as root is not to be had")
    folder.mkdir(parents=True, exist_ok=True)
    containers = folder / "containers.conf"
    containers.write_text(
        '[containers]\ncgroups = "disabled"\ncgroupns = "host"\nnetns = "host"\n'
        'default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "crun"\n'
    )
    storage = folder / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n')
    path = folder / "podman.sock"
    script = (
        "umount /sys/fs/cgroup/unified 2>/dev/null; ulimit -n 20000; ulimit -u 30000; "
        f"exec podman --log-level=warn system service --time=0 unix://{path}"
    )
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
            env={**os.environ, "CONTAINERS_CONF": str(containers), "CONTAINERS_STORAGE_CONF": str(storage)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    os.environ["DOCKER_HOST"] = f"unix://{path}"
    try:
        wait_until(
            lambda: process.poll() is not None or (path.exists() and _engine_name() != ""), "podman's API"
        )
        if process.poll() is not None:
            raise RuntimeError(f"podman's API ended: {(folder / 'service.log').read_text()[-300:]}")
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process


def _registry_image(folder: Path) -> str:
    """The image to run: made of the installed registry program where there is one, else the public one."""
    import docker

    binary = shutil.which(BINARY)
    if binary is None:
        return PUBLIC_IMAGE
    context = folder / "context"
    linked = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout.split()
    for file in [binary, *(word for word in linked if word.startswith("/"))]:
        place = context / file.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)  # follows links: the loader is one
    (context / "config.yml").write_text(config("/data"))
    (context / "data").mkdir()
    (context / "Containerfile").write_text(
        f'FROM scratch\nCOPY . /\nENTRYPOINT ["{binary}"]\nCMD ["serve", "/config.yml"]\n'
    )
    archive = folder / "registry.tar"
    own = ["--root", folder / "build", "--runroot", folder / "build-run", "--storage-driver", "vfs"]
    for words in (
        ["bud", "--quiet", "--isolation", "chroot", "--tag", OWN_IMAGE, context],
        ["push", "--quiet", OWN_IMAGE, f"docker-archive:{archive}:{OWN_IMAGE}"],
    ):
        subprocess.run(
            ["buildah", *map(str, own), *map(str, words)], check=True, capture_output=True, timeout=300
        )
    client = docker.from_env(timeout=60)
    client.images.load(archive.read_bytes())
    client.close()
    return OWN_IMAGE


def _unmount_below(folder: Path) -> None:
    """Unmount whatever an engine left mounted below a folder, deepest first."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)


def remove_storage(folder: Path) -> None:
    """Remove a folder that held a container storage."""
    _unmount_below(folder)
    shutil.rmtree(folder, ignore_errors=True)


# What a proxy does with a request: None forwards it, a number answers with that status, "drop" hangs up.
Answer = int | str | None


class Proxy:
    """An HTTP proxy before a registry that can misbehave. `requests` are the methods and paths it saw."""

    def __init__(self, upstream: str | None, decide: Callable[[str, str], Answer]) -> None:
        self.upstream = upstream
        self.decide = decide
        self.requests: list[tuple[str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                proxy.requests.append((self.command, self.path))
                answer = proxy.decide(self.command, self.path)
                if answer == "drop" or (answer is None and proxy.upstream is None):
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif isinstance(answer, int):
                    self._body()
                    code = {401: "UNAUTHORIZED", 403: "DENIED"}.get(answer, "UNSUPPORTED")
                    text = json.dumps({"errors": [{"code": code, "message": "refused by the test"}]})
                    self._answer(answer, text.encode())
                else:
                    self._forward()

            do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _handle

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while length := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(length))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _forward(self) -> None:
                body = self._body()
                headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
                connection = http.client.HTTPConnection(str(proxy.upstream), timeout=30)
                connection.request(self.command, self.path, body, {**headers, "Content-Length": len(body)})
                response = connection.getresponse()
                self._answer(response.status, response.read(), response.getheaders())
                connection.close()

            def _answer(self, status: int, body: bytes, headers: list[tuple[str, str]] | None = None) -> None:
                self.send_response(status)
                for name, value in headers or [("Content-Type", "application/json")]:
                    if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        if name.lower() == "content-length" and self.command != "HEAD":
                            continue
                        self.send_header(name, value)
                if status == 401 and not headers:
                    self.send_header("WWW-Authenticate", 'Basic realm="test"')
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(body)))
                elif not headers:
                    self.send_header("Content-Length", "0")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, part: str = "") -> int:
        """How many requests of a method had `part` in their path."""
        return sum(1 for m, path in list(self.requests) if m == method and part in path)


def auth_file(path: Path, address: str, user: str, password: str) -> Path:
    """Write a file of credentials as `skopeo login --authfile` does."""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {address: {"auth": token}}}))
    return path
