"""The tables of a target profile; :mod:`toolchain.target` loads and combines them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from toolchain.config_errors import refuse
from toolchain.config_types import Count, Distinct, Flag, NonEmpty, Positive, PrecisionName, Section

CUDA_ARCH_PATTERN = r"sm_\d{2,3}[a-z]?"
Backend = Literal["onnxruntime", "tvm"]


def _signed(value: Any) -> Any:
    if not isinstance(value, str) or len(value) < 2 or value[0] not in "+-":
        raise refuse("an LLVM feature name after '+' or '-', e.g. '+dotprod'")
    return value


Attribute = Annotated[str, BeforeValidator(_signed)]
CudaArch = Annotated[str, Field(pattern=f"^{CUDA_ARCH_PATTERN}$")]


class Cpu(Section):
    """The processor, as far as schedules and host checks need it."""

    model: NonEmpty = Field(description="LLVM processor name (mcpu)")
    features: Annotated[tuple[NonEmpty, ...], Distinct] = Field(
        (), description="features the machine must have, named as in /proc/cpuinfo, besides those of the compiled code"
    )
    vector_bits: Literal[128, 256, 512] = Field(description="width of a vector register in bits: 128, 256 or 512")
    registers: Positive = Field(description="number of vector registers")
    l1d_kib: Positive = Field(description="level-1 data cache of one core in KiB")
    l2_kib: Positive = Field(description="level-2 cache of one core in KiB (of one cluster where cores share it)")
    cores: Count = Field(0, description="cores to use; 0 for all of the machine")


class Cuda(Section):
    """The GPU."""

    arch: CudaArch = Field(description="CUDA architecture such as 'sm_80'")


class LlvmTarget(Section):
    """A TVM target of kind llvm."""

    kind: Literal["llvm"] = Field("llvm", description="'llvm'")
    mtriple: NonEmpty = Field(description="LLVM triple, e.g. 'aarch64-linux-gnu'")
    mcpu: NonEmpty = Field(description="LLVM processor name")
    mattr: Annotated[tuple[Attribute, ...], Distinct] = Field((), description="LLVM features, each with its sign")
    mfloat_abi: Literal["hard"] | None = Field(
        None, alias="mfloat-abi", description="'hard' for 32-bit ARM: floats are passed in registers of the FPU"
    )
    mabi: Literal["lp64d"] | None = Field(
        None, description="'lp64d' for riscv64: the calling convention with doubles in registers"
    )


class CudaTarget(Section):
    """A TVM target of kind cuda."""

    kind: Literal["cuda"] = Field("cuda", description="'cuda'")
    arch: CudaArch = Field(description="CUDA architecture such as 'sm_80'")
    max_threads_per_block: Positive = Field(1024, description="threads in a block")
    max_shared_memory_per_block: Positive = Field(49152, description="bytes of static shared memory for a block")
    thread_warp_size: Positive = Field(32, description="threads in a warp")
    registers_per_block: Positive = Field(65536, description="32-bit registers for a block")
    l2_cache_size_bytes: Positive | None = Field(None, description="level-2 cache in bytes")


class Tvm(Section):
    """How TVM compiles for the target."""

    target: Annotated[LlvmTarget | CudaTarget, Field(discriminator="kind")] = Field(
        description="the TVM target: a table with kind = 'llvm' or 'cuda'"
    )
    host: LlvmTarget | None = Field(None, description="for a GPU: the TVM target of its host processor")
    linker: NonEmpty = Field(
        "cc",
        description="'cc', another compiler driver on PATH, 'zig' to link for another machine, or 'zig-cc', which also "
        "knows 32-bit ARM, riscv64 and wasm32",
    )


class Numerics(Section):
    """Precisions in order of preference, and the int8 scheme that suits the instructions."""

    precisions: Annotated[tuple[PrecisionName, ...], Distinct, Field(min_length=1)] = Field(
        description="precisions in order of preference where nothing can be measured"
    )
    activation: Literal["u8", "s8"] = Field(description="type of quantized activations: 'u8' or 's8'")
    weight: Literal["u8", "s8"] = Field("s8", description="type of quantized weights: 's8' or 'u8'")
    per_channel: Flag = Field(True, description="whether each output channel of a weight has its own scale")
    symmetric_activation: Flag = Field(description="whether the zero point of activations is fixed in the middle")
    symmetric_weight: Flag = Field(True, description="whether the zero point of weights is 0")
    reduce_range: Flag = Field(False, description="whether weights use 7 bits, so that 16-bit sums cannot saturate")


class Abi(Section):
    """The C library that compiled code is linked against."""

    libc: Literal["glibc", "wasi"] = Field("glibc", description="'glibc', or 'wasi' for wasm32")
    min: Annotated[str, Field(pattern=r"^\d+\.\d+$")] = Field(
        description="oldest version, e.g. '2.28'; of WASI '0.1', which is also called preview 1"
    )


class Runtime(Section):
    """What runs the engines on the target."""

    engines: Annotated[tuple[Backend, ...], Distinct, Field(min_length=1)] = Field(
        description="backends in order of preference where nothing can be measured: 'onnxruntime', 'tvm'"
    )
    abi: Abi = Field(description="a table with libc and min")
    execution_provider: Literal["CPUExecutionProvider", "CUDAExecutionProvider"] = Field(
        "CPUExecutionProvider", description="provider of ONNX Runtime"
    )
    form: Literal["auto", "aot", "vm", "static"] = Field(
        "auto",
        description="form of TVM engines: 'aot' (ahead of time: a library that needs no run-time), 'vm' (TVM's virtual "
        "machine), 'auto' (ahead of time wherever the model allows it), 'static' (ahead of time, as one executable "
        "or WebAssembly module that holds the edge runtime and the model)",
    )
    runner: bool = Field(
        False,
        description="whether bundles carry the edge runtime: a C library and the program 'bundle-run', so that a "
        "device needs nothing else; with an engine of TVM's virtual machine also TVM's run-time",
    )
    tvm_packages: str = Field(
        "",
        description="where TVM's run-time for another architecture comes from: a folder into which "
        "'pip install --target' put apache-tvm and apache-tvm-ffi for it; relative to the profile's file",
    )


class Limits(Section):
    """What the device has room for."""

    memory_mb: Positive | None = Field(None, description="memory for the model in megabytes")
    size_mb: Positive | None = Field(None, description="storage for the model in megabytes")


class Execute(Section):
    """How code for the target is executed in a build."""

    how: Literal["native", "emulated", "remote", "none"] = Field(
        "native",
        description="'native' (measured where the machine satisfies the profile), 'emulated', 'remote' (measured on a "
        "device over SSH), 'none'",
    )
    remote: str = Field(
        "",
        description="with how = 'remote': the device, '[user@]host[:port]'; stays on this machine",
    )
    qemu_cpu: str = Field(
        "",
        description="the processor that QEMU's user-mode emulation is told to be where it checks code for the target, "
        "e.g. 'cortex-a76'",
    )
