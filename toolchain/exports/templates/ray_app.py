"""A Ray Serve application that answers the Open Inference Protocol over REST for the bundle beside this file.

Run it with ``serve run app:application`` in this folder, or deploy ``serve.yaml``.  Replicas of the engine come and go
with the load; each checks the bundle's digests, this machine and the self-test before it takes requests.  A request
whose replica dies is given to another.  Every node needs this folder and the package ``toolchain`` with what the engine
needs.
"""

import json
from pathlib import Path

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.responses import JSONResponse

FOLDER = Path(__file__).resolve().parent
SETTINGS = json.loads((FOLDER / "app.json").read_text())
ATTEMPTS = 4
DATATYPES = {
    "BOOL": "bool",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    **{f"{sign.upper()}INT{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}


class RefusedError(Exception):
    """A request that cannot be answered, with the status of its answer."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


@serve.deployment(
    name="engine",
    autoscaling_config=SETTINGS["autoscaling"],
    max_ongoing_requests=max(5, round(2 * SETTINGS["autoscaling"]["target_ongoing_requests"])),
    ray_actor_options={"num_cpus": SETTINGS["threads"], "num_gpus": SETTINGS["gpus"]},
    health_check_period_s=5,
)
class Engine:
    """One replica of the engine."""

    def __init__(self):
        from toolchain.errors import ExitCode, ToolchainError
        from toolchain.runtime import load, run_selftest

        self.bundle = load(FOLDER / "bundle", SETTINGS["target"], SETTINGS["threads"])
        if "selftest.npz" in self.bundle.bundle.files:
            with self.bundle.bundle.materialize() as folder:
                problems = run_selftest(self.bundle, folder / "selftest.npz").problems
            if problems:
                raise ToolchainError("the self-test fails", details=problems, code=ExitCode.DAMAGED_BUNDLE)

    def run(self, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int, str]:
        """Outputs, or a status and a text for what is wrong."""
        from toolchain.errors import ExitCode, ToolchainError

        try:
            return self.bundle.run(inputs), 200, ""
        except ToolchainError as error:
            return {}, 400 if error.code == ExitCode.BAD_INPUT else 500, error.render()


@serve.deployment(name="protocol", num_replicas=SETTINGS["protocol_replicas"], ray_actor_options={"num_cpus": 0})
class Protocol:
    """What clients talk to: JSON in, JSON out."""

    def __init__(self, engine):
        self.engine = engine

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            return JSONResponse(await self._answer(request))
        except RefusedError as refused:
            return JSONResponse({"error": str(refused)}, refused.status)

    async def _answer(self, request):
        words = [word for word in request.url.path.split("/") if word]
        if words in (["v2", "health", "live"], ["v2", "health", "ready"]):
            return {}
        if words == ["v2"]:
            return {"name": "toolchain on ray serve", "version": SETTINGS["version"], "extensions": []}
        known = words[:3] == ["v2", "models", SETTINGS["name"]]
        rest = words[3:]
        if rest[:1] == ["versions"]:
            known, rest = known and rest[1:2] == [SETTINGS["version"]], rest[2:]
        if not known or rest not in ([], ["ready"], ["infer"]):
            raise RefusedError(404, f"there is nothing at {request.url.path}; the model is {SETTINGS['name']}")
        if request.method != ("POST" if rest == ["infer"] else "GET"):
            raise RefusedError(405, f"{request.method} is not for {request.url.path}")
        if rest == ["infer"]:
            return await self._infer(await request.body())
        if rest == ["ready"]:
            return {"name": SETTINGS["name"], "ready": True}
        keys = ("name", "inputs", "outputs")
        return {"versions": [SETTINGS["version"]], "platform": "toolchain", **{key: SETTINGS[key] for key in keys}}

    async def _infer(self, body):
        try:
            asked = json.loads(body)
            inputs = {tensor["name"]: array_of(tensor) for tensor in asked["inputs"]}
            wanted = [tensor["name"] for tensor in asked.get("outputs") or []]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise RefusedError(400, f"not an inference request: {type(error).__name__}: {error}") from error
        unknown = set(wanted) - {tensor["name"] for tensor in SETTINGS["outputs"]}
        if unknown:
            raise RefusedError(400, f"the model has no output {min(unknown)!r}")
        outputs, status, text = await self._run(inputs)
        if status != 200:
            raise RefusedError(status, text)
        return {
            "model_name": SETTINGS["name"],
            "model_version": SETTINGS["version"],
            **({"id": asked["id"]} if "id" in asked else {}),
            "outputs": [tensor_of(name, outputs[name]) for name in wanted or outputs],
        }

    async def _run(self, inputs):
        for attempt in range(ATTEMPTS):
            try:
                return await self.engine.run.remote(inputs)
            except RayActorError as error:
                # The replica died or its machine went; a run changes nothing, so it may be run again.
                if attempt == ATTEMPTS - 1:
                    raise RefusedError(503, f"no replica of the engine lives long enough: {error}") from error
        raise AssertionError


def array_of(tensor):
    """The array in an input of a request."""
    datatype = tensor["datatype"]
    if datatype not in DATATYPES:
        raise ValueError(f"datatype {datatype!r} is not one of {', '.join(DATATYPES)}")
    return np.asarray(tensor["data"], DATATYPES[datatype]).reshape(tensor["shape"])


def tensor_of(name, array):
    """An output of an answer."""
    if not np.isfinite(array).all():
        raise RefusedError(500, f"output {name!r} holds values that JSON has no name for")
    data = array.ravel().tolist()
    return {"name": name, "datatype": NAMES[array.dtype.name], "shape": list(array.shape), "data": data}


application = Protocol.bind(Engine.bind())
