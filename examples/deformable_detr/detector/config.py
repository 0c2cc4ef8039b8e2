"""Every setting of the detector, its default (the paper's), the presets and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import operator
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GROUPS = 32  # of the group norm after each input projection
# x and y are the upper left corner, cx and cy the centre; relative to the sides of the image.
BOX_FORMATS = (
    "coco",
    "xywh",
    "xyxy",
    "cxcywh",
    "relative-xywh",
    "relative-xyxy",
    "relative-cxcywh",
)


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    option: bool = True,
) -> Any:
    """Declare a field: its default, the line of ``--help``, and what its value must fulfil.

    ``low`` and ``high`` are allowed values, ``above`` is not; ``option=False`` keeps the field off
    the command line.
    """
    rules = dict(help=help, choices=choices, low=low, above=above, high=high, option=option)
    return field(default=default, metadata=rules)


@dataclass
class _Checked:
    """Checks each field of the dataclass that inherits it against its rules."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for entry in dataclasses.fields(self):
            value = _as_type(entry.name, getattr(self, entry.name), hints[entry.name])
            setattr(self, entry.name, value)
            rules = entry.metadata
            if rules["choices"] and value not in rules["choices"]:
                raise ValueError(
                    f"{entry.name} must be one of {', '.join(rules['choices'])}, got {value!r}"
                )
            for number in value if isinstance(value, tuple) else [value]:
                _check_number(entry.name, number, rules)


def _check_number(name: str, number: Any, rules: Mapping[str, Any]) -> None:
    # Written so that NaN breaks every rule.
    for rule, words, fulfils in (
        ("low", "at least", operator.ge),
        ("above", "above", operator.gt),
        ("high", "at most", operator.le),
    ):
        if rules[rule] is not None and not fulfils(number, rules[rule]):
            raise ValueError(f"{name} must be {words} {rules[rule]}, got {number}")


def _as_type(name: str, value: Any, hint: Any) -> Any:
    """``value``, an int taken for a float and a list for a tuple; TypeError if it does not fit."""
    if hint is float and type(value) is int:
        return float(value)
    if hint in (bool, int, float, str):
        if type(value) is not hint:
            raise TypeError(f"{name} must be of type {hint.__name__}, got {value!r}")
        return value
    element = typing.get_args(hint)[0]  # tuple[element, ...]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of {element.__name__}, got {value!r}")
    return tuple(_as_type(name, entry, element) for entry in value)


@dataclass
class ModelConfig(_Checked):
    """The detector itself; what a checkpoint needs to be rebuilt."""

    backbone: str = setting(
        "resnet50", "resnet50, resnet101, tiny (trained from scratch) or timm:NAME"
    )
    dilation: bool = setting(False, "DC5: the last stage keeps its resolution")
    attention: str = setting(
        "deformable",
        "dense: scaled_dot_product_attention over all tokens",
        choices=("deformable", "dense"),
    )
    reference_boxes: bool = setting(True, "dense only: boxes relative to reference points")
    num_classes: int = setting(
        91, "logits; labels are 0 .. num_classes - 1", low=1, option=False
    )  # no option: training reads it from the data
    num_feature_levels: int = setting(4, "feature maps; 1: the backbone's last", low=1)
    hidden_dim: int = setting(256, "channels of the transformer", low=1)
    num_heads: int = setting(8, "attention heads", low=1)
    num_encoder_layers: int = setting(6, "encoder layers", low=1)
    num_decoder_layers: int = setting(6, "decoder layers", low=1)
    feedforward_dim: int = setting(1024, "channels inside the feed-forward networks", low=1)
    num_encoder_points: int = setting(4, "points per head and level in the encoder", low=1)
    num_decoder_points: int = setting(4, "points per head and level in the decoder", low=1)
    num_queries: int = setting(300, "object queries, the most boxes an image can get", low=1)
    dropout: float = setting(0.1, "share of activations dropped in training", low=0, high=1)
    position_embedding: str = setting(
        "sine", "of the feature maps' pixels", choices=("sine", "learned")
    )
    box_refine: bool = setting(False, "each decoder layer refines the boxes of the one before")
    two_stage: bool = setting(False, "queries are the encoder's best proposals; needs box_refine")
    aux_loss: bool = setting(True, "losses on every decoder layer, not only on the last")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone not in ("resnet50", "resnet101", "tiny") and not (
            self.backbone.startswith("timm:")
        ):
            raise ValueError(
                f"backbone must be resnet50, resnet101, tiny or timm:NAME, got {self.backbone!r}"
            )
        if self.num_feature_levels == 2:
            raise ValueError("num_feature_levels must be 1, or 3 or more, got 2")
        for name, divisor in (("num_heads", self.num_heads), ("groups of the group norm", GROUPS)):
            if self.hidden_dim % divisor != 0:
                raise ValueError(
                    f"hidden_dim must be a multiple of {divisor} ({name}), got {self.hidden_dim}"
                )
        if self.two_stage and not self.box_refine:
            raise ValueError("box_refine must be set where two_stage is, got box_refine=False")
        if self.two_stage and self.attention == "dense":
            raise ValueError("two_stage must not be set with attention='dense', got two_stage=True")
        if not self.reference_boxes and (self.attention != "dense" or self.box_refine):
            raise ValueError(
                "reference_boxes must be set with deformable attention and with box_refine, got "
                f"reference_boxes=False, attention={self.attention!r}, "
                f"box_refine={self.box_refine}"
            )


