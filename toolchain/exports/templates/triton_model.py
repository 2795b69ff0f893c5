"""Triton's Python backend for one model: hands requests to the engine in the folder beside this file.

Requests that Triton's batcher put together, and that agree in all other sizes, run as one.
"""

import json
import os
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from toolchain_engine import ToolchainError, open_folder


class TritonPythonModel:
    """One instance, in a process of its own."""

    def initialize(self, args):
        """Open the engine; an error here keeps the model from being ready, and Triton shows its text."""
        config = json.loads(args["model_config"])
        instances = sum(group["count"] for group in config["instance_group"])
        asked = int(config["parameters"]["threads"]["string_value"])
        threads = asked or max(1, len(os.sched_getaffinity(0)) // instances)
        self.engine = open_folder(Path(__file__).resolve().parent / "engine", threads)
        contract = self.engine.contract
        self.inputs = [(spec.name, np.dtype(spec.dtype)) for spec in contract.inputs]
        self.outputs = [spec.name for spec in contract.outputs]
        # With a max_batch_size the first axis of everything is the batch.
        self.batched = config["max_batch_size"] > 0

    def execute(self, requests):
        """A response for each request, in their order."""
        responses = [None] * len(requests)
        groups = {}
        for number, request in enumerate(requests):
            try:
                inputs = self._inputs_of(request)
            except ToolchainError as error:
                responses[number] = refusal(error)
                continue
            key = tuple(array.shape[1:] for array in inputs.values()) if self.batched else number
            groups.setdefault(key, []).append((number, inputs))
        for group in groups.values():
            for number, outputs in self._run_group(group):
                responses[number] = self._response(requests[number], outputs)
        return responses

    def _inputs_of(self, request):
        arrays = {}
        for name, _ in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                arrays[name] = tensor.as_numpy()
        checked, _ = self.engine.contract.check(arrays)
        return checked

    def _run_group(self, group):
        """Pairs of a request's number and its outputs, or the error that it met."""
        if len(group) == 1:
            number, inputs = group[0]
            return [(number, self._run(inputs))]
        merged = {name: np.concatenate([inputs[name] for _, inputs in group]) for name, _ in self.inputs}
        outputs = self._run(merged)
        if isinstance(outputs, ToolchainError):
            # Only the request at fault is to fail.
            return [(number, self._run(inputs)) for number, inputs in group]
        first = self.inputs[0][0]
        ends = np.cumsum([inputs[first].shape[0] for _, inputs in group])[:-1]
        parts = {name: np.split(array, ends) for name, array in outputs.items()}
        return [(number, {name: parts[name][i] for name in parts}) for i, (number, _) in enumerate(group)]

    def _run(self, inputs):
        try:
            return self.engine.run(inputs)
        except ToolchainError as error:
            return error

    def _response(self, request, outputs):
        if isinstance(outputs, ToolchainError):
            return refusal(outputs)
        asked = set(request.requested_output_names())
        # The backend takes memory as it lies.
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(outputs[name]).reshape(outputs[name].shape))
            for name in self.outputs
            if name in asked
        ]
        return pb_utils.InferenceResponse(tensors)


def refusal(error):
    """The answer to a request that cannot be run."""
    code = pb_utils.TritonError.INVALID_ARG if error.code == error.code.BAD_INPUT else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse([], pb_utils.TritonError(error.render(), code))
