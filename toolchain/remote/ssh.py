"""Runs commands on a device with the user's own ``ssh`` program: their keys, their known hosts, their configuration.

Nothing here asks a question or waits for ever: ``BatchMode`` forbids prompts, every command has a time limit, and
ssh itself notices within some 15 s that a device no longer answers.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from typing import IO

from toolchain.errors import ExitCode, ToolchainError
from toolchain.remote.address import Address

CONNECT_SECONDS = 10
LOST = 255
"""ssh's own exit status when the connection fails or is lost; a command's is passed through."""

_SIGNALS = 64

_OPTIONS = (
    "BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "ConnectionAttempts=1", "ServerAliveInterval=5",
    "ServerAliveCountMax=3", "LogLevel=ERROR", "RequestTTY=no", "ClearAllForwardings=yes", "ForwardAgent=no",
    "ForwardX11=no", "PermitLocalCommand=no", "EscapeChar=none",
    # A master that outlives its command keeps our pipes open; one that is there already is used.
    "ControlMaster=no",
)  # fmt: skip
_UNREACHED = (
    "could not resolve", "connection refused", "timed out", "no route to host", "network is unreachable",
    "host is down", "name or service not known",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended: its exit status (128 + N: ended by signal N), standard output and error."""

    status: int
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """Which signal ended it, else the last line on standard error, else its status."""
        if 128 < self.status <= 128 + _SIGNALS:
            # The shell's own words for it are shorter than helpful.
            return describe_status(self.status)
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else describe_status(self.status)


@dataclass(frozen=True, slots=True)
class Ssh:
    """One device."""

    address: Address

    def run(self, script: str, seconds: float, stdin: IO[bytes] | None = None) -> Done:
        """Run a script of the POSIX shell there and wait for it.

        Args:
            script: for ``sh -c``.
            seconds: time limit, besides that for connecting.
            stdin: an open file; nothing if not given.

        Raises:
            ToolchainError: DEVICE, the device can't be reached, refuses the login, is lost or takes too long;
                MISSING_TOOL, there is no ssh.
        """
        process = self.start(script, stdin if stdin is not None else subprocess.DEVNULL)
        try:
            out, err = process.communicate(timeout=seconds + CONNECT_SECONDS)
        except subprocess.TimeoutExpired:
            raise self.error(f"the device did not answer within {seconds:g} s") from None
        finally:
            # Also on Ctrl-C: ending ssh ends the command on the device.
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        done = Done(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
        if done.status == LOST:
            raise self.failure(done.err)
        return done

    def start(
        self, script: str, stdin: IO[bytes] | int, stderr: IO[bytes] | int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        """Start a script there; the caller ends it.

        Raises:
            ToolchainError: MISSING_TOOL.
        """
        command = [ssh_program(), *(part for option in _OPTIONS for part in ("-o", option))]
        if self.address.port:
            command += ["-p", self.address.port]
        # The login shell may be any; it is only asked to start sh.
        command += ["--", self.address.destination, f"exec sh -c {shlex.quote(script)}"]
        # Its messages are told apart by their words.
        environment = {**os.environ, "LC_ALL": "C"}
        return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=environment)

    def failure(self, stderr: str) -> ToolchainError:
        """What ssh's own words mean after it ended with :data:`LOST`."""
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        last, text = (lines[-1] if lines else ""), stderr.lower()
        login = f"ssh {self.address.destination}" + (f" -p {self.address.port}" if self.address.port else "")
        if "identification has changed" in text:
            hint = "find out why; if the device was set up anew, remove its old key with ssh-keygen -R"
            return self.error("the device's host key is not the known one", hint)
        if "host key verification failed" in text:
            hint = f"log in once by hand and compare the key's fingerprint: {login}"
            return self.error("the device's host key is not known", hint)
        if "permission denied" in text:
            hint = f"a key must do without a question (ssh-copy-id, ssh-agent); try: {login} -o BatchMode=yes true"
            return self.error(f"the device refuses the login: {last}", hint)
        if any(words in text for words in _UNREACHED):
            return self.error(f"the device cannot be reached: {last}", "is it on, and are name and port right?")
        return self.error(f"the connection to the device was lost{f': {last}' if last else ''}", "run again")

    def error(self, what: str, hint: str = "", code: ExitCode = ExitCode.DEVICE) -> ToolchainError:
        return ToolchainError(what, where=str(self.address), hint=hint, code=code)


def ssh_program() -> str:
    """Path of the ``ssh`` program.

    Raises:
        ToolchainError: MISSING_TOOL.
    """
    path = shutil.which("ssh")
    if path is None:
        raise ToolchainError(
            "the program 'ssh' is not on PATH", hint="apt-get install openssh-client", code=ExitCode.MISSING_TOOL
        )
    return path


def describe_status(status: int) -> str:
    """An exit status of the shell in words."""
    import signal

    number = status - 128
    try:
        return f"ended by signal {signal.Signals(number).name}"
    except ValueError:
        return f"ended with status {status}"
