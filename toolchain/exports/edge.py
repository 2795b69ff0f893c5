"""A folder for a device: the bundle, the program that runs it, and the library and headers for other programs.

Of a static executable or a WebAssembly module: that file alone, which holds all of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from toolchain.bundle.layout import Blob
from toolchain.bundle.media import RUNNER_FOLDER
from toolchain.bundle.read import open_release
from toolchain.bundle.resolve import split_reference
from toolchain.errors import ExitCode, ToolchainError
from toolchain.exports.files import Tree, text_file
from toolchain.exports.source import Source
from toolchain.runtime.edge.tvm_libraries import LIBRARIES

PROGRAM = "bundle-run"
PROGRAMS = frozenset({PROGRAM, "model"})
"""Files that may be executed."""


def edge_target(reference: str) -> str | None:
    """The target that is meant when none is named: the only one of the release that a device can run; None: not so.

    Raises:
        ToolchainError: USAGE, there are several, or no such release.
    """
    path, named = split_reference(reference)
    if named:
        return None
    fitting = [b.target for b in open_release(path).bundles if b.manifest.engine.form == "static" or _carries(b.files)]
    if len(fitting) > 1:
        raise ToolchainError(
            f"holds several bundles for devices: {', '.join(sorted(fitting))}",
            where=str(path),
            hint="say which with --target, or FOLDER@TARGET",
            code=ExitCode.USAGE,
        )
    return fitting[0] if fitting else None


def _carries(files: Iterable[str]) -> bool:
    return f"{RUNNER_FOLDER}/{PROGRAM}" in files


def edge_tree(source: Source) -> Tree:
    """``bundle/`` (an OCI image layout with the one target), ``bundle-run``, ``lib/``, ``include/``, ``README.md``.

    Of an engine of the form ``static``: ``model`` or ``model.wasm``, and ``README.md``.

    Raises:
        ToolchainError: USAGE, the bundle carries no edge runtime.
    """
    if source.engine.form == "static":
        program = source.engine.variants[0].file
        readme = _wasm_readme(source) if source.manifest.requirements["arch"] == "wasm32" else _static_readme(source)
        return {program: source.file(program), "README.md": text_file(readme)}
    runner = {name.removeprefix(f"{RUNNER_FOLDER}/"): source.file(name) for name in source.bundle.files if _of(name)}
    if PROGRAM not in runner:
        raise ToolchainError(
            f"the bundle for {source.manifest.target.name} carries no edge runtime",
            where=str(source.bundle.layout),
            details=[f"its engine is {source.facts()['engine']}"],
            hint=_why_without(source),
            code=ExitCode.USAGE,
        )
    # What the bundle itself needs of TVM stays in it.
    tree: dict[str, Blob] = {_place(name): blob for name, blob in runner.items() if name not in LIBRARIES}
    tree |= source.layout_files("bundle")
    tree["README.md"] = text_file(_readme(source))
    return tree


def _why_without(source: Source) -> str:
    if source.engine.form == "vm":
        return (
            "its engine needs TVM's run-time, which goes into bundles whose target profile says runner = true in its "
            "[runtime] table and, for another architecture than the build machine's, where tvm_packages are"
        )
    return (
        "the runtime goes into bundles with an engine of TVM for processors whose target profile says runner = true in "
        "its [runtime] table"
    )


def _static_readme(source: Source) -> str:
    manifest = source.manifest
    needs = manifest.requirements
    inputs = " ".join(f"--input {spec.name}={spec.name}.npy" for spec in source.contract.inputs)
    return f"""# {manifest.name} {manifest.version} for {manifest.target.name}

`model` is one static executable with the model inside. It needs Linux on {needs["arch"]} with the processor features
{" ".join(needs["cpu_features"])}, and no other file.

```sh
./model info         # what it is, its inputs, outputs and dimensions
./model self-test    # the recorded inputs against the recorded outputs
./model run {inputs}
./model bench        # latency, time to load, peak memory
```
"""


def _wasm_readme(source: Source) -> str:
    manifest = source.manifest
    inputs = " ".join(f"--input {spec.name}={spec.name}.npy" for spec in source.contract.inputs)
    return f"""# {manifest.name} {manifest.version} for {manifest.target.name}

`model.wasm` is a WebAssembly module with the model inside, for engines that have WASI preview 1 and these proposals:
{" ".join(manifest.requirements["cpu_features"])}. With wasmtime:

```sh
wasmtime model.wasm info         # what it is, its inputs, outputs and dimensions
wasmtime model.wasm self-test    # the recorded inputs against the recorded outputs
wasmtime --dir . model.wasm run {inputs}
wasmtime model.wasm bench        # latency, time to load, the module's memory
```

It sees the files of the folders that are opened for it, here `--dir .`. In a browser it needs a shim for WASI. Programs
that embed it call `tc_open_module` first and then the functions of `toolchain_runtime.h`, which it exports.
"""


def _nothing_else(source: Source) -> str:
    if source.engine.form == "vm":
        return "Beside these libstdc++.so.6, and nothing else: no Python, no package."
    return "Nothing else: no Python, no package."


def _of(name: str) -> bool:
    return name.startswith(f"{RUNNER_FOLDER}/")


def _place(name: str) -> str:
    if name.endswith(".h"):
        return f"include/{name}"
    return f"lib/{name}" if name.endswith(".so") else name


def _readme(source: Source) -> str:
    manifest = source.manifest
    needs = manifest.requirements
    libc = needs.get("libc") or {}
    inputs = " ".join(f"--input {spec.name}={spec.name}.npy" for spec in source.contract.inputs)
    return f"""# {manifest.name} {manifest.version} for {manifest.target.name}

Copy this folder to the device. It needs Linux on {needs["arch"]} with {libc.get("name", "libc")} {libc.get("min", "")}
or newer, and the processor features {" ".join(needs["cpu_features"])}. {_nothing_else(source)}

```sh
./bundle-run info bundle         # what it is, its inputs, outputs and dimensions
./bundle-run self-test bundle    # every digest, then the recorded inputs against the recorded outputs
./bundle-run run bundle {inputs}
./bundle-run bench bundle        # latency, time to load, peak memory
```

`lib/libtoolchain_runtime.so` with `include/toolchain_runtime.h` does the same for programs in C and whatever calls C.
"""
