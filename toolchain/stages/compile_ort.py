"""compile_ort: a candidate as an ONNX Runtime engine: the model file itself, opened once to see that it loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.stage import StageContext, StageDef, StageResult

CPU = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the compile_ort stage.

    Attributes:
        provider: ONNX Runtime execution provider of the target, e.g. ``"CPUExecutionProvider"``.
        device: ``"cpu"`` or ``"cuda"``.
        precision: name of the candidate, written to engine.json.
    """

    provider: str
    device: str
    precision: str


def run(ctx: StageContext) -> StageResult:
    """Input ``onnx``; output ``engine``: engine.json, contract.json, model.onnx and its external data.

    Raises:
        ToolchainError: COMPILE: ONNX Runtime can't load the model.
    """
    options: Options = ctx.options
    source, output = ctx.inputs["onnx"], ctx.output("engine")
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        copy = output / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    facts = _open(output / "model.onnx", options)
    engine = {
        "schema": 1,
        "backend": "onnxruntime",
        "precision": options.precision,
        "device": options.device,
        "variants": [{"file": "model.onnx", "sizes": {}}],
    }
    (output / "engine.json").write_text(json.dumps(engine, sort_keys=True, indent=1) + "\n")
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file() and not p.name.endswith(".json"))
    return StageResult({**facts, "bytes": size})


def _open(model: Path, options: Options) -> dict[str, Any]:
    """Opens a session on the CPU and says what that proves."""
    import onnxruntime as ort

    from toolchain.graph.numeric import WITHOUT_SPINNING

    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.add_session_config_entry(*WITHOUT_SPINNING)
    try:
        session = ort.InferenceSession(str(model), session_options, providers=[CPU])
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ToolchainError(
            f"ONNX Runtime {ort.__version__} can't load the {options.precision} model: "
            f"{lines[0] if lines else type(error).__name__}",
            where="model.onnx",
            code=ExitCode.COMPILE,
        ) from error
    checked = "loads on the CPU"
    if options.provider != CPU:
        checked += f"; {options.provider} is not checked on this machine"
    return {
        "checked": checked,
        "inputs": [i.name for i in session.get_inputs()],
        "outputs": [o.name for o in session.get_outputs()],
    }


STAGE = StageDef(
    name="compile_ort",
    version=1,
    run="toolchain.stages.compile_ort:run",
    options=Options,
    tools=("onnxruntime",),
    worker="onnx",
)
