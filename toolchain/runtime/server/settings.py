"""The server's settings: a TOML file, every mistake of which is told at once, and flags that override it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from toolchain.config_errors import Problem, check_schema_version, problem, raise_problems, read_toml, shape_problems
from toolchain.config_types import SCHEMA, Count, Flag, NonEmpty, NotNegative, Positive, SchemaNumber, Section, Share
from toolchain.errors import ExitCode, ToolchainError

_WHAT, _CODE = "settings file", ExitCode.USAGE

Execution = Literal["process", "thread", "inline"]
Port = Annotated[int, Field(strict=True, ge=0, le=65535)]
PositiveNumber = Annotated[float, Field(strict=True, gt=0)]


class ModelSettings(Section):
    """How one model is served; a key that is not given has the value of ``[defaults]``."""

    execution: Execution = Field(
        "process",
        description="'process', 'thread' or 'inline'; in the latter two a crash of the engine ends the server",
    )
    instances: Positive = Field(1, description="a whole number of at least 1: engines that run at the same time")
    threads: Count = Field(0, description="threads of one engine; 0: all processors, divided by the instances")
    max_batch_size: Positive = Field(1, description="rows merged into one run, a whole number of at least 1")
    queue_delay_us: Count = Field(0, description="microseconds a batch may wait for more rows, a whole number")
    queue_size: Positive = Field(256, description="requests that may wait, a whole number of at least 1")
    queue_mb: Positive = Field(256, description="megabytes of inputs that may wait, a whole number of at least 1")
    tensor_mb: Positive = Field(
        256, description="megabytes that the inputs or the outputs of one run may have, a whole number of at least 1"
    )
    timeout_ms: NotNegative = Field(0, description="milliseconds that a request may wait in the queue; 0: no limit")
    run_timeout_s: PositiveNumber = Field(
        60.0, description="seconds after which the process of a run that does not end is replaced, above 0"
    )
    load_timeout_s: PositiveNumber = Field(300.0, description="seconds that loading and testing may take, above 0")
    priorities: Positive = Field(1, description="levels of priority, a whole number of at least 1; 1 is the highest")
    default_priority: Count = Field(0, description="level of requests that name none; 0: the middle one")
    keep_versions: Positive = Field(
        1, description="versions of a watched folder that stay loaded, a whole number of at least 1"
    )
    canary_share: Share = Field(
        1.0, description="share of the traffic that a new version takes on trial, above 0 and up to 1"
    )
    trial_requests: Count = Field(50, description="requests that a new version must answer before it is trusted")
    trial_s: NotNegative = Field(0, description="seconds that a new version is on trial at least")
    max_error_rate: Share = Field(
        0.05, description="share of failed requests above which a version on trial is rolled back, from 0 to 1"
    )


class Limits(Section):
    """What a client may ask of the server."""

    request_mb: Positive = Field(64, description="megabytes of one request, a whole number of at least 1")
    pending_mb: Positive = Field(512, description="megabytes of all requests together, a whole number of at least 1")
    connections: Positive = Field(1024, description="connections at the same time, a whole number of at least 1")
    header_timeout_s: PositiveNumber = Field(10.0, description="seconds for the head of a request, above 0")
    body_timeout_s: PositiveNumber = Field(20.0, description="seconds of the longest pause in a body, above 0")
    idle_timeout_s: PositiveNumber = Field(75.0, description="seconds that a connection may lie idle, above 0")
    drain_s: NotNegative = Field(30.0, description="seconds that running requests have when the server stops")


class Tls(Section):
    """Encryption of both ports."""

    certificate: NonEmpty = Field(description="PEM file of the certificate chain")
    key: NonEmpty = Field(description="PEM file of the private key")


class Registries(Section):
    """Releases that are served out of registries, ``oci://HOST/REPOSITORY:TAG``."""

    folder: NonEmpty | None = Field(None, description="folder where they are kept; none: below the user's cache")
    interval_s: PositiveNumber = Field(30.0, description="seconds between looks at a tag, above 0")
    plain_http: Flag = Field(False, description="true to do without encryption, also with other machines")


class Logs(Section):
    """Structured logs on standard error."""

    success_share: Share = Field(0.0, description="share of the answered requests that are logged, from 0 to 1")
    traces: Flag = Field(False, description="true for OpenTelemetry traces (needs the package opentelemetry-sdk)")


def _defaults(section: type[Section]) -> Any:
    return Field(default_factory=lambda: section.model_validate({}), description="a table")


