"""Which targets of a build are measured on a device over SSH, and the stage that does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.plan_shared import Maker
from toolchain.remote.address import Address, parse_address
from toolchain.remote.device import Device, check_device, inspect_device
from toolchain.stages import measure_device
from toolchain.target import TargetProfile

_NEEDS_PYTHON = "not measured on the device: ONNX Runtime needs Python there"


class DeviceEntry(Protocol):
    """An engine of the plan; :class:`toolchain.plan.Entry` is one."""

    @property
    def id(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def compile(self) -> str: ...
    @property
    def verify(self) -> str: ...


def find_devices(profiles: Sequence[TargetProfile], given: Mapping[str, Address]) -> dict[str, Device]:
    """Target -> its device, asked and checked: those given, else those that profiles name (``[execute] remote``).

    Raises:
        ToolchainError: BAD_TARGET, a device is given for a target that is not built; USAGE, for one that can't be
            measured so; DEVICE, it can't be reached; INCOMPATIBLE_HOST, it is no such machine; MISSING_TOOL.
    """
    by_name = {profile.name: profile for profile in profiles}
    for name in given:
        if name not in by_name:
            raise ToolchainError(
                f"got a device for {name!r}; targets of this build: {', '.join(by_name)}{did_you_mean(name, by_name)}",
                where="--device",
                code=ExitCode.BAD_TARGET,
            )
        if why := _not_on_devices(by_name[name]):
            raise ToolchainError(f"a device for {name} is of no use: {why}", where="--device", code=ExitCode.USAGE)
    devices: dict[str, Device] = {}
    for name, profile in by_name.items():
        address = given.get(name)
        if address is None and profile.execute.how == "remote" and profile.execute.remote:
            address = parse_address(profile.execute.remote, f"{profile.path}: execute.remote")
        if address is not None:
            devices[name] = inspect_device(address)
            check_device(devices[name], profile.requirements(), name)
    return devices


def _not_on_devices(profile: TargetProfile) -> str:
    if profile.kind != "cpu":
        return "only engines for CPUs are compiled ahead of time"
    if profile.arch == "wasm32":
        return "WebAssembly modules run inside of other programs"
    if "tvm" not in profile.runtime.engines or profile.runtime.form == "vm":
        return "its profile allows no engine compiled ahead of time by TVM"
    return ""


def add_measure_device(
    maker: Maker, profile: TargetProfile, device: Device, entries: Sequence[DeviceEntry], runner: str
) -> str:
    """The stage that measures a target's engines on ``device``; ``runner``: the node that builds its ``bundle-run``."""
    settings, cores = maker.recipe.measure, profile.cpu.cores
    made = [entry for entry in entries if entry.compile]
    sent = [entry for entry in made if entry.backend == "tvm" and entry.verify]
    options = measure_device.Options(
        target=profile.name,
        requirements=profile.requirements(),
        sizes=dict(settings.shapes),
        runs=settings.runs,
        warmup=settings.warmup,
        max_seconds=settings.max_seconds,
        threads=settings.threads or (min(cores, device.host.cores) if cores else 0),
        unmeasured={entry.id: _NEEDS_PYTHON for entry in made if entry.backend == "onnxruntime"},
    )
    engines = {entry.id: f"{entry.compile}:engine" for entry in sent}
    verdicts = {f"verdict[{entry.id}]": f"{entry.verify}:verdict" for entry in sent}
    return maker.add(
        f"measure@{profile.name}",
        measure_device.STAGE,
        options,
        {
            "evaluation": "evaluation:dataset",
            "runner": f"{runner}:runner",
            "selftest": "selftest:selftest",
            **engines,
            **verdicts,
        },
        optional=frozenset({*engines, *verdicts}),
        failure=ExitCode.MEASURE,
        target=profile.name,
        extra=device.identity(),
        outside={"address": str(device.address)},
    )
