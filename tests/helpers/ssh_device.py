"""An emulated device behind a real SSH server on the loopback address.

    with SshDevice(tmp_path / "device") as device:
        device.environment      # with it, ssh reaches the device under the name ADDRESS

``sshd`` is OpenSSH's, from a package that is unpacked without root rights.  What a session runs sees the processor of
QEMU's ``-cpu``, and aarch64 programs run in QEMU: ``device_shim.c``, preloaded into the session, does what a kernel
with binfmt_misc would.  Times are no times there, so the session says that it is emulated.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from helpers.emulated import EmulatedMachine
from helpers.emulator_packages import EmulatorError, qemu_folder, ssh_server_folder
from helpers.processes import descendants
from toolchain.remote.device import EMULATED_VARIABLE

ADDRESS = "board-of-the-tests"
"""The device's address: a ``Host`` in the configuration that :attr:`SshDevice.environment` brings."""

SHIM = Path(__file__).with_name("device_shim.c")


class SshDevice:
    """Started on entry, ended on exit.

    Attributes:
        folder: keys and configuration; ``tmp`` in it is the device's folder for temporary files.
        port: where it listens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp = folder / "tmp"
        self.port = 0
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SshDevice:
        self.tmp.mkdir(parents=True)
        for name in ("host", "user", "stranger"):
            _call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)])
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        _call(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(self.folder / "shim.so"), str(SHIM), "-ldl"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._configure()
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Puts the ``ssh`` with this device's configuration first on PATH."""
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def stop(self) -> None:
        """The device is gone: its server, and the sessions that are open."""
        if self._server is not None:
            below = descendants(self._server.pid)
            self._server.kill()
            self._server.wait()
            self._server = None
            # Its sessions are processes of their own.
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def become(self, cpu: str = "cortex-a76", emulated: str = "QEMU", **variables: str) -> None:
        """What later sessions see: the processor, whether it is said to be emulated, and further variables."""
        sysroot = EmulatedMachine(cpu).sysroot()
        session = {
            "DEVICE_QEMU": f"{qemu_folder() / 'qemu-aarch64'}|{cpu}|{sysroot}",
            "DEVICE_CPUINFO": str(sysroot / "proc/cpuinfo"),
            "DEVICE_ARCH": "aarch64",
            "TMPDIR": str(self.tmp),
            **({EMULATED_VARIABLE: emulated} if emulated else {}),
            **variables,
            "LD_PRELOAD": str(self.folder / "shim.so"),
        }
        exports = "".join(f"export {name}='{value}'\n" for name, value in session.items())
        wrapper = self.folder / "session"
        wrapper.write_text(f'#!/bin/sh\n{exports}exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n')
        wrapper.chmod(0o755)

    def runs(self, word: str) -> bool:
        """Whether a session runs a command with ``word`` in it."""
        assert self._server is not None
        for pid in descendants(self._server.pid):
            with contextlib.suppress(OSError):
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    return True
        return False

    def use_key(self, name: str) -> None:
        """Log in with another of the keys, ``"user"`` or ``"stranger"``."""
        self._client(name, self.folder / "known")

    def forget_host(self) -> None:
        """Know no host key any more."""
        self._client("user", self.folder / "empty")

    def leftovers(self, seconds: float = 5.0) -> list[str]:
        """What lies in the device's folder of temporary files once sessions had that long to clean up."""
        deadline = time.monotonic() + seconds
        while (left := sorted(path.name for path in self.tmp.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def _configure(self) -> None:
        self.become()
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder / 'host'}\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder / 'authorized'}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nForceCommand {self.folder / 'session'}\n"
        )
        key = (self.folder / "host.pub").read_text()
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {key}")
        (self.folder / "empty").touch()
        program = self.folder / "bin" / "ssh"
        program.parent.mkdir()
        # As a user's ~/.ssh/config, which ssh takes from the home folder of the account, not from $HOME.
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder / "ssh_config"} "$@"\n')
        program.chmod(0o755)
        self.use_key("user")

    def _client(self, key: str, known: Path) -> None:
        (self.folder / "ssh_config").write_text(
            f"Host {ADDRESS}\n  HostName 127.0.0.1\n  Port {self.port}\n  User {pwd.getpwuid(os.getuid()).pw_name}\n"
            f"Host *\n  IdentityFile {self.folder / key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {known}\n  GlobalKnownHostsFile /dev/null\n"
        )

    def _start(self) -> None:
        server = ssh_server_folder()
        if os.geteuid() == 0:
            # OpenSSH's own place for the unprivileged half of a server that runs as root.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        libraries = ":".join(str(path) for path in (server / "usr/lib").glob("*-linux-gnu"))
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries, "LD_PRELOAD": str(self.folder / "shim.so")}
        with (self.folder / "log").open("wb") as log:
            command = [server / "usr/sbin/sshd", "-D", "-e", "-f", self.folder / "sshd_config"]
            self._server = subprocess.Popen(command, env=environment, stderr=log)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._server.poll() is not None:
                break
            time.sleep(0.05)
        raise EmulatorError(f"sshd does not start: {(self.folder / 'log').read_text().strip()}")


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatorError(f"{command[0]} failed: {done.stderr.strip()}")
