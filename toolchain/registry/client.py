"""Talks to a registry: requests, logins, and errors that say what to do."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from toolchain.artifact import digest_bytes
from toolchain.bundle.check import MAX_JSON_BYTES, damaged
from toolchain.bundle.layout import MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST
from toolchain.errors import ExitCode, ToolchainError
from toolchain.registry.credentials import Credentials, credentials_for
from toolchain.registry.reference import RegistryReference
from toolchain.version import __version__

ACCEPT = f"{MEDIA_TYPE_INDEX}, {MEDIA_TYPE_MANIFEST}"
#: Seconds that a registry may keep silent.
TIMEOUT = 30.0
_HUB = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
#: What ends a transfer in the middle; trying again may help.
BROKEN = (OSError, http.client.HTTPException)


class UnreachableError(ToolchainError):
    """The registry did not answer, or not to the end: trying again may help."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to where blobs are kept, without taking the login along to another host."""

    def redirect_request(
        self,
        request: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        made = super().redirect_request(request, fp, code, msg, headers, newurl)
        before = urllib.parse.urlsplit(request.full_url)
        after = urllib.parse.urlsplit(newurl)
        if before.scheme == "https" and after.scheme != "https":
            raise urllib.error.URLError("it redirects to an address without encryption")
        if made is not None and before.netloc != after.netloc:
            made.remove_header("Authorization")
        return made


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers and, where it was read, the body of an answer."""

    status: int
    headers: Any
    body: bytes = b""


class Registry:
    """One repository of a registry.

    Args:
        reference: names host and repository.
        plain_http: without encryption; always so for this machine itself.
        timeout: seconds that the registry may keep silent.
    """

    def __init__(self, reference: RegistryReference, *, plain_http: bool = False, timeout: float = TIMEOUT) -> None:
        self.reference = reference
        scheme = "http" if plain_http or reference.local else "https"
        self._base = f"{scheme}://{_HUB.get(reference.host, reference.host)}"
        self._plain = scheme == "http"
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_Redirects())
        self._authorization = ""
        self._credentials: Credentials | None = None

    def manifest(self, named: str, *, missing_ok: bool = False) -> tuple[bytes, str] | None:
        """The bytes of a manifest or index, and their digest; None where there is none and that is fine.

        Raises:
            ToolchainError: REGISTRY; DAMAGED_BUNDLE, it is not what its digest says.
        """
        answer = self.send("GET", self._path(f"manifests/{named}"), {"Accept": ACCEPT}, allow=(200, 404))
        if answer.status == 404:
            if missing_ok:
                return None
            raise self._error(f"has no {named!r}", hint="push it first, or name another tag")
        digest = digest_bytes(answer.body)
        said = answer.headers.get("Docker-Content-Digest", "")
        for expected in (named if named.startswith("sha256:") else "", said if said.startswith("sha256:") else ""):
            if expected and expected != digest:
                raise damaged(f"the manifest {named} has digest {digest}, expected {expected}", str(self.reference))
        return answer.body, digest

    def digest(self, named: str) -> str:
        """The digest that a tag names at present.

        Raises:
            ToolchainError: REGISTRY.
        """
        answer = self.send("HEAD", self._path(f"manifests/{named}"), {"Accept": ACCEPT}, allow=(200, 404))
        said: str = answer.headers.get("Docker-Content-Digest", "")
        if answer.status == 200 and said.startswith("sha256:"):
            return said
        found = self.manifest(named)
        return found[1] if found is not None else ""

    def open_blob(self, digest: str, offset: int = 0) -> http.client.HTTPResponse:
        """An open answer with the bytes of a blob, from ``offset`` on if its status is 206.

        Raises:
            ToolchainError: REGISTRY.
            OSError: the connection broke.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        answer: http.client.HTTPResponse = self._open("GET", self._path(f"blobs/{digest}"), headers, None, (200, 206))
        return answer

    def has_blob(self, digest: str) -> bool:
        """Whether the repository has a blob."""
        return self.send("HEAD", self._path(f"blobs/{digest}"), {}, allow=(200, 404)).status == 200

    def start_upload(self) -> str:
        """Begin to upload a blob; the address to send it to."""
        answer = self.send("POST", self._path("blobs/uploads/"), {"Content-Length": "0"}, b"", allow=(202,))
        location: str = answer.headers.get("Location", "")
        if not location:
            raise self._error("did not say where to send a blob")
        return urllib.parse.urljoin(self._base, location)

    def send_blob(self, location: str, digest: str, data: IO[bytes] | bytes, size: int) -> None:
        """Send a whole blob to the address that :meth:`start_upload` gave."""
        parts = urllib.parse.urlsplit(location)
        query = f"{parts.query}&" if parts.query else ""
        url = parts._replace(query=f"{query}digest={urllib.parse.quote(digest)}").geturl()
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        self.send("PUT", url, headers, data, allow=(201,))

    def put_manifest(self, named: str, data: bytes, media_type: str) -> None:
        """Store a manifest or index under a tag or its digest."""
        self.send("PUT", self._path(f"manifests/{named}"), {"Content-Type": media_type}, data, allow=(201,))

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: IO[bytes] | bytes | None = None,
        allow: tuple[int, ...] = (200,),
    ) -> Answer:
        """Ask once, after a login where that is asked for; the body is read up to what JSON may have.

        Raises:
            ToolchainError: REGISTRY, it cannot be reached or answers anything but ``allow``.
        """
        try:
            with self._open(method, url, headers, data, allow) as answer:
                body = answer.read(MAX_JSON_BYTES + 1)
                if len(body) > MAX_JSON_BYTES:
                    raise self._error(f"answers with more than {MAX_JSON_BYTES} bytes of JSON")
                return Answer(answer.status, answer.headers, body)
        except BROKEN as error:
            raise self.unreachable(error) from None

    def _open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: IO[bytes] | bytes | None,
        allow: tuple[int, ...],
    ) -> Any:
        for attempt in (1, 2):
            sent = {**headers, "User-Agent": f"toolchain/{__version__}"}
            # Never to another host than the registry's: an upload may be sent to a store with an address of its own.
            if self._authorization and urllib.parse.urlsplit(url).netloc == urllib.parse.urlsplit(self._base).netloc:
                sent["Authorization"] = self._authorization
            request = urllib.request.Request(url, data, sent, method=method)
            try:
                answer = self._opener.open(request, timeout=self._timeout)
            except urllib.error.HTTPError as error:
                if error.code in allow:
                    return error
                with error:
                    if error.code == 401 and attempt == 1:
                        self._login(error.headers.get_all("WWW-Authenticate") or [], method)
                        if data is not None and not isinstance(data, bytes):
                            data.seek(0)
                        continue
                    raise self._refused(error, url) from None
            except urllib.error.URLError as error:
                reason = error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason))
                raise reason from None
            if answer.status in allow:
                return answer
            answer.close()
            raise self._error(f"answers {answer.status} to {method} {urllib.parse.urlsplit(url).path}")
        raise AssertionError

    def _login(self, challenges: list[str], method: str) -> None:
        """Do what the registry asks for: a token of its token server, or name and password.

        Raises:
            ToolchainError: REGISTRY.
        """
        if self._credentials is None:
            self._credentials = credentials_for(self.reference.host)
        known = self._credentials
        for challenge in challenges:
            scheme, _, rest = challenge.partition(" ")
            if scheme.lower() == "bearer":
                writes = method not in ("GET", "HEAD")
                self._authorization = f"Bearer {self._token(dict(_PARAMETER.findall(rest)), known, writes=writes)}"
                return
            if scheme.lower() == "basic" and known.user:
                self._authorization = known.basic
                return
        raise self._error("asks for a login", hint=f"docker login {self.reference.host}, or podman login")

    def _token(self, challenge: Mapping[str, str], known: Credentials, *, writes: bool) -> str:
        realm = challenge.get("realm", "")
        parts = urllib.parse.urlsplit(realm)
        if parts.scheme not in (("http", "https") if self._plain else ("https",)):
            raise self._error(f"names a token server without encryption, or none: {realm!r}")
        scope = challenge.get("scope") or f"repository:{self.reference.repository}:pull{',push' if writes else ''}"
        asked = {"service": challenge.get("service", ""), "scope": scope}
        headers: dict[str, str] = {}
        data: bytes | None = None
        if known.identity:
            form = {**asked, "grant_type": "refresh_token", "client_id": "toolchain", "refresh_token": known.identity}
            data = urllib.parse.urlencode(form).encode()
        else:
            realm = parts._replace(query="&".join(filter(None, (parts.query, urllib.parse.urlencode(asked))))).geturl()
            headers = {"Authorization": known.basic} if known.user else {}
        try:
            with self._opener.open(urllib.request.Request(realm, data, headers), timeout=self._timeout) as answer:
                document = json.loads(answer.read(MAX_JSON_BYTES))
            token = document.get("token") or document.get("access_token")
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, realm) from None
        except (*BROKEN, ValueError, AttributeError) as error:
            raise self._error(f"its token server {parts.netloc} does not do: {error}") from None
        if not isinstance(token, str) or not token:
            raise self._error(f"its token server {parts.netloc} gave no token")
        return token

    def _path(self, rest: str) -> str:
        return f"{self._base}/v2/{self.reference.repository}/{rest}"

    def _refused(self, error: urllib.error.HTTPError, url: str) -> ToolchainError:
        told = ""
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, *BROKEN):
            first = json.loads(error.read(MAX_JSON_BYTES))["errors"][0]
            told = f": {first.get('code', '')} {first.get('message', '')}".rstrip()
        if error.code in (401, 403):
            hint = f"docker login {self.reference.host}, with an account that may do it"
            return self._error(f"refuses the login ({error.code}){told}", hint=hint)
        return self._error(f"answers {error.code} to {urllib.parse.urlsplit(url).path}{told}")

    def unreachable(self, error: BaseException) -> UnreachableError:
        """The error of a request that ``error`` of the network ended."""
        what = "does not answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        where = str(self.reference)
        return UnreachableError(f"cannot be reached: {what}", where=where, code=ExitCode.REGISTRY)

    def _error(self, what: str, hint: str = "") -> ToolchainError:
        return ToolchainError(what, where=str(self.reference), hint=hint, code=ExitCode.REGISTRY)


def pause(attempt: int) -> None:
    """Wait before the next of several attempts: half a second, one, two."""
    time.sleep(0.25 * 2**attempt)
