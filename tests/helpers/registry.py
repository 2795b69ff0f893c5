"""A real registry (Debian's docker-registry) in a process, a token server, and a network in front of it that fails."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from helpers.emulator_packages import programs_folder
from helpers.ports import free_ports

USER, PASSWORD, TOKEN = "someone", "secret", "a-token"
#: Turns the bytes that the registry has sent so far on one connection, and the new ones, into what arrives; None: cut.
Fault = Callable[[str, int, bytes], bytes | None]


@contextmanager
def running_registry(
    folder: Path, auth: str = "", *, address: str = "127.0.0.1", name: str = "", tls: str = ""
) -> Iterator[str]:
    """``HOST:PORT`` of a registry.

    ``auth`` is a section of its configuration, ``tls`` a part of ``http``; it listens on ``address``, called ``name``.
    """
    program = programs_folder("registry", "docker-registry") / "usr" / "bin" / "docker-registry"
    folder.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        f"http: {{addr: '{address}:{port}'{tls}}}\n{auth}"
    )
    with open(folder / "log", "wb") as log, subprocess.Popen([program, "serve", config], stderr=log, stdout=log) as run:
        try:
            wait_for_port(port, address.strip("[]"))
            yield f"{name or address}:{port}"
        finally:
            run.terminate()
            run.wait(10)


def wait_for_port(port: int, address: str = "127.0.0.1") -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection((address, port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the registry does not start"
            time.sleep(0.02)


@contextmanager
def token_server(asked: list[str]) -> Iterator[str]:
    """Gives :data:`TOKEN` to whoever has the password; ``asked`` gets the addresses that were asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            known = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            right = self.headers.get("Authorization") == known
            body = json.dumps({"token": TOKEN} if right else {"errors": [{"code": "DENIED", "message": "no"}]}).encode()
            self.send_response(200 if right else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/token"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def login(folder: Path, host: str, user: str = USER, password: str = PASSWORD) -> Path:
    """A folder for ``DOCKER_CONFIG``, as ``docker login`` writes it."""
    folder.mkdir(exist_ok=True)
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return folder


class Network:
    """A relay to a registry; ``fault`` is applied to answers, ``requests`` has the first line of each request."""

    def __init__(self, host: str) -> None:
        self._backend = host
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.fault: Fault | None = None
        self.before: Callable[[str], None] | None = None
        self.requests: list[str] = []
        self.heads: list[str] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        # A blocked accept ends by shutdown, not by close.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        name, port = self._backend.split(":")
        with client, socket.create_connection((name, int(port))) as backend:
            data = client.recv(65536)
            line = data.partition(b"\r\n")[0].decode()
            self.requests.append(line)
            self.heads.append(data.partition(b"\r\n\r\n")[0].decode("latin-1"))
            if self.before is not None:
                self.before(line)
            backend.sendall(data)
            threading.Thread(target=self._upstream, args=(client, backend), daemon=True).start()
            sent = 0
            try:
                while data := backend.recv(16384):
                    arrives = self.fault(line, sent, data) if self.fault else data
                    if arrives is None:
                        return
                    client.sendall(arrives)
                    sent += len(data)
            except OSError:
                pass
            finally:
                # Closing alone would not end the other thread's wait.
                for end in (client, backend):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _upstream(client: socket.socket, backend: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                backend.sendall(data)
        except OSError:
            pass


@contextmanager
def network(host: str) -> Iterator[Network]:
    """A :class:`Network` in front of a registry."""
    relay = Network(host)
    try:
        yield relay
    finally:
        relay.close()


def skopeo(*words: object, home: Path) -> subprocess.CompletedProcess[str]:
    """Debian's skopeo, an implementation of registries and cosign's signatures that is not ours."""
    root = programs_folder("skopeo", "skopeo")
    libraries = [str(p) for p in (root / "usr" / "lib").glob("*-linux-gnu")]
    environment = os.environ | {"HOME": str(home), "LD_LIBRARY_PATH": ":".join(libraries)}
    command = [str(root / "usr" / "bin" / "skopeo"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
