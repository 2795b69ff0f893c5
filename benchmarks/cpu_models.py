"""The models of the CPU benchmark: where each is defined, its inputs, and the sizes it is timed at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolchain.specs import DimSpec, InputSpec

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Model:
    """One line of the tables.

    Attributes:
        source: ``file.py:function`` below the repository's root, returning an ``nn.Module``.
        inputs: with names for the axes that may be dynamic.
        sizes: of those axes; exported fixed unless ``dynamic``.
        checkpoint: weights below the repository's root, or "".
        int8: what ``--precision int8`` means for it.  Static (QDQ) everywhere: that is the form that all
            contenders take, also for MiniLM, whose accuracy would ask for int8-dynamic in a release.
        build_only: timed in the build table alone (how build time grows with depth).
        further: beyond the list: only when asked for by name.
        dynamic: whether the named axes stay dynamic.
    """

    name: str
    source: str
    inputs: tuple[InputSpec, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    checkpoint: str = ""
    int8: str = "int8-static"
    build_only: bool = False
    further: bool = False
    dynamic: bool = False

    @property
    def exported_inputs(self) -> tuple[InputSpec, ...]:
        """The inputs as exported: fixed shapes, or named axes when dynamic."""
        if self.dynamic:
            return self.inputs
        return tuple(replace(spec, shape=spec.concrete(self.sizes)) for spec in self.inputs)

    @property
    def dims(self) -> tuple[DimSpec, ...]:
        """The dynamic axes; buckets at the size that is timed, should TVM need them fixed."""
        if not self.dynamic:
            return ()
        return tuple(
            DimSpec(name, 1, max(2 * size, 8), name == "batch", (size,), 2 if size == 1 else size)
            for name, size in self.sizes.items()
        )


def all_models(dynamic: bool = False) -> dict[str, Model]:
    """Every model by name, in the order of the tables."""
    models = [*_convolutional(), *_transformers(), *_recurrent(), *_further()]
    return {model.name: replace(model, dynamic=dynamic) for model in models}


def _images(name: str, source: str, build_only: bool = False) -> Model:
    image = InputSpec("image", "float32", ("batch", 3, 224, 224))
    return Model(name, source, (image,), {"batch": 1}, build_only=build_only)


def _convolutional() -> list[Model]:
    own = "benchmarks/models/convolutional.py"
    digit = InputSpec("image", "float32", ("batch", 1, 8, 8), 0, 0, 1)
    return [
        _images("resnet18", "recipes/vision/resnet.py:build"),
        _images("mobilenet_v2", "recipes/vision/mobilenet.py:build"),
        _images("resnet50", f"{own}:resnet50"),
        _images("efficientnet_b0", f"{own}:efficientnet_b0"),
        Model("digits", "recipes/digits/model.py:build", (digit,), {"batch": 1}, "recipes/digits/digits.safetensors"),
        _images("resnet34", f"{own}:resnet34", build_only=True),
        _images("resnet101", f"{own}:resnet101", build_only=True),
    ]


def _transformers() -> list[Model]:
    own = "benchmarks/models/transformers.py"
    tokens = InputSpec("input_ids", "int64", ("batch", "sequence"), 0, 0, 30521)
    mask = InputSpec("attention_mask", "int64", ("batch", "sequence"), 0, 1, 1)
    minilm = [
        Model(
            f"minilm_b{batch}_s{sequence}",
            "recipes/minilm/model.py:build",
            (tokens, mask),
            {"batch": batch, "sequence": sequence},
        )
        for batch in (1, 8)
        for sequence in (16, 128, 384)
    ]
    past = ("batch", 6, 8, "past", 64)
    gpt = (
        InputSpec("token", "int64", ("batch", 1), None, 0, 31999),
        InputSpec("past_keys", "float32", past),
        InputSpec("past_values", "float32", past),
    )
    return [
        _images("vit_tiny", f"{own}:vit_tiny"),
        *minilm,
        Model("gpt_step", f"{own}:gpt", gpt, {"batch": 1, "past": 128}),
    ]


def _recurrent() -> list[Model]:
    x = InputSpec("x", "float32", ("batch", "sequence", 128))
    return [Model("gru", "benchmarks/models/recurrent.py:gru", (x,), {"batch": 1, "sequence": 64})]


def _further() -> list[Model]:
    own = "benchmarks/models/further.py"
    image = InputSpec("image", "float32", ("batch", 3, 128, 128))
    clip = InputSpec("clip", "float32", ("batch", 3, 8, 56, 56))
    images = [
        Model(name, f"{own}:{name}", (image,), {"batch": 1}, further=True)
        for name in ("unet", "unet_bilinear", "convnext", "resnext", "style_transfer")
    ]
    return [*images, Model("video", f"{own}:video", (clip,), {"batch": 1}, further=True)]
