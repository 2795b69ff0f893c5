import json
from dataclasses import replace
from pathlib import Path

import pytest

from toolchain.config_errors import dotted
from toolchain.errors import ExitCode, ToolchainError
from toolchain.host import CPUINFO_VARIABLE, CudaDevice, Host, detect_host, incompatibilities
from toolchain.llvm_cpus import CPUINFO_NAMES, compiled_features, cpuinfo_names, table
from toolchain.target import list_targets, load_target, shipped_folder
from toolchain.target_detect import llvm_cpu

SHIPPED = (
    "armv7-neon",
    "cortex-a53",
    "cortex-a72",
    "cortex-a76",
    "cuda-sm80",
    "cuda-sm90",
    "host",
    "neoverse-n1",
    "neoverse-v1",
    "riscv64",
    "wasm32-wasi",
    "x86-64-v3",
    "x86-64-v4",
)

PI_5 = """\
processor\t: 0
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""
UNKNOWN_ARM = PI_5.replace("0xd0b", "0xfff")
V3_FLAGS = (
    "lm cmov cx8 cx16 fxsr mmx sse sse2 pni ssse3 sse4_1 sse4_2 popcnt lahf_lm avx avx2 f16c fma bmi1 bmi2 abm movbe"
)
V4_FLAGS = f"{V3_FLAGS} avx512f avx512bw avx512cd avx512dq avx512vl"


def x86(vendor: str, family: int, model: int, flags: str) -> str:
    return f"processor : 0\nvendor_id : {vendor}\ncpu family : {family}\nmodel : {model}\nflags : {flags}\n"


def host_like(cpuinfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setenv(CPUINFO_VARIABLE, str(tmp_path / "cpuinfo"))
    return detect_host()


def own(tmp_path: Path, text: str, name: str = "own.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def refused(path: Path | str, base: Path | None = None) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        load_target(path, base)
    assert caught.value.code == ExitCode.BAD_TARGET
    return caught.value


def test_the_shipped_profiles_are_those_of_the_manual() -> None:
    assert list_targets() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_under_its_own_name(name: str) -> None:
    profile = load_target(name)
    assert profile.name == name
    assert profile.description
    assert profile.path == shipped_folder() / f"{name}.toml"
    json.dumps(profile.to_json(), allow_nan=False)
    assert str(shipped_folder()) not in json.dumps(profile.to_json())


@pytest.mark.parametrize("name", SHIPPED)
def test_requirements_cover_every_instruction_that_the_compiled_code_may_hold(name: str) -> None:
    profile = load_target(name)
    needed = profile.requirements()
    llvm = profile.llvm()
    assert compiled_features(profile.arch, llvm.mcpu, llvm.mattr) <= set(needed["cpu_features"])
    assert set(profile.cpu.features) <= set(needed["cpu_features"])


def test_numerics_suit_the_instructions() -> None:
    v3, v4 = load_target("x86-64-v3").numerics, load_target("x86-64-v4").numerics
    assert (v3.activation, v3.weight, v3.reduce_range) == ("u8", "s8", True)
    assert (v4.activation, v4.weight, v4.reduce_range) == ("u8", "s8", False)
    for name in ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "cuda-sm80", "cuda-sm90"):
        scheme = load_target(name).numerics
        assert (scheme.activation, scheme.weight, scheme.symmetric_activation) == ("s8", "s8", True)
        assert scheme.per_channel
    assert load_target("cuda-sm90").numerics.precisions[0] == "fp16"


def test_a_gpu_profile_compiles_for_its_gpu_and_its_host_processor() -> None:
    profile = load_target("cuda-sm90")
    target = profile.tvm_target()
    assert (target["kind"], target["arch"], target["host"]["mcpu"]) == ("cuda", "sm_90", "x86-64-v3")
    assert profile.requirements()["cuda_arch"] == "sm_90"
    assert profile.runtime.execution_provider == "CUDAExecutionProvider"


def test_a_fixed_number_of_cores_reaches_tvm(tmp_path: Path) -> None:
    path = own(tmp_path, 'schema = 1\nname = "own"\nextends = "cortex-a72"\n[cpu]\ncores = 4\n')
    assert load_target(path).tvm_target()["num-cores"] == 4
    assert "num-cores" not in load_target("cortex-a72").tvm_target()


def test_an_own_profile_changes_only_what_it_states(tmp_path: Path) -> None:
    text = 'schema = 1\nname = "own"\nextends = "cortex-a76"\n[cpu]\nfeatures = ["fp"]\n[limits]\nmemory_mb = 64\n'
    profile, parent = load_target(own(tmp_path, text)), load_target("cortex-a76")
    assert profile.cpu.features == ("fp",)
    assert profile.cpu.l1d_kib == parent.cpu.l1d_kib
    assert profile.tvm == parent.tvm
    assert profile.limits.memory_mb == 64
    assert profile.description == ""


def test_a_path_starts_from_the_base_and_extends_from_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    own(tmp_path, 'schema = 1\nname = "b"\nextends = "cortex-a53"\n', "deep/b.toml")
    own(tmp_path, 'schema = 1\nname = "a"\nextends = "deep/b.toml"\n', "a.toml")
    assert load_target("a.toml", tmp_path).cpu.model == "cortex-a53"


def test_an_unknown_name_gets_the_list_and_a_suggestion() -> None:
    error = refused("cortex-a75")
    assert "unknown target 'cortex-a75'; shipped profiles: armv7-neon, cortex-a53, " in error.what
    assert "did you mean 'cortex-a7" in error.what
    assert ".toml" in error.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert (
        refused("none.toml", tmp_path).render().startswith(f"{tmp_path / 'none.toml'}: there is no such target profile")
    )


def test_a_circle_of_extends_is_shown(tmp_path: Path) -> None:
    own(tmp_path, 'schema = 1\nname = "a"\nextends = "b.toml"\n', "a.toml")
    own(tmp_path, 'schema = 1\nname = "b"\nextends = "a.toml"\n', "b.toml")
    error = refused("a.toml", tmp_path)
    assert error.what == "extends goes round in a circle: a.toml -> b.toml -> a.toml"
    assert error.where == f"{tmp_path / 'b.toml'}: extends"


@pytest.mark.parametrize(
    ("extends", "what"),
    [
        ('"b.toml"', "which does not exist"),
        ('"cortex-a5"', "unknown target 'cortex-a5'"),
        ("3", "got 3; allowed: the name of a shipped profile, or a path"),
    ],
)
def test_a_wrong_parent_is_reported_with_file_and_key(extends: str, what: str, tmp_path: Path) -> None:
    error = refused(own(tmp_path, f'schema = 1\nname = "a"\nextends = {extends}\n'))
    assert what in error.what
    assert error.where == f"{tmp_path / 'own.toml'}: extends"


def test_five_mistakes_are_told_at_once_in_our_own_words(tmp_path: Path) -> None:
    text = """
