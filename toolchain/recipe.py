"""The recipe: what is built, from which model, for which targets, under which limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr

from toolchain.config_errors import (
    Problem,
    check_schema_version,
    closest,
    problem,
    raise_problems,
    read_toml,
    shape_problems,
    shown,
)
from toolchain.config_types import (
    PRECISIONS,
    SCHEMA,
    Distinct,
    Name,
    NonEmpty,
    SchemaNumber,
    Section,
    SemanticVersion,
    split_function,
)
from toolchain.errors import ExitCode, ToolchainError
from toolchain.recipe_checks import sense_problems
from toolchain.recipe_parts import (
    METRICS,
    Data,
    Dim,
    GateLimits,
    Gates,
    Input,
    Measure,
    Metric,
    Model,
    Quantize,
    TargetGates,
    Tvm,
    source_kind,
)
from toolchain.target import is_path, list_targets

__all__ = [
    "METRICS",
    "PRECISIONS",
    "Data",
    "Dim",
    "GateLimits",
    "Gates",
    "Input",
    "Measure",
    "Metric",
    "Model",
    "Quantize",
    "Recipe",
    "TargetGates",
    "Tvm",
    "load_recipe",
    "source_kind",
    "split_function",
]

_WHAT, _CODE = "recipe", ExitCode.BAD_RECIPE


class Recipe(Section):
    """One recipe; the fields are those of its TOML file, whose paths are relative to :attr:`folder`."""

    schema_version: SchemaNumber = Field(alias="schema", description="format of the file: 1")
    name: Name = Field(description="name of the release, e.g. 'digits'")
    version: SemanticVersion = Field(description="semantic version of the release, e.g. '1.0.0'")
    description: str = Field("", description="what the model does")
    targets: Annotated[tuple[NonEmpty, ...], Distinct, Field(min_length=1)] = Field(
        description="names of shipped target profiles, or paths of own ones"
    )
    model: Model = Field(description="a table with the model's source and inputs")
    data: Data = Field(
        default_factory=lambda: Data.model_validate({}), description="a table with calibration, evaluation"
    )
    metric: Metric | None = Field(None, description="a table with kind")
    quantize: Quantize = Field(
        default_factory=lambda: Quantize.model_validate({}), description="a table with precisions, method"
    )
    measure: Measure = Field(
        default_factory=lambda: Measure.model_validate({}), description="a table with shapes, runs"
    )
    tvm: Tvm = Field(default_factory=lambda: Tvm.model_validate({}), description="a table with records")
    gates: Gates = Field(default_factory=lambda: Gates.model_validate({}), description="a table of limits")

    _path: Path = PrivateAttr(default=Path())
    _target_names: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        """Keeps the file's path, which the loader hands over as the validation context."""
        if isinstance(context, Path):
            self._path = context
            self._target_names = _target_names(self.targets, context.parent)[0]

    @property
    def path(self) -> Path:
        """The recipe file."""
        return self._path

    @property
    def folder(self) -> Path:
        """The recipe's folder, where its relative paths start."""
        return self._path.parent

    @property
    def root(self) -> Path:
        """Root of the repository: the nearest folder upwards with ``.git``, else ``pyproject.toml``, else the folder.

        Absolute, with symbolic links resolved.
        """
        folder = self.folder.resolve()
        for marker in (".git", "pyproject.toml"):
            for candidate in (folder, *folder.parents):
                if (candidate / marker).exists():
                    return candidate
        return folder

    @property
    def records_file(self) -> str:
        """The file of tuning records, which need not exist, relative to the recipe."""
        return self.tvm.records or f"{self.path.stem}.tune.toml"

    @property
    def records_path(self) -> Path:
        """The file of tuning records, which need not exist."""
        return self.resolve(self.records_file)

    def resolve(self, relative: str) -> Path:
        """A path of the recipe, from the recipe's folder."""
        return self.folder / relative

    def to_json(self) -> dict[str, Any]:
        """The content with defaults filled in and without absolute paths, for digests."""
        return self.model_dump(mode="json", by_alias=True)

    def gates_for(self, target_name: str) -> Gates:
        """The limits for the profile named ``target_name``: the general ones with its overrides in place.

        Overrides may be written under the profile's name or under its entry in ``targets``.  The
        result has no overrides left.
        """
        limits = self.gates.model_dump(exclude={"targets"})
        for written, own in self.gates.targets.items():
            if target_name in (written, self._target_names.get(written)):
                limits |= own.model_dump(exclude_unset=True, exclude_none=True)
        return Gates.model_validate(limits)


def load_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe.

    The files that the recipe names must exist; none of them is run or loaded.

    Raises:
        ToolchainError: BAD_RECIPE: no such file, not TOML, made for a newer schema, or mistakes in
            it, all of them at once with one line each in ``details``.  BAD_TARGET: the only mistakes are
            targets that name no profile.
    """
    path = Path(path)
    raw = read_toml(path, _WHAT, _CODE, hint="give the path of a recipe, or write one with `toolchain init`")
    check_schema_version(raw, path, _WHAT, SCHEMA, _CODE)
    listed = raw.get("targets")
    names, bad_targets = _target_names(listed if isinstance(listed, list) else (), path.parent)
    problems = [*shape_problems(Recipe, raw), *bad_targets, *sense_problems(raw, path.parent, names)]
    order = {key: position for position, key in enumerate(raw)}
    # As the file has it; what is missing altogether comes last.
    problems.sort(key=lambda entry: order.get(str(entry.key[0]) if entry.key else "", len(order)))
    # Where nothing else is wrong, an unknown target is what `--target` and `toolchain targets` say of it.
    raise_problems(problems, path, _WHAT, ExitCode.BAD_TARGET if problems == bad_targets else _CODE)
    return Recipe.model_validate(raw, context=path)


def _target_names(listed: Any, folder: Path) -> tuple[dict[str, str], list[Problem]]:
    """Entry of ``targets`` -> name of that profile, and the entries that name no profile or one twice."""
    names: dict[str, str] = {}
    problems: list[Problem] = []
    shipped = list_targets()
    for index, entry in enumerate(listed):
        if not isinstance(entry, str) or not entry or entry in names:
            continue  # the shape check reports these
        key = ("targets", index)
        if entry.startswith(("/", "~")):
            problems.append(problem(key, entry, "the name of a shipped profile, or a path relative to the recipe"))
            continue
        if is_path(entry):
            name = _own_profile_name(folder / entry)
            if name is None:
                files = [path.name for path in (folder / entry).parent.glob("*.toml")]
                meant = closest(Path(entry).name, files)
                meant = (Path(entry).parent / meant).as_posix() if meant else ""
                allowed = "an existing target profile, relative to the recipe"
                problems.append(Problem(key, f"{shown(entry)}, which does not exist", allowed, meant))
                continue
        elif entry in shipped:
            name = entry
        else:
            allowed = f"{', '.join(shipped)}, or the path of a .toml file"
            problems.append(problem(key, entry, allowed, shipped))
            continue
        if name in names.values():
            problems.append(problem(key, entry, f"profiles with different names; {name!r} is in the list already"))
        names[entry] = name
    return names, problems


def _own_profile_name(path: Path) -> str | None:
    """The name in a profile file, None if there is no such file; what else is wrong there shows when it is loaded."""
    if not path.is_file():
        return None
    try:
        data: Mapping[str, Any] = read_toml(path, "target profile", ExitCode.BAD_TARGET)
    except ToolchainError:
        return path.stem
    name = data.get("name")
    return name if isinstance(name, str) else path.stem
