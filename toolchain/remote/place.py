"""A folder on a device that is gone when we are: its files, and programs started in it."""

from __future__ import annotations

import contextlib
import secrets
import shlex
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from toolchain.errors import ExitCode, ToolchainError
from toolchain.remote.ssh import CONNECT_SECONDS, LOST, Done, Ssh

_SPARE_KIB = 4096
_SLOWEST = 50e3  # bytes/s: a transfer that is slower counts as stuck
_PLACE_SECONDS = 30.0

# The shell holds the folder for as long as its standard input is open: when this process ends in whatever way, or the
# connection is lost, cat comes to an end and the trap removes the folder.
_HOLD = """
umask 077
name={name}; need={need}; noexec=; full=; tried=
for base in "${{TMPDIR:-/tmp}}" /var/tmp "$HOME"; do
  folder=$base/$name
  mkdir "$folder" 2>/dev/null || continue
  trap 'rm -rf "$folder"' EXIT
  trap 'exit 1' HUP INT TERM PIPE
  free=$(df -Pk "$folder" 2>/dev/null | {{ read -r line; read -r disk blocks used free line; echo "$free"; }})
  printf '#!/bin/sh\\nexit 0\\n' > "$folder/try" && chmod 700 "$folder/try"
  if ! "$folder/try" 2>/dev/null; then noexec="$noexec $base"
  elif [ "${{free:-$need}}" -lt "$need" ]; then full="$full $base(${{free}}KiB)"
  else
    rm "$folder/try"
    printf 'held %s\\n' "$folder"
    cat > /dev/null
    exit 0
  fi
  rm -rf "$folder"
done
printf 'refused full=%s noexec=%s\\n' "$full" "$noexec"
"""


class Place:
    """A new folder on a device, as a context manager; ``folder`` is its path there."""

    def __init__(self, ssh: Ssh, size: int) -> None:
        """``size``: bytes that are going to be put there.

        Raises:
            ToolchainError: DEVICE; STORAGE, no folder has the room or allows programs; MISSING_TOOL.
        """
        self._ssh = ssh
        name = f"toolchain-{secrets.token_hex(8)}"
        script = _HOLD.format(name=name, need=size // 1024 + _SPARE_KIB)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._holder = ssh.start(script, subprocess.PIPE, self._errors)
        try:
            self.folder = self._held(size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the device remove the folder, and wait for that a moment."""
        stdin = self._holder.stdin
        assert stdin is not None
        assert self._holder.stdout is not None
        try:
            stdin.close()
            self._holder.wait(CONNECT_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            self._holder.kill()
            self._holder.wait()
        self._holder.stdout.close()
        self._errors.close()

    def put(self, files: Mapping[str, Path], programs: frozenset[str] = frozenset()) -> None:
        """Copy files into the folder.

        Args:
            files: name there (with folders) -> file here.
            programs: the names that must be executable.

        Raises:
            ToolchainError: DEVICE; STORAGE, the device has no room left.
        """
        with tempfile.TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for name, path in files.items():
                    info = tarfile.TarInfo(name)
                    info.size, info.mode = path.stat().st_size, 0o700 if name in programs else 0o600
                    with path.open("rb") as file:
                        tar.addfile(info, file)
            size = archive.tell()
            archive.seek(0)
            done = self.run("tar xof -", _PLACE_SECONDS + size / _SLOWEST, archive)
        if done.status:
            full = "no space left" in done.err.lower() or "quota" in done.err.lower()
            what = "the device has no space left" if full else f"the files cannot be unpacked there: {done.last_words}"
            hint = f"{size / 1e6:.1f} MB are needed in {self.folder}" if full else ""
            raise self._ssh.error(what, hint, ExitCode.STORAGE if full else ExitCode.DEVICE)

    def run(self, command: str, seconds: float, stdin: IO[bytes] | None = None) -> Done:
        """Run a command of the shell in the folder; raises as :meth:`Ssh.run`."""
        return self._ssh.run(self._here(command), seconds, stdin)

    def converse(self, command: str) -> Conversation:
        """Start a command in the folder that answers lines with lines."""
        return Conversation(self._ssh, self._here(command))

    def _here(self, command: str) -> str:
        # The shell stays, to give the status of a program that a signal ended: ssh tells a lost connection's instead.
        return f"cd {shlex.quote(self.folder)} || exit 1\n{command}\nexit $?"

    def _held(self, size: int) -> str:
        timer = threading.Timer(_PLACE_SECONDS, self._holder.kill)
        timer.start()
        try:
            assert self._holder.stdout is not None
            # A greeting of the login shell may come first.
            for line in iter(self._holder.stdout.readline, b""):
                word, _, rest = line.decode(errors="replace").strip().partition(" ")
                if word == "held":
                    return rest
                if word == "refused":
                    raise self._refused(rest, size)
        finally:
            timer.cancel()
        self._holder.wait()
        raise self._ssh.failure(_text(self._errors))

    def _refused(self, rest: str, size: int) -> ToolchainError:
        full, _, noexec = rest.removeprefix("full=").partition(" noexec=")
        if full.strip():
            what = f"the device has no space left: {size / 1e6:.1f} MB are needed, free is {full.strip()}"
            return self._ssh.error(what, "free some there, or set TMPDIR in its environment", ExitCode.STORAGE)
        where = f" (programs may not run in{noexec})" if noexec.strip() else ""
        what = f"the device has no folder for programs{where}"
        return self._ssh.error(what, "set TMPDIR in its environment to one", ExitCode.STORAGE)


class Conversation:
    """A program on the device that answers each line with one."""

    def __init__(self, ssh: Ssh, script: str) -> None:
        self._ssh = ssh
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = ssh.start(script, subprocess.PIPE, self._errors)

    def ask(self, line: str, seconds: float) -> str | None:
        """Send ``line`` (nothing if empty) and read the answer; None when the program has ended.

        Raises:
            ToolchainError: DEVICE, the connection is lost or there is no answer in time.
        """
        process, late = self._process, threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds + CONNECT_SECONDS, end)
        timer.start()
        try:
            if line:
                # Its end shows in what is read.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line.encode() + b"\n")
                    process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise self._ssh.error(f"the device did not answer within {seconds:g} s")
        if answer.endswith(b"\n"):
            return answer.decode(errors="replace").strip()
        if process.wait() == LOST:
            raise self._ssh.failure(_text(self._errors))
        return None

    @property
    def last_words(self) -> str:
        """Why the program ended."""
        return Done(self._process.wait(), "", _text(self._errors)).last_words

    def close(self) -> None:
        process = self._process
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
