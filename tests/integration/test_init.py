"""`toolchain init` in a user's repository: what it writes works, and it runs none of the user's code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain.errors import ExitCode, ToolchainError
from toolchain.recipe import load_recipe

TOOLCHAIN = [sys.executable, "-m", "toolchain.cli.main"]

MODEL = """
raise RuntimeError("init must not run this file")
import torch
from torch import nn
from shapes.blocks import Block


class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.block = Block(classes)

    def forward(self, image, mask, scale=1.0):
        return self.block(image * mask * scale)


def build() -> nn.Module:
    net = Net()
    return net.eval()


def build_sized(classes, width):
    return Net(classes)
"""
DATA = "import helper\n\ndef calibration():\n    yield helper.batch()\n\ndef evaluation():\n    yield helper.batch()\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with the package ``shapes``, a helper beside it and a checkpoint."""
    root = tmp_path / "their repository"
    (root / "shapes").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / "shapes" / "model.py").write_text(MODEL)
    (root / "shapes" / "blocks.py").write_text("from . import inner\nclass Block: ...\n")
    (root / "shapes" / "inner.py").write_text("")
    (root / "shapes" / "data.py").write_text(DATA)
    (root / "shapes" / "weights.safetensors").write_bytes(b"not read")
    (root / "helper.py").write_text("def batch(): ...\n")
    (root / "unrelated.py").write_text("")
    return root


def toolchain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOLCHAIN, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def init(repository: Path, *arguments: str) -> Path:
    """Run init in ``repository`` and fill in the recipe's placeholders, as its user would."""
    done = toolchain(repository, "init", "shapes/model.py:build", *arguments)
    assert done.returncode == 0, done.stderr
    recipe = repository / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('"FILL_IN"', "8"))
    return recipe


def test_the_recipe_is_valid_once_its_placeholders_are_filled(repository: Path) -> None:
    done = toolchain(repository, "init", "shapes/model.py:build")
    assert done.returncode == 0, done.stderr
    recipe = repository / "recipe.toml"
    with pytest.raises(ToolchainError) as caught:
        load_recipe(recipe)
    assert "FILL_IN" in caught.value.render()
    line = re.search(r"replace FILL_IN in recipe.toml \(line (\d+)\)", done.stdout)
    assert line
    assert "FILL_IN" in recipe.read_text().splitlines()[int(line[1]) - 1]
    recipe.write_text(recipe.read_text().replace('"FILL_IN"', "8"))
    loaded = load_recipe(recipe)
    assert loaded.name == "shapes"
    assert [i.name for i in loaded.model.inputs] == ["image", "mask"]
    assert loaded.model.source == "shapes/model.py:build"
    assert loaded.model.checkpoint == "shapes/weights.safetensors"
    assert (loaded.data.calibration, loaded.data.evaluation) == (
        "shapes/data.py:calibration",
        "shapes/data.py:evaluation",
    )


def test_it_names_what_it_wrote_and_the_next_step(repository: Path) -> None:
    done = toolchain(repository, "init", "shapes/model.py:build", "--name", "mine", "--json")
    facts = json.loads(done.stdout)
    assert facts["name"] == "mine"
    written = [Path(p).relative_to(repository).as_posix() for p in facts["written"]]
    assert written == ["recipe.toml", "release.mk", ".github/workflows/release.yml"]
    assert all((repository / p).is_file() for p in written)
    text = toolchain(repository, "init", "shapes/model.py:build", "--force").stdout
    assert "then run: toolchain build recipe.toml" in text
    assert "include release.mk" in text


def test_existing_files_stay_without_force(repository: Path) -> None:
    (repository / "recipe.toml").write_text("name = 'shapes'")
    (repository / "release.mk").write_text("mine")
    done = toolchain(repository, "init", "shapes/model.py:build")
    assert done.returncode == ExitCode.USAGE
    assert "recipe.toml" in done.stderr
    assert (repository / "release.mk").read_text() == "mine"
    assert not (repository / "release-shapes.mk").exists()
    assert toolchain(repository, "init", "shapes/model.py:build", "--force").returncode == 0
    assert (repository / "release.mk").read_text() != "mine"


def test_a_recipe_in_a_subfolder_has_its_fragment_beside_it_and_its_workflow_in_the_root(repository: Path) -> None:
    done = toolchain(repository / "shapes", "init", "model.py:build", "--output", "deploy/shapes.toml")
    assert done.returncode == 0, done.stderr
    recipe = repository / "shapes" / "deploy" / "shapes.toml"
    assert 'source = "../model.py:build"' in recipe.read_text()
    assert "shapes.toml" in (recipe.parent / "release.mk").read_text()
    workflow = (repository / ".github" / "workflows" / "release.yml").read_text()
    assert "toolchain build shapes/deploy/shapes.toml" in workflow


