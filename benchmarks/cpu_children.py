"""Child processes of the benchmark: nothing heavy is loaded twice in one, and a crash costs one figure."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpu_models import ROOT, Model

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 1200


class Failed(Exception):  # noqa: N818 - a result that the table shows
    """Why there is no figure, in one line."""


class Workshop:
    """Makes the models and our libraries once, in a folder, and runs the measuring children.

    Args:
        work: the folder; None: in the user's cache.
        profile: the target profile that we compile for.
        dynamic: whether models keep their dynamic axes.
    """

    def __init__(self, work: Path | None, profile: str, dynamic: bool) -> None:
        from platformdirs import user_cache_path

        self.work = (work or user_cache_path("toolchain") / "bench-cpu").absolute()
        self.profile, self.dynamic = profile, dynamic
        self._prepared: dict[tuple[str, str], dict[str, str]] = {}
        (self.work / "libraries").mkdir(parents=True, exist_ok=True)

    def prepare(self, model: Model, precision: str) -> dict[str, str]:
        """Paths ``folder`` and ``inputs``.

        Raises:
            Failed: the toolchain offers no such precision of this model.
        """
        key = (model.name, precision)
        if key not in self._prepared:
            dynamic = "dynamic" if self.dynamic else "static"
            answer = child("cpu_prepare.py", model.name, precision, self.profile, str(self.work), dynamic)
            self._prepared[key] = {name: str(value) for name, value in answer.items()}
        if "refused" in self._prepared[key]:
            raise Failed(self._prepared[key]["refused"])
        return self._prepared[key]

    def library(self, model: Model, precision: str, form: str = "auto") -> tuple[Path, dict[str, Any]]:
        """Our library and what building it cost; built unless this compiler has already built this file.

        ``form`` "vm" is for kernels by time: the virtual machine can be watched.

        Raises:
            Failed: we refuse the model.
        """
        folder = Path(self.prepare(model, precision)["folder"])
        digest = hashlib.sha256((folder / "model.onnx").read_bytes() + f"{self.profile} {form}".encode())
        runtime = (ROOT / "toolchain" / "runtime" / "edge").rglob("*.[ch]")
        sources = [*(ROOT / "toolchain" / "tvm").rglob("*.py"), *runtime, *(ROOT / "targets").glob("*.toml")]
        for file in sorted(sources):
            digest.update(file.read_bytes())
        path = self.work / "libraries" / f"{model.name}-{digest.hexdigest()[:12]}.so"
        notes = path.with_suffix(".json")
        if not notes.is_file():
            answer = child("cpu_ours.py", str(folder), self.profile, str(path), form)
            notes.write_text(json.dumps(answer))
        answer = json.loads(notes.read_text())
        if "refused" in answer:
            raise Failed(answer["refused"])
        return path, answer

    def time(
        self, model: Model, precision: str, threads: int, contenders: list[str], rounds: int, seconds: float
    ) -> dict[str, Any]:
        """One line of a speed table."""
        line: dict[str, Any] = {"model": model.name, "precision": precision, "threads": threads, "missing": {}}
        try:
            request = self._request(model, precision, threads, contenders)
        except Failed as failure:
            return {**line, "refused": str(failure)}
        wanted = {"rounds": rounds, "seconds": seconds}
        try:
            line |= child("cpu_time.py", threads=threads, request={**request, **wanted}, work=self.work)
        except Failed as failure:
            return {**line, "refused": str(failure)}
        from cpu_flops import count_flops

        # Those of the fp32 graph also for int8: the work that the model's definition asks for.
        original = Path(request["folder"]).parents[1] / "fp32" / "onnx" / "model.onnx"
        line["gflops"] = count_flops(original, model.sizes) / 1e9
        return line

    def _request(self, model: Model, precision: str, threads: int, contenders: list[str]) -> dict[str, Any]:
        """What :mod:`cpu_time` reads; where we refuse the model, the others run all the same."""
        request: dict[str, Any] = {"model": model.name, "threads": threads, "dynamic": self.dynamic, "missing": {}}
        request |= self.prepare(model, precision)
        request["library"], names = "", list(contenders)
        if "ours" in names:
            try:
                request["library"] = str(self.library(model, precision)[0])
            except Failed as failure:
                names.remove("ours")
                request["missing"]["ours"] = str(failure)
        return {**request, "contenders": names}

    def costs(self, model: Model, precision: str) -> dict[str, Any]:
        """One line of the table of build time, code size and memory."""
        from cpu_size import onnx_facts, text_bytes

        line: dict[str, Any] = {"model": model.name, "precision": precision}
        try:
            library, built = self.library(model, precision)
        except Failed as failure:
            return {**line, "refused": str(failure)}
        line |= {"cpu_s": built["costs"], "compiler_peak_mb": built["peak_mb"]}
        line |= {"library_bytes": library.stat().st_size, "code_bytes": text_bytes(library)}
        line |= onnx_facts(Path(self.prepare(model, precision)["folder"]) / "model.onnx")
        for name in ("ours", "onnxruntime"):
            request = self._request(model, precision, 1, [name])
            try:
                answer = child("cpu_time.py", threads=1, request={**request, "probe": True}, work=self.work)
                line[f"{name}_peak_mb"] = answer["peak_mb"]
            except Failed as failure:
                line[f"{name}_failed"] = str(failure)
        return line

    def ops(self, model: Model, precision: str, threads: int) -> list[dict[str, Any]]:
        """Our kernels by time.

        Raises:
            Failed: we refuse the model.
        """
        request = self._request(model, precision, threads, [])
        request["library"] = str(self.library(model, precision, "vm")[0])
        rows: list[dict[str, Any]] = child("cpu_ops.py", threads=threads, request=request, work=self.work)
        return rows

    def peak(self) -> dict[str, float]:
        """``gflops`` of fp32 multiply-adds on one core, and ``int8_gops`` where it has VNNI."""
        found: dict[str, float] = child("cpu_peak.py", self.profile, threads=1)
        return found


def child(
    script: str, *arguments: str, threads: int = 0, request: dict[str, Any] | None = None, work: Path | None = None
) -> Any:
    """The JSON on the last line that ``script`` prints.

    Raises:
        Failed: it crashed or printed none.
    """
    environment = dict(os.environ)
    if threads:
        environment |= {name: str(threads) for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if work is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    command = [sys.executable, str(HERE / script), *arguments]
    text = json.dumps(request) if request is not None else None
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{script} took longer than {TIMEOUT_S} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        problem = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise Failed(f"{script} ended with {done.returncode}: {problem[-1].strip() if problem else 'no message'}")
    return json.loads(lines[-1])
