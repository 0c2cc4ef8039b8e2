"""Checkpoint files: ours, the original's, and those of the transformers library.

Inside this program a state dict always has the original's keys. The transformers library stores
the same tensors under other names, with the query, key and value projections of the decoder's
self-attention apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector import run_checkpoints, safe_pickle, weight_files
from detector.backbone import RESNET_BLOCKS
from detector.config import Config, DataConfig, ModelConfig
from detector.model import DeformableDETR, build_model

State = dict[str, Tensor]

# ---- reading -------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """Weights, and what it takes to use them."""

    state: State  # with the original's keys
    config: Config  # only the model's part is known of files that are not ours
    categories: list[str] | None  # names of the classes, where they are known
    category_ids: list[int]  # the id in the data of each class


def read_checkpoint(path: str | Path, option: str = "") -> Checkpoint:
    """Read a checkpoint of any kind; nothing in it is executed.

    Args:
        path: a file of ours or of others (the moving average of the weights, where it has one): the
            original's ``.pth``, a state dict alone or under one of the usual names and prefixes,
            ``.safetensors``; or a folder that transformers' ``save_pretrained`` wrote.
        option: the one that the path was given by, for advice.

    Returns:
        Its contents. Where a file holds weights only, sizes come from their shapes and the rest is
        the original's default: 8 heads, no dilation, 300 two-stage queries.

    Raises:
        OSError: there is no such file.
        ValueError: it is no checkpoint of this model; says what is wrong with it.
        ImportError: it takes a package that is not installed.
    """
    path = Path(path)
    try:
        if (path / "config.json").is_file():
            return _read_transformers_folder(path)
        content = weight_files.read(path, option)
        if isinstance(content.get("format"), int):
            return _read_ours(content)
        state = _weights_in(content)
        if "model.level_embed" in state:
            state = from_transformers(state)
            return _foreign(state, config_from_state(state))
        state = _without_leftovers(state)
        return _foreign(state, config_from_state(state, **_settings_of(content.get("args"))))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _foreign(state: State, model: ModelConfig, categories: list[str] | None = None) -> Checkpoint:
    """A checkpoint of others: their labels are the category ids of the data."""
    config = Config(model=model, data=DataConfig(label_ids="category"))
    return Checkpoint(state, config, categories, list(range(model.num_classes)))


# Under what others keep weights; a moving average comes before what it averages.
_NESTED = (
    *("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema"),
    *("model", "state_dict", "model_state_dict", "net", "network", "module", "weights", "params"),
)
_LEVELS = ("transformer.level_embed", "model.level_embed")  # the original's and transformers'


def _weights_in(content: dict[str, Any]) -> State:
    """The state dict in a file of others, with the names that the model itself gives."""
    candidates = [_bare(state) for state in _state_dicts(content)]
    state = next((s for s in candidates if any(key in s for key in _LEVELS)), None)
    if state is None:
        found = max(candidates, key=len, default={})
        raise ValueError(
            f"a state dict of Deformable DETR must have the key {_LEVELS[0]}, "
            f"got {_kind_of(found, content)}"
        )
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = getattr(type(tensor), "origin", type(tensor).__name__)
            raise ValueError(f"{key} must be a tensor, got {kind}")
    return state


def _state_dicts(content: dict[str, Any], depth: int = 3) -> Iterator[State]:
    """Dictionaries with tensors, in which others are under the usual names."""
    if depth > 0:
        for name in _NESTED:
            yield from _state_dicts(safe_pickle.entries_of(content.get(name)), depth - 1)
    if any(isinstance(value, Tensor) for value in content.values()):
        yield content


def _bare(state: dict[Any, Any]) -> State:
    """Without what wrappers put before the names, or into them, and what else they keep."""
    wrappers = re.compile(r"(^|\.)((module|_orig_mod)\.)+")
    bare = {wrappers.sub(r"\1", key): t for key, t in state.items() if isinstance(key, str)}
    starts = {key.removesuffix(end) for key in bare for end in _LEVELS if key.endswith(end)}
    start = min(starts, key=lambda text: ("ema" not in text, text), default="")
    return {key.removeprefix(start): t for key, t in bare.items() if key.startswith(start)}


def _kind_of(state: State, content: dict[str, Any]) -> str:
    """What weights of another model are, as far as their names tell."""
    if not state:
        return f"a file in which no weights are known by name: {weight_files.shortened(content)}"
    for key, kind in (
        (
            "transformer.encoder.layers.0.self_attn.in_proj_weight",
            "those of DETR, which attends otherwise and has other weights",
        ),
        ("bbox_head.cls_branches.0.weight", "those of mmdetection, which has other names"),
        ("layer1.0.conv1.weight", "those of a ResNet alone, which --backbone-weights takes"),
    ):
        if key in state:
            return kind
    return f"those of another model: {weight_files.shortened(state)}"


def _read_ours(content: dict[str, Any]) -> Checkpoint:
    if content["format"] != run_checkpoints.FORMAT:
        raise ValueError(f"format must be {run_checkpoints.FORMAT}, got {content['format']}")
    for name in ("model", "config", "categories", "category_ids"):
        if name not in content:
            raise ValueError(f"a checkpoint must hold {name}, got {', '.join(content)}")
    return Checkpoint(
        content.get("ema") or content["model"],
        Config.from_dict(content["config"]),
        content["categories"],
        content["category_ids"],
    )


_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def _read_transformers_folder(folder: Path) -> Checkpoint:
    try:
        theirs = json.loads((folder / "config.json").read_bytes())
        kind = theirs.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"config.json must be one of transformers, but {error}") from error
    if kind not in (None, "deformable_detr"):
        raise ValueError(f"model_type in config.json must be deformable_detr, got {kind!r}")
    heads = {theirs.get(f"{part}_attention_heads", 8) for part in ("encoder", "decoder")}
    activation = theirs.get("activation_function", "relu")
    if len(heads) > 1 or activation != "relu":
        raise ValueError(
            "encoder and decoder must have as many heads and relu as activation, "
            f"got {sorted(heads)} heads and {activation}"
        )
    settings = {"num_heads": heads.pop()}
    settings |= {name: theirs[name] for name in ("dropout", "dilation") if name in theirs}
    queries = "two_stage_num_proposals" if theirs.get("two_stage") else "num_queries"
    if queries in theirs:
        settings["num_queries"] = theirs[queries]

    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise ValueError(f"must hold {' or '.join(_WEIGHTS)} beside config.json, got neither")
    try:
        state = from_transformers(_bare(weight_files.read(weights)))
    except ValueError as error:
        raise ValueError(f"{weights.name} in it {error}") from error
    model = config_from_state(state, **settings)
    names = theirs.get("id2label", {})
    categories = [names[label] for label in sorted(names, key=int)]
    known = len(categories) == model.num_classes and not categories[0].startswith("LABEL_")
    return _foreign(state, model, categories if known else None)


# Fields of ModelConfig by their names on the original's command line.
_ARGUMENTS = {
    "backbone": "backbone",
    "dilation": "dilation",
    "position_embedding": "position_embedding",
    "num_feature_levels": "num_feature_levels",
    "hidden_dim": "hidden_dim",
    "num_heads": "nheads",
    "num_encoder_layers": "enc_layers",
    "num_decoder_layers": "dec_layers",
    "feedforward_dim": "dim_feedforward",
    "num_encoder_points": "enc_n_points",
    "num_decoder_points": "dec_n_points",
    "num_queries": "num_queries",
    "dropout": "dropout",
    "box_refine": "with_box_refine",
    "two_stage": "two_stage",
    "aux_loss": "aux_loss",
}


def _settings_of(arguments: Any) -> dict[str, Any]:
    given = safe_pickle.entries_of(arguments)
    return {
        ours: given[theirs]
        for ours, theirs in _ARGUMENTS.items()
        if theirs in given and not isinstance(given[theirs], safe_pickle.Unknown)
    }


def config_from_state(state: State, **settings: Any) -> ModelConfig:
    """Work out the model from the keys and shapes of a state dict of the original.

    Args:
        state: with the original's keys.
        **settings: fields of :class:`ModelConfig` for what shapes do not tell: ``num_heads``,
            ``dilation``, ``dropout``, ``aux_loss``, and ``num_queries`` of two-stage models.

    Raises:
        ValueError: it is not the state dict of such a model.
    """

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(
                f"a state dict of Deformable DETR must have the key {key}, "
                f"got {weight_files.shortened(state)}"
            )
        return state[key].shape

    num_levels, hidden_dim = shape("transformer.level_embed")
    samples = settings.get("num_heads", ModelConfig.num_heads) * num_levels
    blocks = tuple(
        _count(state, rf"backbone\.0\.body\.layer{stage}\.\d+\.conv1\.weight")
        for stage in (1, 2, 3, 4)
    )
    names = {blocks: name for name, blocks in RESNET_BLOCKS.items()}
    if blocks not in names:
        others = [key for key in state if key.startswith("backbone.")]
        raise ValueError(
            f"backbone must be one of {RESNET_BLOCKS}, got {blocks} blocks, in "
            f"{weight_files.shortened(others) or 'no key'}"
        )
    found = {
        "backbone": names[blocks],
        "num_classes": shape("class_embed.0.weight")[0],
        "num_feature_levels": num_levels,
        "hidden_dim": hidden_dim,
        "num_encoder_layers": _count(state, r"transformer\.encoder\.layers\.\d+\.norm1\.weight"),
        "num_decoder_layers": _count(state, r"transformer\.decoder\.layers\.\d+\.norm1\.weight"),
        "feedforward_dim": shape("transformer.encoder.layers.0.linear1.weight")[0],
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in state,
        "two_stage": "transformer.enc_output.weight" in state,
    }
    for name, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        key = f"transformer.{name}.layers.0.{attention}.attention_weights.bias"
        if shape(key)[0] % samples != 0:
            raise ValueError(
                f"{key} must have a multiple of {samples} entries (heads times levels), "
                f"got {shape(key)[0]}"
            )
        found[f"num_{name}_points"] = shape(key)[0] // samples
    if "query_embed.weight" in state:
        found["num_queries"] = shape("query_embed.weight")[0]
    return ModelConfig(**(settings | found))


def _count(state: State, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)


def _without_leftovers(state: State) -> State:
    """Without the entries that tools leave beside the weights."""
    leftovers = ("total_params", "total_ops", "num_batches_tracked", "n_averaged")
    return {key: tensor for key, tensor in state.items() if not key.endswith(leftovers)}


# ---- into a model --------------------------------------------------------------------------------

_CLASS_HEADS = ("class_embed.", "transformer.decoder.class_embed.")


def load_model(path: str | Path) -> tuple[DeformableDETR, Checkpoint]:
    """Build the model of a checkpoint, for evaluation; see :func:`read_checkpoint`."""
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint.config.model)
    try:
        load_into(model, checkpoint.state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model.eval(), checkpoint


def load_into(model: DeformableDETR, state: State, reset_classes: bool = False) -> None:
    """Load a state dict of which every key and shape must fit.

    Args:
        model: to be overwritten.
        state: of a checkpoint.
        reset_classes: keep the model's own class heads, to fine-tune on other classes. Of the
            head that scores the proposals of a two-stage model, the first row (object or not) is
            loaded all the same.

    Raises:
        ValueError: it does not fit; names what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    if reset_classes:
        state = dict(state)
        proposals = f"class_embed.{model.config.num_decoder_layers}."  # two-stage only
        for key in [key for key in own if key.startswith(_CLASS_HEADS)]:
            head = own[key].clone()
            if proposals in key and key in state:
                head[0] = state[key][0]
            state[key] = head
    problems = weight_files.misfits(own, state)
    if not problems:
        model.load_state_dict(state)
        return
    if all(key in own and key in state and key.startswith(_CLASS_HEADS) for key in problems):
        raise ValueError(
            f"the checkpoint has other classes than the model: {next(iter(problems.values()))}; to "
            "fine-tune on the model's classes with new class heads, pass reset_classes=True "
            "(--reset-classes)"
        )
    listed = weight_files.shortened(problems.values(), "; ", 5)
    raise ValueError(f"the checkpoint does not fit the model: {listed}")


