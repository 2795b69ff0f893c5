"""The compile_tvm stage on small models, in real workers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tvm_support import BATCH, X86_V3, X86_V4, Graph, Stages, attention, cortex, save_unary

from toolchain.data import Batch, write_batches
from toolchain.errors import ExitCode
from toolchain.host import detect_host
from toolchain.quantize.calibration import calibrate
from toolchain.quantize.dynamic import quantize_dynamic
from toolchain.quantize.model import load_prepared, write_model
from toolchain.quantize.scheme import Scheme
from toolchain.quantize.static import quantize_static
from toolchain.stage import StageContext
from toolchain.stages import compile_tvm
from toolchain.stages.compile_tvm import Options
from toolchain.tvm.cuda import kernel_architectures
from toolchain.tvm.elf import read_elf

V3 = Options(X86_V3, "cpu", "x86_64", True, 256, 16, "cc", "2.28", "fp32")
AARCH64 = replace(V3, arch="aarch64", native=False, vector_bits=128, registers=32, linker="zig")

pytestmark = pytest.mark.skipif(
    detect_host().arch != "x86_64" or "avx2" not in detect_host().cpu_features,
    reason="these tests run AVX2 code on this machine",
)


def test_dynamic_batch_gives_one_engine_that_agrees_with_onnxruntime(stages: Stages, digits: Path) -> None:
    ran = stages.run(compile_tvm, V3, digits)
    assert not ran.refused
    assert ran.description == {
        "schema": 1,
        "backend": "tvm",
        "precision": "fp32",
        "device": "cpu",
        "form": "aot",
        "variants": [{"file": "model.so", "sizes": {}}],
    }
    assert ran.facts["checked"] == "native"
    assert 0 < ran.facts["max_abs_error"] < 1e-4
    assert ran.facts["unscheduled"] == []
    assert ran.facts["linker"] == "cc"
    assert ran.facts["bytes"] == (ran.engine / "model.so").stat().st_size
    assert (ran.engine / "contract.json").read_bytes() == (digits / "contract.json").read_bytes()


def test_a_model_too_large_for_one_library_is_refused_before_it_is_read(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_tvm, "LIBRARY_LIMIT", 1000)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    (tmp_path / "model.onnx.data").write_bytes(bytes(1000))
    result = compile_tvm.run(StageContext({"onnx": tmp_path}, V3, tmp_path / "out", tmp_path))
    assert "TVM's engines hold them in one library" in result.refused
    assert not (tmp_path / "out").exists()


def test_avx512_code_is_made_and_checked_by_proxy_where_it_cannot_run(stages: Stages, digits: Path) -> None:
    native = "avx512f" in detect_host().cpu_features
    options = replace(V3, target=X86_V4, vector_bits=512, registers=32, native=native)
    ran = stages.run(compile_tvm, options, digits)
    assert not ran.refused
    assert ran.facts["checked"] == ("native" if native else "proxy on build host")


@pytest.mark.parametrize("target", [cortex("cortex-a72", "+neon"), cortex("cortex-a76", "+neon", "+dotprod")])
@pytest.mark.parametrize("form", ["aot", "vm"])
def test_an_arm_library_needs_only_what_its_form_says(
    stages: Stages, digits: Path, target: dict[str, Any], form: str
) -> None:
    ran = stages.run(compile_tvm, replace(AARCH64, target=target, form=form), digits)
    assert not ran.refused
    assert ran.facts["form"] == form
    assert ran.facts["checked"] == "proxy on build host"
    assert ran.facts["linker"] == "zig"
    info = read_elf(ran.engine / "model.so")
    assert info.machine == "aarch64"
    assert info.versions == ()
    if form == "vm":
        assert set(info.needed) <= {"libc.so.6", "libm.so.6"}
        allowed = {"memcpy", "memset", "expf", "TVMFFIErrorSetRaisedFromCStrParts"}
        assert {s for s in info.undefined if not s.startswith("TVM")} <= allowed
    else:
        assert set(info.needed) <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
        assert not [s for s in info.undefined if s.startswith("TVM")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_kernels_are_machine_code_and_the_same_bytes_without_a_gpu(stages: Stages, digits: Path) -> None:
    options = replace(V3, target={"kind": "cuda", "arch": "sm_80"}, kind="cuda", native=False, precision="fp32")
    ran = stages.run(compile_tvm, options, digits)
    assert not ran.refused
    assert ran.description["device"] == "cuda"
    assert ran.facts["checked"] == "proxy on build host cpu"
    library = (ran.engine / "model.so").read_bytes()
    assert kernel_architectures(library) == [80]
    assert b"__global__" not in library
    again = stages.run(compile_tvm, options, digits)
    assert (again.engine / "model.so").read_bytes() == library


def test_the_same_bytes_come_out_in_two_folders(stages: Stages, digits: Path, tmp_path: Path) -> None:
    here = stages.run(compile_tvm, V3, digits, where=str(tmp_path / "a"))
    there = stages.run(compile_tvm, V3, digits, where=str(tmp_path / "another" / "deeper"))
    assert here.facts == there.facts
    assert (here.engine / "model.so").read_bytes() == (there.engine / "model.so").read_bytes()
    assert str(tmp_path).encode() not in (here.engine / "model.so").read_bytes()


def test_the_same_arm_bytes_come_out_in_two_folders(stages: Stages, digits: Path, tmp_path: Path) -> None:
    options = replace(AARCH64, target=cortex("cortex-a72", "+neon"))
    here = stages.run(compile_tvm, options, digits, where=str(tmp_path / "a"))
    there = stages.run(compile_tvm, options, digits, where=str(tmp_path / "another" / "deeper"))
    assert (here.engine / "model.so").read_bytes() == (there.engine / "model.so").read_bytes()


def test_dump_ir_writes_the_module_after_every_phase_in_order(stages: Stages, digits: Path, tmp_path: Path) -> None:
    stages.run(compile_tvm, replace(V3, form="vm"), digits, dump=tmp_path / "ir")
    files = sorted((tmp_path / "ir").iterdir())
    assert [p.name.split("-", 1)[1].removesuffix(".py") for p in files] == [
        "import", "canonicalize", "integer", "fold", "simplify", "layout", "dispatch", "legalize", "annotate", "fuse",
        "functions", "schedule", "dataflow", "plan", "lower", "codegen",
    ]  # fmt: skip
    assert [int(p.name.split("-", 1)[0]) for p in files] == list(range(1, len(files) + 1))
    text = {p.name.split("-", 1)[1].removesuffix(".py"): p.read_text() for p in files}
    assert "R.nn.conv2d" in text["import"]
    assert "R.nn.conv2d" not in text["legalize"]
    assert "T.vectorized" not in text["fuse"]
    assert "T.vectorized" in text["schedule"]


def test_dump_ir_of_an_engine_ahead_of_time_ends_with_its_plan(stages: Stages, digits: Path, tmp_path: Path) -> None:
    stages.run(compile_tvm, V3, digits, dump=tmp_path / "ir")
    files = sorted(p.name for p in (tmp_path / "ir").iterdir())
    assert files[-3:] == ["13-dataflow.py", "14-codegen.py", "15-plan.c"]
    assert "static int32_t run(" in (tmp_path / "ir" / files[-1]).read_text()


def test_sizes_that_cannot_stay_dynamic_become_one_engine_per_bucket(stages: Stages, tmp_path: Path) -> None:
    ran = stages.run(compile_tvm, V3, attention(tmp_path / "onnx", [8, 16]))
    assert not ran.refused
    sizes = [(batch, length) for batch in (1, 2) for length in (8, 16)]
    assert ran.description["variants"] == [
        {"file": f"model-batch-{b}_sequence-{s}.so", "sizes": {"batch": b, "sequence": s}} for b, s in sizes
    ]
    assert all((ran.engine / v["file"]).is_file() for v in ran.description["variants"])
    assert "TVM" in ran.facts["fixed_because"]
    assert ran.facts["exact_size_dims"] == []
    assert ran.facts["checked"] == "native"


def test_a_dynamic_dimension_without_buckets_is_refused_by_name(stages: Stages, tmp_path: Path) -> None:
    ran = stages.run(compile_tvm, V3, attention(tmp_path / "onnx", []))
    expected = "dynamic dimension 'sequence' can't be imported and has no buckets in [model.dims.sequence]"
    assert ran.refused.startswith(expected)


def test_an_operator_that_tvm_lacks_is_refused_by_operator_and_node(stages: Stages, tmp_path: Path) -> None:
    g = Graph()
    x = g.add("Det", "x", name="volume")
    ran = stages.run(compile_tvm, V3, save_unary(tmp_path / "onnx", g, x, [5, 3, 3], [5]))
    assert ran.refused == "TVM has no importer for operator Det (node 'volume')"


def int8_model(folder: Path) -> Path:
    """A product of quantized data and 8-bit weights, then of two quantized values."""
    g = Graph()
    scale, zero = g.constant(np.float32(0.1)), g.constant(np.uint8(100))
    weights = g.constant(np.arange(-128, 128, dtype=np.int8).reshape(16, 16))
    w = g.add("DequantizeLinear", weights, g.constant(np.float32(0.01)), g.constant(np.int8(0)))
    x = g.add("DequantizeLinear", g.add("QuantizeLinear", "x", scale, zero), scale, zero)
    y = g.add("MatMul", x, w, name="product")
    y = g.add("DequantizeLinear", g.add("QuantizeLinear", y, scale, zero), scale, zero)
    return save_unary(folder, g, g.add("MatMul", y, y, name="square"), [16, 16], [16, 16])


def test_an_int8_model_is_compiled_and_says_which_product_of_two_values_is_computed_in_float(
    stages: Stages, tmp_path: Path
) -> None:
    ran = stages.run(compile_tvm, replace(V3, precision="int8-static"), int8_model(tmp_path / "onnx"))
    assert not ran.refused
    assert ran.facts["checked"] == "native"
    assert ran.facts["float_products"] == ["square"]
    assert ran.description["precision"] == "int8-static"


@pytest.mark.parametrize("precision", ["int8-static", "int8-dynamic"])
def test_digits_in_int8_with_dynamic_batch_gives_one_engine(
    stages: Stages, digits: Path, tmp_path: Path, precision: str
) -> None:
    onnx_folder = tmp_path / "onnx"
    onnx_folder.mkdir()
    shutil.copy(digits / "contract.json", onnx_folder)
    quantized_copy(digits, onnx_folder, precision)
    ran = stages.run(compile_tvm, replace(V3, precision=precision), onnx_folder)
    assert not ran.refused
    assert ran.description["variants"] == [{"file": "model.so", "sizes": {}}]
    assert ran.facts["checked"] == "native"
    assert ran.facts["float_products"] == []
    assert ran.facts["max_abs_error"] < 0.05


def quantized_copy(source: Path, folder: Path, precision: str) -> None:
    """As the stage quantize does, on random images."""
    model, scheme = load_prepared(source), Scheme(reduce_range=True)
    if precision == "int8-dynamic":
        write_model(quantize_dynamic(model, scheme), folder)
        return
    images = np.random.default_rng(0).standard_normal((32, 1, 8, 8)).astype(np.float32)
    data = folder.parent / "data"
    data.mkdir()
    write_batches(data, [Batch({"x": images}, size=32)])
    write_model(quantize_static(model, calibrate(model, data, scheme), scheme), folder)


@pytest.mark.parametrize("target", [cortex("cortex-a72", "+neon"), cortex("cortex-a76", "+neon", "+dotprod")])
def test_an_int8_model_is_compiled_for_arm_and_checked_by_proxy(
    stages: Stages, tmp_path: Path, target: dict[str, Any]
) -> None:
    options = replace(AARCH64, target=target, precision="int8-static")
    ran = stages.run(compile_tvm, options, int8_model(tmp_path / "onnx"))
    assert not ran.refused
    assert ran.facts["checked"] == "proxy on build host"


def test_weights_in_8_bits_that_would_be_multiplied_in_float_are_refused_by_name(
    stages: Stages, tmp_path: Path
) -> None:
    g = Graph()
    weights = g.constant(np.ones((4, 4), np.int8))
    w = g.add("DequantizeLinear", weights, g.constant(np.float32(0.1)), g.constant(np.int8(0)))
    x = g.add("MatMul", "x", w, name="product")
    ran = stages.run(compile_tvm, V3, save_unary(tmp_path / "onnx", g, x, ["batch", 4], ["batch", 4]))
    assert ran.refused.startswith("operator MatMul (node 'product'): its weights are quantized, its data are not")


def test_an_operator_that_tvm_computes_wrong_is_refused_with_the_reason(stages: Stages, tmp_path: Path) -> None:
    g = Graph()
    boxes = g.constant(np.array([[0, 0, 3, 3]], np.float32))
    x = g.add(
        "RoiAlign", "x", boxes, g.constant(np.array([0])), name="pool", mode="max", output_height=2, output_width=2
    )
    ran = stages.run(compile_tvm, V3, save_unary(tmp_path / "onnx", g, x, [1, 2, 5, 6], [1, 2, 2, 2]))
    assert ran.refused == "operator RoiAlign (node 'pool'): TVM computes mode 'max' wrong"


def test_wrong_values_that_no_rule_foresees_are_refused_after_comparing(stages: Stages, tmp_path: Path) -> None:
    # max(log(-1), 1) is NaN in ONNX and 1 in TVM; no rule can know that a NaN will come.
    g = Graph()
    negative = g.add("Sub", g.add("Neg", g.add("Abs", "x")), g.constant(np.float32(1)))
    x = g.add("Max", g.add("Log", negative), g.constant(np.float32(1)), name="peak")
    ran = stages.run(compile_tvm, V3, save_unary(tmp_path / "onnx", g, x, [4], [4]))
    assert ran.refused.startswith("TVM computes something else than ONNX Runtime: output 'y': NaN or infinity")


def test_several_inputs_and_outputs_keep_the_contract_order(stages: Stages, tmp_path: Path) -> None:
    g = Graph()
    g.nodes.append(helper.make_node("Sub", ["a", "b"], ["difference"], name="sub"))
    g.nodes.append(helper.make_node("Mul", ["a", "b"], ["product"], name="mul"))
    kind = ("float32", ["batch", 3])
    model = g.save(tmp_path / "onnx", {"b": kind, "a": kind}, {"product": kind, "difference": kind}, BATCH)
    ran = stages.run(compile_tvm, V3, model)
    assert not ran.refused
    assert ran.facts["checked"] == "native"


def test_a_linker_that_is_not_installed_is_named_with_how_to_install_it(stages: Stages, digits: Path) -> None:
    options = replace(V3, linker="mips-linux-gnu-gcc")
    error = stages.run(compile_tvm, options, digits).error
    assert error is not None
    assert error.code == ExitCode.MISSING_TOOL
    assert "mips-linux-gnu-gcc" in error.what
    assert "PATH" in error.hint


def test_the_host_compiler_is_never_used_for_another_architecture(stages: Stages, digits: Path) -> None:
    options = replace(AARCH64, target=cortex("cortex-a72", "+neon"), linker="cc")
    error = stages.run(compile_tvm, options, digits).error
    assert error is not None
    assert error.code == ExitCode.COMPILE
    assert "not for aarch64" in error.what


def test_a_target_that_tvm_rejects_is_a_bad_target(stages: Stages, digits: Path) -> None:
    error = stages.run(compile_tvm, replace(V3, target={"kind": "nonsense"}), digits).error
    assert error is not None
    assert error.code == ExitCode.BAD_TARGET
