"""The recorder: what user code read, and nothing else."""

from __future__ import annotations

import itertools
import os
import sqlite3
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.distributions import install_distribution
from safetensors.numpy import save_file

from toolchain.worker import WorkerPool

Trace = Callable[..., set[tuple[str, str]]]


@pytest.fixture
def trace(pool: WorkerPool, repo: Path, tmp_path: Path) -> Trace:
    numbers = itertools.count()

    def trace(code: str, **request: Any) -> set[tuple[str, str]]:
        reply = tmp_path / f"reply-{next(numbers)}"
        request = {"root": str(repo), "code": code, **request}
        end = pool.call("onnx", "helpers.calls:trace_code", request, reply, tmp_path / "log")
        assert end.reply is not None
        assert "result" in end.reply, end.reply
        return {(kind, name) for kind, name in end.reply["result"]["dependencies"]}

    return trace


def test_imported_files_of_the_repository_are_recorded(trace: Trace) -> None:
    assert trace("import helper") == {("file", "$ROOT/helper.py")}


def test_everything_an_import_pulls_in_is_recorded(trace: Trace) -> None:
    assert trace("import model; model.build()") == {
        ("file", "$ROOT/model.py"),
        ("file", "$ROOT/helper.py"),
        ("file", "$ROOT/data/numbers.txt"),
    }


def test_a_package_and_its_parts_are_recorded(trace: Trace, repo: Path) -> None:
    (repo / "nets").mkdir()
    (repo / "nets" / "__init__.py").write_text("")
    (repo / "nets" / "cnn.py").write_text("from . import layers\n")
    (repo / "nets" / "layers.py").write_text("")
    assert trace("import nets.cnn") == {("file", f"$ROOT/nets/{n}.py") for n in ("__init__", "cnn", "layers")}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("open", "open(path).read()"),
        ("os.open", "import os; os.open(path, os.O_RDONLY)"),
        ("pathlib", "import pathlib; pathlib.Path(path).read_bytes()"),
        ("json", "import json; json.load(open(path, 'rb'))"),
        ("numpy.fromfile", "import numpy; numpy.fromfile(path, dtype='u1')"),
        ("numpy.memmap", "import numpy; numpy.memmap(path)"),
        ("bytes path", "open(path.encode()).read()"),
        ("shutil.copy", "import shutil, tempfile; shutil.copy(path, tempfile.mkdtemp())"),
    ],
)
def test_a_file_is_recorded_however_it_is_read(trace: Trace, repo: Path, name: str, code: str) -> None:
    (repo / "data" / "values.json").write_text("[1, 2]")
    found = trace("path = str(root / 'data' / 'values.json')\n" + code)
    assert ("file", "$ROOT/data/values.json") in found
    assert found <= {("file", "$ROOT/data/values.json")} | {d for d in found if d[0] == "distribution"}


def test_numpy_archives_are_recorded(trace: Trace, repo: Path) -> None:
    np.save(repo / "a.npy", np.zeros(3))
    np.savez(repo / "b.npz", x=np.zeros(3))
    found = trace(
        "import numpy as np\nnp.load(root / 'a.npy')\nnp.load(root / 'a.npy', mmap_mode='r')\n"
        "with np.load(root / 'b.npz') as archive: archive['x']"
    )
    assert found == {("file", "$ROOT/a.npy"), ("file", "$ROOT/b.npz")}


def test_safetensors_files_are_recorded_though_compiled_code_reads_them(trace: Trace, repo: Path) -> None:
    for name in "abc":
        save_file({"x": np.zeros(3, np.float32)}, repo / f"{name}.safetensors")
    found = trace(
        "from safetensors import safe_open\n"
        "with safe_open(root / 'a.safetensors', framework='np') as file: file.get_tensor('x')\n"
        "from safetensors.numpy import load_file, load\n"
        "load_file(root / 'b.safetensors')\n"
        "load((root / 'c.safetensors').read_bytes())"
    )
    assert {("file", f"$ROOT/{n}.safetensors") for n in "abc"} <= found


def test_an_announced_file_is_recorded(trace: Trace, repo: Path) -> None:
    (repo / "model.pt2").write_bytes(b"x")
    assert trace("from toolchain.trace import announce; announce(root / 'model.pt2')") == {("file", "$ROOT/model.pt2")}


def test_a_sqlite_database_is_recorded(trace: Trace, repo: Path) -> None:
    with sqlite3.connect(repo / "data.db") as database:
        database.execute("create table t (x)")
    database.close()
    found = trace("import sqlite3; c = sqlite3.connect(root / 'data.db'); c.execute('select * from t'); c.close()")
    assert found == {("file", "$ROOT/data.db")}


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.listdir(root / 'data')",
        "list((root / 'data').iterdir())",
        "list((root / 'data').glob('*.txt'))",
        "import glob; glob.glob(str(root / 'data' / '*'))",
        "import os; list(os.walk(root / 'data'))",
    ],
)
def test_a_listed_folder_is_recorded(trace: Trace, code: str) -> None:
    assert trace(code) == {("folder", "$ROOT/data")}


def test_a_relative_path_starts_at_the_current_folder(trace: Trace, repo: Path) -> None:
    found = trace("open('numbers.txt').read()\nimport os; os.listdir()", cwd=str(repo / "data"))
    assert found == {("file", "$ROOT/data/numbers.txt"), ("folder", "$ROOT/data")}


