"""What a target profile's tables say about each other, and whether LLVM knows their names.

Like the checks of recipes these read raw tables; values of the wrong type are left to the shape check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toolchain.config_errors import Key, Problem, problem
from toolchain.llvm_cpus import CPUINFO_NAMES, cpuinfo_names, table

Raw = Mapping[str, Any]


def sense_problems(raw: Raw) -> list[Problem]:
    """Mistakes that only show when a profile's tables are seen together; ``raw`` is already merged."""
    found = [*_kind(raw), *_numerics(raw), *_small(raw), *_wasm(raw), *_static(raw)]
    arch = raw.get("arch")
    if isinstance(arch, str) and arch in CPUINFO_NAMES:
        found += [*_cpu(raw, arch), *_llvm(raw, arch)]
    return found


def _table(raw: Raw, *keys: str) -> dict[str, Any]:
    value: Any = raw
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def _strings(table_: Raw, key: str) -> list[tuple[int, str]]:
    value = table_.get(key)
    return [(i, v) for i, v in enumerate(value) if isinstance(v, str)] if isinstance(value, list | tuple) else []


def _kind(raw: Raw) -> Iterator[Problem]:
    kind, target = raw.get("kind"), _table(raw, "tvm", "target")
    provider = _table(raw, "runtime").get("execution_provider", "CPUExecutionProvider")
    if kind not in ("cpu", "cuda"):
        return
    wanted = {"cpu": ("llvm", "CPUExecutionProvider"), "cuda": ("cuda", "CUDAExecutionProvider")}[kind]
    if target.get("kind") in ("llvm", "cuda") and target["kind"] != wanted[0]:
        yield problem(("tvm", "target", "kind"), target["kind"], f"'{wanted[0]}', as the profile's kind is '{kind}'")
    if provider in ("CPUExecutionProvider", "CUDAExecutionProvider") and provider != wanted[1]:
        allowed = f"'{wanted[1]}', as the profile's kind is '{kind}'"
        yield problem(("runtime", "execution_provider"), provider, allowed)
    if kind == "cuda":
        arch = _table(raw, "cuda").get("arch")
        if "cuda" not in raw:
            yield Problem(("cuda",), "nothing", "a table with arch, as the profile's kind is 'cuda'")
        elif isinstance(arch, str) and target.get("arch", arch) != arch:
            yield problem(("tvm", "target", "arch"), target["arch"], f"the same as cuda.arch, '{arch}'")
        if "tvm" in raw and "host" not in _table(raw, "tvm"):
            yield Problem(("tvm", "host"), "nothing", "the TVM target of the host processor, as the kind is 'cuda'")
    else:
        for key in (("cuda",), ("tvm", "host")):
            if key[-1] in _table(raw, *key[:-1]):
                yield Problem(key, "a table", "no such table, as the profile's kind is 'cpu'")


def _numerics(raw: Raw) -> Iterator[Problem]:
    numerics = _table(raw, "numerics")
    if numerics.get("activation") == "s8" and numerics.get("reduce_range") is True:
        allowed = "false with s8 activations: only products of u8 and s8 saturate 16-bit sums"
        yield problem(("numerics", "reduce_range"), True, allowed)


SMALL = {"armv7l": ("mfloat-abi", "hard"), "riscv64": ("mabi", "lp64d")}
"""Architectures that only engines ahead of time run on, and the calling convention that their target must name."""


AHEAD_ONLY = (*SMALL, "wasm32")
"""All architectures that only engines ahead of time run on."""


def _wasm(raw: Raw) -> Iterator[Problem]:
    """WebAssembly has an operating system and a C library of its own, and no others have them."""
    arch, abi, linker = raw.get("arch"), _table(raw, "runtime", "abi"), _table(raw, "tvm").get("linker")
    if not isinstance(arch, str):
        return
    module = arch == "wasm32"
    if raw.get("os") in ("linux", "wasi") and (raw["os"] == "wasi") != module:
        yield problem(("os",), raw["os"], f"'{'wasi' if module else 'linux'}', as the profile's arch is '{arch}'")
    if abi and (abi.get("libc", "glibc") == "wasi") != module:
        allowed = f"'{'wasi' if module else 'glibc'}', as the profile's arch is '{arch}'"
        yield problem(("runtime", "abi", "libc"), abi.get("libc", "glibc"), allowed)
    if module and "tvm" in raw and linker != "zig-cc":
        yield problem(("tvm", "linker"), linker or "nothing", "'zig-cc', as the profile's arch is 'wasm32'")


