"""A Ray Serve application of a bundle.

::

    DIR/app.py         the application, ``app:application``; it reads app.json
    DIR/serve.yaml     the same for ``serve deploy``
    DIR/bundle/...
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.exports.files import Tree, json_file, text_file, yaml_file
from toolchain.exports.source import Source, protocol_tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """How many replicas there are.

    Attributes:
        min_replicas: that always run.
        max_replicas: under load.
        target_ongoing_requests: of one replica, above which more are started.
        threads: of one replica; it asks Ray for so many processors.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: float = 2.0
    threads: int = 1


def ray_serve_tree(source: Source, scaling: Scaling | None = None) -> Tree:
    """The folder.

    Raises:
        ToolchainError: USAGE, fewer replicas at most than at least.
    """
    scaling = scaling or Scaling()
    if scaling.max_replicas < scaling.min_replicas:
        raise ToolchainError(
            f"must be at least --min-replicas {scaling.min_replicas}, got {scaling.max_replicas}",
            where="--max-replicas",
            code=ExitCode.USAGE,
        )
    template = resources.files("toolchain.exports") / "templates" / "ray_app.py"
    contract = source.contract
    settings = {
        "name": source.name,
        "version": source.manifest.version,
        "inputs": [protocol_tensor(s.name, s.dtype, s.shape) for s in contract.inputs],
        "outputs": [protocol_tensor(s.name, s.dtype, s.shape) for s in contract.outputs],
        "target": source.bundle.target,
        "threads": scaling.threads,
        "protocol_replicas": 1,
        "gpus": int(source.engine.device == "cuda"),
        "autoscaling": {k: v for k, v in asdict(scaling).items() if k != "threads"},
        "facts": source.facts(),
    }
    return {
        "app.py": text_file(template.read_text(encoding="utf-8")),
        "app.json": json_file(settings),
        "serve.yaml": yaml_file(_deploy(source)),
        **source.layout_files("bundle"),
    }


def _deploy(source: Source) -> dict[str, Any]:
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [{"name": source.name, "route_prefix": "/", "import_path": "app:application"}],
    }