def test_a_second_model_has_its_own_files_and_make_builds_each_or_both(repository: Path) -> None:
    init(repository)
    before = {p: p.read_bytes() for p in (repository / "release.mk", repository / ".github/workflows/release.yml")}
    done = toolchain(repository, "init", "shapes/model.py:build", "--name", "other.2")
    assert done.returncode == 0, done.stderr
    assert {p: p.read_bytes() for p in before} == before
    recipe, workflow = repository / "other.2.toml", repository / ".github/workflows/release-other.2.yml"
    assert "toolchain build other.2.toml" in workflow.read_text()
    assert "# Replace every FILL_IN below, then: toolchain build other.2.toml" in recipe.read_text()
    assert "then run: toolchain build other.2.toml" in done.stdout
    assert "include release-other.2.mk" in done.stdout
    assert "include release-other.2.mk" in (repository / "release-other.2.mk").read_text()
    recipe.write_text(recipe.read_text().replace('"FILL_IN"', "8"))
    make = Make(repository)
    with (repository / "Makefile").open("a") as file:
        file.write("include release-other.2.mk\n")
    both, one = make.run("-n", "release").stdout, make.run("-n", "release-other.2").stdout
    first, second = "build ./recipe.toml --output ./artifacts", "build ./other.2.toml --output ./artifacts"
    assert (first in both, second in both, first in one, second in one) == (True, True, False, True)
    again = toolchain(repository, "init", "shapes/model.py:build", "--name", "other.2")
    assert again.returncode == ExitCode.USAGE
    assert "other.2.toml" in again.stderr


def test_a_workflow_of_the_user_does_not_block_init(repository: Path) -> None:
    theirs = repository / ".github" / "workflows" / "release.yml"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("name: theirs\n")
    init(repository)
    assert theirs.read_text() == "name: theirs\n"
    assert "toolchain build recipe.toml" in theirs.with_name("release-shapes.yml").read_text()


def test_releases_are_ignored_by_git_and_the_lines_of_the_user_stay(repository: Path) -> None:
    (repository / ".gitignore").write_text("*.pyc")
    done = toolchain(repository, "init", "shapes/model.py:build")
    assert (repository / ".gitignore").read_text() == "*.pyc\nartifacts/\n"
    assert "extended .gitignore" in done.stdout
    again = toolchain(repository, "init", "shapes/model.py:build", "--force")
    assert (repository / ".gitignore").read_text() == "*.pyc\nartifacts/\n"
    assert ".gitignore" not in again.stdout


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("shapes/modle.py:build", "did you mean 'model.py'?"),
        ("nowhere/model.py:build", "does not exist"),
        ("shapes/model.py:biuld", "did you mean 'build'?"),
        ("shapes/model.py:build_sized", "needs the arguments classes, width"),
        ("shapes/model.py", "allowed: 'path/to/model.py:function'"),
        ("shapes:build", "allowed: 'path/to/model.py:function'"),
    ],
)
def test_a_wrong_model_is_explained_and_nothing_written(repository: Path, source: str, words: str) -> None:
    done = toolchain(repository, "init", source)
    assert done.returncode == ExitCode.USAGE
    assert words in done.stderr
    assert done.stdout == ""
    assert not (repository / "recipe.toml").exists()


def test_a_model_file_that_is_not_python_is_explained_with_its_line(repository: Path) -> None:
    (repository / "shapes" / "model.py").write_text("import torch\ndef build(:\n")
    done = toolchain(repository, "init", "shapes/model.py:build")
    assert done.returncode == ExitCode.USER_CODE
    assert "model.py:2" in done.stderr


def test_a_folder_that_cannot_be_made_is_explained(repository: Path) -> None:
    (repository / ".github").write_text("a file in the way")
    done = toolchain(repository, "init", "shapes/model.py:build")
    assert done.returncode == ExitCode.STORAGE, done.stderr
    assert not (repository / "recipe.toml").exists()


