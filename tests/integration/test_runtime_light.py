"""Bundles run and are inspected where nothing of the compiler is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from helpers.bundle_samples import bundle_spec, expected_scores, matrix_engine

from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.errors import ExitCode

BLOCKER = """
    import sys
    BLOCKED = {"torch", "onnx", "onnxscript", "onnxconverter_common", "onnxslim", "sklearn", "tvm", "tvm_ffi"} | BLOCK

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                raise ImportError(f"{name} is not installed")
            return None

    sys.meta_path.insert(0, Blocker())
    import json
    from pathlib import Path
    from toolchain.errors import ToolchainError
"""


def python(script: str, *arguments: object, block: str = "set()") -> subprocess.CompletedProcess[str]:
    text = textwrap.dedent(BLOCKER.replace("BLOCK\n", f"{block}\n")) + textwrap.dedent(script)
    command = [sys.executable, "-W", "error", "-c", text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])


def release(tmp_path: Path) -> Path:
    image = np.array([[1, 2, 3, 4]], np.float32)
    np.save(tmp_path / "image.npy", image)
    np.savez(tmp_path / "selftest.npz", **{"input:image": image, "output:scores": expected_scores(image)})
    spec = bundle_spec(matrix_engine(tmp_path / "e", [1, 8]), selftest_npz=tmp_path / "selftest.npz")
    pack_release("sample", "1.0.0", [pack_bundle(spec)], tmp_path / "r")
    return tmp_path / "r"


def test_an_onnxruntime_bundle_runs_without_torch_onnx_and_tvm(tmp_path: Path) -> None:
    script = """
        import io
        from toolchain.runtime import load, read_inputs, run_selftest
        with load(sys.argv[1]) as model:
            scores = model.run(read_inputs([sys.argv[2]], model.contract))["scores"]
            assert run_selftest(model, io.BytesIO(model.bundle.read("selftest.npz"))).passed
        print(json.dumps(scores.tolist()))
    """
    done = python(script, release(tmp_path), tmp_path / "image.npy")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), expected_scores(np.float32([[1, 2, 3, 4]])), atol=1e-5)


def test_a_bundle_is_read_verified_and_copied_with_the_standard_library_alone(tmp_path: Path) -> None:
    script = """
        from toolchain.bundle.read import copy_bundle, open_release
        from toolchain.bundle.resolve import resolve
        release = open_release(Path(sys.argv[1]))
        release.verify()
        copy_bundle(resolve(sys.argv[1]), Path(sys.argv[2]))
        print(release.bundles[0].manifest.contract["outputs"][0]["name"])
    """
    done = python(script, release(tmp_path), tmp_path / "copy", block="{'numpy', 'onnxruntime', 'pydantic', 'rich'}")
    assert (done.stdout, done.stderr) == ("scores\n", "")


def test_a_runtime_that_cannot_be_imported_gives_the_pip_command(tmp_path: Path) -> None:
    script = """
        from toolchain.runtime import open_engine
        try:
            open_engine(Path(sys.argv[1]))
        except ToolchainError as error:
            print(int(error.code), error.hint)
    """
    folder = release(tmp_path).parent / "e"
    done = python(script, folder, block="{'onnxruntime'}")
    assert done.stdout == f"{int(ExitCode.MISSING_TOOL)} pip install onnxruntime\n"
    description = (folder / "engine.json").read_text()
    (folder / "engine.json").write_text(description.replace('"onnxruntime"', '"tvm"'))
    done = python(script, folder)
    assert done.stdout == f"{int(ExitCode.MISSING_TOOL)} pip install apache-tvm\n"
