"""What one run of a stage made, and what to check before it is used again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from toolchain.artifact import Artifact, canonical_json, digest_json

BAD_RECORD = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged record raises."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one run of a stage made.

    Attributes:
        key: digest of ``components``.
        components: everything known beforehand that can change the result, by name.
        dependencies: ``[kind, name, digest]`` found out while it ran.
        outputs: output name -> artifact.
        refused: why there are no outputs, if the stage refused.
    """

    key: str
    components: dict[str, Any]
    dependencies: tuple[tuple[str, str, str], ...]
    outputs: dict[str, Artifact]
    facts: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "components": self.components,
            "dependencies": [list(d) for d in self.dependencies],
            "outputs": {name: artifact.to_json() for name, artifact in self.outputs.items()},
            "facts": self.facts,
            "refused": self.refused,
        }

    @property
    def artifact_names(self) -> set[str]:
        """The names of its artifacts' folders in the cache."""
        return {artifact.digest.removeprefix("sha256:") for artifact in self.outputs.values()}

    def encode(self) -> bytes:
        """The record as a file, with its own digest in it."""
        data = self.to_json()
        return canonical_json({"digest": digest_json(data), "record": data})

    @classmethod
    def decode(cls, content: bytes) -> Record:
        """Raises one of :data:`BAD_RECORD` when ``content`` is no whole record."""
        file = json.loads(content)
        data = file["record"]
        if file["digest"] != digest_json(data):
            raise ValueError("the record does not match its digest")
        return cls(
            data["key"],
            data["components"],
            tuple((kind, name, digest) for kind, name, digest in data["dependencies"]),
            {name: Artifact.from_json(value) for name, value in data["outputs"].items()},
            data["facts"],
            data["refused"],
        )