# ---- the names of transformers -------------------------------------------------------------------

_LEGACY = [  # older files on the hub; transformers renames them too
    (r"^model\.backbone\.conv_encoder\.", r"model.backbone."),
    (r"\.self_attn\.out_proj\.", r".self_attn.o_proj."),
    (r"\.layers\.(\d+)\.fc([12])\.", r".layers.\1.mlp.fc\2."),
]
_RULES = [
    ("query_embed.", "model.query_position_embeddings."),
    ("input_proj.", "model.input_proj."),
    ("backbone.1.row_embed.", "model.position_embedding.row_embeddings."),
    ("backbone.1.col_embed.", "model.position_embedding.column_embeddings."),
    *(
        (f"transformer.{part}.layers.{{}}.{ours}.", f"model.{part}.layers.{{}}.{theirs}.")
        for part, ours, theirs in (
            ("encoder", "norm1", "self_attn_layer_norm"),
            ("encoder", "norm2", "final_layer_norm"),
            ("encoder", "linear1", "mlp.fc1"),
            ("encoder", "linear2", "mlp.fc2"),
            ("decoder", "cross_attn", "encoder_attn"),
            ("decoder", "self_attn.out_proj", "self_attn.o_proj"),
            ("decoder", "norm1", "encoder_attn_layer_norm"),
            ("decoder", "norm2", "self_attn_layer_norm"),
            ("decoder", "norm3", "final_layer_norm"),
            ("decoder", "linear1", "mlp.fc1"),
            ("decoder", "linear2", "mlp.fc2"),
        )
    ),
    ("transformer.", "model."),  # last: it would match the others too
]
# The backbone: timm's ResNet is called as torchvision's, transformers' own is not.
_TIMM_RULES = [("backbone.0.body.", "model.backbone.model.")]
_RESNET_STEM = "model.backbone.model.embedder.embedder."
_RESNET_RULES = [
    ("backbone.0.body.conv1.", f"{_RESNET_STEM}convolution."),
    ("backbone.0.body.bn1.", f"{_RESNET_STEM}normalization."),
    *(
        (
            f"backbone.0.body.layer{stage + 1}.{{}}.{ours}.",
            f"model.backbone.model.encoder.stages.{stage}.layers.{{}}.{theirs}.",
        )
        for stage in range(4)
        for ours, theirs in (
            *((f"conv{i + 1}", f"layer.{i}.convolution") for i in range(3)),
            *((f"bn{i + 1}", f"layer.{i}.normalization") for i in range(3)),
            ("downsample.0", "shortcut.convolution"),
            ("downsample.1", "shortcut.normalization"),
        )
    ),
]
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    """Replace the start of a key by the first rule that fits; {} stands for a number."""
    for old, new in rules:
        match = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), key)
        if match:
            return new.format(*match.groups()) + key[match.end() :]
    return key


