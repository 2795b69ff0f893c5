"""The ONNX model of a bundle, with its contract and a page that says what it is."""

from __future__ import annotations

from toolchain.exports.files import Tree, text_file
from toolchain.exports.source import Source, onnx_model
from toolchain.runtime.contract import range_text, shape_text


def onnx_tree(source: Source) -> Tree:
    """``model.onnx`` with its external data, ``contract.json``, ``selftest.npz`` where there is one, ``README.md``.

    Raises:
        ToolchainError: USAGE, the bundle's engine is not one ONNX model.
    """
    model = onnx_model(source, "export onnx")
    files = source.engine_files()
    # External data keeps its name, by which the model finds it.
    tree = {("model.onnx" if name == model else name): blob for name, blob in files.items()}
    tree["contract.json"] = source.contract_json()
    if "selftest.npz" in source.bundle.files:
        tree["selftest.npz"] = source.file("selftest.npz")
    tree["README.md"] = text_file(_readme(source))
    return tree


def _readme(source: Source) -> str:
    manifest, contract = source.manifest, source.contract
    lines = [f"# {source.name} {manifest.version}", ""]
    lines += [manifest.description, ""] if manifest.description else []
    lines += [
        (
            f"`model.onnx` is the {manifest.engine.precision} model that was verified for {manifest.target.name} with "
            f"{manifest.runtime.distribution} {manifest.runtime.versions} ({manifest.runtime.provider}). Its bundle is "
            f"`{source.bundle.digest}`."
        ),
        "",
        "| | name | dtype | shape |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| input | `{s.name}` | {s.dtype} | `{shape_text(s.shape)}` |" for s in contract.inputs]
    lines += [f"| output | `{s.name}` | {s.dtype} | `{shape_text(s.shape)}` |" for s in contract.outputs]
    if contract.dims:
        lines.append("")
    for name, dim in contract.dims.items():
        rows = "; its rows are independent of each other" if dim.batch else ""
        lines.append(f"- `{name}` has a size {range_text(dim)}{rows}.")
    if contract.preprocessing:
        lines += ["", f"Inputs: {contract.preprocessing}"]
    lines += ["", *_accuracy(source)]
    return "\n".join(lines).rstrip() + "\n"


def _accuracy(source: Source) -> list[str]:
    accuracy = source.manifest.evidence.get("accuracy")
    lines = []
    if accuracy:
        got, original = accuracy["value"], accuracy["original"]
        lines.append(f"{accuracy['metric']} on held-out data: {got:.4f}, the original's {original:.4f}.")
    if "selftest.npz" in source.bundle.files and source.manifest.selftest:
        limits = source.manifest.selftest
        words = [
            *([f"a cosine similarity of at least {limits.cosine:g}"] if limits.cosine is not None else []),
            *([f"an absolute error of at most {limits.max_abs_error:g}"] if limits.max_abs_error is not None else []),
        ]
        lines.append(
            "`selftest.npz` holds inputs (`input:NAME`) and what must come out (`output:NAME`), within "
            f"{' and '.join(words)}."
        )
    return lines