@dataclass
class DataConfig(_Checked):
    """Where images come from and what is done to them."""

    dataset: str = setting(
        "coco",
        "coco reads data_path; the others are generated",
        choices=("coco", "digits", "shapes-easy", "shapes-hard", "shapes-gpu-hard"),
    )
    data_path: str = setting(
        "", "folder in COCO's layout, or with train/_annotations.coco.json and valid/..."
    )
    cache_dir: str = setting("", "where generated data is kept; empty: the user's cache directory")
    label_ids: str = setting(
        "contiguous",
        "category: labels are the ids of the json, as in the original's checkpoints",
        choices=("contiguous", "category"),
    )
    short_sides: tuple[int, ...] = setting(
        tuple(range(480, 801, 32)),
        "training resizes to one of these at random, evaluation to the last; 0: only images "
        "beyond max_side",
        low=0,
    )
    max_side: int = setting(1333, "longest side after resizing", low=1)
    crop: bool = setting(True, "crop half of the training images, after a first resize")
    horizontal_flip: float = setting(0.5, "probability in training", low=0, high=1)
    num_workers: int = setting(2, "processes that load images; 0: the training process", low=0)
    exif: str = setting(
        "apply",
        "apply: turn images upright as their EXIF orientation says; ignore: leave all as stored",
        choices=("apply", "ignore"),
    )
    white_level: float = setting(
        0.0,
        "value that is white in grey images of more than 8 bits; 0: 65535, floating point 1",
        low=0,
    )
    max_pixels: int = setting(
        0, "images with more are left out, lest they fill the memory; 0: Pillow's limit", low=0
    )
    box_format: str = setting(
        "coco",
        "what a bbox holds; coco: xywh in pixels, refused where the numbers look otherwise",
        choices=BOX_FORMATS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.short_sides:
            raise ValueError("short_sides must hold one length at least, got ()")


@dataclass
class TrainConfig(_Checked):
    """The optimisation; defaults are the original's."""

    epochs: int = setting(50, "passes over the training images", low=1)
    batch_size: int = setting(2, "images per process and forward pass", low=1)
    accumulate: int = setting(1, "forward passes per step of the optimiser", low=1)
    lr: float = setting(2e-4, "learning rate", above=0)
    lr_backbone: float = setting(2e-5, "learning rate of the backbone; 0: it is frozen", low=0)
    lr_points_factor: float = setting(
        0.1, "learning rate of sampling offsets and reference points, times lr", low=0
    )
    weight_decay: float = setting(1e-4, "of AdamW", low=0)
    schedule: str = setting(
        "step", "step: a tenth every lr_drop epochs; cosine: down to 0", choices=("step", "cosine")
    )
    lr_drop: int = setting(40, "epochs between drops of the learning rate", low=1)
    warmup_steps: int = setting(0, "first steps, in which the learning rate rises linearly", low=0)
    clip_norm: float = setting(0.1, "largest norm of the gradient; 0: not clipped", low=0)
    ema_decay: float = setting(
        0.0, "of the moving average of the weights, which is then evaluated; 0: none", low=0, high=1
    )
    amp: str = setting(
        "off",
        "mixed precision; on a CPU with instructions for bf16 it pays for a ResNet",
        choices=("off", "bf16", "fp16"),
    )
    compile: bool = setting(False, "torch.compile the model")
    gradient_checkpointing: bool = setting(False, "less memory, more time: recompute activations")
    seed: int = setting(42, "of weights, order of the images, augmentation and dropout", low=0)
    class_weight: float = setting(2.0, "of the focal loss, and of its cost in matching", low=0)
    box_weight: float = setting(5.0, "of the L1 loss, and of its cost in matching", low=0)
    giou_weight: float = setting(2.0, "of the GIoU loss, and of its cost in matching", low=0)
    focal_alpha: float = setting(0.25, "weight of objects against background", low=0, high=1)
    eval_every: int = setting(1, "epochs between evaluations", low=1)


@dataclass
class Config:
    """What is trained, on what, and how: all that a result depends on; checkpoints hold it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, tuples and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Mapping[str, Any]]) -> Config:
        """The inverse of ``to_dict``; what is missing has its default.

        Raises:
            ValueError: a name is unknown, or a value breaks its rule.
            TypeError: a value has the wrong type.
        """
        _refuse_unknown(settings, _SECTIONS, "")
        for name, section in _SECTIONS.items():
            known = [entry.name for entry in dataclasses.fields(section)]
            _refuse_unknown(settings.get(name, {}), known, f"{name}.")
        return cls(**{name: cls_(**settings.get(name, {})) for name, cls_ in _SECTIONS.items()})

    def replace(self, **changes: Any) -> Config:
        """A copy in which the fields named, of whichever section, have new values."""
        parts = {}
        for name, section in _SECTIONS.items():
            mine = {entry.name for entry in dataclasses.fields(section)} & set(changes)
            parts[name] = dataclasses.replace(
                getattr(self, name), **{key: changes.pop(key) for key in mine}
            )
        _refuse_unknown(changes, [], "")
        return Config(**parts)


_SECTIONS: dict[str, Any] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    unknown = [f"{prefix}{name}" for name in given if name not in known]
    if unknown:
        raise ValueError(f"config must hold known settings only, got {', '.join(unknown)}")


@dataclass
class RunConfig(_Checked):
    """One run of the training program; nothing that its result depends on."""

    output: str = setting(
        "", "folder of checkpoints and log; empty: out/PRESET, or where --resume points"
    )
    resume: str = setting("", "checkpoint to go on from, with its configuration")
    weights: str = setting(
        "", "checkpoint to start anew from, with its model; also the original's, or transformers'"
    )
    reset_classes: bool = setting(False, "start from weights, but for the classes: new class heads")
    backbone_weights: str = setting(
        "", "torchvision's .pth file to start the backbone from, or 'random'"
    )
    device: str = setting("", "cpu, cuda, cuda:1, ...; empty: cuda where there is one")
    max_minutes: float = setting(0.0, "save and stop after so long; 0: no limit", low=0)
    save_minutes: float = setting(10.0, "save so often, besides after each epoch", above=0)
    log_every: int = setting(10, "steps between records in log.jsonl", low=1)
    check_data: bool = setting(
        False, "read all images and annotations, print and draw what is there, and end"
    )
    tensorboard: bool = setting(False, "also log to TensorBoard")
    wandb: bool = setting(False, "also log to Weights & Biases")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.weights:
            raise ValueError(f"resume and weights must not both be given, got {self.weights!r}")


# ---- presets -------------------------------------------------------------------------------------

_ORIGINAL = Config()  # multi-scale Deformable DETR; a total batch of 32 trained the paper's models
_REFINE = _ORIGINAL.replace(box_refine=True)

# Small enough for two CPU cores. The backbone starts from nothing and so learns at the full rate.
_SMALL = _ORIGINAL.replace(
    backbone="tiny",
    num_feature_levels=3,
    hidden_dim=64,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    feedforward_dim=128,
    dropout=0.0,
    box_refine=True,
    short_sides=(0,),
    crop=False,
    num_workers=0,  # the images are in memory, and other processes would compete for the cores
    batch_size=16,
    lr=1e-3,
    lr_backbone=1e-3,
    schedule="cosine",
    warmup_steps=100,
    clip_norm=1.0,
)

PRESETS: dict[str, Config] = {
    "r50_deformable_detr": _ORIGINAL,
    "r50_deformable_detr_single_scale": _ORIGINAL.replace(num_feature_levels=1),
    "r50_deformable_detr_single_scale_dc5": _ORIGINAL.replace(num_feature_levels=1, dilation=True),
    "r50_deformable_detr_plus_iterative_bbox_refinement": _REFINE,
    "r50_deformable_detr_plus_plus_two_stage": _REFINE.replace(two_stage=True),
    # A 3 is no longer one in a mirror.
    "digits": _SMALL.replace(dataset="digits", num_queries=30, horizontal_flip=0.0, epochs=8),
    "shapes-easy": _SMALL.replace(dataset="shapes-easy", num_queries=20, epochs=10),
    "shapes-hard": _SMALL.replace(dataset="shapes-hard", num_queries=40, epochs=20),
    "shapes-gpu-hard": _SMALL.replace(
        dataset="shapes-gpu-hard",
        num_feature_levels=4,
        hidden_dim=128,
        num_heads=8,
        num_encoder_layers=3,
        num_decoder_layers=3,
        feedforward_dim=512,
        num_queries=100,
        num_workers=4,
        batch_size=32,
        lr=5e-4,
        lr_backbone=5e-4,
        amp="bf16",
        epochs=40,
        eval_every=2,
    ),
}


# ---- command line --------------------------------------------------------------------------------


@dataclass
class CommandLine:
    """What the user gave: a preset, settings that differ from it, and how to run."""

    preset: str
    changes: dict[str, Any]
    run: RunConfig


def parse_command_line(arguments: Sequence[str] | None = None) -> CommandLine:
    """Read ``--preset NAME`` and an option for every field of the configuration."""
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument(
        "--preset", choices=PRESETS, metavar="NAME", help=f"one of {', '.join(PRESETS)}"
    )
    known, _ = preset.parse_known_args(arguments)
    name = known.preset or "r50_deformable_detr"

    parser = argparse.ArgumentParser(
        usage="%(prog)s [--preset NAME] [option ...]",
        description="Train Deformable DETR: the settings of a preset, changed by what is given.",
        epilog=f"The defaults shown are those of the preset {name}.",
        parents=[preset],
        allow_abbrev=False,
    )
    for title, section in {"run": RunConfig(), **vars(PRESETS[name])}.items():
        _add_options(parser.add_argument_group(title, type(section).__doc__), section)

    given = vars(parser.parse_args(arguments))
    given.pop("preset")
    if given.get("data_path"):
        given.setdefault("dataset", "coco")  # nothing else reads it
    run_names = {entry.name for entry in dataclasses.fields(RunConfig)} & set(given)
    try:
        run = RunConfig(**{key: given.pop(key) for key in run_names})
        if run.resume and known.preset:
            raise ValueError("resume must come without preset: the checkpoint holds its settings")
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return CommandLine(name, given, run)


_METAVAR = {int: "N", float: "X", str: "TEXT"}


def add_data_options(
    parser: argparse.ArgumentParser, names: Collection[str], *, of_checkpoint: bool = False
) -> None:
    """Options for some fields of ``DataConfig``; what is not given leaves no trace in the result.

    Args:
        parser: to add them to.
        names: of the fields.
        of_checkpoint: the defaults are those that a checkpoint holds.
    """
    title = "The defaults are those of the checkpoint." if of_checkpoint else DataConfig.__doc__
    _add_options(parser.add_argument_group("data", title), DataConfig(), names, not of_checkpoint)


def _add_options(
    group: argparse._ArgumentGroup,
    section: Any,
    names: Collection[str] | None = None,
    show_defaults: bool = True,
) -> None:
    """One option per field, or for some; what is not given leaves no trace in the result."""
    hints = typing.get_type_hints(type(section))
    for entry in dataclasses.fields(section):
        if not (entry.metadata["option"] if names is None else entry.name in names):
            continue
        hint, default = hints[entry.name], getattr(section, entry.name)
        if hint is bool:
            form: dict[str, Any] = dict(action=argparse.BooleanOptionalAction)
            shown = "yes" if default else "no"
        elif hint in (int, float, str):
            choices = entry.metadata["choices"] or None
            form = dict(type=hint, choices=choices, metavar=None if choices else _METAVAR[hint])
            shown = f"{default:g}" if hint is float else str(default)
        else:
            element = typing.get_args(hint)[0]  # tuple[element, ...]
            form = dict(type=element, nargs="+", metavar=_METAVAR[element])
            shown = " ".join(map(str, default))
        group.add_argument(
            f"--{entry.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=entry.metadata["help"]
            + (f" (default: {shown})" if shown and show_defaults else ""),
            **form,
        )
