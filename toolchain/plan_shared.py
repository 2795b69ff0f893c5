"""The stages of a plan that serve every target: data, export, reference and self-test."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolchain.errors import ExitCode
from toolchain.export.source import ModelOptions
from toolchain.host import Host
from toolchain.recipe import Recipe
from toolchain.runner import Node
from toolchain.specs import DimSpec, ImageSpec, InputSpec
from toolchain.stages import data, export, reference, selftest
from toolchain.tvm.records import Records

DEFAULT_K = 5


@dataclass(slots=True)
class Maker:
    """Collects the nodes of a plan; see :func:`toolchain.plan.make_plan` for the attributes."""

    recipe: Recipe
    host: Host
    records: Mapping[str, Records]
    nodes: list[Node] = field(default_factory=list)

    def add(self, id: str, stage: Any, options: Any, inputs: dict[str, str], **rest: Any) -> str:
        """Append a node; ``inputs`` maps an input's name to ``"node id:output"``."""
        pairs = {name: (source.rpartition(":")[0], source.rpartition(":")[2]) for name, source in inputs.items()}
        self.nodes.append(Node(id, stage, options, pairs, **rest))
        return id

    def path(self, written: str | None) -> str:
        """A path or ``file.py:function`` of the recipe, relative to the repository's root."""
        if not written:
            return ""
        file, colon, function = written.rpartition(":")
        file = file if colon else written
        moved = os.path.relpath(self.recipe.folder.absolute() / file, self.recipe.root.absolute())
        return moved + (f":{function}" if colon else "")


def _model_fields(maker: Maker) -> dict[str, Any]:
    model = maker.recipe.model
    return {
        "source": maker.path(model.source),
        "checkpoint": maker.path(model.checkpoint),
        "example_inputs": maker.path(model.example_inputs),
        "inputs": input_specs(maker.recipe),
        "dims": _dims(maker.recipe),
        "outputs": tuple(model.outputs),
    }


def input_specs(recipe: Recipe) -> tuple[InputSpec, ...]:
    """The inputs that the recipe declares."""
    return tuple(InputSpec(i.name, i.dtype, tuple(i.shape), i.pad, i.low, i.high) for i in recipe.model.inputs)


def _inputs_with_images(recipe: Recipe) -> tuple[InputSpec, ...]:
    """For the contract alone: no other stage looks at image files."""
    images = [None if i.image is None else ImageSpec(**i.image.model_dump()) for i in recipe.model.inputs]
    return tuple(dataclasses.replace(s, image=image) for s, image in zip(input_specs(recipe), images, strict=True))


def _dims(recipe: Recipe) -> tuple[DimSpec, ...]:
    return tuple(
        DimSpec(name, d.min, d.max, d.batch, tuple(d.buckets), d.example) for name, d in recipe.model.dims.items()
    )


def add_shared_stages(maker: Maker) -> None:
    """The stages that serve every target."""
    recipe = maker.recipe
    fields = _model_fields(maker)
    options = export.Options(
        **{**fields, "inputs": _inputs_with_images(recipe)},
        opset=recipe.model.opset,
        preprocessing=recipe.model.preprocessing,
    )
    maker.add("export", export.STAGE, options, {}, failure=ExitCode.EXPORT)
    for role in ("calibration", "evaluation"):
        source = getattr(recipe.data, role)
        if source is None and role == "calibration":
            continue
        maker.add(
            role,
            data.STAGE,
            data.Options(
                maker.path(source),
                role if source else "random",
                getattr(recipe.data, f"{role}_limit"),
                fields["inputs"],
                fields["dims"],
            ),
            # Without declared inputs, the checks need the contract that the export found out.
            {} if fields["inputs"] else {"onnx": "export:onnx"},
            failure=ExitCode.USER_CODE,
        )
    model = reference.Options(**{f.name: fields[f.name] for f in dataclasses.fields(ModelOptions)})
    maker.add("reference", reference.STAGE, model, {"evaluation": "evaluation:dataset"}, failure=ExitCode.EXPORT)
    inputs = {"onnx": "export:onnx", "evaluation": "evaluation:dataset", "reference": "reference:reference"}
    maker.add("selftest", selftest.STAGE, selftest.Options(), inputs)


def metric_fields(maker: Maker) -> dict[str, Any]:
    metric = maker.recipe.metric
    if metric is None:
        return {"metric": "", "k": DEFAULT_K, "output": None, "higher_is_better": True}
    kind = maker.path(metric.kind) if ":" in metric.kind else metric.kind
    better = metric.kind != "mae" if metric.higher_is_better is None else metric.higher_is_better
    return {"metric": kind, "k": metric.k or DEFAULT_K, "output": metric.output, "higher_is_better": better}
