"""What can't be exported: one clear message each, with the place in the user's own code."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_support import ASSETS, BATCH, IMAGE, export_model, repository, run_stage
from safetensors.torch import save_file

from toolchain.data import Batch, write_batches
from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import DimSpec, InputSpec
from toolchain.stages import reference

X4 = InputSpec("x", "float32", ("batch", 4))
SQUARE = InputSpec("x", "float32", (4, 4))


def line_of(file: str, text: str) -> str:
    lines = (ASSETS / file).read_text().splitlines()
    return f"{file}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


def failure(tmp_path: Path, source: str, **options: object) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        export_model(tmp_path, source, **options)  # type: ignore[arg-type]
    error = caught.value
    assert "\n" not in error.what
    assert len(error.what) < 700
    assert "Traceback" not in error.render()
    return error


def test_data_dependent_control_flow_names_the_module_and_the_line_in_the_imported_helper(tmp_path: Path) -> None:
    error = failure(tmp_path, "gate", inputs=(X4,), dims=(BATCH,))
    assert error.code is ExitCode.EXPORT
    assert error.where == line_of("nets/blocks.py", "if x.sum() > 0")
    assert "data-dependent" in error.what
    assert "'inner'" in error.what
    assert "torch.where" in error.hint
    assert "GuardOnDataDependentSymNode" in error.debug


def test_an_operator_without_onnx_form_names_it_and_its_line(tmp_path: Path) -> None:
    error = failure(tmp_path, "eig", inputs=(SQUARE,))
    assert error.code is ExitCode.EXPORT
    assert error.where == line_of("nets/blocks.py", "linalg.eigvals")
    assert "linalg_eig" in error.what
    assert "'inner'" in error.what


def test_a_dynamic_dimension_that_the_model_fixes(tmp_path: Path) -> None:
    spec = InputSpec("x", "float32", ("batch", 16))
    error = failure(tmp_path, "fixed_size", inputs=(spec,), dims=(BATCH,))
    assert error.code is ExitCode.EXPORT
    assert "'batch' is declared dynamic" in error.what
    assert "2 only" in error.what


def test_shapes_that_do_not_fit_the_model_name_the_line_and_the_shapes(tmp_path: Path) -> None:
    error = failure(tmp_path, "dict_out", inputs=(InputSpec("x", "float32", ("batch", 5)),), dims=(BATCH,))
    assert error.code is ExitCode.EXPORT
    assert error.where == line_of("nets/models.py", '"logits": self.a(x)')
    assert "x float32[2, 5]" in error.what
    assert "'a'" in error.what


def test_a_wrong_input_name_gets_a_suggestion_and_the_signature(tmp_path: Path) -> None:
    inputs = (InputSpec("ids", "int64", ("batch", 3), low=0, high=4), InputSpec("weigth", "float32", ("batch", 3)))
    error = failure(tmp_path, "two_inputs", inputs=inputs, dims=(BATCH,))
    assert error.code is ExitCode.BAD_RECIPE
    assert "did you mean 'weight'" in error.what
    assert "forward(ids, weight, *, scale=None)" in error.hint


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    error = failure(tmp_path, "two_inputs", inputs=(InputSpec("ids", "int64", (2, 3), low=0, high=4),))
    assert error.code is ExitCode.BAD_RECIPE
    assert "'weight'" in error.what


def test_random_integers_without_a_range(tmp_path: Path) -> None:
    inputs = (InputSpec("ids", "int64", (2, 3)), InputSpec("weight", "float32", (2, 3)))
    error = failure(tmp_path, "two_inputs", inputs=inputs)
    assert error.code is ExitCode.BAD_RECIPE
    assert "low and high" in error.hint


def test_a_dynamic_length_of_a_recurrent_network_is_told_with_its_cause(tmp_path: Path) -> None:
    length = DimSpec("length", 1, 16)
    error = failure(tmp_path, "lstm", inputs=(InputSpec("x", "float32", (2, "length", 5)),), dims=(length,))
    assert error.code is ExitCode.EXPORT
    assert "the cause may be LSTM 'lstm': torch.export unrolls it step by step" in error.what
    assert "declare one length and pad to it" in error.hint


def test_an_index_outside_a_table_is_told_with_the_values_given_and_the_keys_to_set(tmp_path: Path) -> None:
    inputs = (InputSpec("ids", "int64", (2, 40), low=0, high=90), InputSpec("weight", "float32", (2, 40)))
    error = failure(tmp_path, "two_inputs", inputs=inputs)
    assert error.code is ExitCode.EXPORT
    assert "ids int64[2, 40] of " in error.what
    assert "low and high (both included)" in error.hint


def test_not_a_number_in_an_output_names_the_output(tmp_path: Path) -> None:
    error = failure(tmp_path, "not_a_number", inputs=(X4,), dims=(BATCH,))
    assert error.code is ExitCode.EXPORT
    assert error.where == "output 'bad'"
    assert "NaN or infinity" in error.what
    assert "random ones" in error.hint
    assert "x float32 standard normal" in error.hint
    assert "low and high in [[model.inputs]]" in error.hint


def test_not_a_number_among_the_weights_is_not_blamed_on_the_inputs(tmp_path: Path) -> None:
    error = failure(tmp_path, "not_a_weight", inputs=(replace(X4, name="input"),), dims=(BATCH,))
    assert error.code is ExitCode.EXPORT
    assert error.what.startswith("the parameter 'weight' holds NaN or infinity (1 of 8 values)")
    assert error.hint == "check the checkpoint, or the code that makes the weights"


def test_not_a_number_in_the_reference_names_the_batch(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    (tmp_path / "data").mkdir()
    fine, bad = np.full((1, 4), 200, np.float32), np.full((1, 4), 3, np.float32)
    write_batches(tmp_path / "data", [Batch({"x": fine}), Batch({"x": bad})])
    options = reference.Options("nets/models.py:not_a_number", inputs=(X4,), dims=(BATCH,))
    with pytest.raises(ToolchainError) as caught:
        run_stage(reference, options, tmp_path / "out", root, evaluation=tmp_path / "data")
    assert caught.value.where == "evaluation batch 1, output 'bad'"
    assert "random" not in caught.value.hint


def test_not_a_number_on_random_evaluation_inputs_blames_the_inputs_and_names_their_range(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    (tmp_path / "data").mkdir()
    write_batches(tmp_path / "data", [Batch({"x": np.full((1, 4), 3, np.float32)})], random=True)
    ranged = InputSpec("x", "float32", X4.shape, low=0, high=5.5)
    options = reference.Options("nets/models.py:not_a_number", inputs=(ranged,), dims=(BATCH,))
    with pytest.raises(ToolchainError) as caught:
        run_stage(reference, options, tmp_path / "out", root, evaluation=tmp_path / "data")
    assert caught.value.code is ExitCode.EXPORT
    assert "x float32 0 to 5.5" in caught.value.hint


def test_an_output_that_is_not_a_tensor(tmp_path: Path) -> None:
    error = failure(tmp_path, "plain_number", inputs=(X4,), dims=(BATCH,))
    assert error.where == "output 'n'"
    assert "is int" in error.what


def test_output_names_that_do_not_fit_list_the_models_own(tmp_path: Path) -> None:
    error = failure(tmp_path, "dict_out", inputs=(X4,), dims=(BATCH,), outputs=("logit", "best"))
    assert error.code is ExitCode.BAD_RECIPE
    assert "did you mean 'logits'" in error.what
    assert "logits, extra_left, best" in error.hint


def test_a_function_that_returns_no_model(tmp_path: Path) -> None:
    error = failure(tmp_path, "not_a_model", inputs=(X4,), dims=(BATCH,))
    assert error.code is ExitCode.USER_CODE
    assert "returned dict" in error.what


def test_a_shape_that_names_an_undeclared_dimension(tmp_path: Path) -> None:
    error = failure(tmp_path, "clash", inputs=(X4,))
    assert error.code is ExitCode.BAD_RECIPE
    assert "[model.dims.batch]" in error.hint


def test_an_opset_that_is_not_offered(tmp_path: Path) -> None:
    error = failure(tmp_path, "cnn", inputs=(IMAGE,), dims=(BATCH,), opset=11)
    assert error.code is ExitCode.BAD_RECIPE
    assert "allowed: 18" in error.what


# ---- checkpoints ----


def cnn_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "conv.weight": torch.randn(8, 1, 3, 3),
        "conv.bias": torch.randn(8),
        "norm.weight": torch.randn(8),
        "norm.bias": torch.randn(8),
        "norm.running_mean": torch.randn(8),
        "norm.running_var": torch.rand(8) + 0.5,
        "norm.num_batches_tracked": torch.tensor(1),
        "head.weight": torch.randn(10, 8),
        "head.bias": torch.full((10,), 100.0),
    }


def checkpoint_failure(tmp_path: Path, name: str) -> ToolchainError:
    return failure(tmp_path, "cnn", root=tmp_path / "repo", checkpoint=name, inputs=(IMAGE,), dims=(BATCH,))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "wrapped.pt"])
def test_a_checkpoint_is_loaded(tmp_path: Path, name: str) -> None:
    root = repository(tmp_path / "repo")
    if name == "w.safetensors":
        save_file(cnn_state(), root / name)
    else:
        torch.save({"epoch": 3, "state_dict": cnn_state()} if name == "wrapped.pt" else cnn_state(), root / name)
    exported = export_model(tmp_path, "cnn", root=root, checkpoint=name, inputs=(IMAGE,), dims=(BATCH,))
    assert (exported.outputs(image=np.zeros((1, 1, 8, 8), np.float32))["output"] > 50).all()


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path, kind: str) -> None:
    root = repository(tmp_path / "repo")
    payload = {"conv.weight": Evil(tmp_path / "ran")}
    if kind == "torch":
        torch.save(payload, root / "evil.pt")
    else:
        (root / "evil.pt").write_bytes(pickle.dumps(payload))
    error = checkpoint_failure(tmp_path, "evil.pt")
    assert error.code is ExitCode.BAD_RECIPE
    assert "not loaded" in error.what
    assert "safetensors" in error.hint
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_truncated_checkpoint(tmp_path: Path, name: str) -> None:
    root = repository(tmp_path / "repo")
    save_file(cnn_state(), root / name) if name.endswith("rs") else torch.save(cnn_state(), root / name)
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: len(data) // 2])
    error = checkpoint_failure(tmp_path, name)
    assert error.code is ExitCode.BAD_RECIPE
    assert "truncated" in error.what
    assert error.where == f"model.checkpoint = {name!r}"


def test_a_missing_checkpoint_gets_a_suggestion(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    save_file(cnn_state(), root / "weights.safetensors")
    error = checkpoint_failure(tmp_path, "weight.safetensors")
    assert "did you mean 'weights.safetensors'" in error.what


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    state = cnn_state()
    del state["conv.bias"]
    state["tail.weight"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(11)
    save_file(state, root / "w.safetensors")
    error = checkpoint_failure(tmp_path, "w.safetensors")
    assert error.code is ExitCode.BAD_RECIPE
    assert error.details == (
        "missing: conv.bias",
        "unexpected: tail.weight",
        "shape differs: head.bias: (11,) in the file, (10,) in the model",
    )


def test_a_range_that_the_model_does_not_hold(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    (root / "short.py").write_text(
        "import torch\nclass M(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.p = torch.nn.Parameter(torch.randn(16, 4))\n"
        "    def forward(self, x):\n        return x + self.p[: x.shape[1]]\n"
    )
    spec = InputSpec("x", "float32", ("batch", "sequence", 4))
    dims = (BATCH, DimSpec("sequence", 1, 32))
    error = failure(tmp_path, "short.py:M", root=root, inputs=(spec,), dims=dims)
    assert error.code is ExitCode.EXPORT
    assert "sequence" in error.what
