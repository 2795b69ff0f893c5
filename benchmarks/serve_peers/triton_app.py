"""Triton Inference Server, as nvidia-pytriton carries it, with the engine in a Python model of its python backend."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
MODEL_PY = """
import sys
sys.path.insert(0, {here!r})
sys.path[1:1] = {path!r}
import triton_python_backend_utils as pb_utils
from session import Session


class TritonPythonModel:
    def initialize(self, args):
        self.session = Session()

    def execute(self, requests):
        answers = []
        for request in requests:
            tensors = {{name: pb_utils.get_input_tensor_by_name(request, name) for name in self.session.inputs}}
            arrays = {{name: tensor.as_numpy() for name, tensor in tensors.items()}}
            outputs = [pb_utils.Tensor(name, array) for name, array in self.session.run(arrays).items()]
            answers.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return answers
"""
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


def main() -> None:
    import numpy as np
    import pytriton
    from session import Session

    session = Session()
    folder = Path(os.environ["SCRATCH"]) / "models" / "model"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(
        MODEL_PY.format(here=str(HERE), path=[p for p in sys.path if "site-packages" in p])
    )

    def dims(shape):
        return ", ".join(str(size if isinstance(size, int) else -1) for size in shape)

    lines = ['name: "model"', 'backend: "python"', "max_batch_size: 0"]
    for name, (dtype, shape) in session.inputs.items():
        kind = TYPES[np.dtype(dtype).name]
        lines.append(f'input {{ name: "{name}" data_type: {kind} dims: [ {dims(shape)} ] }}')
    for output in session._session.get_outputs():
        lines.append(f'output {{ name: "{output.name}" data_type: TYPE_FP32 dims: [ {dims(output.shape)} ] }}')
    lines.append("instance_group [ { count: 1 kind: KIND_CPU } ]")
    (folder / "config.pbtxt").write_text("\n".join(lines))
    root = Path(pytriton.__file__).parent / "tritonserver"
    # The wheel keeps the stub of each Python version apart from the backend.
    backends = Path(os.environ["SCRATCH"]) / "backends"
    shutil.copytree(root / "backends", backends)
    stubs = root / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(stubs, backends / "python", dirs_exist_ok=True)
    carried = Path(pytriton.__file__).parents[1] / "nvidia_pytriton.libs"
    libraries = [str(carried), str(sysconfig.get_config_var("LIBDIR"))]
    process = subprocess.Popen(
        [
            str(root / "bin" / "tritonserver"),
            f"--model-repository={folder.parent}",
            f"--backend-directory={backends}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            f"--http-port={os.environ['HTTP_PORT']}",
            f"--grpc-port={os.environ['GRPC_PORT']}",
            "--allow-metrics=true",
            f"--metrics-port={os.environ['METRICS_PORT']}",
        ],
        env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries), "PYTHONPATH": ":".join(sys.path[1:])},
    )
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    sys.exit(process.wait())


if __name__ == "__main__":
    main()
