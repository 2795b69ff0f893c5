"""JSON Schemas of recipes, profiles and server settings, for editors: ``python -m toolchain.schemas`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolchain.recipe import Recipe
from toolchain.runtime.server.settings import ServerSettings
from toolchain.target import TargetProfile

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schemas"


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": _DIALECT, **_without_nulls(schema), "title": "toolchain recipe"}


def target_schema() -> dict[str, Any]:
    """The JSON Schema of a target profile file.

    A file that extends another, or is detected, need not be complete, so nothing is required in its
    tables; the loader checks the combined profile.
    """
    schema = _without_nulls(TargetProfile.model_json_schema(by_alias=True))
    required = [key for key in schema["required"] if key not in ("schema", "name")]
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "name of a shipped profile, or path of another file, that this one changes",
    }
    schema["properties"]["detect"] = {
        "type": "boolean",
        "description": "whether processor, features and caches are those of the machine that loads the file",
    }
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    schema["required"] = ["schema", "name"]
    schema["anyOf"] = [{"required": ["extends"]}, {"required": ["detect"]}, {"required": required}]
    return {"$schema": _DIALECT, **schema, "title": "toolchain target profile"}


def settings_schema() -> dict[str, Any]:
    """The JSON Schema of a settings file of ``toolchain serve``."""
    schema = ServerSettings.model_json_schema(by_alias=True)
    return {"$schema": _DIALECT, **_without_nulls(schema), "title": "toolchain server settings"}


def write_schemas(folder: Path) -> tuple[Path, ...]:
    """Writes ``recipe``, ``target`` and ``serve.schema.json`` into ``folder``, which is made if absent.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schemas = {
        "recipe.schema.json": recipe_schema(),
        "target.schema.json": target_schema(),
        "serve.schema.json": settings_schema(),
    }
    for name, schema in schemas.items():
        (folder / name).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return tuple(folder / name for name in schemas)


def _without_nulls(node: Any) -> Any:
    """TOML has no null: an optional key is left out, so ``anyOf: [X, null]`` with default null becomes X."""
    if isinstance(node, list):
        return [_without_nulls(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _without_nulls(value) for key, value in node.items() if not (key == "default" and value is None)}
    choices = [choice for choice in node.get("anyOf", []) if choice != {"type": "null"}]
    if "anyOf" in node and len(choices) == 1:
        del node["anyOf"]
        return {**choices[0], **node}
    return node


if __name__ == "__main__":
    for written in write_schemas(_FOLDER):
        print(f"wrote {written}")
