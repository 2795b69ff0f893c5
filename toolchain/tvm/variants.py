"""Compiles a model for one target: with dynamic sizes, or one library per combination of buckets, each one checked."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

    from toolchain.specs import Signature
    from toolchain.tvm.aot.library import AheadOfTime
    from toolchain.tvm.compare import Comparison, Reference
    from toolchain.tvm.forms import Form, Interface
    from toolchain.tvm.link import Linker
    from toolchain.tvm.machine import Machine
    from toolchain.tvm.pipeline import Notes


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the compile_tvm stage, taken from the target profile.

    Attributes:
        target: TVM's target, the profile's ``[tvm] target``.
        kind: ``"cpu"`` or ``"cuda"``.
        arch: architecture of the (host) code, ``"x86_64"`` or ``"aarch64"``.
        native: whether this machine can run code for the target; then the library itself is checked.
        vector_bits: width of a vector register in bits.
        registers: number of vector registers.
        linker: see :class:`toolchain.tvm.link.Linker`.
        libc_min: lowest glibc that the library must load on, or "".
        precision: name of the candidate, written to engine.json.
        l1d_kib: level-1 data cache of a core in KiB.
        proxy: LLVM processor name of the code that is run here in place of the target's, when that can't be; ""
            for the plainest of this architecture.
        records: tuned choices, as :func:`toolchain.tvm.records.to_json` gives them; the rules choose the rest.
        records_file: where they come from, relative to the repository's root, for the report.
        emulator: program that runs code for the target here, e.g. ``"qemu-aarch64-static"``; "" for none.
        emulator_cpu: the processor that it is told to be.
        form: of the engine, see :func:`toolchain.tvm.forms.build_library`.
    """

    target: Mapping[str, Any]
    kind: str
    arch: str
    native: bool
    vector_bits: int
    registers: int
    linker: str
    libc_min: str
    precision: str
    l1d_kib: int = 32
    proxy: str = ""
    records: Mapping[str, str] = field(default_factory=dict)
    records_file: str = ""
    form: str = "auto"
    emulator: str = ""
    emulator_cpu: str = ""


@dataclass(frozen=True, slots=True)
class _Variant:
    """One library: its sizes ({} for dynamic ones) and the model that it is made of."""

    sizes: Mapping[str, int]
    model: onnx.ModelProto


@dataclass(slots=True)
class Job:
    """What every step of one run needs."""

    options: Options
    signature: Signature
    reference: Reference
    linker: Linker
    machine: Machine
    folder: Path
    dump: Path | None
    interface: Interface
    form: Form | None = None


def machine_of(options: Options) -> Machine:
    """The target as the compile pipeline sees it.

    Raises:
        ToolchainError: BAD_RECIPE: a record can't be used.
    """
    from toolchain.tvm.choices import Choices
    from toolchain.tvm.machine import Machine
    from toolchain.tvm.records import from_json

    bits, registers = options.vector_bits, options.registers
    choices = Choices(from_json(options.records))
    return Machine(dict(options.target), options.kind, options.arch, bits, registers, options.l1d_kib, choices=choices)


def compile_sizes(job: Job, model: onnx.ModelProto) -> dict[str, Any]:
    """Compiles with the sizes as they are, or else one library per combination of buckets.

    Raises:
        Refusal: neither did.
    """
    from toolchain.tvm.library import Mismatch, Refusal
    from toolchain.tvm.sizes import bucket_variants, exact_dims, fix_sizes

    try:
        return _compile_variants(job, [_Variant({}, model)])
    except Refusal as refusal:
        # Wrong values come from an operator or a precision; fixed sizes would only take longer to find that out.
        # An executable holds one engine, which takes every size.
        if isinstance(refusal, Mismatch) or not job.signature.used_dims or job.options.form == "static":
            raise
        why = str(refusal)
    variants = [_Variant(sizes, fix_sizes(model, sizes)) for sizes in bucket_variants(job.signature, why)]
    facts = _compile_variants(job, variants)
    return {**facts, "fixed_because": why, "exact_size_dims": exact_dims(job.signature)}


def _compile_variants(job: Job, variants: list[_Variant]) -> dict[str, Any]:
    from toolchain.tvm.compare import rounded
    from toolchain.tvm.importer import operator_counts
    from toolchain.tvm.integer_products import float_products
    from toolchain.tvm.pipeline import Notes

    notes, checks, files = Notes(), [], []
    for variant in variants:
        checks.append(_compile_one(job, variant, notes, single=len(variants) == 1))
        files.append({"file": _file_name(variant, len(variants) == 1), "sizes": dict(variant.sizes)})
    skipped = next((c.skipped for c in checks if c.skipped), "")
    return {
        "variants": files,
        "unscheduled": sorted(set(notes.unscheduled)),
        "functions": notes.functions,
        "kernels": [
            {"name": name, "rule": k.rule, "tile": k.tile, "of_peak": k.of_peak}
            for name, k in sorted(notes.kernels.items())
        ],
        **_records_facts(job),
        **_form_facts(job),
        "linker": job.options.linker,
        "operators": dict(operator_counts(variants[-1].model)),
        "float_products": float_products(variants[-1].model),
        "checked": f"no: {skipped}" if skipped else _checked(job),
        "max_abs_error": None if skipped else rounded(max(c.max_abs_error for c in checks)),
    }


