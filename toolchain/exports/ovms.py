"""A model repository for OpenVINO Model Server.

::

    DIR/config.json
    DIR/NAME/NUMBER/model.onnx
"""

from __future__ import annotations

from typing import Any

from toolchain.exports.files import Tree, json_file
from toolchain.exports.source import Source, numbered, onnx_model

DEFAULT_BASE = "/models"
"""Where the server's own documentation mounts repositories."""


def ovms_tree(source: Source, *, version_number: int | None = None, base: str = DEFAULT_BASE, threads: int = 0) -> Tree:
    """The repository.

    Args:
        source: the bundle; its engine is an ONNX model.
        version_number: of the version's folder; from the release's version when not given.
        base: where the server will find the repository.
        threads: of inference; 0: as many as the server thinks best.

    Raises:
        ToolchainError: USAGE, another engine, or the version cannot be numbered.
    """
    model = onnx_model(source, "export ovms")
    number = numbered(source.manifest.version, version_number)
    files = source.engine_files()
    tree = {f"{source.name}/{number}/{'model.onnx' if name == model else name}": blob for name, blob in files.items()}
    config: dict[str, Any] = {
        "name": source.name,
        "base_path": f"{base.rstrip('/')}/{source.name}",
        "target_device": "GPU" if source.engine.device == "cuda" else "CPU",
        "model_version_policy": {"latest": {"num_versions": 1}},
    }
    if threads:
        config["plugin_config"] = {"INFERENCE_NUM_THREADS": threads}
    tree["config.json"] = json_file({"model_config_list": [{"config": config}]})
    return tree
