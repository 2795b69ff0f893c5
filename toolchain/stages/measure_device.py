"""measure_device: engines ahead of time on a device that is reached over SSH: checked there, then timed side by side.

Each engine goes there as a bundle, with the ``bundle-run`` of the target, and is opened as it will be in the end: first
its self-test against the original's outputs, then latencies in turns with the other engines.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.race import Racer, race, sample_shapes, write_sample
from toolchain.remote.address import parse_address
from toolchain.remote.device import check_device, inspect_device
from toolchain.remote.place import Conversation, Place
from toolchain.remote.ssh import Ssh
from toolchain.stage import StageContext, StageDef, StageResult

PROGRAM = "bundle-run"
_SAMPLE = "sample.npz"
_OPEN_SECONDS = 300.0
_SELF_TEST, _INCOMPATIBLE, _STORAGE = 20, 30, 41  # exit codes of bundle-run, docs/edge.md


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the measure_device stage.

    Attributes:
        target: name of the target.
        requirements: what its machines must have, as ``TargetProfile.requirements()`` gives it.
        sizes, runs, warmup, max_seconds, threads: as those of the measure stage.
        unmeasured: engine -> why it can't be measured there, to be said with the figures.
    """

    target: str
    requirements: dict[str, Any]
    sizes: dict[str, int]
    runs: int
    warmup: int
    max_seconds: float
    threads: int
    unmeasured: dict[str, str]


def run(ctx: StageContext) -> StageResult:
    """Inputs: ``evaluation``, ``runner``, ``selftest``, engines ``PRECISION/BACKEND`` and ``verdict[ENGINE]`` of each.

    Output ``measurement`` (measurement.json).  Facts as those of the measure stage (``peak_mb`` is the whole process's)
    and ``self_test`` per engine; an engine that fails it has ``rejected`` instead of figures.  ``device`` says that and
    how they were taken; ``unmeasured`` which engines could not be.  ``outside["address"]`` says where the device is.

    Raises:
        ToolchainError: DEVICE, STORAGE, INCOMPATIBLE_HOST or MISSING_TOOL.
    """
    options: Options = ctx.options
    engines, unmeasured = _engines(ctx, options)
    if not engines:
        return StageResult(refused="there is no engine ahead of time to measure on the device")
    # Asked again: it may be another one now than when the build began.
    device = inspect_device(parse_address(ctx.outside["address"], "the device's address"))
    check_device(device, options.requirements, options.target)
    out = ctx.output("measurement")
    files = _files(ctx, options, engines, out)
    with Place(Ssh(device.address), sum(path.stat().st_size for path in files.values())) as place:
        place.put(files, frozenset([PROGRAM]))
        rows = _measure(place, list(engines), options, bool(device.emulated))
    if device.emulated:
        why = f"checked on an emulated device ({device.emulated}), whose times are none"
        unmeasured |= {name: why for name, row in rows.items() if not row.keys() & {"error", "rejected"}}
    host = device.host
    facts = {
        "engines": rows,
        "unmeasured": unmeasured,
        "shapes": sample_shapes(out / _SAMPLE),
        "threads": options.threads or host.cores,
        "host": {"cpu_model": host.cpu_model, "cores": host.cores, "arch": host.arch, "memory_mb": host.memory_mb},
        "device": {"over": "ssh", "emulated": device.emulated, "governor": device.governor},
        "unit": {"median_ms": "milliseconds", "peak_mb": "1e6 bytes of the whole process"},
    }
    (out / _SAMPLE).unlink()
    (out / "measurement.json").write_text(json.dumps(facts, sort_keys=True, indent=1))
    return StageResult(facts)


def _engines(ctx: StageContext, options: Options) -> tuple[dict[str, Path], dict[str, str]]:
    """The engines that can go to the device, and why the others can't."""
    engines, unmeasured = {}, dict(options.unmeasured)
    for name, folder in sorted(ctx.inputs.items()):
        if name in ("evaluation", "runner", "selftest") or name.startswith("verdict["):
            continue
        if f"verdict[{name}]" not in ctx.inputs:
            unmeasured[name] = "not measured on the device: it was not verified here"
        elif (form := json.loads((folder / "engine.json").read_text()).get("form")) == "aot":
            engines[name] = folder
        else:
            why = "engines of TVM's virtual machine are not sent" if form == "vm" else f"the form {form!r} is not"
            unmeasured[name] = f"not measured on the device: {why}"
    return engines, unmeasured