def _records_facts(job: Job) -> dict[str, Any]:
    """How many of the tuning records served, if there are any."""
    choices = job.machine.choices
    if not choices.records:
        return {}
    return {"records": {"file": job.options.records_file, "given": len(choices.records), "used": choices.used}}


def _form_facts(job: Job) -> dict[str, Any]:
    """The form of the engine, why it is not the one preferred, and what memory a plan needs."""
    form = job.form
    if form is None:
        raise AssertionError("an engine without a variant")
    facts: dict[str, Any] = {"form": form.name, "form_because": form.because or None}
    if form.name == "aot":
        facts |= {"arena_bytes": form.arena_bytes, "weight_bytes": form.weight_bytes}
    return {key: value for key, value in facts.items() if value is not None}


def how_checked(options: Options) -> str:
    if options.native and options.kind == "cpu":
        return "native"
    return "proxy on build host cpu" if options.kind == "cuda" else "proxy on build host"


def _checked(job: Job) -> str:
    """How the engine was compared with ONNX Runtime, for the report."""
    options = job.options
    if options.emulator and _form(job) == "aot" and how_checked(options) == "proxy on build host":
        return f"emulated by {options.emulator}" + (f" as {options.emulator_cpu}" if options.emulator_cpu else "")
    return how_checked(options)


def _file_name(variant: _Variant, single: bool) -> str:
    from toolchain.tvm.sizes import variant_name

    return "model.so" if single else f"model-{variant_name(variant.sizes)}.so"


def _compile_one(job: Job, variant: _Variant, notes: Notes, *, single: bool) -> Comparison:
    """Imports, compiles, links and checks one variant.

    Raises:
        Refusal: it can't be imported or compiled, or computes something else than ONNX Runtime.
    """
    from toolchain.tvm.forms import build_library
    from toolchain.tvm.importer import import_model
    from toolchain.tvm.library import Mismatch, Refusal
    from toolchain.tvm.sizes import variant_name

    module = import_model(variant.model)
    dump = job.dump / variant_name(variant.sizes) if job.dump is not None and variant.sizes else job.dump
    library = job.folder / _file_name(variant, single)
    # The variants of an engine are all of one form: the first one's.
    built = build_library(module, job.machine, notes, job.linker, library, job.interface, _form(job), dump)
    if job.form is None:
        job.form = built
    sizes = [dict(variant.sizes)] if variant.sizes else job.signature.check_sizes()
    if how_checked(job.options) == "native":
        result = _compare(job, library, sizes)
    else:
        result = _check_by_proxy(job, module, sizes, job.folder / "twin" / library.name)
        if not result.problem and built.engine is not None and job.options.emulator:
            result = _check_emulated(job, built.engine, sizes[:1])
    if result.problem:
        raise (Mismatch if result.ran else Refusal)(f"TVM computes something else than ONNX Runtime: {result.problem}")
    return result


def _check_by_proxy(job: Job, module: Any, sizes: list[dict[str, int]], library: Path) -> Comparison:
    """The same import and the same rules, compiled for this machine as ``library``, against ONNX Runtime."""
    import platform

    from toolchain.tvm.choices import Choices
    from toolchain.tvm.forms import build_library
    from toolchain.tvm.link import Linker
    from toolchain.tvm.machine import Machine
    from toolchain.tvm.pipeline import Notes

    arch = platform.machine()
    # The processor is an option, and so part of the key: the answer must not depend on which machine builds.
    target = {"kind": "llvm", "mtriple": f"{arch}-linux-gnu"}
    if job.options.proxy:
        target["mcpu"] = job.options.proxy
    bits = job.options.vector_bits if job.options.kind == "cpu" else 128
    records = Choices(job.machine.choices.records)
    machine = Machine(target, "cpu", arch, bits, job.options.registers, job.options.l1d_kib, choices=records)
    linker = Linker("cc" if shutil.which("cc") else "zig", arch, "")
    build_library(module, machine, Notes(), linker, library, job.interface, _form(job))
    return _compare(job, library, sizes)


def _check_emulated(job: Job, engine: AheadOfTime, sizes: list[dict[str, int]]) -> Comparison:
    """The engine itself, on an emulated processor, against ONNX Runtime on this one."""
    from toolchain.tvm.compare import compare_all, tolerance_of
    from toolchain.tvm.emulated import EmulatedLibrary

    options = job.options
    cpu = ("-cpu", options.emulator_cpu) if options.emulator_cpu else ()
    library = EmulatedLibrary(engine, job.linker, (options.emulator, *cpu))
    return compare_all(library, job.reference, job.signature, sizes, tolerance_of(options.precision))


def _form(job: Job) -> str:
    return job.form.name if job.form is not None else job.options.form


def _compare(job: Job, library: Path, sizes: list[dict[str, int]]) -> Comparison:
    from toolchain.tvm.compare import compare_all, open_library, tolerance_of

    tolerance = tolerance_of(job.options.precision)
    return compare_all(open_library(library, _form(job)), job.reference, job.signature, sizes, tolerance)
