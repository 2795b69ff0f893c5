"""The engines of a target: the stages that compile and verify each one, or why the plan offers none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from toolchain.errors import ExitCode
from toolchain.host import Host
from toolchain.keys import installed_version
from toolchain.llvm_cpus import compiled_features
from toolchain.plan_shared import Maker, metric_fields
from toolchain.plan_static import add_link
from toolchain.programs import emulator_program
from toolchain.stages import compile_ort, compile_tvm, verify
from toolchain.target import TargetProfile
from toolchain.tvm.records import to_json as records_to_json


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine that the plan races: the node ids that make and verify it.

    ``verify`` is "" when it can't be run here; ``unverified`` says why.  ``refused`` says why the plan
    itself offers no such engine.  ``link`` makes what goes into the bundle where that is another file than what was
    compiled.
    """

    precision: str
    backend: str
    compile: str = ""
    verify: str = ""
    unverified: str = ""
    refused: str = ""
    link: str = ""

    @property
    def id(self) -> str:
        return f"{self.precision}/{self.backend}"


def unsuited(profile: TargetProfile, precision: str, backend: str) -> str:
    """Why a pair makes no sense on a target's instructions, known before anything is compiled."""
    if backend in profile.without_wheels:
        return f"there is no build of ONNX Runtime for {profile.arch}"
    x86 = profile.kind == "cpu" and profile.arch == "x86_64"
    if x86 and backend == "tvm" and precision == "fp16" and "avx512_fp16" not in profile.cpu.features:
        # LLVM converts every value to float32 and back; the library is slower than the fp32 one.
        return "the target has no fp16 arithmetic (avx512_fp16): TVM would emulate it"
    return ""


def add_engine(maker: Maker, profile: TargetProfile, precision: str, backend: str, source: str, at: str) -> Entry:
    native = profile.runs_natively_on(maker.host)
    provider = profile.runtime.execution_provider
    name = f"compile[{precision}/{backend}]{at}"
    if backend == "tvm":
        maker.add(
            name,
            compile_tvm.STAGE,
            _tvm_options(maker, profile, precision, native),
            {"onnx": source},
            failure=ExitCode.COMPILE,
            tolerant=True,
            target=profile.name,
            extra={"host": maker.host.cpu_model} if native else {},
        )
        if not native and profile.kind != "cpu":
            return Entry(precision, backend, name, unverified=why_not_here(profile, maker.host))
    else:
        device = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
        options = compile_ort.Options(provider, device, precision)
        maker.add(name, compile_ort.STAGE, options, {"onnx": source}, failure=ExitCode.COMPILE, target=profile.name)
    native = native and has_provider(provider)
    checked = f"verify[{precision}/{backend}]{at}"
    options_ = verify.Options(
        **metric_fields(maker),
        evidence="native" if native else "proxy",
        provider=provider if native else "CPUExecutionProvider",
    )
    # Code that can't run here is judged by its twin: the same rules, compiled for this machine.
    judged = "twin" if backend == "tvm" and not native else "engine"
    inputs = {"engine": f"{name}:{judged}", "evaluation": "evaluation:dataset", "reference": "reference:reference"}
    own = ".py:" in options_.metric
    stage = dataclasses.replace(verify.STAGE, user_code=True) if own else verify.STAGE
    # Kernels are chosen by the processor, and so may the last bits of the outputs be.
    extra = {"host": maker.host.cpu_model}
    maker.add(
        checked, stage, options_, inputs, failure=ExitCode.COMPILE, tolerant=True, target=profile.name, extra=extra
    )
    linked = add_link(maker, profile, name, checked) if backend == "tvm" and profile.runtime.form == "static" else ""
    return Entry(precision, backend, name, checked, link=linked)


def _tvm_options(maker: Maker, profile: TargetProfile, precision: str, native: bool) -> compile_tvm.Options:
    records = maker.records.get(profile.name, {}) if precision == "fp32" else {}
    return compile_tvm.Options(
        target=profile.tvm_target(),
        kind=profile.kind,
        arch=profile.arch,
        native=native,
        vector_bits=profile.cpu.vector_bits,
        registers=profile.cpu.registers,
        linker=profile.tvm.linker,
        libc_min=profile.runtime.abi.min,
        precision=precision,
        l1d_kib=profile.cpu.l1d_kib,
        proxy="" if native else _proxy(maker.host),
        records=records_to_json(records),
        records_file=maker.path(maker.recipe.records_file) if records else "",
        form=profile.runtime.form,
        **({} if native or profile.kind != "cpu" else _emulator(profile)),
    )


def _emulator(profile: TargetProfile) -> dict[str, str]:
    """What runs the target's code here, if its profile says which processor to be and QEMU is on PATH."""
    program = emulator_program(profile.arch, profile.execute.qemu_cpu)
    return {"emulator": program, "emulator_cpu": profile.execute.qemu_cpu if program else ""}


def _proxy(host: Host) -> str:
    """The level of x86-64 whose code stands in for code that this machine can't run.

    Without vectors of 256 bits and fp16 conversions, checking a model for another processor takes minutes.
    """
    level = "x86-64-v3"
    return level if host.arch == "x86_64" and compiled_features("x86_64", level) <= host.cpu_features else ""


def has_provider(provider: str) -> bool:
    return provider == "CPUExecutionProvider" or installed_version("onnxruntime-gpu") != "not installed"


def why_not_here(profile: TargetProfile, host: Host) -> str:
    from toolchain.host import incompatibilities

    if profile.execute.how == "none":
        return "the profile says execute.how = 'none'"
    if profile.execute.how == "remote":
        return "the profile says execute.how = 'remote', and no device was given (--device)"
    return "; ".join(incompatibilities(profile.requirements(), host))