def _files(ctx: StageContext, options: Options, engines: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """Name on the device -> file; the bundles are made in ``out``'s neighbour."""
    sample = out / _SAMPLE
    contract = json.loads((next(iter(engines.values())) / "contract.json").read_text())
    write_sample(ctx.inputs["evaluation"], contract, options.sizes, sample)
    files = {PROGRAM: ctx.inputs["runner"] / PROGRAM, _SAMPLE: sample}
    for index, (name, folder) in enumerate(engines.items()):
        bundle = ctx.out.with_name("bundles") / str(index)
        _pack(ctx, options, name, folder, bundle)
        found = sorted(path for path in bundle.rglob("*") if path.is_file())
        files |= {f"{index}/{path.relative_to(bundle).as_posix()}": path for path in found}
    return files


def _pack(ctx: StageContext, options: Options, name: str, engine: Path, out: Path) -> None:
    """An engine as the bundle that it would be released in, less what only people read."""
    from toolchain.bundle.manifest import BundleManifest, RuntimeNeed, TargetInfo, Tolerance, parse_engine
    from toolchain.bundle.pack import BundleSpec, pack_bundle, pack_release

    verdict = json.loads((ctx.inputs[f"verdict[{name}]"] / "verdict.json").read_text())
    files = {path.relative_to(engine).as_posix(): path for path in sorted(engine.rglob("*")) if path.is_file()}
    files["selftest.npz"] = ctx.inputs["selftest"] / "selftest.npz"
    manifest = BundleManifest(
        name="measured",
        version="0.0.0",
        target=TargetInfo(options.target),
        requirements=options.requirements,
        engine=parse_engine(json.loads((engine / "engine.json").read_text()), engine / "engine.json"),
        runtime=RuntimeNeed("", ""),
        contract=json.loads((engine / "contract.json").read_text()),
        selftest=Tolerance.around(verdict.get("worst") or {}),
    )
    out.parent.mkdir(exist_ok=True)
    pack_release("measured", "0.0.0", [pack_bundle(BundleSpec(manifest, files))], out)


def _measure(place: Place, names: list[str], options: Options, emulated: bool) -> dict[str, dict[str, Any]]:
    """A row per engine: its self-test, and what it took."""
    rows = {name: _self_test(place, index, options) for index, name in enumerate(names)}
    with contextlib.ExitStack() as stack:
        racers: dict[str, RemoteRacer] = {}
        for index, name in enumerate(names):
            if rows[name].keys() & {"error", "rejected"}:
                continue
            racer = RemoteRacer(place, index, options)
            stack.callback(racer.close)
            if racer.error:
                rows[name]["error"] = racer.error
            else:
                racers[name] = racer
        runs, warmup = (1, 0) if emulated else (options.runs, options.warmup)
        race(racers, runs, warmup, options.max_seconds)
        for name, racer in racers.items():
            figures = racer.figures()
            if not emulated:
                rows[name] |= figures
    return rows


def _self_test(place: Place, index: int, options: Options) -> dict[str, Any]:
    """``{"self_test": ...}``, and why the engine is rejected or did not run, if so."""
    done = place.run(f"./{PROGRAM} self-test {index} --threads {options.threads}", _OPEN_SECONDS)
    said = done.last_words.removeprefix(f"{PROGRAM}: ")
    if done.status in (_INCOMPATIBLE, _STORAGE):
        code = ExitCode.INCOMPATIBLE_HOST if done.status == _INCOMPATIBLE else ExitCode.STORAGE
        raise ToolchainError(f"the device cannot open the engine: {said}", where=options.target, code=code)
    if done.status not in (0, _SELF_TEST):
        return {"error": f"on the device: {said}"}
    row: dict[str, Any] = {"self_test": json.loads(done.out.strip().splitlines()[-1])["outputs"]}
    return row | ({"rejected": f"its self-test fails on the device: {said}"} if done.status else {})


class RemoteRacer(Racer):
    """One engine's process on the device: ``bundle-run turns``."""

    def __init__(self, place: Place, index: int, options: Options) -> None:
        super().__init__()
        command = f"./{PROGRAM} turns {index} --inputs {_SAMPLE} --threads {options.threads}"
        self._seconds = 120.0 + 10 * options.max_seconds
        self._process: Conversation = place.converse(command)
        try:
            answer = self._process.ask("", _OPEN_SECONDS)
        except BaseException:
            self.close()
            raise
        self.error = "" if answer else f"on the device: {self._process.last_words.removeprefix(f'{PROGRAM}: ')}"
        self.opened = json.loads(answer) if answer else {}

    def peak_mb(self, memory: Mapping[str, Any]) -> float:
        return float(memory["peak_kb"] * 1024 / 1e6)

    def close(self) -> None:
        self._process.close()

    def answer(self, line: str) -> Any:
        answer = self._process.ask(line, self._seconds)
        if answer is None:
            said = self._process.last_words.removeprefix(f"{PROGRAM}: ")
            hint = "is its memory too small for all engines at once? quantize.precisions leaves some out"
            raise ToolchainError(
                f"the measuring process on the device ended: {said}",
                hint=hint if said.endswith("SIGKILL") else "",
                code=ExitCode.MEASURE,
            )
        return json.loads(answer)


STAGE = StageDef(
    name="measure_device",
    version=1,
    run="toolchain.stages.measure_device:run",
    options=Options,
    tools=(),
    worker="onnx",
    exclusive=True,
)
