"""Releases that go through a real registry: whole, checked, gone on with where the network failed, and signed."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.bundle_samples import bundle_spec, matrix_engine, requirements
from helpers.keys import make_key, openssl
from helpers.registry import PASSWORD, USER, Network, login, network, running_registry, skopeo, token_server

from toolchain.artifact import digest_bytes
from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.bundle.read import Release, open_release
from toolchain.bundle.resolve import resolve
from toolchain.bundle.sign import read_trust, sign_release
from toolchain.cli.main import cli
from toolchain.errors import ExitCode, ToolchainError
from toolchain.registry.client import Registry
from toolchain.registry.pull import pull
from toolchain.registry.push import push
from toolchain.registry.reference import RegistryReference, parse_reference
from toolchain.runtime import load

pytestmark = pytest.mark.xdist_group("registry")
SIZE = 3_000_000


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def flaky(host: str) -> Iterator[Network]:
    with network(host) as relay:
        yield relay


def release_of(folder: Path, version: str = "1.0.0", seed: int = 1) -> Release:
    """Two bundles, and a file of 3 MB in each."""
    (folder / "e").mkdir(parents=True, exist_ok=True)
    big = folder / "report.md"
    big.write_bytes(bytes([seed]) + os.urandom(SIZE - 1))
    engine = matrix_engine(folder / "e" / "engine")
    specs = [bundle_spec(engine, name, requirements(), report_md=big) for name in ("one", "two")]
    specs = [replace(spec, manifest=replace(spec.manifest, version=version)) for spec in specs]
    pack_release("sample", version, [pack_bundle(spec) for spec in specs], folder / "release")
    return open_release(folder / "release")


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def place(host: str, request: pytest.FixtureRequest, tag: str = "stable") -> RegistryReference:
    return RegistryReference(host, f"models/{abs(hash(request.node.name))}", tag)


def refused(reference: RegistryReference, folder: Path) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        pull(reference, folder)
    assert not list(folder.glob("sample/*")), "nothing half is left"
    return caught.value


def test_what_is_pulled_is_what_was_pushed(host: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    release = release_of(tmp_path)
    pushed = push(release, place(host, request, ""))
    assert pushed.reference.tag == "1.0.0"
    assert pushed.sent > SIZE
    assert push(release, place(host, request, "")).sent == 0
    pulled = pull(pushed.reference, tmp_path / "p")
    assert pulled.digest == release.digest
    assert content(tmp_path / "p" / "sample" / "1.0.0") == content(release.path)
    assert not list((tmp_path / "p" / ".pull").iterdir())
    # What is there already is not fetched again, also under another version.
    assert pull(pushed.reference, tmp_path / "p").received == 0
    only = pull(pushed.reference, tmp_path / "q", target="two")
    assert [b.target for b in open_release(only.folder).bundles] == ["two"]
    assert resolve(str(only.folder)).digest == release.bundles[1].digest


def test_a_transfer_that_breaks_off_is_gone_on_with(
    flaky: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    release = release_of(tmp_path)
    reference = place(flaky.host, request)
    push(release, reference)
    cuts = []

    def cut(line: str, sent: int, data: bytes) -> bytes | None:
        if "GET" in line and "/blobs/" in line and sent > SIZE // 3:
            cuts.append(sent)
            return None
        return data

    flaky.fault = cut
    pulled = pull(reference, tmp_path / "p")
    assert len(cuts) >= 2
    assert SIZE < pulled.received < 1.1 * SIZE
    assert sum("Range: bytes=" in head for head in flaky.heads) == len(cuts)
    assert content(pulled.folder) == content(release.path)


def test_a_transfer_that_was_given_up_is_gone_on_with_the_next_time(
    flaky: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reference = place(flaky.host, request)
    release = release_of(tmp_path)
    push(release, reference)
    dead = []

    def cut(line: str, sent: int, data: bytes) -> bytes | None:
        if "/blobs/" in line and (dead or sent > SIZE // 2):
            dead.append(line)
            return None
        return data

    flaky.fault = cut
    error = refused(reference, tmp_path / "p")
    assert error.code is ExitCode.REGISTRY
    assert "cannot be reached" in error.what
    flaky.fault = None
    pulled = pull(reference, tmp_path / "p")
    assert pulled.received < SIZE * 0.6
    assert content(pulled.folder) == content(release.path)


def test_an_upload_that_breaks_off_is_sent_again(
    flaky: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cut = []

    def fault(line: str, sent: int, data: bytes) -> bytes | None:
        if line.startswith("PUT") and "/blobs/" in line and len(cut) < 2:
            cut.append(line)
            return None
        return data

    flaky.fault = fault
    release = release_of(tmp_path)
    push(release, place(flaky.host, request))
    assert len(cut) == 2
    assert pull(place(flaky.host, request), tmp_path / "p").digest == release.digest


@pytest.mark.parametrize("part", ["/blobs/", "/manifests/stable", "/manifests/sha256"])
def test_bytes_that_change_on_the_way_are_refused_and_fetched_anew(
    flaky: Network, tmp_path: Path, request: pytest.FixtureRequest, part: str
) -> None:
    reference = place(flaky.host, request)
    release = release_of(tmp_path)
    push(release, reference)

    def flip(line: str, sent: int, data: bytes) -> bytes:
        return (
            data[:-1] + bytes([data[-1] ^ 1]) if line.startswith("GET") and part in line and len(data) > 700 else data
        )

    flaky.fault = flip
    assert refused(reference, tmp_path / "p").code is ExitCode.DAMAGED_BUNDLE
    flaky.fault = None
    assert content(pull(reference, tmp_path / "p").folder) == content(release.path)


def test_a_tag_that_moves_meanwhile_gives_one_release_and_not_a_mixture(
    flaky: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reference = place(flaky.host, request)
    old, new = release_of(tmp_path / "old"), release_of(tmp_path / "new", "2.0.0", 2)
    push(old, reference)
    moved = []

    def move(line: str) -> None:
        if "GET" in line and "/blobs/" in line and not moved:
            moved.append(line)
            push(new, reference)

    flaky.before = move
    assert pull(reference, tmp_path / "p").digest == old.digest
    assert pull(reference, tmp_path / "p").digest == new.digest
    assert len(open_release(tmp_path / "p" / "sample" / "2.0.0").bundles) == 2


def test_a_login_is_asked_for_and_taken_from_dockers_configuration(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = release_of(tmp_path)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    asked: list[str] = []
    with token_server(asked) as realm:
        # "silly" is a part of docker-registry that sends clients to a token server and takes any token.
        auth = f"auth: {{silly: {{realm: '{realm}', service: models}}}}\n"
        with running_registry(tmp_path / "registry", auth) as host:
            reference = place(host, request)
            with pytest.raises(ToolchainError) as caught:
                push(release, reference)
            assert caught.value.code is ExitCode.REGISTRY
            assert f"docker login {host}" in caught.value.hint
            monkeypatch.setenv("DOCKER_CONFIG", str(login(tmp_path / "wrong", host, password="wrong")))
            with pytest.raises(ToolchainError, match=r"refuses the login \(401\): DENIED no"):
                push(release, reference)
            monkeypatch.setenv("DOCKER_CONFIG", str(login(tmp_path / "right", host)))
            push(release, reference)
            assert pull(reference, tmp_path / "p").digest == release.digest
    assert all("service=models" in line for line in asked)


def test_a_registry_with_names_and_passwords_of_its_own(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import crypt
    users = tmp_path / "htpasswd"
    users.write_text(f"{USER}:{crypt.crypt(PASSWORD, crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=16))}\n")
    release = release_of(tmp_path)
    with running_registry(tmp_path / "r", f"auth: {{htpasswd: {{realm: models, path: {users}}}}}\n") as host:
        reference = place(host, request)
        monkeypatch.setenv("DOCKER_CONFIG", str(login(tmp_path / "wrong", host, password="wrong")))
        with pytest.raises(ToolchainError) as caught:
            push(release, reference)
        assert caught.value.code is ExitCode.REGISTRY
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(login(tmp_path / "right", host) / "config.json"))
        push(release, reference)
        # A credential helper, as Docker's desktop programs use one.
        helper = tmp_path / "bin" / "docker-credential-test"
        helper.parent.mkdir()
        answer = json.dumps({"Username": USER, "Secret": PASSWORD})
        helper.write_text(f"#!/bin/sh\n[ \"$(cat)\" = '{host}' ] && echo '{answer}'\n")
        helper.chmod(0o755)
        (tmp_path / "helper.json").write_text(json.dumps({"credHelpers": {host: "test"}}))
        monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "helper.json"))
        assert pull(reference, tmp_path / "p").digest == release.digest


def test_signatures_travel_along_and_are_checked_before_engines_come(
    flaky: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reference = place(flaky.host, request)
    own, public = make_key(tmp_path / "own.pem")
    release = release_of(tmp_path)
    push(release, reference)
    flaky.requests.clear()
    with pytest.raises(ToolchainError) as caught:
        pull(reference, tmp_path / "p", trust=read_trust(public))
    assert caught.value.code is ExitCode.UNTRUSTED
    engine = release.bundles[0].files["model.onnx"].digest
    assert not [line for line in flaky.requests if engine in line]
    sign_release(release.path, own)
    push(open_release(release.path), reference)
    for target in ("", "one"):
        pulled = pull(reference, tmp_path / f"p{target}", target=target, trust=read_trust(public))
        load(pulled.folder, "one", trust_key=public).close()


def test_skopeo_finds_release_and_signatures_where_it_looks_for_them(
    host: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """An implementation of registries and of cosign's storage that is not ours; OpenSSL checks what it found."""
    reference = place(host, request)
    named = f"{host}/{reference.repository}"
    own, public = make_key(tmp_path / "own.pem")
    release = release_of(tmp_path)
    sign_release(release.path, own, named)
    push(open_release(release.path), reference)
    registries = tmp_path / "registries.d"
    registries.mkdir()
    (registries / "r.yaml").write_text(f"docker:\n  {host}:\n    use-sigstore-attachments: true\n")
    listed = skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{named}:stable", home=tmp_path)
    assert digest_bytes(listed.stdout.encode()) == release.digest
    for bundle in release.bundles:
        copy = tmp_path / bundle.target
        words = ["--insecure-policy", "--registries.d", registries, "copy", "--src-tls-verify=false"]
        done = skopeo(*words, f"docker://{named}@{bundle.digest}", f"dir:{copy}", home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (copy / bundle.files["model.onnx"].digest[7:]).is_file()
        head, _, text = (copy / "signature-1").read_bytes().partition(b"\n")
        assert head == b"\0sigstore-json"
        signature = json.loads(text)
        assert signature["mimeType"] == "application/vnd.dev.cosign.simplesigning.v1+json"
        payload, value = tmp_path / "payload", tmp_path / "value"
        payload.write_bytes(base64.b64decode(signature["payload"]))
        value.write_bytes(base64.b64decode(signature["annotations"]["dev.cosignproject.cosign/signature"]))
        openssl("dgst", "-sha256", "-verify", public, "-signature", value, payload)
        critical = json.loads(payload.read_bytes())["critical"]
        assert critical["identity"]["docker-reference"] == named
        assert critical["image"]["docker-manifest-digest"] == bundle.digest


def test_the_commands_push_and_pull(host: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    release = release_of(tmp_path)
    runner = CliRunner()
    pushed = runner.invoke(cli, ["push", str(release.path), str(place(host, request, ""))])
    assert pushed.exit_code == 0, pushed.output
    reference = pushed.stdout.split()[0]
    assert reference.endswith(f":1.0.0@{release.digest}")
    pulled = runner.invoke(cli, ["pull", reference, str(tmp_path / "p")])
    assert pulled.exit_code == 0, pulled.output
    assert pulled.stdout.startswith(f"{tmp_path / 'p' / 'sample' / '1.0.0'} ({release.digest}, ")


def test_a_registry_that_keeps_silent_is_given_up(
    flaky: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    flaky.before = lambda line: time.sleep(2)
    with pytest.raises(ToolchainError, match="does not answer in time") as caught:
        pull(place(flaky.host, request), tmp_path, timeout=0.2)
    assert caught.value.code is ExitCode.REGISTRY


def test_what_is_not_there_is_said(host: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    error = refused(place(host, request, "nothing"), tmp_path)
    assert (error.code, error.what) == (ExitCode.REGISTRY, "has no 'nothing'")
    error = refused(RegistryReference("127.0.0.1:1", "models/sample", "x"), tmp_path)
    assert error.code is ExitCode.REGISTRY
    assert "cannot be reached" in error.what
    release = release_of(tmp_path)
    push(release, place(host, request))
    with pytest.raises(ToolchainError) as caught:
        pull(place(host, request), tmp_path / "p", target="three")
    assert caught.value.code is ExitCode.USAGE
    assert "it has one, two" in caught.value.what


def other_name() -> tuple[str, str]:
    """A name of this machine that is not known to be one, so that encryption is asked for, and its address."""
    for name in (socket.gethostname(), "ip6-localhost", "localhost.localdomain"):
        try:
            [address] = {entry[4][0] for entry in socket.getaddrinfo(name, 80)}
        except (OSError, ValueError):
            continue
        if ipaddress.ip_address(address).is_loopback and name != "localhost":
            return name, f"[{address}]" if ":" in address else address
    pytest.skip("this machine has no name but localhost that leads to itself")


def test_other_machines_are_asked_over_tls_and_their_certificates_checked(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, address = other_name()
    release = release_of(tmp_path)
    with running_registry(tmp_path / "plain", address=address, name=name) as host:
        with pytest.raises(ToolchainError, match=r"cannot be reached.*SSL") as caught:
            push(release, place(host, request))
        assert caught.value.code is ExitCode.REGISTRY
        assert push(release, place(host, request), plain_http=True).sent > SIZE
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-days", "2", "-nodes"]
    openssl("req", "-x509", "-newkey", "rsa:2048", *words, "-keyout", key, "-out", certificate)
    tls = f", tls: {{certificate: '{certificate}', key: '{key}'}}"
    with running_registry(tmp_path / "tls", address=address, name=name, tls=tls) as host:
        with pytest.raises(ToolchainError, match="CERTIFICATE_VERIFY_FAILED"):
            push(release, place(host, request))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        push(release, place(host, request))
        assert pull(place(host, request), tmp_path / "p").digest == release.digest


@contextmanager
def store_behind_a_registry(blob: bytes, seen: list[tuple[bool, str | None]]) -> Iterator[str]:
    """A registry that asks for a login and sends clients on to another server, which has the blob."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization")
            seen.append((self.server is store, known))
            if self.server is store:
                self.answer(200, {}, blob)
            elif known is None:
                self.answer(401, {"WWW-Authenticate": 'Basic realm="models"'}, b"")
            else:
                self.answer(307, {"Location": f"http://127.0.0.1:{store.server_port}/elsewhere"}, b"")

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    place = ("127.0.0.1", 0)
    with ThreadingHTTPServer(place, Handler) as front, ThreadingHTTPServer(place, Handler) as store:
        threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in (front, store)]
        for thread in threads:
            thread.start()
        try:
            yield f"127.0.0.1:{front.server_port}"
        finally:
            for server, thread in zip((front, store), threads, strict=True):
                server.shutdown()
                thread.join()


def test_a_login_is_not_taken_along_to_where_blobs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, str | None]] = []
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    with store_behind_a_registry(b"content", seen) as host:
        monkeypatch.setenv("DOCKER_CONFIG", str(login(tmp_path / "docker", host)))
        with Registry(RegistryReference(host, "models/sample")).open_blob(digest_bytes(b"content")) as answer:
            assert answer.read() == b"content"
    assert [(at_store, known is not None) for at_store, known in seen] == [(False, False), (False, True), (True, False)]


@pytest.mark.parametrize(
    "text", ["oci://", "oci://host", "oci://host/UPPER", "oci://host/a:b:c", "oci://h/a@sha256:12"]
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        parse_reference(text)
    assert caught.value.code is ExitCode.USAGE


def test_encryption_is_left_out_on_this_machine_alone() -> None:
    for text, local in (
        ("localhost:5000", True),
        ("127.0.0.1:80", True),
        ("[::1]:5000", True),
        ("registry.example", False),
        ("127.example:5000", False),
    ):
        assert parse_reference(f"oci://{text}/a/b:c").local is local, text
