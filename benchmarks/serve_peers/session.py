"""What every peer runs: the ONNX file that is named in MODEL, in ONNX Runtime with one thread."""

import os

import numpy as np
import onnxruntime as ort

_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Session:
    """An engine that takes {name: array or nested lists}, or the inputs' bytes, batch 1."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: (_DTYPES[i.type], i.shape) for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(self, arrays):
        """{output: array} of {input: array or nested lists}."""
        given = {name: np.asarray(arrays[name], dtype) for name, (dtype, _) in self.inputs.items()}
        return dict(zip(self.outputs, self._session.run(None, given), strict=True))

    def run_raw(self, body):
        """{output: array} of one row, the inputs' bytes one after the other; dynamic sizes share what is left."""
        arrays, at = {}, 0
        share = len(body) // sum(np.dtype(dtype).itemsize for dtype, _ in self.inputs.values())
        for name, (dtype, shape) in self.inputs.items():
            sizes = [1 if index == 0 else size if isinstance(size, int) else -1 for index, size in enumerate(shape)]
            count = share if -1 in sizes else int(np.prod(sizes))
            arrays[name] = np.frombuffer(body, dtype, count, at).reshape(sizes)
            at += arrays[name].nbytes
        return self.run(arrays)
