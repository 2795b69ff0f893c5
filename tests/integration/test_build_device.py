"""``toolchain build --device``: a whole build for a Cortex-A76 that is measured on a device behind an SSH server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import wait_until
from helpers.shop import RECIPE, Shop
from helpers.ssh_device import ADDRESS, SshDevice

from toolchain.bundle.read import open_release
from toolchain.target import load_target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("device"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]
DEVICE = ("--device", f"cortex-a76={ADDRESS}")


@pytest.fixture(scope="module")
def shop(ssh_device: SshDevice, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Built, its engines checked on a device that says that it is emulated."""
    made = Shop(tmp_path_factory.mktemp("shop"))
    recipe = RECIPE.replace('["x86-64-v3"]', '["cortex-a76"]').replace('["fp32", "int8-static"]', '["fp32"]')
    made.recipe.write_text(recipe)
    code, _, errors = made.build(*DEVICE, env=ssh_device.environment)
    assert code == 0, errors
    return made


def report_of(shop: Shop) -> dict[str, object]:
    [bundle] = open_release(shop.release).bundles
    return json.loads(bundle.read("report.json"))


def test_engines_are_checked_on_an_emulated_device_and_no_latency_is_reported(
    shop: Shop, ssh_device: SshDevice
) -> None:
    report = report_of(shop)
    assert report["measured"]["where"] == "not measured: outputs checked on an emulated device (QEMU) over ssh"
    rows = {row["engine"]: row for row in report["engines"]}
    assert rows["fp32/tvm"]["measurement"].keys() == {"self_test"}
    assert rows["fp32/onnxruntime"]["measurement"] is None
    assert report["reason"] == "not measured on this target: first in the profile's order of preference"
    [bundle] = open_release(shop.release).bundles
    assert bundle.manifest.evidence["measured"] is None
    assert "latency  not measured on this target" in shop.call("inspect", shop.release).stdout
    assert ssh_device.leftovers() == []
    for folder in (shop.output, shop.cache):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert [path for path in files if ADDRESS.encode() in path.read_bytes()] == []


def test_a_second_build_with_the_device_measures_nothing_again(shop: Shop, ssh_device: SshDevice) -> None:
    assert shop.ran(*DEVICE, env=ssh_device.environment) == set()


def test_ctrl_c_while_the_device_measures_leaves_nothing_on_it(shop: Shop, ssh_device: SshDevice) -> None:
    text = shop.recipe.read_text()
    shop.recipe.write_text(text.replace("runs = 10", "runs = 10000000").replace("seconds = 2.0", "seconds = 300.0"))
    ssh_device.become(emulated="")
    command = [sys.executable, "-m", "toolchain.cli.main", *map(str, shop.build_arguments(*DEVICE))]
    environment = {**os.environ, **ssh_device.environment}
    try:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                wait_until(lambda: ssh_device.runs("turns"), "the engine is being timed", 60)
                assert ssh_device.leftovers(0) != []
                process.send_signal(signal.SIGINT)
                assert process.wait(15) == 130
            finally:
                process.kill()
    finally:
        shop.recipe.write_text(text)
    assert ssh_device.leftovers() == []


def test_a_measured_engine_is_chosen_before_one_that_cannot_be_and_the_measurement_replays(
    shop: Shop, ssh_device: SshDevice, tmp_path: Path
) -> None:
    ssh_device.become(emulated="")
    assert "measure@cortex-a76" in shop.ran(*DEVICE, env=ssh_device.environment)
    report = report_of(shop)
    assert report["chosen"] == "fp32/tvm"
    reason = "the only measured engine that holds every gate; not measured there, so not preferred: fp32/onnxruntime"
    assert report["reason"] == reason
    assert report["measured"]["where"] == "on a device (ARM 0x41/0xd0b) over ssh"
    [bundle] = open_release(shop.release).bundles
    assert "Measured on device ARM 0x41/0xd0b, " in bundle.read("report.md").decode()
    digest = open_release(shop.release).digest
    again = shop.copied(tmp_path)
    code, result, errors = again.build("--measurements", shop.release)
    assert (code, result["digest"]) == (0, digest), errors


def test_devices_that_cannot_serve_are_refused_before_anything_is_built(shop: Shop, ssh_device: SshDevice) -> None:
    ssh_device.become("cortex-a53")
    for options, code, words in (
        (DEVICE, 30, "is no cortex-a76"),
        (("--device", f"cortex-a72={ADDRESS}"), 11, "got a device for 'cortex-a72'"),
        (("--device", "cortex-a76"), 2, "allowed: TARGET=[user@]host[:port]"),
        (("--device", "cortex-a76=-oProxyCommand=x"), 2, "allowed: [user@]host[:port]"),
        (("--device", "cortex-a76=127.0.0.1:1"), 42, "cannot be reached"),
    ):
        got, result, errors = shop.build(*options, env=ssh_device.environment)
        assert (got, result["exit_code"]) == (code, code)
        assert words in errors
        assert "stages" not in result


def test_a_profile_of_one_s_own_names_its_device_and_a_bundle_does_not(shop: Shop, ssh_device: SshDevice) -> None:
    ssh_device.become()
    profile = shop.repository / "board.toml"
    remote = f'[execute]\nhow = "remote"\nremote = "{ADDRESS}"\n'
    profile.write_text(f'schema = 1\nname = "board"\nextends = "cortex-a76"\n{remote}')
    recipe = shop.repository / "board-recipe.toml"
    recipe.write_text(shop.recipe.read_text().replace('["cortex-a76"]', '["board.toml"]'))
    done = shop.call("build", recipe, "--cache", shop.cache, "--dry-run", env=ssh_device.environment)
    assert "measure@board" in done.stdout, done.stderr
    told = shop.call("why", recipe, "--cache", shop.cache, "--stage", "measure", env=ssh_device.environment)
    assert "measure@board" in told.stdout, told.stderr
    assert ADDRESS not in json.dumps(load_target(profile).to_json())
    assert load_target(profile).execute.remote == ADDRESS
    profile.write_text(profile.read_text().replace(f'remote = "{ADDRESS}"', 'remote = "-oProxyCommand=x"'))
    done = shop.call("build", recipe, "--cache", shop.cache, "--dry-run", env=ssh_device.environment)
    assert done.returncode == 2
    assert "board.toml: execute.remote: got '-oProxyCommand=x'" in done.stderr