def test_the_workflow_is_plain_yaml_that_builds_and_keeps_the_release(repository: Path) -> None:
    init(repository)
    text = (repository / ".github" / "workflows" / "release.yml").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert "\t" not in text
    assert "@" not in re.sub(r"actions/[a-z-]+@v\d+|\] @ git\+", "", text)
    in_block = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        assert indent % 2 == 0, line
        if in_block is not None and indent > in_block:
            continue
        in_block = indent if line.endswith("|") else None
        assert re.fullmatch(r"\s*(- )?[\w-]+:( .+)?", line), line
    for needed in ("actions/checkout@", 'python-version: "3.11"', "actions/cache@", "actions/upload-artifact@"):
        assert needed in text
    assert re.search(r'^  TOOLCHAIN: "(FILL_IN|toolchain\[build\] @ git\+.*)"$', text, re.MULTILINE)
    assert "run: toolchain build recipe.toml --output artifacts" in text
    assert "path: artifacts/shapes" in text


class Make:
    """GNU make in ``repository`` with ``include release.mk``; times are set, so that no test has to wait."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.index = repository / "artifacts" / "shapes" / "0.1.0" / "index.json"
        (repository / "Makefile").write_text("all:\n\t@echo nothing\n\ninclude release.mk\n")
        for path in repository.rglob("*"):
            if path.is_file() and ".git" not in path.parts:
                os.utime(path, (1_000_000, 1_000_000))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *arguments, f"TOOLCHAIN={' '.join(TOOLCHAIN)}"]
        return subprocess.run(command, cwd=self.repository, capture_output=True, text=True, timeout=60, check=False)

    def would_build(self) -> bool:
        done = self.run("-n", "release")
        assert done.returncode == 0, done.stderr
        return f"build {'./recipe.toml'} --output ./artifacts" in done.stdout

    def built(self) -> None:
        """What a build leaves, a while after everything else."""
        assert self.run("-n", "release").returncode == 0
        self.index.parent.mkdir(parents=True, exist_ok=True)
        self.index.write_text("{}")
        os.utime(self.repository / "artifacts" / ".shapes.d", (1_500_000, 1_500_000))
        os.utime(self.index, (2_000_000, 2_000_000))


def test_make_release_builds_when_and_only_when_a_source_is_newer(repository: Path) -> None:
    init(repository)
    make = Make(repository)
    assert make.would_build()
    make.built()
    assert not make.would_build()
    (repository / "unrelated.py").touch()
    assert not make.would_build()
    sources = ("helper.py", "shapes/inner.py", "shapes/weights.safetensors", "recipe.toml")
    for name in sources:
        (repository / name).touch()
        assert make.would_build(), name
        os.utime(repository / name, (1_000_000, 1_000_000))
        make.built()
        assert not make.would_build(), name


def test_make_follows_a_new_import_and_survives_a_deleted_file(repository: Path) -> None:
    init(repository)
    make = Make(repository)
    make.built()
    (repository / "later.py").write_text("")
    (repository / "helper.py").write_text("import later\n")
    assert make.would_build()
    for name in ("later.py", "helper.py"):
        os.utime(repository / name, (1_000_000, 1_000_000))
    make.built()
    assert not make.would_build()
    (repository / "later.py").touch()
    assert make.would_build()
    (repository / "later.py").unlink()
    (repository / "helper.py").write_text("def batch(): ...\n")
    assert make.would_build()


def test_a_broken_recipe_fails_make_release_but_no_other_goal(repository: Path) -> None:
    recipe = init(repository)
    recipe.write_text(recipe.read_text().replace("schema = 1", "schema = 'one'"))
    make = Make(repository)
    assert make.run("all").returncode == 0
    done = make.run("release")
    assert done.returncode != 0
    assert "schema" in done.stderr


def test_the_dependencies_are_listed_with_odd_names_escaped(repository: Path) -> None:
    odd = repository / "with space $1.safetensors"
    odd.write_bytes(b"")
    recipe = init(repository)
    recipe.write_text(recipe.read_text().replace("shapes/weights.safetensors", odd.name))
    listed = json.loads(toolchain(repository, "init", "--dependencies", "recipe.toml", "--json").stdout)
    names = [Path(p).relative_to(repository).as_posix() for p in listed["sources"]]
    code = ["helper.py", "shapes/blocks.py", "shapes/data.py", "shapes/inner.py", "shapes/model.py"]
    assert names == ["recipe.toml", *code, odd.name]
    make = Make(repository)
    make.built()
    assert not make.would_build()
    odd.touch()
    assert make.would_build()


def test_a_model_or_dependencies_must_be_asked_for_but_not_both(repository: Path) -> None:
    for arguments in ([], ["shapes/model.py:build", "--dependencies", "recipe.toml"]):
        done = toolchain(repository, "init", *arguments)
        assert done.returncode == ExitCode.USAGE
        assert "either" in done.stderr