schema = 1
name = "own"
extends = "x86-64-v4"
kid = "cpu"
[cpu]
model = "x86-64-v4"
features = ["avx512vnni"]
vector_bits = 500
[tvm.target]
mattr = ["+avx512vni"]
[numerics]
precisions = ["int8", "fp32"]
"""
    lines = refused(own(tmp_path, text)).details
    start = "own.toml: "
    expected = [
        "kid: got an unknown key; allowed: the keys schema, name, description, os, arch, kind, cpu, cuda, tvm, ",
        "cpu.vector_bits: got 500; allowed: 128, 256 or 512",
        "numerics.precisions[0]: got 'int8'; allowed: 'fp32', 'fp16', 'int8-static', 'int8-mixed', 'int8-dynamic'",
        (
            "cpu.features[0]: got 'avx512vnni'; allowed: a feature name of /proc/cpuinfo on x86_64; "
            "did you mean 'avx512_vnni'?"
        ),
        (
            "tvm.target.mattr[0]: got '+avx512vni'; allowed: a feature that LLVM knows for x86_64; "
            "did you mean '+avx512vnni'?"
        ),
    ]
    for part in expected:
        assert [line for line in lines if line.startswith(start + part)], (part, lines)
    assert len(lines) == len(expected)


def test_a_mistake_of_a_parent_is_reported_in_the_parent(tmp_path: Path) -> None:
    own(tmp_path, 'schema = 1\nname = "p"\nextends = "cortex-a53"\n[cpu]\nl1d_kib = 0\n', "parent.toml")
    error = refused(own(tmp_path, 'schema = 1\nname = "c"\nextends = "parent.toml"\n[cpu]\ncores = -1\n', "child.toml"))
    assert error.details == (
        "parent.toml: cpu.l1d_kib: got 0; allowed: a number of at least 1",
        "child.toml: cpu.cores: got -1; allowed: a number of at least 0",
    )


BROKEN = {
    "another processor for TVM": (
        '[tvm.target]\nmcpu = "cortex-a53"',
        "tvm.target.mcpu: got 'cortex-a53'; allowed: the",
    ),
    "misspelt processor": (
        '[cpu]\nmodel = "cortex-a27"',
        "cpu.model: got 'cortex-a27'; allowed: a processor that LLVM",
    ),
    "triple of another architecture": (
        '[tvm.target]\nmtriple = "x86_64-linux-gnu"',
        "tvm.target.mtriple: got 'x86_64-l",
    ),
    "unsigned attribute": (
        '[tvm.target]\nmattr = ["neon"]',
        "tvm.target.mattr[0]: got 'neon'; allowed: an LLVM feature",
    ),
    "unknown kind of TVM target": ('[tvm.target]\nkind = "lvm"', "tvm.target.kind: got 'lvm'; allowed: 'llvm', 'cuda'"),
    "cuda target for a processor": (
        '[tvm.target]\nkind = "cuda"\narch = "sm_80"',
        "tvm.target.kind: got 'cuda'; allowed: 'llvm', as the profile's kind is 'cpu'",
    ),
    "gpu table for a processor": ('[cuda]\narch = "sm_80"', "cuda: got a table; allowed: no such table"),
    "gpu provider for a processor": (
        '[runtime]\nexecution_provider = "CUDAExecutionProvider"',
        "runtime.execution_provid",
    ),
    "gpu without its tables": ('kind = "cuda"', "cuda: got nothing; allowed: a table with arch"),
    "gpu without host": ('kind = "cuda"', "tvm.host: got nothing; allowed: the TVM target of the host processor"),
    "odd gpu architecture": ('kind = "cuda"\n[cuda]\narch = "80"', "cuda.arch: got '80'; allowed: CUDA architecture"),
    "C library version": ('[runtime.abi]\nmin = "new"', "runtime.abi.min: got 'new'; allowed: oldest version, e.g."),
    "reduced range for s8": (
        "[numerics]\nreduce_range = true",
        "numerics.reduce_range: got true; allowed: false with s8",
    ),
    "unknown way to execute": ('[execute]\nhow = "nativ"', "did you mean 'native'?"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_profile_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    text, expected = BROKEN[case]
    error = refused(own(tmp_path, f'schema = 1\nname = "own"\nextends = "cortex-a72"\n{text}\n'))
    assert [line for line in error.details if expected in line], error.details


def test_a_profile_from_a_newer_schema_says_so(tmp_path: Path) -> None:
    assert "made for schema 9" in refused(own(tmp_path, "schema = 9\n")).what


def test_a_detected_profile_cannot_extend(tmp_path: Path) -> None:
    error = refused(own(tmp_path, 'schema = 1\nname = "a"\ndetect = true\nextends = "host"\n'))
    assert "allowed: detect = true, or extends" in error.what


def test_the_host_profile_always_runs_on_the_host() -> None:
    profile = load_target("host")
    assert incompatibilities(profile.requirements(), detect_host()) == []
    assert profile.runs_natively_on(detect_host())


def test_an_own_profile_may_extend_the_host(tmp_path: Path) -> None:
    profile = load_target(own(tmp_path, 'schema = 1\nname = "mine"\nextends = "host"\n[limits]\nmemory_mb = 100\n'))
    assert profile.cpu == load_target("host").cpu


MACHINES = {
    "Raspberry Pi 5": (PI_5, "cortex-a76", (), 128, False),
    "unknown ARM": (UNKNOWN_ARM, "generic", ("+dotprod", "+fullfp16", "+lse", "+rcpc", "+rdm"), 128, False),
    "Haswell": (x86("GenuineIntel", 6, 60, V3_FLAGS), "haswell", (), 256, True),
    "Cascade Lake": (x86("GenuineIntel", 6, 85, f"{V4_FLAGS} avx512_vnni"), "cascadelake", (), 512, False),
    "Skylake server": (x86("GenuineIntel", 6, 85, V4_FLAGS), "skylake-avx512", (), 512, True),
    "Zen 2": (x86("AuthenticAMD", 23, 49, f"{V3_FLAGS} sse4a"), "znver2", (), 256, True),
    "Zen 4 with AVX-512 hidden": (x86("AuthenticAMD", 25, 17, V3_FLAGS), "x86-64-v3", (), 256, True),
    "unknown with VNNI": (
        x86("Other", 1, 1, f"{V4_FLAGS} avx512_vnni"),
        "x86-64-v4",
        ("+avx512vnni",),
        512,
        False,
    ),
    "AVX2 with AVX-VNNI": (x86("Other", 1, 1, f"{V3_FLAGS} avx_vnni"), "x86-64-v3", ("+avxvnni",), 256, False),
    "oldest x86-64": (x86("Other", 1, 1, "lm cmov cx8 fxsr mmx sse sse2"), "x86-64", (), 128, True),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_host_profile_fits_other_machines(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo, cpu, attributes, bits, reduce_range = MACHINES[machine]
    host = host_like(cpuinfo, tmp_path, monkeypatch)
    profile = load_target("host")
    assert (profile.llvm().mcpu, profile.llvm().mattr) == (cpu, attributes)
    assert (profile.cpu.vector_bits, profile.numerics.reduce_range) == (bits, reduce_range)
    assert profile.arch == host.arch
    assert profile.runs_natively_on(host)


def test_a_machine_without_vnni_is_refused_for_a_vnni_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_like(x86("GenuineIntel", 6, 85, V4_FLAGS), tmp_path, monkeypatch)
    profile = load_target("x86-64-v4")
    assert not profile.runs_natively_on(host)
    assert incompatibilities(profile.requirements(), host) == [
        "needs CPU feature avx512_vnni, which this machine (x86_64) lacks"
    ]


def test_a_pi_4_without_crypto_runs_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pi_4 = "processor : 0\nFeatures : fp asimd evtstrm crc32 cpuid\nCPU implementer : 0x41\nCPU part : 0xd08\n"
    host = host_like(pi_4, tmp_path, monkeypatch)
    assert llvm_cpu(host) == "cortex-a72"
    assert load_target("cortex-a72").runs_natively_on(host)
    assert not load_target("cortex-a76").runs_natively_on(host)


def test_a_profile_that_is_never_run_here_does_not_run_natively(tmp_path: Path) -> None:
    path = own(tmp_path, 'schema = 1\nname = "a"\nextends = "host"\n[execute]\nhow = "none"\n')
    assert not load_target(path).runs_natively_on(detect_host())


def test_a_gpu_profile_runs_only_where_such_a_gpu_is() -> None:
    profile = load_target("cuda-sm80")
    features = frozenset(profile.requirements()["cpu_features"])
    bare = Host("linux", "x86_64", "a server", features, cores=2, memory_mb=1, glibc="2.36")
    assert not profile.runs_natively_on(bare)
    assert profile.runs_natively_on(replace(bare, cuda=(CudaDevice("A100", "sm_80"),)))


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_every_feature_that_llvm_emits_has_a_name_in_cpuinfo(arch: str) -> None:
    known = table(arch)
    assert set(CPUINFO_NAMES[arch]) <= known.features
    assert set(known.implies) == set(CPUINFO_NAMES[arch])
    for cpu in known.cpus:
        assert compiled_features(arch, cpu) <= cpuinfo_names(arch)


def test_switching_a_feature_off_takes_what_needs_it_along() -> None:
    assert "avx512f" in compiled_features("x86_64", "x86-64-v4")
    without = compiled_features("x86_64", "x86-64-v4", ["-avx512f"])
    assert not [name for name in without if name.startswith("avx512")]
    assert "avx2" in without


def test_keys_with_dots_are_quoted() -> None:
    assert dotted(("gates", "targets", "own/a.toml", "size_mb")) == 'gates.targets."own/a.toml".size_mb'


@pytest.mark.parametrize(
    ("cpuinfo", "arch", "features"),
    [
        ("processor : 0\nFeatures : half thumb neon vfpv3 vfpv4 idiva\n", "armv7l", {"neon", "vfpv4"}),
        ("processor : 0\nisa : rv64imafdc_zicsr_zba\n", "riscv64", {"i", "m", "a", "f", "d", "c", "zba"}),
    ],
)
def test_small_machines_are_known_by_their_cpuinfo(
    cpuinfo: str, arch: str, features: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_like(cpuinfo, tmp_path, monkeypatch)
    assert host.arch == arch
    assert features <= host.cpu_features
    lacking = incompatibilities({**load_target("armv7-neon").requirements(), "libc": None}, host)
    if arch == "armv7l":
        assert "needs CPU features edsp, idivt, vfp, vfpd32, which" in lacking[0]
    else:
        assert lacking == ["needs a processor of architecture armv7l, this machine is riscv64"]


def test_targets_without_wheels_take_engines_ahead_of_time_alone(tmp_path: Path) -> None:
    text = 'schema = 1\nname = "own"\nextends = "riscv64"\n[runtime]\nengines = ["onnxruntime", "tvm"]\nform = "vm"\n'
    details = "\n".join(refused(own(tmp_path, text)).details)
    assert "ONNX Runtime has no build for riscv64" in details
    assert "TVM's run-time has no build for riscv64" in details
    text = 'schema = 1\nname = "own"\nextends = "armv7-neon"\n[tvm.target]\nmabi = "lp64d"\n'
    assert "it is for riscv64" in "\n".join(refused(own(tmp_path, text)).details)


def test_webassembly_is_a_module_on_a_system_of_its_own(tmp_path: Path) -> None:
    profile = load_target("wasm32-wasi")
    needs = profile.requirements()
    assert (needs["os"], needs["arch"], needs["libc"]) == ("wasi", "wasm32", None)
    assert profile.tvm_target()["vector-width"] == 128
    assert profile.without_wheels == ("onnxruntime",)
    text = (
        'schema = 1\nname = "own"\nextends = "wasm32-wasi"\nos = "linux"\n[tvm]\nlinker = "cc"\n[runtime]\n'
        'form = "aot"\nabi = { libc = "glibc", min = "2.28" }\n'
    )
    details = "\n".join(refused(own(tmp_path, text)).details)
    for key in ("os: ", "tvm.linker: ", "runtime.form: ", "runtime.abi.libc: "):
        assert key in details
    text = 'schema = 1\nname = "own"\nextends = "cortex-a53"\nos = "wasi"\n'
    assert "'linux', as the profile's arch is 'aarch64'" in "\n".join(refused(own(tmp_path, text)).details)


def test_an_arm_target_of_32_bits_says_how_floats_are_passed() -> None:
    assert load_target("armv7-neon").tvm_target()["mfloat-abi"] == "hard"
    assert load_target("riscv64").tvm_target()["mabi"] == "lp64d"
    assert "mabi" not in load_target("cortex-a53").tvm_target()


def test_executables_hold_engines_of_tvm_and_need_no_c_library(tmp_path: Path) -> None:
    text = 'schema = 1\nname = "own"\nextends = "cortex-a53"\n[runtime]\nform = "static"\n'
    assert "runtime.engines" in "\n".join(refused(own(tmp_path, text)).details)
    profile = load_target(own(tmp_path, text + 'engines = ["tvm"]\n'))
    assert profile.requirements()["libc"] is None
    assert load_target("cortex-a53").requirements()["libc"] == {"name": "glibc", "min": "2.28"}
    text = 'schema = 1\nname = "own"\nextends = "cuda-sm80"\n[runtime]\nform = "static"\nengines = ["tvm"]\n'
    assert "'auto' or 'vm'" in "\n".join(refused(own(tmp_path, text)).details)


def test_a_module_is_not_measured_on_a_device() -> None:
    from toolchain.plan_device import find_devices
    from toolchain.remote.address import parse_devices

    with pytest.raises(ToolchainError, match="WebAssembly modules run inside of other programs") as caught:
        find_devices([load_target("wasm32-wasi")], parse_devices(["wasm32-wasi=board"]))
    assert caught.value.code == ExitCode.USAGE
