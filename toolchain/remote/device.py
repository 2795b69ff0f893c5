"""What a device is, found out over SSH with a POSIX shell and what Linux shows in /proc."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.host import Host, describe_host, incompatibilities
from toolchain.remote.address import Address
from toolchain.remote.ssh import Ssh

EMULATED_VARIABLE = "TOOLCHAIN_EMULATED"
"""Environment variable of a device that is an emulator: what runs there is checked, and its times are no times."""

_SECONDS = 30.0
# /proc/cpuinfo comes last: it is the one part of any form.
_SCRIPT = f"""
fact() {{ printf '%s=%s\\n' "$1" "$2"; }}
fact os "$(uname -s)"
fact arch "$(uname -m)"
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null)
if [ -z "$libc" ]; then
  for loader in /lib/ld-linux*.so* /lib64/ld-linux*.so*; do
    version=$("$loader" --version 2>/dev/null | sed -n '1s/.*version \\([0-9.]*[0-9]\\).*/\\1/p')
    [ -n "$version" ] && libc="glibc $version"
  done
fi
fact libc "$libc"
fact cores "$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || grep -c ^processor /proc/cpuinfo)"
fact memory "$(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)"
fact governor "$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null)"
fact emulated "${{{EMULATED_VARIABLE}-}}"
fact tar "$(command -v tar)"
fact cpuinfo ""
cat /proc/cpuinfo
"""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that answered.

    Attributes:
        address: where it is; never stored.
        host: what it is.
        governor: how the kernel chooses the clock of its first core, e.g. ``"ondemand"``; empty if unknown.
        emulated: what emulates it, or empty.
    """

    address: Address
    host: Host
    governor: str = ""
    emulated: str = ""

    def identity(self) -> dict[str, Any]:
        """What a measurement on it depends on and is remembered by: nothing that says where it is or whose."""
        host = self.host
        return {
            "arch": host.arch,
            "cpu_model": host.cpu_model,
            "cpu_ids": [list(ids) for ids in host.cpu_ids],
            "cpu_features": sorted(host.cpu_features),
            "cores": host.cores,
            "memory_mb": host.memory_mb,
            "governor": self.governor,
            "emulated": self.emulated,
        }


def inspect_device(address: Address) -> Device:
    """Ask a device what it is.

    Raises:
        ToolchainError: DEVICE, it can't be reached or lacks tar or a shell; MISSING_TOOL, there is no ssh here.
    """
    ssh = Ssh(address)
    done = ssh.run(_SCRIPT, _SECONDS)
    facts, cpuinfo = parse_facts(done.out)
    if done.status or "arch" not in facts or not cpuinfo.strip():
        raise ssh.error(
            f"the device did not say what it is: {done.last_words}",
            "it needs Linux, a POSIX shell (sh) and /proc; a login that runs commands is needed too",
        )
    if not facts["tar"]:
        raise ssh.error("the device has no tar", "install it there (busybox's will do)")
    return Device(address, _host(facts, cpuinfo), facts["governor"], facts["emulated"])


def check_device(device: Device, requirements: Mapping[str, Any], target: str) -> None:
    """Refuse a device that is not what ``requirements`` (of the target's profile) ask for.

    Raises:
        ToolchainError: INCOMPATIBLE_HOST.
    """
    if not device.host.glibc:
        # An unknown C library is left to bundle-run, which asks the one that it runs with.
        requirements = {**requirements, "libc": None}
    found = incompatibilities(requirements, device.host)
    if found:
        raise ToolchainError(
            f"the device ({device.host.describe()}) is no {target}",
            where=str(device.address),
            details=[line.replace("this machine", "the device") for line in found],
            hint="give the device of another target, or a profile that fits it",
            code=ExitCode.INCOMPATIBLE_HOST,
        )


def parse_facts(text: str) -> tuple[dict[str, str], str]:
    """The lines ``name=value`` that the script writes, and the text of /proc/cpuinfo after them.

    What a login shell prints by itself before them (a greeting) is left out.
    """
    head, _, cpuinfo = text.partition("\ncpuinfo=\n")
    pairs = (re.fullmatch(r"(os|arch|libc|cores|memory|governor|emulated|tar)=(.*)", line) for line in head.split("\n"))
    facts = {match[1]: match[2].strip() for match in pairs if match}
    return {"libc": "", "cores": "", "memory": "", "governor": "", "emulated": "", "tar": "", **facts}, cpuinfo


def _host(facts: Mapping[str, str], cpuinfo: str) -> Host:
    def number(name: str) -> int:
        return int(facts[name]) if facts[name].isdigit() else 0

    libc = re.fullmatch(r"glibc (\d[\d.]*)", facts["libc"])
    return describe_host(
        cpuinfo,
        os=facts["os"].lower(),
        arch=facts["arch"],
        cores=number("cores") or 1,
        memory_mb=number("memory") // 1024,
        glibc=libc[1] if libc else "",
    )