def _small(raw: Raw) -> Iterator[Problem]:
    """Of architectures for which there are no wheels of ONNX Runtime and TVM's run-time."""
    arch, target, runtime = raw.get("arch"), _table(raw, "tvm", "target"), _table(raw, "runtime")
    for name, (key, value) in SMALL.items():
        if arch == name and target and target.get(key) != value:
            yield problem(("tvm", "target", key), target.get(key, "nothing"), f"'{value}' on {name}")
        elif arch != name and key in target:
            yield problem(("tvm", "target", key), target[key], f"no such key: it is for {name}")
    if not isinstance(arch, str) or arch not in AHEAD_ONLY:
        return
    for index, engine in _strings(runtime, "engines"):
        if engine == "onnxruntime":
            yield problem(("runtime", "engines", index), engine, f"'tvm': ONNX Runtime has no build for {arch}")
    module = arch == "wasm32"
    if runtime.get("form") in (None, "auto", "vm", *(["aot"] if module else [])):
        allowed = f"'aot' or 'static': TVM's run-time has no build for {arch}"
        if module:
            allowed = "'static': a WebAssembly module holds its model"
        yield problem(("runtime", "form"), runtime.get("form", "nothing"), allowed)


def _cpu(raw: Raw, arch: str) -> Iterator[Problem]:
    cpu = _table(raw, "cpu")
    model = cpu.get("model")
    cpus = table(arch).cpus
    if isinstance(model, str) and model and model not in cpus:
        yield problem(("cpu", "model"), model, f"a processor that LLVM knows for {arch}", cpus)
    known = cpuinfo_names(arch)
    for index, name in _strings(cpu, "features"):
        if name not in known:
            yield problem(("cpu", "features", index), name, f"a feature name of /proc/cpuinfo on {arch}", known)
    compiled = _table(raw, "tvm", "host") or _table(raw, "tvm", "target")
    if isinstance(model, str) and model in cpus and compiled.get("mcpu") in cpus and compiled["mcpu"] != model:
        key = ("tvm", "host" if _table(raw, "tvm", "host") else "target", "mcpu")
        yield problem(key, compiled["mcpu"], f"the same as cpu.model, '{model}'")


def _llvm(raw: Raw, arch: str) -> Iterator[Problem]:
    for name in ("target", "host"):
        target = _table(raw, "tvm", name)
        if target and target.get("kind", "llvm") == "llvm":
            yield from _llvm_target(target, arch, ("tvm", name))


def _static(raw: Raw) -> Iterator[Problem]:
    runtime = _table(raw, "runtime")
    if runtime.get("form") != "static":
        return
    if raw.get("kind") == "cuda":
        yield problem(("runtime", "form"), "static", "'auto' or 'vm', as the profile's kind is 'cuda'")
    if [name for _, name in _strings(runtime, "engines")] != ["tvm"]:
        # The requirements of its bundles name no C library, which ONNX Runtime needs.
        yield problem(("runtime", "engines"), runtime.get("engines"), "['tvm'], as runtime.form is 'static'")


def _triple(arch: str) -> str:
    if arch == "wasm32":
        return "wasm32-unknown-wasi"
    return f"{arch}-linux-gnu" + ("eabihf" if arch == "armv7l" else "")


def _llvm_target(target: Raw, arch: str, key: Key) -> Iterator[Problem]:
    known = table(arch)
    triple, cpu = target.get("mtriple"), target.get("mcpu")
    if isinstance(triple, str) and triple and triple.split("-")[0] != arch:
        yield problem(
            (*key, "mtriple"), triple, f"a triple that begins with the profile's arch, e.g. '{_triple(arch)}'"
        )
    if isinstance(cpu, str) and cpu and cpu not in known.cpus:
        yield problem((*key, "mcpu"), cpu, f"a processor that LLVM knows for {arch}", known.cpus)
    for index, attribute in _strings(target, "mattr"):
        sign, name = attribute[:1], attribute[1:]
        if sign in ("+", "-") and name and name not in known.features:
            choices = [sign + feature for feature in known.features]
            yield problem((*key, "mattr", index), attribute, f"a feature that LLVM knows for {arch}", choices)
