"""What is read from a Python file without running it."""

from pathlib import Path

import pytest

from toolchain.errors import ExitCode, ToolchainError
from toolchain.python_source import Arguments, forward_arguments, imported_files, parse_file

NET = "class Net(nn.Module):\n    def forward(self, image, mask=None):\n        return image\n"


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / (name.replace("__", "/").replace("/init/", "__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def forward(root: Path, text: str, name: str = "build") -> Arguments | None:
    write(root, model=text)
    return forward_arguments(root / "model.py", name, [root])


@pytest.mark.parametrize(
    "body",
    [
        "def build():\n    return Net()",
        "def build():\n    return Net(1, 2).to('cpu').eval()",
        "def build():\n    net = Net()\n    net.load()\n    return net.eval()",
        "def build():\n    def inner():\n        return Other()\n    return Net()",
        "def make():\n    return Net()\n\ndef build():\n    return make()",
        "def build() -> Net:\n    return REGISTRY['net']",
        "def build() -> 'Net':\n    return REGISTRY['net']",
        "class build(Net):\n    pass",
    ],
)
def test_forward_is_found_however_the_function_makes_the_model(tmp_path: Path, body: str) -> None:
    assert forward(tmp_path, f"{NET}\n{body}\n") == Arguments(("image",), ("mask",))


@pytest.mark.parametrize(
    "line",
    [
        "from layers import Net",
        "from layers import Net as Own",
        "from pkg import Net",
        "from pkg.net import Net as Own",
    ],
)
def test_forward_is_found_through_imports(tmp_path: Path, line: str) -> None:
    write(tmp_path, layers=NET, pkg__net=NET)
    (tmp_path / "pkg" / "__init__.py").write_text("from .net import Net\n")
    name = line.split()[-1]
    assert forward(tmp_path, f"{line}\ndef build():\n    return {name}()\n") == Arguments(("image",), ("mask",))


@pytest.mark.parametrize(
    "text",
    [
        "def build():\n    return nn.Sequential(nn.Linear(1, 2))\n",
        "from torchvision.models import resnet18\ndef build():\n    return resnet18()\n",
        "def build():\n    return build()\n",
        "def a():\n    return build()\ndef build():\n    return a()\n",
    ],
)
def test_a_model_that_the_code_does_not_show_gives_nothing(tmp_path: Path, text: str) -> None:
    assert forward(tmp_path, text) is None


def test_keyword_only_and_variadic_arguments_are_told_apart(tmp_path: Path) -> None:
    text = "class Net:\n    def forward(self, a, b=1, *rest, c, d=2, **more): ...\ndef build():\n    return Net()\n"
    assert forward(tmp_path, text) == Arguments(("a", "c"), ("b", "d"), variadic=True)


def test_imports_are_followed_transitively_and_only_within_the_repository(tmp_path: Path) -> None:
    write(
        tmp_path,
        model="import torch, json\nimport helper\nfrom pkg import deep\nfrom . import sibling\n",
        helper="def f():\n    import late\n",
        late="import importlib\nimportlib.import_module('dynamic')\n",
        dynamic="",
        sibling="import model\n",
        unrelated="",
        pkg__deep="from .deeper import thing\n",
        pkg__deeper="from ..helper import f\n",
        json="raise SystemExit\n",
    )
    (tmp_path / "pkg" / "__init__.py").write_text("")
    installed = tmp_path / "venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "torch.py").write_text("")
    found = imported_files([tmp_path / "model.py"], [tmp_path, installed])
    names = {path.relative_to(tmp_path).as_posix() for path in found}
    # json.py is listed: the repository's folders come first on sys.path when its code runs.
    assert names == {
        "model.py", "helper.py", "late.py", "dynamic.py", "sibling.py", "json.py",
        "pkg/__init__.py", "pkg/deep.py", "pkg/deeper.py",
    }  # fmt: skip


def test_a_namespace_package_is_followed(tmp_path: Path) -> None:
    write(tmp_path, model="import space.inner\n", space__inner="")
    found = imported_files([tmp_path / "model.py"], [tmp_path])
    assert [path.name for path in found] == ["model.py", "inner.py"]


def test_an_imported_file_that_is_not_valid_python_is_listed(tmp_path: Path) -> None:
    write(tmp_path, model="import broken\n", broken="def (:\n")
    assert tmp_path / "broken.py" in imported_files([tmp_path / "model.py"], [tmp_path])


@pytest.mark.parametrize(("text", "where"), [("x = (\n", ":1"), ("a = 1\ndef f(:\n", ":2"), ("a\0b", "")])
def test_invalid_python_is_refused_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    write(tmp_path, model=text)
    with pytest.raises(ToolchainError) as caught:
        parse_file(tmp_path / "model.py")
    assert caught.value.code is ExitCode.USER_CODE
    assert caught.value.where == f"{tmp_path / 'model.py'}{where}"
