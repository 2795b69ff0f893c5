"""What a recipe's tables say about each other and about the files they name.

These checks read the raw tables, so that they also work on a recipe whose shape is wrong elsewhere:
a value of the wrong type is skipped here, the shape check reports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from toolchain.config_errors import Key, Problem, closest, problem, shown
from toolchain.config_types import split_function
from toolchain.recipe_parts import METRICS, source_kind

Raw = Mapping[str, Any]
_WHOLE_NUMBERS = ("int64", "int32", "int16", "int8", "uint8")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def sense_problems(raw: Raw, folder: Path, target_names: Mapping[str, str]) -> list[Problem]:
    """Mistakes that only show when a recipe's tables are seen together.

    Args:
        raw: the recipe as read from TOML.
        folder: the recipe's folder; its paths are relative to it.
        target_names: entry of ``targets`` -> name of that profile, for the entries that were found.
    """
    return [
        *_files(raw, folder),
        *_inputs(raw),
        *_dims(raw),
        *_used_dims(raw),
        *_data(raw),
        *_metric(raw),
        *_quantize(raw),
        *_measure(raw),
        *_gates(raw, target_names),
    ]


def _table(raw: Raw, *keys: str) -> dict[str, Any]:
    value: Any = raw
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def _tables(raw: Raw, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, dict(value)) for name, value in _table(raw, *keys).items() if isinstance(value, Mapping))


def _list(table: Raw, key: str) -> list[Any]:
    value = table.get(key)
    return value if isinstance(value, list) else []


def _whole(table: Raw, key: str, default: int | None = None) -> int | None:
    value = table.get(key, default)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _input_tables(raw: Raw) -> list[tuple[int, dict[str, Any]]]:
    entries = enumerate(_list(_table(raw, "model"), "inputs"))
    return [(index, dict(entry)) for index, entry in entries if isinstance(entry, Mapping)]


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _files(raw: Raw, folder: Path) -> Iterator[Problem]:
    model = _table(raw, "model")
    source = model.get("source")
    if isinstance(source, str) and source_kind(source) in ("onnx", "exported_program"):
        yield from _file(("model", "source"), source, source, folder)
    checkpoint = model.get("checkpoint")
    if isinstance(checkpoint, str):
        yield from _file(("model", "checkpoint"), checkpoint, checkpoint, folder)
        if not checkpoint.endswith(_SUFFIXES):
            yield problem(("model", "checkpoint"), checkpoint, f"a file ending in {', '.join(_SUFFIXES)}")
    outputs = _list(model, "outputs")
    for output, file in _table(model, "labels").items():
        if isinstance(file, str):
            yield from _file(("model", "labels", output), file, file, folder)
        if outputs and output not in outputs:
            meant = closest(output, [name for name in outputs if isinstance(name, str)])
            yield Problem(("model", "labels", output), shown(output), "a name of model.outputs", meant)
    functions = {
        ("model", "source"): source,
        ("model", "example_inputs"): model.get("example_inputs"),
        ("data", "calibration"): _table(raw, "data").get("calibration"),
        ("data", "evaluation"): _table(raw, "data").get("evaluation"),
        ("metric", "kind"): _table(raw, "metric").get("kind"),
    }
    for key, value in functions.items():
        if isinstance(value, str) and (parts := split_function(value)):
            yield from _file(key, value, parts[0], folder)


def _file(key: Key, written: str, file: str, folder: Path) -> Iterator[Problem]:
    if file.startswith(("/", "~")):
        return  # the shape check refuses it
    path = folder / file
    if path.is_file():
        return
    try:
        near = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        near = []
    meant = closest(path.name, near)
    meant = (Path(file).parent / meant).as_posix() + written[len(file) :] if meant else ""
    state = "is a folder" if path.is_dir() else "does not exist"
    yield Problem(key, f"{shown(written)}, but {file} {state}", "an existing file, relative to the recipe", meant)


def _inputs(raw: Raw) -> Iterator[Problem]:
    model = _table(raw, "model")
    source = model.get("source")
    kind = source_kind(source) if isinstance(source, str) else None
    if kind == "function" and not model.get("inputs") and "example_inputs" not in model:
        yield Problem(("model", "inputs"), "nothing", "[[model.inputs]] tables, or model.example_inputs")
    if kind in ("onnx", "exported_program") and "checkpoint" in model:
        allowed = "no checkpoint with an .onnx or .pt2 source: it holds its weights"
        yield problem(("model", "checkpoint"), model["checkpoint"], allowed)
    names: set[str] = set()
    for index, entry in _input_tables(raw):
        key = ("model", "inputs", index)
        if isinstance(name := entry.get("name"), str):
            if name in names:
                yield problem((*key, "name"), name, "a name that no other input has")
            names.add(name)
        yield from _input_range(raw, key, entry)
        yield from _input_image((*key, "image"), entry)


def _input_range(raw: Raw, key: Key, entry: Raw) -> Iterator[Problem]:
    low, high, dtype = entry.get("low"), entry.get("high"), entry.get("dtype")
    if _is_number(low) and _is_number(high) and low > high:
        yield problem((*key, "low"), low, f"a number of at most high, which is {shown(high)}")
    if (low is None) != (high is None):
        absent = "low" if low is None else "high"
        yield Problem((*key, absent), "nothing", "low and high together, or neither")
    if dtype in _WHOLE_NUMBERS:
        for name in ("low", "high", "pad"):
            if isinstance(entry.get(name), float) and not entry[name].is_integer():
                yield problem((*key, name), entry[name], f"a whole number, since the dtype is {dtype}")
        given = "evaluation" in _table(raw, "data") or "example_inputs" in _table(raw, "model")
        if low is None and high is None and not given:
            allowed = "low and high for whole-number inputs, where neither evaluation data nor example inputs exist"
            yield Problem((*key, "low"), "nothing", allowed)


def _input_image(key: Key, entry: Raw) -> Iterator[Problem]:
    image, shape = _table(entry, "image"), _list(entry, "shape")
    # As the runtime finds the channels: [..., C, H, W], else [..., H, W, C], else there is one.
    channels = next((shape[at] for at in (-3, -1) if len(shape) >= 3 and shape[at] in (1, 3)), 1)
    for name in ("mean", "std"):
        values = _list(image, name)
        if len(values) not in (0, 1, channels):
            yield problem((*key, name), values, "one number" + (f", or {channels}" if channels > 1 else ""))
    for index, value in enumerate(_list(image, "std")):
        if _is_number(value) and value <= 0:
            yield problem((*key, "std", index), value, "a number above 0")
    if image and entry.get("dtype") == "bool":
        yield problem(key, image, "no image for an input of booleans")


def _dims(raw: Raw) -> Iterator[Problem]:
    rows = [name for name, dim in _tables(raw, "model", "dims") if dim.get("batch") is True]
    for name in rows[1:]:
        yield problem(("model", "dims", name, "batch"), True, f"one batch dimension; {rows[0]} is one already")
    for name, dim in _tables(raw, "model", "dims"):
        key = ("model", "dims", name)
        low, high = _whole(dim, "min", 1), _whole(dim, "max")
        if low is None or high is None:
            continue
        if low > high:
            yield problem((*key, "min"), low, f"a size of at most max, which is {high}")
            continue
        example = _whole(dim, "example")
        if example is not None and not low <= example <= high:
            yield problem((*key, "example"), example, f"a size from min to max, {low} to {high}")
        yield from _buckets((*key, "buckets"), dim, low, high)


def _buckets(key: Key, dim: Raw, low: int, high: int) -> Iterator[Problem]:
    buckets = [(i, size) for i, size in enumerate(_list(dim, "buckets")) if isinstance(size, int)]
    for index, size in buckets:
        if not low <= size <= high:
            yield problem((*key, index), size, f"a size from min to max, {low} to {high}")
    inside = [size for _, size in buckets if low <= size <= high]
    if inside and dim.get("batch") is not True and max(inside) < high:
        # Rows can be run in several goes; a longer sequence cannot.
        allowed = f"a largest bucket equal to max ({high}), as inputs along this dimension cannot be split"
        yield problem(key, [size for _, size in buckets], allowed)


def _used_dims(raw: Raw) -> Iterator[Problem]:
    declared = set(_table(raw, "model", "dims"))
    used: set[str] = set()
    for index, entry in _input_tables(raw):
        for axis, size in enumerate(_list(entry, "shape")):
            if not isinstance(size, str) or not size:
                continue
            used.add(size)
            if size not in declared:
                allowed = f"a size, or a dimension declared under [model.dims] ({_names(declared)})"
                yield problem(("model", "inputs", index, "shape", axis), size, allowed, declared)
    # A misspelt name in a shape leaves a declared one unused: that is one mistake, not two.
    if _input_tables(raw) and used <= declared:
        for name in sorted(declared - used):
            allowed = f"dimensions that occur in the shape of an input ({_names(used)})"
            yield Problem(("model", "dims", name), "a dimension that no input has", allowed, closest(name, used))


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "there are none"


def _data(raw: Raw) -> Iterator[Problem]:
    data = _table(raw, "data")
    for role in ("calibration", "evaluation"):
        if f"{role}_limit" in data and role not in data:
            yield problem(("data", f"{role}_limit"), data[f"{role}_limit"], f"a limit only where data.{role} is given")


def _metric(raw: Raw) -> Iterator[Problem]:
    if "metric" not in raw:
        return
    metric, outputs = _table(raw, "metric"), _list(_table(raw, "model"), "outputs")
    kind = metric.get("kind")
    if "k" in metric and isinstance(kind, str) and kind != "topk":
        yield problem(("metric", "k"), metric["k"], f"k only with kind 'topk'; the kind is {shown(kind)}")
    if kind == "topk" and "k" not in metric:
        yield Problem(("metric", "k"), "nothing", "a whole number of at least 1, as the kind is 'topk'")
    if kind in METRICS and "higher_is_better" in metric:
        allowed = "higher_is_better only with a metric of your own ('file.py:function')"
        yield problem(("metric", "higher_is_better"), metric["higher_is_better"], allowed)
    output = metric.get("output")
    if isinstance(output, str) and outputs and output not in outputs:
        names = [name for name in outputs if isinstance(name, str)]
        yield problem(("metric", "output"), output, f"one of model.outputs: {', '.join(names)}", names)
    if "evaluation" not in _table(raw, "data"):
        yield Problem(("data", "evaluation"), "nothing", "'file.py:function' yielding data, as there is a [metric]")


def _quantize(raw: Raw) -> Iterator[Problem]:
    quantize, data = _table(raw, "quantize"), _table(raw, "data")
    asked = _list(quantize, "precisions")
    required = quantize.get("require")
    if isinstance(required, str) and asked and required not in asked:
        names = [name for name in asked if isinstance(name, str)]
        yield problem(("quantize", "require"), required, f"one of quantize.precisions: {', '.join(names)}")
    wanted = [name for name in (*asked, required) if isinstance(name, str)]
    needs = {"calibration": ("int8-static", "int8-mixed"), "evaluation": ("int8-mixed",)}
    for role, precisions in needs.items():
        reason = next((name for name in wanted if name in precisions), None)
        if reason and role not in data:
            yield Problem(
                ("data", role), "nothing", f"'file.py:function' yielding data, as [quantize] asks for {reason}"
            )
    method = quantize.get("method", "minmax")
    if "percentile" in quantize and method != "percentile":
        allowed = f"percentile only with method 'percentile'; the method is {shown(method)}"
        yield problem(("quantize", "percentile"), quantize["percentile"], allowed)


def _measure(raw: Raw) -> Iterator[Problem]:
    dims = dict(_tables(raw, "model", "dims"))
    for name, size in _table(raw, "measure", "shapes").items():
        key = ("measure", "shapes", name)
        if name not in dims:
            allowed = f"dimensions declared under [model.dims] ({_names(set(dims))})"
            yield Problem(key, "an unknown dimension", allowed, closest(name, dims))
            continue
        low, high = _whole(dims[name], "min", 1), _whole(dims[name], "max")
        if not isinstance(size, int) or low is None or high is None or low > high:
            continue
        if not low <= size <= high:
            yield problem(key, size, f"a size from min to max, {low} to {high}")


def _gates(raw: Raw, target_names: Mapping[str, str]) -> Iterator[Problem]:
    listed = {entry for entry in _list(raw, "targets") if isinstance(entry, str)} | set(target_names.values())
    for name in _table(raw, "gates", "targets"):
        if name not in listed:
            allowed = f"a target of this recipe ({_names(listed)})"
            yield Problem(("gates", "targets", name), "another target", allowed, closest(name, listed))
    tables: list[tuple[Key, dict[str, Any]]] = [(("gates",), _table(raw, "gates"))]
    tables += [(("gates", "targets", name), gates) for name, gates in _tables(raw, "gates", "targets")]
    if "metric" not in raw:
        for key, gates in tables:
            for gate in ("accuracy_drop", "min_accuracy"):
                if gate in gates:
                    yield problem((*key, gate), gates[gate], "a limit of accuracy only where a [metric] is given")
