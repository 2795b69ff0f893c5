"""Loading a model with another configuration than its own: Triton's ``load`` with a ``config`` parameter.

A client sends a ModelConfig as JSON.  What it may change is how the model is served: rows of a request, merging, queue,
instances, threads.  Whatever else stands in it must be as it is, so that a client may send back what it was told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from toolchain.errors import did_you_mean
from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.settings import ModelSettings

_KINDS = ("KIND_AUTO", "KIND_CPU", "KIND_GPU")
#: What Triton's schema calls it -> the key of our settings.
_QUEUE = {"max_queue_size": "queue_size"}
_BATCHING = {
    "max_queue_delay_microseconds": "queue_delay_us",
    "priority_levels": "priorities",
    "default_priority_level": "default_priority",
}
#: Fields of batching that may stand there with the value that is always so here.
_FIXED = {"preserve_ordering": False, "timeout_action": "REJECT", "allow_timeout_override": True}


@dataclass(frozen=True, slots=True)
class Overrides:
    """How a model is served instead.

    Attributes:
        settings: of each of its versions.
        max_rows: most rows of a request; None: as the bundle says.
    """

    settings: ModelSettings
    max_rows: int | None = None


def parse_overrides(
    name: str, parameters: Mapping[str, Any], settings: ModelSettings, current: Mapping[str, Any]
) -> Overrides | None:
    """What the parameters of a request to load a model ask for; None: nothing.

    Args:
        name: of the model.
        parameters: of the request.
        settings: of the model as the server was told.
        current: the ModelConfig of the loaded version; empty where none is.

    Raises:
        ServeError: INVALID, not a configuration, or one that cannot be; UNSUPPORTED, files or other parameters.
    """
    if not parameters:
        return None
    for key in parameters:
        if key != "config":
            text = f"failed to load {name!r}: a model is loaded from its bundle; parameter {key!r} is not supported"
            raise ServeError(Status.UNSUPPORTED, text)
    try:
        config = json.loads(parameters["config"])
    except (ValueError, TypeError) as error:
        _refuse(name, f"'config' is not JSON: {error}")
    if not isinstance(config, dict):
        _refuse(name, "'config' is not a JSON object")
    return _Reader(name, settings, current).read(config)


class _Reader:
    def __init__(self, name: str, settings: ModelSettings, current: Mapping[str, Any]) -> None:
        self._name = name
        self._settings = settings
        self._current = current
        self._changes: dict[str, Any] = {}

    def read(self, config: Mapping[str, Any]) -> Overrides:
        handlers = {"instance_group": self._groups, "parameters": self._parameters}
        # Triton has 0 for a model without a batch axis, and so has what the client was told.
        told = self._current.get("max_batch_size")
        rows = None
        if "max_batch_size" in config and not _contained(config["max_batch_size"], told):
            rows = self._number(config["max_batch_size"], "max_batch_size", least=1)
        if "dynamic_batching" in config:
            self._batching(config["dynamic_batching"], rows or (told if isinstance(told, int) else 0))
        for key, value in config.items():
            if key in handlers:
                handlers[key](value)
            elif key not in ("max_batch_size", "dynamic_batching"):
                self._same(key, value, {"name": self._name, **self._current})
        try:
            settings = ModelSettings.model_validate({**self._settings.model_dump(), **self._changes})
        except ValidationError as error:
            first = error.errors()[0]
            _refuse(self._name, f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}")
        if settings.execution == "inline" and settings.instances > 1:
            _refuse(self._name, "the server itself runs this engine (execution 'inline'), in one instance")
        if settings.default_priority > settings.priorities:
            _refuse(self._name, f"default_priority_level is a level from 1 to {settings.priorities}, or 0")
        return Overrides(settings, rows)

    def _batching(self, value: object, rows: int) -> None:
        batching = self._object(value, "dynamic_batching")
        preferred = batching.get("preferred_batch_size", [])
        if not isinstance(preferred, list):
            _refuse(self._name, "dynamic_batching.preferred_batch_size is a list of whole numbers")
        sizes = [self._number(size, "preferred_batch_size", least=1) for size in preferred]
        if rows and any(size > rows for size in sizes):
            _refuse(self._name, f"preferred_batch_size {max(sizes)} is above max_batch_size {rows}")
        merged = max(sizes, default=rows)
        if not merged:
            _refuse(self._name, "dynamic_batching needs preferred_batch_size or max_batch_size here")
        self._changes["max_batch_size"] = merged
        for key, item in batching.items():
            if key in _BATCHING:
                self._changes[_BATCHING[key]] = self._number(item, key)
            elif key == "default_queue_policy":
                self._queue(item)
            elif key != "preferred_batch_size":
                self._fixed(key, item, "dynamic_batching")
        if self._changes.get("priorities") == 0:
            self._changes["priorities"] = 1

    def _queue(self, value: object) -> None:
        for key, item in self._object(value, "default_queue_policy").items():
            if key in _QUEUE:
                self._changes[_QUEUE[key]] = self._number(item, key)
            elif key == "default_timeout_microseconds":
                self._changes["timeout_ms"] = self._number(item, key) / 1000
            else:
                self._fixed(key, item, "default_queue_policy")

    def _groups(self, value: object) -> None:
        if not isinstance(value, list) or not value:
            _refuse(self._name, "instance_group is a list of groups")
        count = 0
        for group in (self._object(item, "instance_group") for item in value):
            count += self._number(group.get("count", 1), "instance_group.count", least=1)
            told = self._current.get("instance_group", [{}])[0]
            for key, item in group.items():
                if key == "kind" and item in _KINDS and item in ("KIND_AUTO", told.get("kind", item)):
                    continue
                if key not in ("count", "name"):
                    self._same(f"instance_group.{key}", item, {f"instance_group.{key}": told.get(key)})
        self._changes["instances"] = count

    def _parameters(self, value: object) -> None:
        told = self._current.get("parameters", {})
        for key, item in self._object(value, "parameters").items():
            text = self._object(item, f"parameters.{key}").get("string_value")
            if key == "threads":
                self._changes["threads"] = self._number(text, "parameters.threads")
            elif key == "execution":
                self._changes["execution"] = text
            else:
                self._same(f"parameters.{key}", item, {f"parameters.{key}": told.get(key)})

    def _same(self, key: str, value: object, told: Mapping[str, Any]) -> None:
        """Refuse a field that can't be changed, unless it is as it is."""
        if key not in told:
            hint = did_you_mean(key, ("max_batch_size", "dynamic_batching", "instance_group", "parameters"))
            _refuse(self._name, f"{key!r} of the configuration cannot be set{hint}")
        if not _contained(value, told[key]):
            _refuse(self._name, f"{key!r} is {json.dumps(told[key])[:200]} by the bundle and cannot be changed")

    def _fixed(self, key: str, value: object, where: str) -> None:
        if key not in _FIXED or not _contained(value, _FIXED[key]):
            only = f" to other than {json.dumps(_FIXED[key])}" if key in _FIXED else ""
            _refuse(self._name, f"{where}.{key} cannot be set{only}")

    def _number(self, value: object, key: str, least: int = 0) -> int:
        # Protobuf's JSON writes 64-bit numbers as strings.
        if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
            value = int(value)
        if type(value) is not int or value < least:
            _refuse(self._name, f"{key} is a whole number of at least {least}, got {value!r}")
        return value

    def _object(self, value: object, key: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            _refuse(self._name, f"{key} is an object, got {value!r}")
        return value


def _contained(given: object, told: object) -> bool:
    """Whether ``given`` says nothing but what ``told`` says; numbers may be written as strings."""
    if isinstance(given, dict) and isinstance(told, Mapping):
        return all(key in told and _contained(value, told[key]) for key, value in given.items())
    if isinstance(given, list) and isinstance(told, list):
        return len(given) == len(told) and all(map(_contained, given, told))
    if isinstance(told, int) and not isinstance(told, bool) and isinstance(given, str):
        return given == str(told)
    return type(given) is type(told) and given == told


def _refuse(name: str, what: str) -> NoReturn:
    # Triton's words: published client programs look for them.
    raise ServeError(Status.INVALID, f"failed to load {name!r}: {what}")
