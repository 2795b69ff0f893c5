"""Builds the fuzzer of the edge runtime with AddressSanitizer and UBSan, and runs it.

python tests/fuzz/edge.py SECONDS [SEED]      # new inputs of interest are kept in build/edge-fuzz
python tests/fuzz/edge.py --seeds             # writes the first inputs of the corpus anew
"""

from __future__ import annotations

import json
import os
import shutil
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
        # The linked engine takes one size, so that inputs are filled up and split for it; the other one takes any.
        subprocess.run(
            ["gcc", *traced, "-DBATCH=3", "-DSEQUENCE=8", "-c", str(source), "-o", str(objects[-1])], check=True
        )
    wrap = "-Wl,--wrap=malloc,--wrap=calloc"
    program = folder / "edge_fuzz"
    command = ["gcc", *flags, "-Wall", wrap, "-o", str(program), str(Path(__file__).with_name("edge_fuzz.c"))]
    subprocess.run([*command, *map(str, objects), "-lm", "-ldl", "-pthread"], check=True)
    return program, compile_model(folder / "model.so", 0)


def run(folder: Path, seconds: int, seed: int = 1, corpus: Path = CORPUS, save: Path | None = None) -> dict[str, int]:
    """What the fuzzer reports.

    Args:
        folder: an empty one to build in.
        seconds: 0: the corpus alone is run.
        seed: of the changes.
        corpus: first inputs.
        save: where inputs that reach new code are written.

    Raises:
        RuntimeError: it found something; the text holds the sanitizer's words.
    """
    program, model = build(folder)
    command = [str(program), str(corpus), str(model), str(seconds), str(seed), *([str(save)] if save else [])]
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


def layout_seed(release: Path) -> bytes:
    """A release as the fuzzer takes it: its blobs in an order in which digests and sizes name earlier ones."""
    blobs = {"sha256:" + path.name: path.read_bytes() for path in (release / "blobs" / "sha256").iterdir()}
    root = (release / "index.json").read_bytes()
    index = json.loads(blobs[json.loads(root)["manifests"][0]["digest"]])
    order: list[str] = []
    for bundle in index["manifests"]:
        manifest = json.loads(blobs[bundle["digest"]])
        layers = sorted(
            manifest["layers"], key=lambda d: not d["annotations"]["org.cncf.model.filepath"].endswith(".so")
        )
        order += [d["digest"] for d in (*layers, manifest["config"], bundle)]
    order = [*dict.fromkeys(order), json.loads(root)["manifests"][0]["digest"]]
    sections = [b"", *(blobs[digest] for digest in order[1:]), root]
    for number, digest in enumerate(order):
        size = f'"size":{len(blobs[digest])}'.encode()
        for later in range(number + 1, len(sections)):
            first, *rest = sections[later].split(digest.encode())
            rest = [part.replace(size, b'"size":@S%x' % number, 1) for part in rest]
            sections[later] = (b"@D%x" % number).join([first, *rest])
    return b"\n%%\n".join(sections)


def write_seeds() -> None:
    """The first inputs: what the packer makes of small engines, and parts of it."""
    from helpers.bundle_samples import bundle_spec, requirements, sample_release
    from helpers.edge_samples import matrix_engine, selftest_file, tokens_engine

    from toolchain.bundle.pack import pack_bundle, pack_release

    CORPUS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine, selftest = matrix_engine(folder / "e"), selftest_file(folder / "selftest.npz")
        pack_release("sample", "1.0.0", [pack_bundle(bundle_spec(engine, selftest_npz=selftest))], folder / "r")
        needs = {"a": requirements(("sse2",)), "b": requirements(("sse2", "avx"))}
        tokens = bundle_spec(tokens_engine(folder / "t", ((3, 8),))).manifest
        (CORPUS / "one.layout").write_bytes(layout_seed(folder / "r"))
        (CORPUS / "two.layout").write_bytes(layout_seed(sample_release(folder / "s", engine, needs)))
        (CORPUS / "seed.bundle").write_bytes(tokens.to_bytes())
        (CORPUS / "seed.json").write_bytes('{"a":[1,-2.5e3,true,null,"\\u00e9\\n\\ud83d\\ude00é"],"b":{}}'.encode())
        (CORPUS / "seed.npz").write_bytes(selftest.read_bytes())
        (CORPUS / "seed.elf").write_bytes((engine / "b0.so").read_bytes()[:64])


def main() -> None:
    sys.path.insert(0, str(TESTS))
    if sys.argv[1:] == ["--seeds"]:
        write_seeds()
        return
    seconds, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    grown = TESTS.parent / "build" / "edge-fuzz"
    grown.mkdir(parents=True, exist_ok=True)
    for path in CORPUS.iterdir():
        shutil.copy(path, grown)
    with tempfile.TemporaryDirectory(prefix="edge-fuzz-") as name:
        print(json.dumps(run(Path(name), seconds, seed, grown, grown if seconds else None)))


if __name__ == "__main__":
    main()
