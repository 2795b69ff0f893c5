"""Whether the runtime that a bundle needs is installed in a version that suits."""

from __future__ import annotations

import importlib.metadata
import operator
import re
from collections.abc import Callable

from toolchain.bundle.check import damaged
from toolchain.bundle.manifest import RuntimeNeed
from toolchain.errors import ExitCode, ToolchainError

#: Distributions that provide the same module as the named one.
_EQUIVALENT = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "apache-tvm": ("apache-tvm",),
}
_OPERATORS: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CLAUSE = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)(?:\.?(?:a|b|rc|post|dev)\d+)*\s*")


def check_runtime(need: RuntimeNeed) -> str:
    """The installed version of what ``need`` names; "" if it names nothing, as for engines made ahead of time.

    Raises:
        ToolchainError: MISSING_TOOL, not installed; INCOMPATIBLE_HOST, another version;
            DAMAGED_BUNDLE, the range of versions is not one.
    """
    if not need.distribution:
        return ""
    pip = f'pip install "{need.distribution}{need.versions}"'
    for distribution in _EQUIVALENT.get(need.distribution, (need.distribution,)):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version_suits(version, need.versions):
            raise ToolchainError(
                f"the bundle needs {need.distribution} {need.versions}, {version} is installed",
                hint=pip,
                code=ExitCode.INCOMPATIBLE_HOST,
            )
        return version
    raise ToolchainError(
        f"the bundle needs {need.distribution} {need.versions}, which is not installed",
        hint=pip,
        code=ExitCode.MISSING_TOOL,
    )


def version_suits(version: str, versions: str) -> bool:
    """Whether ``version`` is in ``versions``, e.g. ``">=1.18,<2"``; only the numbers before any suffix count.

    The subset of PEP 440 that bundles use: the comparison operators, joined by commas.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, another operator or no version.
    """
    for clause in filter(None, versions.split(",")):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise damaged(f"{clause!r} is not a range of versions such as >=1.18,<2", "bundle.json")
        got, bound = _numbers(version), _numbers(match[2])
        width = max(len(got), len(bound))
        if not _OPERATORS[match[1]](got + (0,) * (width - len(got)), bound + (0,) * (width - len(bound))):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