class ServerSettings(Section):
    """One settings file."""

    schema_version: SchemaNumber = Field(SCHEMA, alias="schema", description="format of the file: 1")
    host: NonEmpty = Field("127.0.0.1", description="address to listen on")
    http_port: Port = Field(8000, description="a port from 0 (any that is free) to 65535")
    grpc_port: Port = Field(8001, description="a port from 0 (any that is free) to 65535")
    server_name: NonEmpty = Field("toolchain", description="what the server calls itself in its metadata")
    grpc: Flag = Field(True, description="true to serve gRPC")
    admin: Flag = Field(False, description="true to allow loading and unloading over the network")
    shared_memory: Flag = Field(False, description="true to let clients name shared memory of this machine")
    token_file: NonEmpty | None = Field(None, description="file with the tokens that clients may use, one a line")
    trust_key: NonEmpty | None = Field(
        None, description="PEM file of public keys; only bundles signed with one of them are served"
    )
    tls: Tls | None = Field(None, description="a table with certificate and key")
    watch: NonEmpty | None = Field(None, description="folder of releases, NAME/VERSION, to serve as they come")
    watch_interval_s: PositiveNumber = Field(1.0, description="seconds between looks at the folder, above 0")
    registry: Registries = _defaults(Registries)
    limits: Limits = _defaults(Limits)
    logs: Logs = _defaults(Logs)
    defaults: ModelSettings = _defaults(ModelSettings)
    models: Mapping[str, ModelSettings] = Field(default_factory=dict, description="a table of tables by model name")

    def model(self, name: str) -> ModelSettings:
        """The settings of one model."""
        return self.models.get(name, self.defaults)


def load_settings(path: Path | None, overrides: Mapping[str, Any] | None = None) -> ServerSettings:
    """The settings in ``path`` (none: the defaults), with ``overrides`` from flags (None: not given) put over them.

    Raises:
        ToolchainError: USAGE, with one line for every mistake.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        tables = read_toml(path, _WHAT, _CODE)
        check_schema_version(tables, path, _WHAT, SCHEMA, _CODE)
        raise_problems([*shape_problems(ServerSettings, tables), *_sense_problems(tables)], path, _WHAT, _CODE)
        tables = _placed(tables, path.parent)
    merged = _with_defaults(tables)
    for key, value in (overrides or {}).items():
        if value is not None:
            _put(merged, key.split("."), value)
    problems = shape_problems(ServerSettings, merged)
    if problems:
        lines = [entry.line("flags") for entry in problems]
        raise ToolchainError("the flags do not fit", details=lines, code=_CODE)
    return ServerSettings.model_validate(merged)


def _placed(tables: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tables with the paths in them, which are relative to the file, made relative to the current folder."""
    placed = {key: str(folder / tables[key]) for key in ("token_file", "trust_key", "watch") if key in tables}
    tls = {key: str(folder / value) for key, value in tables.get("tls", {}).items()}
    registry = dict(tables.get("registry", {}))
    if "folder" in registry:
        registry["folder"] = str(folder / registry["folder"])
    return tables | placed | ({"tls": tls} if tls else {}) | ({"registry": registry} if registry else {})


def _with_defaults(tables: Mapping[str, Any]) -> dict[str, Any]:
    defaults = tables.get("defaults", {})
    models = {name: {**defaults, **table} for name, table in tables.get("models", {}).items()}
    return {**tables, "models": models}


def _put(tables: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a key; one of ``defaults`` counts for every model, since flags override the file."""
    if keys[0] == "defaults":
        for name, table in tables["models"].items():
            tables["models"][name] = {**table, keys[1]: value}
    if len(keys) == 1:
        tables[keys[0]] = value
    else:
        tables[keys[0]] = {**tables.get(keys[0], {}), keys[1]: value}


def _sense_problems(tables: Mapping[str, Any]) -> list[Problem]:
    found: list[Problem] = []
    models = tables.get("models", {})
    if not isinstance(models, Mapping):
        return []
    named: dict[tuple[str, ...], Any] = {("models", name): table for name, table in models.items()}
    named[("defaults",)] = tables.get("defaults", {})
    for key, table in named.items():
        if not isinstance(table, Mapping):
            continue
        levels, default = table.get("priorities", 1), table.get("default_priority", 0)
        if isinstance(levels, int) and isinstance(default, int) and default > levels:
            found.append(problem((*key, "default_priority"), default, f"a level from 1 to {levels}, or 0"))
        if table.get("canary_share") == 0:
            found.append(problem((*key, "canary_share"), 0, "a share above 0 and up to 1"))
        if table.get("execution") == "inline" and isinstance(table.get("instances"), int) and table["instances"] > 1:
            allowed = "1, as the server itself runs the engine with execution = 'inline'"
            found.append(problem((*key, "instances"), table["instances"], allowed))
    return found
