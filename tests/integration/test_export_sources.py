"""Sources other than a function that builds a module: exported programs and ONNX files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_support import BATCH, Exported, export_model, repository
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import DimSpec, InputSpec

X4 = InputSpec("x", "float32", ("batch", 4))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.layer(x) + bias}


def save_program(root: Path, dynamic: bool = True) -> None:
    dims = {"x": {0: torch.export.Dim("rows", min=1, max=64)} if dynamic else {}, "bias": {}}
    keywords = {"bias": torch.ones(3)}
    program = torch.export.export(Two().eval(), (torch.randn(2, 4),), keywords, dynamic_shapes=dims, strict=False)
    torch.export.save(program, root / "net.pt2")


def test_an_exported_program(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    save_program(root)
    inputs = (InputSpec("bias", "float32", (3,)), X4)
    exported = export_model(tmp_path, "net.pt2", root=root, inputs=inputs, dims=(BATCH,))
    values = {"bias": np.arange(3, dtype=np.float32), "x": np.ones((5, 4), np.float32)}
    np.testing.assert_allclose(exported.outputs(**values)["y"], exported.original(tmp_path, **values)["y"], atol=1e-6)
    assert [i["name"] for i in exported.contract["inputs"]] == ["bias", "x"]
    assert exported.contract["outputs"][0]["shape"] == ["batch", 3]


def test_a_fixed_program_needs_no_declared_inputs(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    save_program(root, dynamic=False)
    exported = export_model(tmp_path, "net.pt2", root=root)
    assert [(i["name"], i["shape"]) for i in exported.contract["inputs"]] == [("x", [2, 4]), ("bias", [3])]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "dynamic dimensions"),
        ((X4,), "'bias' is not declared"),
        ((X4, InputSpec("bais", "float32", (3,))), "did you mean 'bias'"),
        ((X4, InputSpec("bias", "float32", (4,))), "fixes 3 where 4 is declared"),
        ((X4, InputSpec("bias", "float64", (3,))), "the program takes float32[3]"),
    ],
)
def test_inputs_that_differ_from_the_program(tmp_path: Path, inputs: tuple[InputSpec, ...], message: str) -> None:
    root = repository(tmp_path / "repo")
    save_program(root)
    with pytest.raises(ToolchainError) as caught:
        export_model(tmp_path, "net.pt2", root=root, inputs=inputs, dims=(BATCH,))
    assert caught.value.code is ExitCode.BAD_RECIPE
    assert message in caught.value.what


def test_a_range_beyond_the_programs(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    save_program(root)
    with pytest.raises(ToolchainError, match="allows 1 to 64"):
        export_model(
            tmp_path,
            "net.pt2",
            root=root,
            inputs=(X4, InputSpec("bias", "float32", (3,))),
            dims=(DimSpec("batch", 1, 99),),
        )


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_a_program_with_pickled_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    save_program(root)
    evil = io.BytesIO()
    torch.save((Evil(tmp_path / "ran"),), evil)
    with zipfile.ZipFile(root / "net.pt2") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    changed = [name for name in entries if "sample_inputs" in name and name.endswith(".pt")]
    assert changed
    with zipfile.ZipFile(root / "net.pt2", "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, evil.getvalue() if name in changed else data)
    with pytest.raises(ToolchainError) as caught:
        export_model(tmp_path, "net.pt2", root=root, inputs=(X4, InputSpec("bias", "float32", (3,))), dims=(BATCH,))
    assert caught.value.code is ExitCode.BAD_RECIPE
    assert not (tmp_path / "ran").exists()


def test_a_damaged_program(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    (root / "net.pt2").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ToolchainError, match="can't be read as an exported program") as caught:
        export_model(tmp_path, "net.pt2", root=root)
    assert caught.value.code is ExitCode.BAD_RECIPE


# ---- ONNX files ----


def save_onnx(path: Path, opset: int = 18, batch: int | str = "N") -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="mm", doc_string="/home/me/secret.py"),
        helper.make_node("Relu", ["h"], ["positive"]),
        helper.make_node("Softmax", ["h"], ["share"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3]) for name in ("positive", "share")],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)


def from_onnx(tmp_path: Path, opset: int = 18, batch: int | str = "N", **options: object) -> Exported:
    root = repository(tmp_path / "repo")
    save_onnx(root / "net.onnx", opset, batch)
    return export_model(tmp_path, "net.onnx", root=root, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("opset", [13, 18])
def test_an_onnx_file_is_brought_to_the_opset_and_renamed_to_the_declared_dimension(tmp_path: Path, opset: int) -> None:
    exported = from_onnx(tmp_path, opset, inputs=(X4,), dims=(BATCH,))
    assert exported.facts["opset"] == 18
    assert "opset_kept" not in exported.facts
    assert [o["shape"] for o in exported.contract["outputs"]] == [["batch", 3], ["batch", 3]]
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    for name, array in exported.original(tmp_path, x=x).items():
        np.testing.assert_allclose(exported.outputs(x=x)[name], array, atol=1e-6)
    assert b"secret" not in (exported.folder / "model.onnx").read_bytes()


def test_inputs_come_from_the_file_when_its_dimension_has_a_range(tmp_path: Path) -> None:
    exported = from_onnx(tmp_path, dims=(DimSpec("N", 1, 8, batch=True),), outputs=("share",))
    assert exported.contract["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 4], "pad": None}]
    assert [o["name"] for o in exported.contract["outputs"]] == ["share"]


def test_a_declared_size_fixes_an_open_dimension_of_the_file(tmp_path: Path) -> None:
    exported = from_onnx(tmp_path, inputs=(InputSpec("x", "float32", (2, 4)),))
    shape = onnx.load(exported.folder / "model.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [2, 4]
    assert exported.contract["outputs"][0]["shape"] == [2, 3]


def test_an_output_axis_that_the_file_leaves_open_is_named_after_the_dimension_that_it_follows(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    save_onnx(root / "net.onnx")
    model = onnx.load(root / "net.onnx")
    shape = model.graph.output[0].type.tensor_type.shape
    shape.dim[0].dim_param = "unk__7"
    onnx.save(model, root / "net.onnx")
    exported = export_model(tmp_path, "net.onnx", root=root, inputs=(X4,), dims=(BATCH,))
    assert exported.contract["outputs"][0]["shape"] == ["batch", 3]


def test_a_later_opset_is_kept_and_said(tmp_path: Path) -> None:
    exported = from_onnx(tmp_path, 20, inputs=(X4,), dims=(BATCH,))
    assert exported.facts["opset"] == 20
    assert "20 is later than 18" in exported.facts["opset_kept"]


@pytest.mark.parametrize(
    ("batch", "inputs", "message"),
    [
        ("N", (), "has a dynamic dimension with no range"),
        ("N", (InputSpec("y", "float32", ("batch", 4)),), "no input 'y'"),
        ("N", (InputSpec("x", "float32", ("batch", 5)),), "the file takes x float32[N,4]"),
        ("N", (InputSpec("x", "int64", ("batch", 4)),), "the file takes x float32[N,4]"),
        (2, (X4,), "the file takes x float32[2,4]"),
    ],
)
def test_inputs_that_differ_from_the_file(
    tmp_path: Path, batch: int | str, inputs: tuple[InputSpec, ...], message: str
) -> None:
    with pytest.raises(ToolchainError) as caught:
        from_onnx(tmp_path, 18, batch, inputs=inputs, dims=(BATCH,))
    assert caught.value.code is ExitCode.BAD_RECIPE
    assert message in caught.value.what


def test_a_damaged_onnx_file(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    (root / "net.onnx").write_bytes(b"\x08\x07nonsense")
    with pytest.raises(ToolchainError) as caught:
        export_model(tmp_path, "net.onnx", root=root)
    assert caught.value.code is ExitCode.BAD_RECIPE


def test_a_function_may_return_the_path_of_a_file(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    save_onnx(root / "nets" / "saved.onnx")
    exported = export_model(tmp_path, "path_of_file", root=root, inputs=(X4,), dims=(BATCH,))
    assert [o["name"] for o in exported.contract["outputs"]] == ["positive", "share"]


def test_a_missing_file_and_a_wrong_suffix(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    save_onnx(root / "net.onnx")
    with pytest.raises(ToolchainError, match=r"did you mean 'net\.onnx'"):
        export_model(tmp_path / "a", "nett.onnx", root=root)
    with pytest.raises(ToolchainError, match=r"allowed: file\.py:function"):
        export_model(tmp_path / "b", "net.bin", root=root)
