"""The Ray Serve peer."""

import os
import signal

import ray
from ray import serve
from session import Session
from starlette.responses import JSONResponse


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class Inference:
    """One engine."""

    def __init__(self) -> None:
        self._session = Session()

    async def __call__(self, request):
        outputs = self._session.run(await request.json())
        return JSONResponse({name: array.tolist() for name, array in outputs.items()})


if __name__ == "__main__":
    import sys

    variables = {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__)), "MODEL": os.environ["MODEL"]}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables}, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["HTTP_PORT"])})
    serve.run(Inference.bind(), name="bench", route_prefix="/")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.pause()
