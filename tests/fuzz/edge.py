"""Builds the fuzzer of the edge runtime with AddressSanitizer and UBSan, and runs it.

python tests/fuzz/edge.py SECONDS [SEED]      # with new inputs of interest written to tests/fuzz/corpus
python tests/fuzz/edge.py --seeds             # writes the first inputs of the corpus anew
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
CORPUS = Path(__file__).with_name("corpus")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def build(folder: Path) -> tuple[Path, Path]:
    """The fuzzer, and the library of the engine that it opens."""
    from helpers.edge_samples import EDGE, SOURCES, compile_model

    from toolchain.runtime.edge.build import RUNTIME_SOURCES

    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", *SANITIZE, f"-I{EDGE / 'include'}", f"-I{EDGE / 'src'}"]
    traced = [*flags, "-Wall", "-Wextra", "-fsanitize-coverage=trace-pc"]
    objects = []
    for source in (*(EDGE / "src" / f"{name}.c" for name in RUNTIME_SOURCES), SOURCES):
        objects.append(folder / f"{source.stem}.o")
        subprocess.run(["gcc", *traced, "-DBATCH=0", "-c", str(source), "-o", str(objects[-1])], check=True)
    wrap = "-Wl,--wrap=malloc,--wrap=calloc"
    program = folder / "edge_fuzz"
    command = ["gcc", *flags, "-Wall", wrap, "-o", str(program), str(Path(__file__).with_name("edge_fuzz.c"))]
    subprocess.run([*command, *map(str, objects), "-lm", "-ldl", "-pthread"], check=True)
    return program, compile_model(folder / "model.so", 0)


def run(folder: Path, seconds: int, seed: int = 1, save: Path | None = None) -> dict[str, int]:
    """What the fuzzer reports.

    Raises:
        RuntimeError: it found something; the text holds the sanitizer's words.
    """
    program, model = build(folder)
    command = [str(program), str(CORPUS), str(model), str(seconds), str(seed), *([str(save)] if save else [])]
    # Failed allocations are wanted, and so are hostile sizes.
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=1:handle_abort=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        crashes = [path.name for path in folder.glob("crash.*")]
        for name in crashes:
            (Path.cwd() / name).write_bytes((folder / name).read_bytes())
        raise RuntimeError(
            f"ended with {done.returncode}; inputs in the working directory: {crashes}\n{done.stderr[-6000:]}"
        )
    report: dict[str, int] = json.loads(done.stdout)
    return report


def write_seeds() -> None:
    """The first inputs: what the packer makes of a small engine, and parts of it."""
    from helpers.bundle_samples import bundle_spec
    from helpers.edge_samples import matrix_engine, selftest_file

    from toolchain.bundle.pack import pack_bundle, pack_release

    CORPUS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = bundle_spec(matrix_engine(folder / "e"), selftest_npz=selftest_file(folder / "selftest.npz"))
        pack_release("sample", "1.0.0", [pack_bundle(spec)], folder / "r")
        blobs = {"sha256:" + p.name: p.read_bytes() for p in (folder / "r" / "blobs" / "sha256").iterdir()}
        index = json.loads((folder / "r" / "index.json").read_bytes())
        release = json.loads(blobs[index["manifests"][0]["digest"]])
        manifest = json.loads(blobs[release["manifests"][0]["digest"]])
        files = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in manifest["layers"]}
        order = [files[n] for n in ("b0.so", "contract.json", "engine.json", "selftest.npz", "bundle.json")]
        order += [manifest["config"], release["manifests"][0], index["manifests"][0]]
        sections = [b"", *(blobs[d["digest"]] for d in order[1:]), (folder / "r" / "index.json").read_bytes()]
        for number, descriptor in enumerate(order):
            old = f'"digest":"{descriptor["digest"]}"'.encode()
            size = f'"size":{descriptor["size"]}'.encode()
            for later in range(number + 1, len(sections)):
                parts = sections[later].split(old)
                for i in range(1, len(parts)):
                    parts[i] = parts[i].replace(size, f'"size":@S{number}'.encode(), 1)
                sections[later] = f'"digest":"@D{number}"'.encode().join(parts)
                sections[later] = sections[later].replace(descriptor["digest"].encode(), f"@D{number}".encode())
        (CORPUS / "seed.layout").write_bytes(b"\n%%\n".join(sections))
        (CORPUS / "seed.bundle").write_bytes(blobs[files["bundle.json"]["digest"]])
        (CORPUS / "seed.json").write_bytes('{"a":[1,-2.5e3,true,null,"\\u00e9\\n\\ud83d\\ude00é"],"b":{}}'.encode())
        (CORPUS / "seed.npz").write_bytes(blobs[files["selftest.npz"]["digest"]])
        (CORPUS / "seed.elf").write_bytes(blobs[files["b0.so"]["digest"]][:64])


def main() -> None:
    sys.path.insert(0, str(TESTS))
    if sys.argv[1:] == ["--seeds"]:
        write_seeds()
        return
    seconds, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(prefix="edge-fuzz-") as name:
        print(json.dumps(run(Path(name), seconds, seed, CORPUS)))


if __name__ == "__main__":
    main()
