"""TVM engines run with TVM's runtime alone; each test runs in fresh processes, as an application would."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers.bundle_samples import (
    MATRIX_CONTRACT,
    TOKENS_CONTRACT,
    bundle_spec,
    expected_scores,
    expected_tokens,
    matrix_model,
    tokens_model,
    write_engine,
)

from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.errors import ExitCode

TESTS = Path(__file__).parents[1]
COMPILE = """
    import sys
    sys.modules["torch"] = None  # importing it takes 2 s
    import onnx, tvm
    from pathlib import Path
    from tvm.relax.frontend.onnx import from_onnx
    for model in Path(sys.argv[1]).glob("*.onnx"):
        module = from_onnx(onnx.load(model), keep_params_in_input=False)
        tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).export_library(str(model.with_suffix(".so")))
        model.unlink()
"""
PRELUDE = """
    import json, os, sys
    import numpy as np
    from pathlib import Path
    from toolchain.errors import ToolchainError
    from toolchain.runtime import load, open_engine
"""


def python(script: str, *arguments: object) -> Any:
    """What the script prints, as JSON."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else None


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tvm")
    models = {
        "any": (MATRIX_CONTRACT, {"model": {}}),
        "buckets": (MATRIX_CONTRACT, {"b1": {"batch": 1}, "b8": {"batch": 8}}),
        "tokens": (TOKENS_CONTRACT, {f"b{b}s{s}": {"batch": b, "sequence": s} for b in (1, 4) for s in (8, 16)}),
    }
    for name, (contract, variants) in models.items():
        write_engine(folder / name, contract, {f"{f}.so": sizes for f, sizes in variants.items()}, "tvm")
        for file, sizes in variants.items():
            batch = sizes.get("batch", "batch")
            model = tokens_model(batch, sizes["sequence"]) if name == "tokens" else matrix_model(batch)
            onnx.save(model, folder / name / f"{file}.onnx")
        python(COMPILE, folder / name)
    return {name: folder / name for name in models}


def test_a_bundle_runs_without_torch_onnx_and_the_compiler(engines: dict[str, Path], tmp_path: Path) -> None:
    pack_release("sample", "1.0.0", [pack_bundle(bundle_spec(engines["any"]))], tmp_path / "r")
    script = (
        PRELUDE
        + """
    before = dict(os.environ)
    with load(sys.argv[1], threads=2) as model:
        image = np.arange(12, dtype=np.float32).reshape(3, 4)
        scores = model.run({"image": image})["scores"].tolist()
    maps = Path("/proc/self/maps").read_text()
    heavy = [m for m in ("torch", "onnx", "onnxruntime", "sklearn") if m in sys.modules]
    changed = {k for k in os.environ if os.environ[k] != before.get(k)}
    print(json.dumps([scores, "libtvm_compiler" in maps, heavy, sorted(changed)]))
    """
    )
    scores, compiler, heavy, changed = python(script, tmp_path / "r")
    np.testing.assert_allclose(scores, expected_scores(np.arange(12, dtype=np.float32).reshape(3, 4)), atol=1e-4)
    assert (compiler, heavy, changed) == (False, [], ["TVM_BIND_THREADS", "TVM_NUM_THREADS"])