def to_transformers(state: State, timm: bool = False) -> State:
    """Give a state dict the names of transformers' ``DeformableDetrForObjectDetection``.

    Args:
        state: with the original's keys.
        timm: name the backbone as timm does, not as transformers' own ResNet.
    """
    rules = (_TIMM_RULES if timm else _RESNET_RULES) + _RULES
    renamed = {}
    for key, tensor in state.items():
        layer, joined, kind = key.rpartition("in_proj_")  # ...self_attn. in_proj_ weight
        if joined:
            for name, part in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
                renamed[_rename(f"{layer}{name}.{kind}", rules)] = part
        else:
            renamed[_rename(key, rules)] = tensor
    return renamed


def from_transformers(state: State) -> State:
    """The inverse of :func:`to_transformers`, for either backbone; also reads older names.

    Tensors that transformers leaves out of its files, being other names of ones that are there,
    are put back.
    """
    rules = [(new, old) for old, new in _RESNET_RULES + _TIMM_RULES + _RULES]
    renamed = {}
    for key, tensor in _without_leftovers(state).items():
        for pattern, replacement in _LEGACY:
            key = re.sub(pattern, replacement, key)
        renamed[_rename(key, rules)] = tensor
    for key in [key for key in renamed if ".q_proj." in key]:
        parts = [renamed.pop(key.replace("q_proj", name)) for name in _PROJECTIONS]
        renamed[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return _with_aliases(renamed)


def _with_aliases(state: State) -> State:
    """Add the names that transformers leaves out: of shared heads, and of the decoder's heads."""
    two_stage = "transformer.enc_output.weight" in state
    refine = any(key.startswith("transformer.decoder.bbox_embed.") for key in state)
    num_heads = _count(state, r"transformer\.decoder\.layers\.\d+\.norm1\.weight") + two_stage
    kinds = ("weight", "bias")
    tails = [f"layers.{layer}.{kind}" for layer in range(3) for kind in kinds]
    complete = dict(state)
    for head, in_decoder, ends in (
        ("class_embed", two_stage, kinds),
        ("bbox_embed", refine, tails),
    ):
        for n, end in itertools.product(range(num_heads), ends):
            key, alias = f"{head}.{n}.{end}", f"transformer.decoder.{head}.{n}.{end}"
            source = next((k for k in (key, alias, f"{head}.0.{end}") if k in complete), None)
            if source is not None:
                complete[key] = complete[source]
                if in_decoder:
                    complete[alias] = complete[source]
    return complete


# ---- writing -------------------------------------------------------------------------------------


def save_ours(path: Path, checkpoint: Checkpoint) -> None:
    """Write weights, and what it takes to use them, in this program's format."""
    content = {
        "model": checkpoint.state,
        "ema": None,
        "config": checkpoint.config.to_dict(),
        "categories": checkpoint.categories,
        "category_ids": checkpoint.category_ids,
    }
    run_checkpoints.save(content, path)


def save_original(path: Path, checkpoint: Checkpoint) -> None:
    """Write weights for the original's ``main.py --resume``, with the command line they need."""
    config = checkpoint.config.model
    _check_convertible(config)
    arguments = {theirs: getattr(config, ours) for ours, theirs in _ARGUMENTS.items()}
    content = {"model": checkpoint.state, "args": argparse.Namespace(masks=False, **arguments)}
    run_checkpoints.write(content, path)


def save_transformers(folder: Path, checkpoint: Checkpoint, timm: bool = False) -> None:
    """Write a folder for ``DeformableDetrForObjectDetection.from_pretrained``.

    Args:
        folder: made if it does not exist.
        checkpoint: to be written.
        timm: let transformers take the backbone from timm instead of building its own ResNet;
            needed for dilation.
    """
    config = checkpoint.config.model
    _check_convertible(config)
    if config.dilation and not timm:
        raise ValueError("timm must be set (--timm) for a model with dilation, got timm=False")
    stages = [4] if config.num_feature_levels == 1 else [2, 3, 4]
    if timm:
        backbone = {
            "model_type": "timm_backbone",
            "backbone": config.backbone,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": stages,
        }
        backbone |= {"output_stride": 16} if config.dilation else {}
    else:
        backbone = {
            "model_type": "resnet",
            "depths": RESNET_BLOCKS[config.backbone],
            "out_features": [f"stage{stage}" for stage in stages],
        }
    labels = checkpoint.categories or [f"LABEL_{label}" for label in range(config.num_classes)]
    settings = {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "backbone_config": backbone,
        "use_timm_backbone": timm,
        "dilation": config.dilation,
        "position_embedding_type": config.position_embedding,
        "d_model": config.hidden_dim,
        "num_feature_levels": config.num_feature_levels,
        "num_queries": config.num_queries,
        "dropout": config.dropout,
        "with_box_refine": config.box_refine,
        "two_stage": config.two_stage,
        "two_stage_num_proposals": config.num_queries,
        "auxiliary_loss": config.aux_loss,
        "id2label": dict(enumerate(labels)),
        "label2id": {name: label for label, name in enumerate(labels)},
    }
    for part in ("encoder", "decoder"):
        settings |= {
            f"{part}_layers": getattr(config, f"num_{part}_layers"),
            f"{part}_n_points": getattr(config, f"num_{part}_points"),
            f"{part}_attention_heads": config.num_heads,
            f"{part}_ffn_dim": config.feedforward_dim,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # safetensors holds no tensor under two names; transformers ties them again.
    tensors = {
        key: tensor.clone() for key, tensor in to_transformers(checkpoint.state, timm).items()
    }
    weight_files.safetensors().save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _check_convertible(config: ModelConfig) -> None:
    if config.attention != "deformable" or config.backbone not in RESNET_BLOCKS:
        raise ValueError(
            f"a model to be converted must have attention 'deformable' and a backbone of "
            f"{', '.join(RESNET_BLOCKS)}, got {config.attention!r} and {config.backbone!r}"
        )
