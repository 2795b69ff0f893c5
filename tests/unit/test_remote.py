"""Addresses of devices, what a device says of itself, and what ssh's words mean."""

from __future__ import annotations

import pytest

from toolchain.errors import ExitCode, ToolchainError
from toolchain.remote.address import Address, parse_address, parse_devices
from toolchain.remote.device import Device, check_device, parse_facts
from toolchain.remote.ssh import Done, Ssh, describe_status
from toolchain.target import load_target

FACTS = """Welcome to the board!
arch=nonsense of a greeting, overridden below
os=Linux
arch=aarch64
libc=glibc 2.36
cores=4
memory=8245904
governor=ondemand
emulated=
tar=/usr/bin/tar
cpuinfo=
processor	: 0
Features	: fp asimd
CPU implementer	: 0x41
CPU part	: 0xd0b
"""


def device(cpuinfo: str, arch: str = "aarch64", glibc: str = "2.36") -> Device:
    from toolchain.host import describe_host

    host = describe_host(cpuinfo, os="linux", arch=arch, cores=4, memory_mb=8052, glibc=glibc)
    return Device(Address("board", "pi", "2222"), host, "ondemand")


def cpuinfo(features: str, part: str = "0xd0b") -> str:
    return f"processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("board", Address("board")),
        ("pi@board", Address("board", "pi")),
        ("pi@192.168.1.7:2222", Address("192.168.1.7", "pi", "2222")),
        ("pi@[fe80::1%eth0]:22", Address("fe80::1%eth0", "pi", "22")),
    ],
)
def test_an_address_is_read_and_written_the_same(text: str, want: Address) -> None:
    assert parse_address(text, "test") == want
    assert str(want) == text
    assert want.destination.startswith("-") is False


@pytest.mark.parametrize(
    "text",
    ["", "-oProxyCommand=touch x", "pi@-x", "-l@board", "a b", "board;id", "board:0", "board:99999", "@board", "x:"],
)
def test_what_ssh_would_take_for_an_option_or_a_shell_for_a_command_is_no_address(text: str) -> None:
    with pytest.raises(ToolchainError, match="allowed: ") as caught:
        parse_address(text, "test")
    assert caught.value.code is ExitCode.USAGE


def test_devices_are_given_by_target_each_once() -> None:
    assert parse_devices(["a=x", "b=pi@y:1"]) == {"a": Address("x"), "b": Address("y", "pi", "1")}
    for wrong in (["x"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ToolchainError) as caught:
            parse_devices(wrong)
        assert caught.value.code is ExitCode.USAGE


def test_what_a_device_says_is_read_past_the_greeting_of_its_login_shell() -> None:
    facts, text = parse_facts(FACTS)
    assert facts["arch"] == "aarch64"
    assert (facts["os"], facts["cores"], facts["governor"], facts["emulated"]) == ("Linux", "4", "ondemand", "")
    assert text.startswith("processor")
    nothing, text = parse_facts("Permission denied")
    assert "arch" not in nothing
    assert text == ""


def test_a_device_is_held_against_the_profile() -> None:
    needs = load_target("cortex-a76").requirements()
    everything = " ".join(needs["cpu_features"])
    check_device(device(cpuinfo(everything)), needs, "cortex-a76")
    # Which C library it has is unknown: bundle-run asks the one that it runs with.
    check_device(device(cpuinfo(everything), glibc=""), needs, "cortex-a76")
    for wrong, words in (
        (device(cpuinfo("fp asimd", "0xd03")), "needs CPU features"),
        (device(cpuinfo(everything), arch="x86_64"), "needs a processor of architecture aarch64"),
        (device(cpuinfo(everything), glibc="2.17"), "needs glibc"),
    ):
        with pytest.raises(ToolchainError, match="is no cortex-a76") as caught:
            check_device(wrong, needs, "cortex-a76")
        assert caught.value.code is ExitCode.INCOMPATIBLE_HOST
        assert words in caught.value.details[0]
        assert "this machine" not in caught.value.render()


def test_the_identity_names_the_processor_and_nothing_of_where_it_is() -> None:
    identity = device(cpuinfo("fp asimd")).identity()
    assert identity["cpu_model"] == "ARM 0x41/0xd0b"
    assert identity["memory_mb"] == 8052
    for secret in ("board", "pi", "2222"):
        assert secret not in identity.values()
    other = Device(Address("elsewhere"), device(cpuinfo("fp asimd")).host, "ondemand")
    assert other.identity() == identity
    assert device(cpuinfo("fp asimd", "0xd03")).identity() != identity


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ssh: connect to host board port 22: Connection refused", "cannot be reached"),
        ("ssh: connect to host board port 22: Connection timed out", "cannot be reached"),
        ("ssh: Could not resolve hostname board: Name or service not known", "cannot be reached"),
        ("pi@board: Permission denied (publickey,password).", "refuses the login"),
        ("No ED25519 host key is known for board.\nHost key verification failed.", "host key is not known"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "not the known one"),
        ("client_loop: send disconnect: Broken pipe", "was lost: client_loop"),
        ("", "the connection to the device was lost"),
    ],
)
def test_ssh_s_words_become_one_message_with_a_hint(said: str, words: str) -> None:
    error = Ssh(Address("board", "pi")).failure(said)
    assert words in error.what
    assert (error.code, error.where) == (ExitCode.DEVICE, "pi@board")
    assert error.hint


def test_an_end_without_words_is_told_by_its_signal_or_status() -> None:
    assert Done(132, "", "").last_words == "ended by signal SIGILL"
    assert describe_status(3) == "ended with status 3"
    assert Done(1, "", "first\nlast\n\n").last_words == "last"
    assert Done(137, "", "Killed").last_words == "ended by signal SIGKILL"
