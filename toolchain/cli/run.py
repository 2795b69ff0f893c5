"""``toolchain run``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.errors import ExitCode, ToolchainError

if TYPE_CHECKING:
    import numpy as np


@click.command()
@click.argument("bundle")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--target", help="Which bundle of a release [default: the one that suits this machine best].")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads; 0 for all cores.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the outputs to this .npz file.")
@click.option("--trust-key", type=click.Path(path_type=Path), help="PEM file of public keys; refuse what none signed.")
@click.option("--json", "as_json", is_flag=True, help="Print all outputs in full as JSON.")
def command(
    bundle: str,
    inputs: tuple[str, ...],
    target: str | None,
    threads: int,
    output: Path | None,
    trust_key: Path | None,
    as_json: bool,
) -> None:
    """Run BUNDLE (a release's folder, or FOLDER@TARGET) on INPUTS.

    Each of INPUTS is FILE or NAME=FILE: .npy, .npz, .json or an image.  NaN and infinity, in what goes in or comes out,
    are told on standard error; they are no mistake of themselves.
    """
    import numpy as np

    from toolchain.cache import storage_errors
    from toolchain.runtime import load, read_inputs

    if output is not None:
        _check_output(output)
    with load(bundle, target, threads, trust_key=trust_key) as model:
        arrays = read_inputs(inputs, model.contract)
        results = model.run(arrays)
        info, labels = model.info, {spec.name: spec.labels for spec in model.contract.outputs}
    for kind, tensors in (("input", arrays), ("output", results)):
        for line in _not_finite(kind, tensors):
            click.echo(f"warning: {line}", err=True)
    if output is not None:
        with storage_errors(output, "another --output file"), open(output, "wb") as file:
            np.savez(file, **results)  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps({name: array.tolist() for name, array in results.items()}))
        return
    engine = info.engine
    click.echo(f"{info.name} {info.version}, {info.target.name}, {engine.precision}/{engine.backend}")
    for name, array in results.items():
        click.echo(f"{name} {array.dtype}{list(array.shape)}")
        for row in np.atleast_2d(array).reshape(-1, array.shape[-1] if array.ndim else 1)[:8]:
            text = np.array2string(row, precision=4, threshold=16, max_line_width=100)
            best = f"  largest: {_class(int(np.argmax(row)), labels[name])}" if row.size > 1 and array.ndim == 2 else ""
            click.echo(f"  {text}{best}")


def _class(index: int, labels: tuple[str, ...]) -> str:
    return f"{index} ({labels[index]})" if index < len(labels) else str(index)


def _not_finite(kind: str, arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    """A line for each array that holds NaN or infinity."""
    import numpy as np

    for name, array in arrays.items():
        if array.dtype.kind != "f":
            continue
        counts = {"NaN": int(np.isnan(array).sum()), "infinite": int(np.isinf(array).sum())}
        told = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        if told:
            yield f"{kind} {name!r} holds {told} of {array.size} values"


def _check_output(path: Path) -> None:
    """Say before the model runs that the outputs cannot be written as asked."""
    what, hint = "", f"name a file: {path / 'outputs.npz'}"
    if path.is_dir():
        what = "is a folder; allowed: the path of a .npz file"
    elif path.suffix.lower() != ".npz":
        got = f"a {path.suffix} file" if path.suffix else "a name without a suffix"
        what, hint = f"got {got}; allowed: .npz", f"name it {path.with_suffix('.npz').name}, or print with --json"
    elif not path.parent.is_dir():
        what, hint = f"the folder {str(path.parent)!r} does not exist", f"mkdir -p {path.parent}, or another path"
    if what:
        raise ToolchainError(what, where=f"--output {path}", hint=hint, code=ExitCode.USAGE)
