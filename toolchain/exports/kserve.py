"""Manifests of an InferenceService of KServe that pulls the model from an OCI registry.

::

    DIR/inference-service.yaml     the service: storage URI, resources, node
    DIR/serving-runtime.yaml       the runtime it names: ``toolchain serve`` in a container
    DIR/Containerfile.model        the model image that the storage URI means
    DIR/Containerfile.runtime      the runtime's image
    DIR/models/...                 the bundle, which goes into the model image
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.exports.files import Tree, text_file, yaml_file
from toolchain.exports.source import Source
from toolchain.version import __version__

#: Where KServe makes the files of an OCI model image visible to the runtime's container.
MOUNT = "/mnt/models"
_HTTP_PORT, _GRPC_PORT = 8080, 9000
_FORMAT = "toolchain"
_PYTHON = "3.11"
# Kubernetes: apimachinery, pkg/util/validation (DNS-1123 label).
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
# distribution/reference: a repository with a registry, and a tag or digest.
_IMAGE = re.compile(
    r"[a-z0-9][a-z0-9.-]*(?::\d+)?(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)+(?::[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})"
)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def kserve_tree(
    source: Source, image: str, runtime_image: str, *, namespace: str = "", memory_mb: int | None = None
) -> Tree:
    """The manifests and what the two images are made of.

    Args:
        source: the bundle.
        image: of the model, ``REGISTRY/NAME:TAG`` or ``@sha256:...``; the storage URI is ``oci://`` and this.
        runtime_image: that has ``toolchain serve``.
        namespace: of the service; the current one of whoever applies it when not given.
        memory_mb: limit of the container; the target profile's when not given, and none where it has none.

    Raises:
        ToolchainError: USAGE, not a name or an image that Kubernetes takes.
    """
    if not _LABEL.fullmatch(source.name):
        raise ToolchainError(
            f"KServe takes names of lower-case letters, digits and '-', up to 63, got {source.name!r}",
            where="--name",
            hint="give another with --name",
            code=ExitCode.USAGE,
        )
    for option, value in (("--image", image), ("--runtime-image", runtime_image)):
        if not _IMAGE.fullmatch(value):
            raise ToolchainError(
                f"an image is REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST, got {value!r}",
                where=option,
                code=ExitCode.USAGE,
            )
    place = {"namespace": namespace} if namespace else {}
    return {
        "inference-service.yaml": yaml_file(_service(source, image, place, memory_mb)),
        "serving-runtime.yaml": yaml_file(_runtime(source, runtime_image, place)),
        "Containerfile.model": text_file(_model_containerfile()),
        "Containerfile.runtime": text_file(_runtime_containerfile(source)),
        **source.layout_files("models"),
    }


def _service(source: Source, image: str, place: Mapping[str, str], memory_mb: int | None) -> dict[str, Any]:
    facts = source.facts()
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": source.name,
            **place,
            "annotations": {f"toolchain/{key.replace('_', '-')}": value for key, value in facts.items()},
        },
        "spec": {
            "predictor": {
                "nodeSelector": _node(source),
                "model": {
                    "modelFormat": {"name": _FORMAT},
                    "runtime": _runtime_name(source),
                    "protocolVersion": "v2",
                    "storageUri": f"oci://{image}",
                    "resources": _resources(source, memory_mb),
                },
            }
        },
    }


def _runtime_name(source: Source) -> str:
    return f"{_FORMAT}-{source.engine.backend}" + ("-cuda" if source.engine.device == "cuda" else "")


def _node(source: Source) -> dict[str, str]:
    needs = source.manifest.requirements
    arch = _ARCHITECTURES.get(str(needs["arch"]), str(needs["arch"]))
    return {"kubernetes.io/os": str(needs["os"]), "kubernetes.io/arch": arch}


def _resources(source: Source, memory_mb: int | None) -> dict[str, Any]:
    """Processors and memory of the profile, with a GPU where the engine runs on one."""
    cores = source.profile.get("cpu", {}).get("cores") or 1
    memory = memory_mb or source.profile.get("limits", {}).get("memory_mb")
    requests: dict[str, str] = {"cpu": str(cores)}
    limits: dict[str, str] = {"cpu": str(cores)}
    if memory:
        requests["memory"] = limits["memory"] = f"{int(memory)}M"
    if source.engine.device == "cuda":
        limits["nvidia.com/gpu"] = "1"
    return {"requests": requests, "limits": limits}


def _runtime(source: Source, image: str, place: Mapping[str, str]) -> dict[str, Any]:
    words = ["toolchain", "serve", "--host", "0.0.0.0", "--http-port", str(_HTTP_PORT), "--grpc-port", str(_GRPC_PORT)]
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": _runtime_name(source), **place},
        "spec": {
            "supportedModelFormats": [{"name": _FORMAT, "version": "1", "autoSelect": False}],
            "protocolVersions": ["v2", "grpc-v2"],
            "containers": [
                {
                    "name": "kserve-container",
                    "image": image,
                    "command": words,
                    "args": [MOUNT],
                    "ports": [{"name": "http1", "containerPort": _HTTP_PORT, "protocol": "TCP"}],
                    "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": _HTTP_PORT}},
                    "livenessProbe": {"httpGet": {"path": "/v2/health/live", "port": _HTTP_PORT}},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "runAsNonRoot": True,
                        "runAsUser": 1000,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        },
    }


def _model_containerfile() -> str:
    # KServe's "modelcars" runs the image beside the runtime and looks below /models of it, so it needs a shell.
    return "FROM busybox:stable\nCOPY --chown=1000:1000 models /models\nUSER 1000\n"


def _runtime_containerfile(source: Source) -> str:
    """Takes the wheel from the folder that the image is built in: a registry may know another package by this name."""
    extras = "serve,tvm" if source.engine.backend == "tvm" and source.engine.form == "vm" else "serve"
    wheel = f"toolchain-{__version__}-py3-none-any.whl"
    return (
        f"# Put {wheel} beside this file (pip wheel --no-deps SOURCES).\n"
        f"FROM python:{_PYTHON}-slim\n"
        f"COPY {wheel} /tmp/\n"
        f'RUN pip install --no-cache-dir "/tmp/{wheel}[{extras}]"\n'
        "USER 1000\n"
    )
