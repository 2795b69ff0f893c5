"""MLServer's runtime for a bundle of toolchain; needs the package ``toolchain`` and the engine's own runtime."""

import asyncio

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.codecs.numpy import to_datatype
from mlserver.errors import InferenceError
from mlserver.types import InferenceResponse, ResponseOutput
from mlserver.utils import get_model_uri

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime import load, run_selftest


class ToolchainRuntime(MLModel):
    """One bundle: its digests, this machine and its self-test are checked before it is ready."""

    bundle = None

    async def load(self):
        uri = await get_model_uri(self.settings)
        extra = self.settings.parameters.extra
        self.bundle = await asyncio.to_thread(self._open, uri, extra["target"], extra["threads"])
        return True

    def _open(self, uri, target, threads):
        bundle = load(uri, target, threads)
        if "selftest.npz" in bundle.bundle.files:
            with bundle.bundle.materialize() as folder:
                problems = run_selftest(bundle, folder / "selftest.npz").problems
            if problems:
                raise ToolchainError("the self-test fails", details=problems, code=ExitCode.DAMAGED_BUNDLE)
        return bundle

    async def predict(self, payload):
        try:
            inputs = {tensor.name: self._array(tensor) for tensor in payload.inputs}
            outputs = await asyncio.to_thread(self.bundle.run, inputs)
        except ToolchainError as error:
            if error.code == ExitCode.BAD_INPUT:
                raise InferenceError(error.render()) from error
            raise
        asked = {tensor.name for tensor in payload.outputs or []} or outputs.keys()
        return InferenceResponse(
            id=payload.id,
            model_name=self.name,
            model_version=self.version,
            outputs=[self._output(name, outputs[name]) for name in outputs if name in asked],
        )

    def _array(self, tensor):
        try:
            return NumpyCodec.decode_input(tensor)
        except (ValueError, TypeError, KeyError) as error:
            raise InferenceError(f"input {tensor.name!r} does not hold what it says: {error}") from error

    def _output(self, name, array):
        # Not by the codec, which makes [n] of an array [n, 1].
        data = array.ravel().tolist()
        return ResponseOutput(name=name, shape=list(array.shape), datatype=to_datatype(array.dtype), data=data)

    async def unload(self):
        if self.bundle is not None:
            self.bundle.close()
        return True