def test_a_file_that_was_asked_for_and_is_not_there_is_recorded_as_absent(trace: Trace) -> None:
    code = "try:\n    open(root / 'local.json')\nexcept FileNotFoundError:\n    pass"
    assert trace(code) == {("absent", "$ROOT/local.json")}


def test_files_that_the_code_wrote_itself_are_not_recorded(trace: Trace, repo: Path) -> None:
    found = trace(
        "(root / 'made.txt').write_text('x'); (root / 'made.txt').read_text()\n"
        "import numpy; numpy.save(root / 'made.npy', [1]); numpy.load(root / 'made.npy')\n"
        "(root / 'made.log').open('a').write('x')\n"
        "(root / 'made.tmp').write_text('x'); (root / 'made.tmp').replace(root / 'moved.txt')\n"
        "(root / 'moved.txt').read_text()\n"
        "import tempfile\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    open(folder + '/x', 'w').close(); open(folder + '/x').read()\n"
        "    import os; os.listdir(folder)\n"
    )
    assert found == set()


def test_listing_a_folder_that_was_there_before_is_recorded_though_the_code_would_make_it(trace: Trace) -> None:
    code = "(root / 'data').mkdir(exist_ok=True); list((root / 'data').iterdir())"
    assert trace(code) == {("folder", "$ROOT/data")}


def test_the_stages_own_folders_are_not_recorded(trace: Trace, tmp_path: Path) -> None:
    private = tmp_path / "input"
    private.mkdir()
    (private / "model.onnx").write_bytes(b"x")
    code = f"open({str(private / 'model.onnx')!r}).read()\nimport os; os.listdir({str(private)!r})"
    assert trace(code, private=[str(private)]) == set()


def test_a_file_outside_the_repository_has_its_whole_path(trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert trace(f"open({str(tmp_path / 'weights.bin')!r}, 'rb').read()") == {("file", str(tmp_path / "weights.bin"))}


def test_a_link_is_recorded_by_its_own_name(trace: Trace, repo: Path, tmp_path: Path) -> None:
    (repo / "data" / "v1").mkdir()
    (repo / "data" / "v1" / "x.txt").write_text("1")
    (repo / "data" / "current").symlink_to("v1")
    (tmp_path / "outside.txt").write_text("1")
    (repo / "outside.txt").symlink_to(tmp_path / "outside.txt")
    found = trace("(root / 'data/current/x.txt').read_text(); (root / 'outside.txt').read_text()")
    assert found == {("file", "$ROOT/data/current/x.txt"), ("file", "$ROOT/outside.txt")}


def test_a_repository_behind_a_link_is_the_repository(trace: Trace, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(repo)
    expected = {("file", "$ROOT/helper.py"), ("file", "$ROOT/data/numbers.txt")}
    code = f"import helper; open({str(repo / 'data/numbers.txt')!r}).read()"
    assert trace(code, root=str(tmp_path / "link")) == expected


def test_installed_packages_are_recorded_by_distribution(trace: Trace) -> None:
    found = trace("import hypothesis")
    assert ("distribution", "hypothesis") in found
    assert {kind for kind, _ in found} == {"distribution"}


def test_a_data_file_of_an_installed_package_is_recorded_by_distribution(trace: Trace) -> None:
    site = sysconfig.get_paths()["purelib"]
    assert trace(f"open({site + '/hypothesis/py.typed'!r}).read()") == {("distribution", "hypothesis")}
    assert trace("import importlib.metadata; importlib.metadata.version('hypothesis')") == {
        ("distribution", "hypothesis")
    }


def test_a_virtual_environment_inside_the_repository_holds_distributions(trace: Trace, repo: Path) -> None:
    site = repo / ".venv" / "lib" / "python3.11" / "site-packages"
    install_distribution(site, "fancy-layers", "1.2", "fancy_layers")
    (site / "loose.py").write_text("")
    found = trace("import fancy_layers, loose", site=[str(site)])
    assert found == {
        ("distribution", "fancy-layers"),
        ("file", "$ROOT/.venv/lib/python3.11/site-packages/loose.py"),  # no distribution owns it
    }


def test_the_standard_library_and_this_package_are_not_recorded(trace: Trace) -> None:
    code = "import wave, toolchain.report\nimport os; open(os.__file__).read(); open('/proc/self/status').read()"
    assert trace(code) == set()


def test_looking_for_modules_and_metadata_lists_no_folder(trace: Trace) -> None:
    code = (
        "import importlib.metadata\n"
        "try:\n    importlib.metadata.version('surely-not-installed')\n"
        "except importlib.metadata.PackageNotFoundError:\n    pass\n"
        "try:\n    import surely_not_installed\nexcept ImportError:\n    pass\n"
    )
    assert trace(code) == set()


def test_an_edit_that_keeps_size_and_time_is_not_hidden_by_a_compiled_file(trace: Trace, repo: Path) -> None:
    import py_compile

    source = repo / "helper.py"
    py_compile.compile(str(source))
    before = source.stat()
    source.write_text(source.read_text().replace("value * 2", "value * 3"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    trace("import helper; assert helper.scale(1) == 3, 'the old code ran'")
