"""Packs the chosen engines of a build into a release."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifact import canonical_json
from toolchain.bundle.manifest import BundleManifest, EngineInfo, RuntimeNeed, TargetInfo, Tolerance, parse_engine
from toolchain.bundle.media import RUNNER_FOLDER
from toolchain.bundle.pack import BundleSpec, PackedBundle, PackResult, pack_bundle, pack_release
from toolchain.bundle.read import Release, open_release
from toolchain.cache import Cache
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.keys import installed_version, tool_versions
from toolchain.plan import TargetPlan
from toolchain.recipe import Recipe
from toolchain.report import to_markdown
from toolchain.runner import Outcome
from toolchain.runtime.edge.tvm_libraries import tvm_libraries
from toolchain.select import Contender, Selection
from toolchain.version import __version__


@dataclass(frozen=True, slots=True)
class TargetResult:
    """One target's race and, if an engine was chosen, its bundle."""

    plan: TargetPlan
    selection: Selection
    report: Mapping[str, Any]
    measurement: Mapping[str, Any] | None

    @property
    def target(self) -> str:
        return self.plan.profile.name


def tools_of(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Distribution or program -> version of everything that took part in a build."""
    versions: dict[str, str] = {}
    for outcome in outcomes:
        versions |= tool_versions(outcome.node)
    return {"toolchain": __version__, **{name: versions[name] for name in sorted(versions)}}


def publish(
    recipe: Recipe,
    results: Sequence[TargetResult],
    outcomes: Mapping[str, Outcome],
    cache: Cache,
    output: Path,
) -> PackResult:
    """Write the release ``output/NAME/VERSION``; what was there before stays if anything fails.

    Raises:
        ToolchainError: STORAGE.
    """
    with cache.scratch() as scratch:
        packed = [_bundle(recipe, result, outcomes, cache, scratch / result.target) for result in results]
        folder = output.absolute() / recipe.name / recipe.version
        return pack_release(recipe.name, recipe.version, packed, folder, "another --output folder")


def standing_release(recipe: Recipe, output: Path) -> Release | None:
    """The release that stands where ``recipe``'s will be written, if there is a readable one."""
    try:
        return open_release(output.absolute() / recipe.name / recipe.version)
    except ToolchainError:
        return None


def replacement_notes(before: Release | None, packed: PackResult) -> tuple[str, ...]:
    """What whoever published the release that stood there before has to know, a line each."""
    if before is None or before.digest == packed.digest:
        return ()
    was = f"{before.name} {before.version}, {before.digest}"
    return (f"replaced another release {was}; one that was published needs a new version",)


def _bundle(
    recipe: Recipe, result: TargetResult, outcomes: Mapping[str, Outcome], cache: Cache, scratch: Path
) -> PackedBundle:
    import json

    chosen = result.selection.chosen
    assert chosen is not None
    entry = next(e for e in result.plan.entries if e.id == chosen.id)
    engine = cache.path(outcomes[entry.link or entry.compile].outputs["engine"])
    files = {p.relative_to(engine).as_posix(): p for p in sorted(engine.rglob("*")) if p.is_file()}
    files["recipe.toml"] = recipe.path
    engine_info = parse_engine(json.loads((engine / "engine.json").read_text()), engine / "engine.json")
    runner = _runner_files(result, outcomes, cache, engine_info)
    files |= {f"{RUNNER_FOLDER}/{name}": path for name, path in runner.items()}
    selftest = outcomes["selftest"].outputs.get("selftest")
    if selftest is not None:
        files["selftest.npz"] = cache.path(selftest) / "selftest.npz"
    scratch.mkdir()
    texts = {"report.json": canonical_json(result.report), "report.md": to_markdown(result.report).encode()}
    if result.measurement is not None:
        texts["measurement.json"] = canonical_json(measured_facts(result, outcomes))
    for name, data in texts.items():
        (scratch / name).write_bytes(data)
        files[name] = scratch / name
    contract = json.loads((engine / "contract.json").read_text())
    if recipe.model.labels:
        contract = with_labels(contract, recipe)
        files["contract.json"] = scratch / "contract.json"
        files["contract.json"].write_bytes(canonical_json(contract))
    return pack_bundle(BundleSpec(_manifest(recipe, result, chosen, engine_info, contract), files))


def _manifest(
    recipe: Recipe, result: TargetResult, chosen: Contender, engine: EngineInfo, contract: Mapping[str, Any]
) -> BundleManifest:
    verdict = chosen.verdict or {}
    return BundleManifest(
        name=recipe.name,
        version=recipe.version,
        description=recipe.description,
        target=TargetInfo(result.target, result.plan.profile.to_json()),
        requirements=result.plan.profile.requirements(),
        engine=engine,
        runtime=_runtime(engine, result.plan.profile.runtime.execution_provider),
        contract=contract,
        evidence={
            "verified": verdict.get("evidence"),
            "worst": verdict.get("worst"),
            "accuracy": verdict.get("accuracy"),
            "measured": dict(chosen.measurement) if chosen.measurement and chosen.median_ms is not None else None,
        },
        tools=result.report["tools"],
        reasons=(result.selection.reason,),
        selftest=Tolerance.around(verdict.get("worst") or {}),
    )


def _runner_files(
    result: TargetResult, outcomes: Mapping[str, Outcome], cache: Cache, engine: EngineInfo
) -> dict[str, Path]:
    """The edge runtime, where the profile asks for it and it can run the engine; with TVM's where that needs it."""
    profile = result.plan.profile
    if not result.plan.runner or engine.form not in ("aot", "vm"):
        return {}
    libraries = tvm_libraries(profile.arch, profile.tvm_packages) if engine.form == "vm" else {}
    if engine.form == "vm" and not libraries:
        return {}
    built = cache.path(outcomes[result.plan.runner].outputs["runner"])
    return {path.name: path for path in sorted(built.iterdir())} | libraries


def with_labels(contract: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The contract with the names of classes that the recipe gives; no stage looks at them.

    Raises:
        ToolchainError: BAD_RECIPE, no such output, an unreadable file, or as many lines as there are no classes.
    """
    outputs = {output["name"]: dict(output) for output in contract["outputs"]}
    for name, file in recipe.model.labels.items():
        where = f"{recipe.path}: model.labels.{name}"
        if name not in outputs:
            what = f"the model has no output {name!r}{did_you_mean(name, outputs)}; it has {', '.join(outputs)}"
            raise ToolchainError(what, where=where, code=ExitCode.BAD_RECIPE)
        try:
            lines = recipe.resolve(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ToolchainError(f"{file} cannot be read: {error}", where=where, code=ExitCode.BAD_RECIPE) from None
        classes = (outputs[name]["shape"] or [1])[-1]
        if not lines or (isinstance(classes, int) and len(lines) != classes):
            what = f"{file} has {len(lines)} lines, output {name!r} has {classes} classes"
            raise ToolchainError(what, where=where, hint="write one name a line", code=ExitCode.BAD_RECIPE)
        outputs[name]["labels"] = lines
    return {**contract, "outputs": list(outputs.values())}


def measured_facts(result: TargetResult, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The measurement with the digests of the engines it is of, so that a replay can be checked."""
    digests = {
        entry.id: artifact.digest
        for entry in result.plan.entries
        if entry.compile and (artifact := outcomes[entry.compile].outputs.get("engine")) is not None
    }
    return {**(result.measurement or {}), "digests": digests}


def _runtime(engine: EngineInfo, provider: str) -> RuntimeNeed:
    if engine.form in ("aot", "static"):
        return RuntimeNeed("", "")
    if engine.backend == "tvm":
        return RuntimeNeed("apache-tvm", f"=={installed_version('apache-tvm')}")
    distribution = "onnxruntime-gpu" if provider == "CUDAExecutionProvider" else "onnxruntime"
    made = installed_version("onnxruntime")
    major, minor = made.split(".")[:2]
    return RuntimeNeed(distribution, f">={major}.{minor},<{int(major) + 1}", provider)
