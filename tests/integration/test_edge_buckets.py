"""The edge runtime's C chooses, fills up, copies and reads exactly as the Python runtime does."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from helpers.edge_samples import DTYPES, EDGE
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.errors import ToolchainError
from toolchain.runtime.buckets import choose, fill
from toolchain.runtime.contract import Contract, parse_contract

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# What ctypes would need the runtime's structs for is done here instead.
SHIM = r"""
#include <stdlib.h>
#include <string.h>
#include "internal.h"

/* Parses a contract and {"sizes": [{...}, ...]} like engine variants; returns its variant, or -1. */
static int parse(const char *json, tcr_manifest *manifest) {
  tcr_problem problem;
  return tcr_parse_manifest(manifest, json, strlen(json), "test", &problem) == TC_OK ? 0 : -1;
}
int shim_choose(const char *json, const int64_t *sizes, uint32_t *variant, uint32_t *split) {
  tcr_manifest manifest;
  tcr_problem problem;
  int status = parse(json, &manifest) == 0 ? tcr_choose(&manifest.contract, manifest.variants, manifest.num_variants,
                                                        sizes, variant, split, &problem) : -1;
  tcr_free_manifest(&manifest);
  return status;
}
int shim_fill(const char *json, const int64_t *from_shape, const void *from, const int64_t *to_shape, void *to) {
  tcr_manifest manifest;
  int status = parse(json, &manifest);
  if (status == 0) tcr_fill(&manifest.contract, &manifest.contract.inputs[0], from_shape, from, to_shape, to);
  tcr_free_manifest(&manifest);
  return status;
}
double shim_number(const char *json) {
  json_document document;
  size_t offset;
  if (json_parse(&document, json, strlen(json), &offset) != NULL) return 12345;
  double number = document.root->as.number;
  json_free(&document);
  return number;
}
int shim_json(const char *text, size_t bytes) {
  json_document document;
  size_t offset;
  if (json_parse(&document, text, bytes, &offset) != NULL) return 0;
  json_free(&document);
  return 1;
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    names = ("buckets", "contract", "error", "host", "json", "json_tree", "manifest")
    sources = [str(EDGE / "src" / f"{name}.c") for name in names]
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", f"-I{EDGE / 'include'}", f"-I{EDGE / 'src'}"]
    command = ["cc", *flags, "-o", str(folder / "shim.so"), str(folder / "shim.c"), *sources, "-lm", "-pthread"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    library.shim_number.restype = ctypes.c_double
    return library


def manifest(contract: dict[str, Any], variants: list[dict[str, int]]) -> bytes:
    document = {
        "schema": 1, "name": "n", "version": "1.0.0", "description": "", "target": {"name": "t", "profile": {}},
        "requirements": {"os": "linux", "arch": "x86_64", "cpu_features": [], "libc": None, "cuda_arch": None},
        "engine": {
            "backend": "tvm", "precision": "fp32", "device": "cpu",
            "variants": [{"file": f"{i}.so", "sizes": sizes} for i, sizes in enumerate(variants)],
        },
        "contract": contract, "selftest": None,
    }  # fmt: skip
    return json.dumps(document).encode()


NAMES = ("a", "b", "c")
# Nearer to the ends of double the last digits may round to infinity, or a subnormal number loses them.
FLOATS = st.just(0.0) | st.floats(1e-290, 1e300) | st.floats(-1e300, -1e-290)

Case = tuple[dict[str, Any], list[dict[str, int]], dict[str, int]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A contract, its engines' sizes, and the sizes of inputs."""
    used = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    shapes = draw(st.lists(st.lists(st.sampled_from([*used, 4]), max_size=3), min_size=1, max_size=3))
    outputs = draw(st.lists(st.lists(st.sampled_from([*used, 4]), max_size=3), min_size=1, max_size=2))
    pads = draw(st.lists(st.sampled_from([None, 0]), min_size=3, max_size=3))
    dims = {name: {"min": 0, "max": None, "batch": draw(st.booleans()), "buckets": []} for name in used}
    contract = {
        "schema": 1,
        "inputs": [
            {"name": f"i{k}", "dtype": "float32", "shape": shape, "pad": pads[k]} for k, shape in enumerate(shapes)
        ],
        "outputs": [{"name": f"o{k}", "dtype": "float32", "shape": shape} for k, shape in enumerate(outputs)],
        "dims": dims,
    }
    size = st.integers(1, 9)
    variants = draw(st.lists(st.dictionaries(st.sampled_from(used), size, max_size=3), min_size=1, max_size=5))
    present = [name for name in used if any(name in shape for shape in shapes)]
    return contract, variants, {name: draw(st.integers(0, 20)) for name in present}


@settings(max_examples=400, deadline=None)
@given(cases())
def test_the_same_engine_is_chosen(
    shim: Any, case: tuple[dict[str, Any], list[dict[str, int]], dict[str, int]]
) -> None:
    contract, variants, sizes = case
    names = list(contract["dims"])
    variant, split = ctypes.c_uint32(), ctypes.c_uint32()
    given_sizes = (ctypes.c_int64 * len(names))(*(sizes.get(name, -1) for name in names))
    status = shim.shim_choose(manifest(contract, variants), given_sizes, ctypes.byref(variant), ctypes.byref(split))
    try:
        want = choose(parse_contract(contract, "test"), variants, sizes)
    except ToolchainError:
        assert status == 4
        return
    assert (status, variant.value) == (0, want.variant)
    assert (names[split.value] if split.value < len(names) else "") == want.split or (
        # With two dimensions to split either may come first: the order of an object's keys is all that decides.
        sizes[names[split.value]] > variants[want.variant][names[split.value]]
    )


PADS = [
    (dtype, pad)
    for dtype in DTYPES
    for pad in (
        (0, 1, 7, 0.1, -2.5, 65519.9, 1e-7, 3e-5) if "float" in dtype else (0, 1) if dtype == "bool" else (0, 7)
    )
]


@pytest.mark.parametrize(("dtype", "pad"), PADS)
def test_inputs_are_filled_up_alike(shim: Any, dtype: str, pad: float) -> None:
    contract = {
        "schema": 1,
        "inputs": [{"name": "x", "dtype": dtype, "shape": [2, "rows", 3, "length"], "pad": pad}],
        "outputs": [{"name": "y", "dtype": dtype, "shape": ["rows"]}],
        "dims": {"rows": {"batch": True}, "length": {"batch": False}},
    }
    array = np.random.default_rng(0).integers(0, 2, (2, 3, 3, 5)).astype(dtype)
    fixed = {"rows": 6, "length": 7}
    parsed: Contract = parse_contract(contract, "test")
    want = fill(parsed, {"x": array}, {"rows": 3, "length": 5}, fixed)["x"]
    got = np.zeros((2, 6, 3, 7), dtype)
    shapes = [(ctypes.c_int64 * 4)(*a.shape) for a in (array, got)]
    where = [ctypes.c_void_p(a.ctypes.data) for a in (array, got)]
    assert shim.shim_fill(manifest(contract, [fixed]), shapes[0], where[0], shapes[1], where[1]) == 0
    np.testing.assert_array_equal(got, want)


@settings(max_examples=300, deadline=None)
@given(FLOATS | st.integers(-(2**63), 2**63 - 1))
def test_numbers_are_read_alike(shim: Any, number: float) -> None:
    got = shim.shim_number(json.dumps(number).encode())
    assert got == pytest.approx(float(number), rel=1e-14, abs=0)


@pytest.mark.parametrize("number", ["0.1", "-2.5e-3", "1e22", "123456789012345", "1E+2", "-0", "1e-400"])
def test_numbers_of_up_to_15_digits_are_exact(shim: Any, number: str) -> None:
    assert shim.shim_number(number.encode()) == float(number)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | FLOATS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.booleans(), st.integers(0, 1000), st.binary(max_size=3))
def test_json_is_taken_where_python_takes_it(shim: Any, value: object, escaped: bool, at: int, put: bytes) -> None:
    try:
        text = json.dumps(value, ensure_ascii=escaped).encode()
    except UnicodeEncodeError:
        return
    for data in (text, text[: at % (len(text) + 1)] + put + text[at % (len(text) + 1) :]):
        try:
            parsed = json.loads(data.decode("utf-8"))
            allowed = not _strange(parsed)
        except (ValueError, RecursionError):
            allowed = False
        assert shim.shim_json(data, ctypes.c_size_t(len(data))) == allowed, data


def _strange(value: object) -> bool:
    """What Python takes and the runtime refuses: NUL and lone surrogates in text, numbers beyond double."""
    if isinstance(value, str):
        return "\0" in value or any("\ud800" <= c < "\ue000" for c in value)
    if isinstance(value, list):
        return any(map(_strange, value))
    if isinstance(value, dict):
        return any(_strange(k) or _strange(v) for k, v in value.items())
    return isinstance(value, float) and (math.isnan(value) or abs(value) == float("inf"))
