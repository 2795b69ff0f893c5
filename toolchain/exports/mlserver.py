"""A folder that MLServer serves: its settings, and a runtime over ``toolchain.runtime``.

::

    DIR/settings.json  DIR/model-settings.json  DIR/toolchain_mlserver.py  DIR/bundle/...
"""

from __future__ import annotations

from importlib import resources

from toolchain.exports.files import Tree, json_file, text_file
from toolchain.exports.source import Source, protocol_tensor

RUNTIME = "toolchain_mlserver"


def mlserver_tree(source: Source, *, workers: int = 0, threads: int = 0) -> Tree:
    """The folder.

    Args:
        source: the bundle.
        workers: processes that run the model, MLServer's ``parallel_workers``; 0: the server's own.
        threads: of one run; 0: every processor that the process may use.
    """
    contract = source.contract
    template = resources.files("toolchain.exports") / "templates" / f"{RUNTIME}.py"
    settings = {
        "name": source.name,
        "version": source.manifest.version,
        "implementation": f"{RUNTIME}.ToolchainRuntime",
        "platform": f"toolchain-{source.engine.backend}",
        "inputs": [protocol_tensor(s.name, s.dtype, s.shape) for s in contract.inputs],
        "outputs": [protocol_tensor(s.name, s.dtype, s.shape) for s in contract.outputs],
        "parameters": {
            "version": source.manifest.version,
            "uri": "./bundle",
            "extra": {**source.facts(), "target": source.bundle.target, "threads": threads},
        },
    }
    return {
        "settings.json": json_file({"parallel_workers": workers, "debug": False}),
        "model-settings.json": json_file(settings),
        f"{RUNTIME}.py": text_file(template.read_text(encoding="utf-8")),
        **source.layout_files("bundle"),
    }
