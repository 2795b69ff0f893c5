"""Opening bundles with the edge runtime: which one is chosen, and what is refused with which words."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edge_support import (
    flip,
    image,
    library_of,
    packed,
    patched,
    program,
    refusal,
)
from helpers import bundle_samples, edge_samples
from helpers.bundle_samples import (
    bundle_spec,
    requirements,
    sample_release,
)
from helpers.edge_samples import EdgeError, Runtime, compile_model

from toolchain.bundle.resolve import resolve
from toolchain.bundle.sign import sign_release
from toolchain.runtime.edge.build import RunnerFiles

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def test_the_interface_is_versioned_and_checked_when_a_bundle_is_opened(runtime: Runtime, release: Path) -> None:
    assert runtime.lib.tc_runtime_abi() == 1
    error = refusal(runtime, release, abi=2)
    assert error.status == edge_samples.USAGE
    assert "made for interface 2 of the runtime, this is 1" in error.text
    assert refusal(runtime, release, size=8).status == edge_samples.USAGE
    # A caller of the first version does not know the members that came later.
    first = edge_samples.Options.selftest.offset
    runtime.open(release, size=first, selftest=1, selftest_bytes=1).close()


def test_of_several_bundles_the_one_is_opened_that_python_opens(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    features = ("sse2", "avx") if platform.machine() == "x86_64" else ("fp", "asimd")
    cases: list[dict[str, Mapping[str, Any]]] = [
        {"a": requirements(), "b": requirements(features[:1]), "c": requirements(features)},
        {"a": requirements(features), "b": requirements(features[1:])},
        {"a": requirements(("no-such-feature",)), "b": requirements()},
        {"z": requirements(), "y": requirements()},
        {"a": requirements(cuda="sm_80"), "b": requirements(arch="riscv64"), "c": requirements()},
    ]
    from toolchain.host import detect_host
    from toolchain.target_detect import own_name

    if own := own_name(detect_host()):
        cases.append({"a": requirements(features), own: requirements()})
    for number, targets in enumerate(cases):
        release = sample_release(tmp_path / str(number), engines["any"], targets)
        bundle = runtime.open(release)
        assert bundle.property("target") == resolve(str(release), note=lambda text: None).target
        bundle.close()
    named = runtime.open(f"{tmp_path / '0'}@b")
    assert named.property("target") == "b"
    named.close()
    assert "it has a, b, c" in refusal(runtime, tmp_path / "0", target="d").text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": "riscv64"}, "needs a processor of architecture riscv64, this machine is "),
        ({"cpu_features": ["sse2", "no_such", "nor_that"]}, "needs CPU features no_such, nor_that, which this machine"),
        ({"libc": {"name": "glibc", "min": "9.1"}}, "needs glibc 9.1 or newer, this machine has 2."),
        ({"os": "plan9"}, "needs operating system plan9, this machine runs linux"),
        ({"cuda_arch": "sm_80"}, "needs a CUDA device of architecture sm_80"),
    ],
)  # fmt: skip
def test_a_machine_that_does_not_suit_is_refused_before_anything_is_loaded(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    if "sse2" in change.get("cpu_features", ()) and platform.machine() != "x86_64":
        change = {"cpu_features": ["no_such", "nor_that"]}
    broken = tmp_path / "engine"
    shutil.copytree(engines["any"], broken)
    (broken / "b0.so").write_bytes(b"nothing that could be loaded")
    error = refusal(runtime, sample_release(tmp_path / "r", broken, {"t": requirements() | change}))
    assert error.status == edge_samples.INCOMPATIBLE_HOST
    assert reason in error.text
    assert "hint: " in error.text
    several = {"t": requirements() | change, "u": requirements(arch="m68k")}
    error = refusal(runtime, sample_release(tmp_path / "s", broken, several))
    assert error.status == edge_samples.INCOMPATIBLE_HOST
    assert "this machine can run none of its bundles" in error.text
    assert reason in error.text
    assert "m68k" in error.text


@pytest.mark.parametrize("change", [flip, lambda data: data[:-1], lambda data: b"", lambda data: data + b"x", None])
def test_a_file_that_was_changed_cut_off_or_removed_is_named(
    runtime: Runtime, release: Path, tmp_path: Path, change: Callable[[bytes], bytes] | None
) -> None:
    files = [p.relative_to(release) for p in release.rglob("*") if p.is_file()]
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(release, copy)
        if change is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(change((copy / file).read_bytes()))
        error = refusal(runtime, copy, flags=edge_samples.VERIFY_ALL)
        assert error.status == edge_samples.DAMAGED_BUNDLE, (file, error)
        assert copy.as_posix() in error.text
        shutil.rmtree(copy)


def test_without_verifying_all_only_what_is_used_is_hashed(runtime: Runtime, release: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    selftest = resolve(str(copy)).files["selftest.npz"]
    (copy / "blobs" / "sha256" / selftest.digest[7:]).write_bytes(b"x" * selftest.size)
    bundle = runtime.open(copy)
    with pytest.raises(EdgeError, match="content has digest sha256:") as caught:
        bundle.check(bundle.lib.tc_self_test(bundle.handle, None, 0))
    assert caught.value.status == edge_samples.DAMAGED_BUNDLE
    bundle.close()


def test_a_signed_release_opens_and_what_index_json_adds_is_checked(
    runtime: Runtime, release: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ED25519", "-out", key], check=True)
    sign_release(copy, key)
    runtime.open(copy).close()
    index = copy / "index.json"
    good = index.read_text()
    for old, new in (("cosign/imageIndex", "cosign/imageindex"), ('.sig"', '.sip"'), ('"kind":', '"kine":')):
        assert old in good
        index.write_text(good.replace(old, new))
        assert refusal(runtime, copy).status == edge_samples.DAMAGED_BUNDLE


def test_what_is_no_bundle_is_told_from_a_damaged_one(runtime: Runtime, tmp_path: Path) -> None:
    assert "does not exist" in refusal(runtime, tmp_path / "nothing").text
    assert "no OCI image layout" in refusal(runtime, tmp_path).text
    assert refusal(runtime, "").status == refusal(runtime, "x" * 5000).status == edge_samples.USAGE
    (tmp_path / "index.json").symlink_to("/dev/zero")
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    assert "is not a regular file" in refusal(runtime, tmp_path).text


@pytest.mark.parametrize("file", ["bundle.json", "engine.json"])
def test_a_newer_schema_is_refused_with_its_number(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path, file: str
) -> None:
    spec = bundle_spec(engines["any"])
    if file == "bundle.json":
        spec = replace(spec, manifest=replace(spec.manifest, schema=7))
    else:
        newer = tmp_path / "engine.json"
        newer.write_text(json.dumps(json.loads((engines["any"] / file).read_text()) | {"schema": 7}))
        spec = replace(spec, files={**spec.files, file: newer})
    error = refusal(runtime, packed(tmp_path / "r", spec))
    assert error.status == edge_samples.INCOMPATIBLE_HOST
    assert "is made for schema 7" in error.text


def test_a_bundle_for_another_machine_can_be_described_but_not_run(
    built: RunnerFiles, runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    release = sample_release(tmp_path / "r", engines["any"], {"far": requirements(arch="riscv64")})
    info = json.loads(program(built, "info", release).stdout)
    assert (info["target"], info["form"]) == ("far", "aot")
    onnx = sample_release(tmp_path / "onnx", bundle_samples.matrix_engine(tmp_path / "e"))
    assert json.loads(program(built, "info", onnx).stdout)["backend"] == "onnxruntime"
    bundle = runtime.open(release, flags=edge_samples.DESCRIBE)
    with pytest.raises(EdgeError, match="was opened to be described only"):
        bundle.run({None: image(2)})
    bundle.close()


def test_engines_of_another_kind_are_refused_with_what_to_do(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    onnx = bundle_samples.matrix_engine(tmp_path / "onnx")
    error = refusal(runtime, sample_release(tmp_path / "r1", onnx))
    assert error.status == edge_samples.NO_ENGINE
    assert "backend onnxruntime" in error.text
    assert "in Python" in error.text
    shutil.copytree(engines["any"], tmp_path / "vm")
    path = tmp_path / "vm" / "engine.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "form"}))
    error = refusal(runtime, sample_release(tmp_path / "r2", tmp_path / "vm"))
    assert error.status == edge_samples.NO_ENGINE
    assert "does not carry TVM's run-time, which its engine needs" in error.text


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        (patched(18, b"\xf3\0"), edge_samples.INCOMPATIBLE_HOST, "is compiled for riscv64 (64 bits), this machine is"),
        (patched(4, b"\1"), edge_samples.INCOMPATIBLE_HOST, "(32 bits)"),
        (patched(0, b"\0"), edge_samples.DAMAGED_BUNDLE, "is not a shared library"),
        (lambda p: p.write_bytes(p.read_bytes()[:3000]), edge_samples.DAMAGED_BUNDLE, "is truncated"),
        (lambda p: p.write_bytes(b""), edge_samples.DAMAGED_BUNDLE, "is not a shared library"),
        (lambda p: compile_model(p, ABI=9), edge_samples.NO_ENGINE, "of interface 9, this runtime takes up to 2"),
        (lambda p: compile_model(p, 5), edge_samples.DAMAGED_BUNDLE, "its input image is not as its contract says"),
        (lambda p: compile_model(p, SEQUENCE=0), edge_samples.DAMAGED_BUNDLE, "takes 2 inputs and gives 2 outputs"),
        (lambda p: compile_model(p, toolchain_model="other"), edge_samples.NO_ENGINE, "it has no toolchain_model"),
    ],
)  # fmt: skip
def test_a_library_that_cannot_be_this_bundles_engine_is_refused(
    runtime: Runtime,
    engines: Mapping[str, Path],
    tmp_path: Path,
    change: Callable[[Path], object],
    status: int,
    text: str,
) -> None:
    error = refusal(runtime, library_of(engines["any"], tmp_path, change))
    assert error.status == status
    assert text in error.text
