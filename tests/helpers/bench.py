"""A cache, a repository and a count of how often stages really ran."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import stages
from helpers.stages import Code, Text, runs
from toolchain.artifact import Artifact
from toolchain.cache import Cache
from toolchain.runner import Lookup, Node, Outcome, Runner
from toolchain.worker import WorkerPool


@dataclass
class Bench:
    """A cache, a repository, and a count of how often stages really ran."""

    cache: Cache
    root: Path
    pool: WorkerPool
    trail: Path
    scope: str = "recipe"

    def runner(self) -> Runner:
        runner = Runner(self.cache, self.root, self.scope)
        runner.pool = self.pool
        return runner

    def run(self, node: Node, **inputs: Artifact) -> Outcome:
        return self.runner().run(node, inputs)

    def look_up(self, node: Node, **inputs: Artifact) -> Lookup:
        return self.runner().look_up(node, inputs)

    def text(self, *words: str, id: str = "text", **inputs: str) -> Node:
        return stages.text_node(id, *words, trail=self.trail, **inputs)

    def model(self, **changes: Any) -> Node:
        return Node("model", dataclasses.replace(stages.MODEL, **changes), Text(trail=str(self.trail)))

    def code(self, code: str, **changes: Any) -> Node:
        """A stage with user code that runs ``code`` and is counted."""
        node = Node("code", stages.USER_CODE, Code(code, str(self.trail)))
        return dataclasses.replace(node, **changes)

    @property
    def runs(self) -> int:
        return runs(self.trail)

    def read(self, outcome: Outcome) -> str:
        return (self.cache.path(outcome.outputs["text"]) / "text.txt").read_text()


def stale(bench: Bench, node: Node, *reasons: str, **inputs: Artifact) -> None:
    """Check that ``node`` would run for these reasons, that it does, and that it is then cached again."""
    before = bench.runs
    found = bench.look_up(node, **inputs)
    assert found.record is None
    assert found.reasons == reasons
    assert bench.run(node, **inputs).status == "ran"
    assert bench.run(node, **inputs).status == "cached"
    assert bench.runs == before + 1


_OTHER_PROCESS = """
import sys
from pathlib import Path
from helpers import stages
from toolchain.cache import Cache
from toolchain.runner import Node, Runner
runner = Runner(Cache(Path(sys.argv[1])), Path(sys.argv[2]), "recipe")
with runner.pool:
    print(runner.run(Node("model", stages.MODEL, stages.Text(trail=sys.argv[3])), {}).status)
"""


def other_process(bench: Bench, cwd: Path, **environment: str) -> str:
    """What a build in another process does with the model: its status."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ["PYTHONPATH"]])
    arguments = [str(bench.cache.folder.parent), str(bench.root), str(bench.trail)]
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
