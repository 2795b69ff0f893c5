"""runner: the edge runtime (``bundle-run``, a library and its headers) for a target, to go into its bundle."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.stage import StageContext, StageDef, StageResult


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the runner stage; the same for every model.

    Attributes:
        arch: e.g. ``"aarch64"``.
        libc: ``"glibc:2.28"`` (the oldest that it must run on) or ``"musl"``.
        compiler: ``"zig"``, ``"cc"`` or a C compiler driver on PATH.
        static: for static executables: objects that link_static takes.
    """

    arch: str
    libc: str
    compiler: str
    static: bool = False


def run(ctx: StageContext) -> StageResult:
    """No inputs; output ``runner``: the files of :func:`toolchain.runtime.edge.build.build_runner`.

    For static executables it is those of :func:`toolchain.runtime.edge.build.compile_static`.

    Raises:
        ToolchainError: COMPILE or MISSING_TOOL.
    """
    from toolchain.runtime.edge.build import build_runner, compile_static

    options: Options = ctx.options
    if options.static:
        compile_static(options.arch, ctx.output("runner"))
        return StageResult({})
    built = build_runner(options.arch, options.libc, options.compiler, ctx.output("runner"))
    return StageResult({"files": dict(built.sizes)})


def programs(options: Options) -> tuple[str, ...]:
    """The programs on PATH whose versions can change the result."""
    return () if options.compiler.startswith("zig") else (options.compiler, "ld")


STAGE = StageDef(
    name="runner",
    version=1,
    run="toolchain.stages.runner:run",
    options=Options,
    tools=("ziglang",),
    worker="graph",
    programs=programs,
)