def test_buckets_are_chosen_filled_and_split(engines: dict[str, Path]) -> None:
    script = (
        PRELUDE
        + """
    engine = open_engine(Path(sys.argv[1]))
    tokens = open_engine(Path(sys.argv[2]), threads=1)
    result = {}
    for n in (1, 3, 8, 20):
        result[n] = engine.run({"image": np.arange(4 * n, dtype=np.float32).reshape(n, 4)})["scores"].tolist()
    values = np.random.default_rng(0).normal(size=(5, 11, 4)).astype(np.float32)
    got = tokens.run({"tokens": values, "mask": np.ones((5, 11), np.float32)})
    result["tokens"] = {name: array.tolist() for name, array in got.items()}
    print(json.dumps(result))
    """
    )
    result = python(script, engines["buckets"], engines["tokens"])
    for n in (1, 3, 8, 20):
        image = np.arange(4 * n, dtype=np.float32).reshape(n, 4)
        np.testing.assert_allclose(result[str(n)], expected_scores(image), rtol=1e-5, atol=1e-4)
    values = np.random.default_rng(0).normal(size=(5, 11, 4)).astype(np.float32)
    for name, want in expected_tokens(values, np.ones((5, 11), np.float32)).items():
        np.testing.assert_allclose(result["tokens"][name], want, rtol=1e-5, atol=1e-4)


def test_bad_files_and_devices_are_refused_with_their_code(engines: dict[str, Path], tmp_path: Path) -> None:
    broken = write_engine(tmp_path / "broken", MATRIX_CONTRACT, {"model.so": {}}, "tvm")
    (broken / "model.so").write_bytes((engines["any"] / "model.so").read_bytes()[:2000])
    text = write_engine(tmp_path / "text", MATRIX_CONTRACT, {"model.so": {}}, "tvm")
    (text / "model.so").write_text("not a library")
    other = write_engine(tmp_path / "other", TOKENS_CONTRACT, {"model.so": {}}, "tvm")
    (other / "model.so").write_bytes((engines["any"] / "model.so").read_bytes())
    cuda = write_engine(tmp_path / "cuda", MATRIX_CONTRACT, {"model.so": {}}, "tvm")
    (cuda / "model.so").write_bytes((engines["any"] / "model.so").read_bytes())
    description = json.loads((cuda / "engine.json").read_text())
    (cuda / "engine.json").write_text(json.dumps({**description, "device": "cuda"}))
    script = (
        PRELUDE
        + """
    codes = []
    for folder in sys.argv[1:]:
        try:
            open_engine(Path(folder))
        except ToolchainError as error:
            codes.append([int(error.code), error.what])
    print(json.dumps(codes))
    """
    )
    truncated, garbage, contradicting, no_device = python(script, broken, text, other, cuda)
    assert truncated[0] == ExitCode.DAMAGED_BUNDLE
    assert truncated[1].startswith("is truncated: it has 2000 bytes")
    assert garbage == [ExitCode.DAMAGED_BUNDLE, "is not a shared library (64-bit little-endian ELF)"]
    assert contradicting == [ExitCode.DAMAGED_BUNDLE, "takes 1 inputs, its contract names 2"]
    assert no_device[0] == ExitCode.INCOMPATIBLE_HOST


def test_threads_are_as_asked_in_every_calling_thread(engines: dict[str, Path]) -> None:
    script = (
        PRELUDE
        + """
    from concurrent.futures import ThreadPoolExecutor
    import tvm_ffi  # noqa: F401
    one, two = open_engine(Path(sys.argv[1]), threads=1), open_engine(Path(sys.argv[1]), threads=2)
    import tvm
    count = tvm.get_global_func("runtime.NumThreads")
    image = {"image": np.ones((1, 4), np.float32)}

    def counts():
        return [(engine.run(image), int(count()))[1] for engine in (one, two, one)]

    with ThreadPoolExecutor(1) as pool:
        print(json.dumps([counts(), pool.submit(counts).result()]))
    """
    )
    assert python("import sys\nsys.modules['torch'] = None\n" + textwrap.dedent(script), engines["any"]) == [
        [1, 2, 1],
        [1, 2, 1],
    ]


def test_torch_can_be_imported_after_an_engine(engines: dict[str, Path]) -> None:
    script = (
        PRELUDE
        + """
    open_engine(Path(sys.argv[1]))
    assert "torch" not in sys.modules
    import torch
    print(json.dumps(torch.ones(2).tolist()))
    """
    )
    assert python(script, engines["any"]) == [1.0, 1.0]
