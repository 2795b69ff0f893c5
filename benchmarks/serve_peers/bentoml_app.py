"""The BentoML peer."""

import os
import subprocess
import sys
from pathlib import Path

import bentoml

try:
    from session import Session
except ImportError:
    sys.path.insert(0, str(Path(__file__).parent))
    from session import Session


@bentoml.service(workers=1, metrics={"enabled": True}, logging={"access": {"enabled": False}})
class Inference:
    """One engine."""

    def __init__(self) -> None:
        self._session = Session()

    @bentoml.api
    def predict(self, inputs: dict) -> dict:
        return {name: array.tolist() for name, array in self._session.run(inputs).items()}


if __name__ == "__main__":
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_app:Inference", "--host", "127.0.0.1"]
    command += ["--port", os.environ["HTTP_PORT"], "--working-dir", str(Path(__file__).parent)]
    os.environ["BENTOML_DO_NOT_TRACK"] = "1"
    sys.exit(subprocess.call(command))
