"""Small detectors, their inputs and outputs, and the files they are saved in."""

import argparse

import pytest
import torch

from detector.backbone import FrozenBatchNorm2d
from detector.checkpoint_formats import Checkpoint, read_checkpoint
from detector.config import Config, ModelConfig
from msda import MSDeformAttn
from msda.reference import ms_deform_attn_fused_reference

DEFORMABLE = {
    "single_scale": dict(num_feature_levels=1),
    "multi_scale": dict(),
    "iter_refine": dict(box_refine=True),
    "two_stage": dict(box_refine=True, two_stage=True),
}
DENSE = {
    "dense": dict(attention="dense", reference_boxes=False),
    "dense_reference": dict(attention="dense"),
    "dense_refine": dict(attention="dense", box_refine=True),
}
VARIANTS = DEFORMABLE | DENSE
every_deformable = pytest.mark.parametrize("variant", DEFORMABLE)
every_dense = pytest.mark.parametrize("variant", DENSE)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny_config(variant="multi_scale", **changes):
    """The tiny backbone with a small transformer."""
    sizes = dict(
        backbone="tiny",
        num_classes=5,
        hidden_dim=64,  # two channels in each group of the norms
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        feedforward_dim=48,
        num_encoder_points=2,
        num_decoder_points=3,
        num_queries=9,
        dropout=0.0,
    )
    return ModelConfig(**(sizes | VARIANTS[variant] | changes))


def resnet_config(variant="multi_scale", **changes):
    """ResNet-50 with a small transformer."""
    sizes = dict(
        num_classes=7,
        hidden_dim=32,
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=3,
        feedforward_dim=48,
        num_encoder_points=2,
        num_decoder_points=3,
        num_queries=20,
    )
    return ModelConfig(**(sizes | DEFORMABLE[variant] | changes))


def randomise(model, scale=0.1):
    """Let every tensor matter, those that start at zero too; ``scale`` is of the transformer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 if "backbone" in name else scale)
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.weight.uniform_(0.3, 0.6)
                module.bias.uniform_(-0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model


def padded_batch(dtype=torch.float64, height=96, width=128):
    """Two images, the second one padded."""
    images = torch.randn(2, 3, height, width, dtype=dtype)
    padding_mask = torch.zeros(2, height, width, dtype=torch.bool)
    padding_mask[1, height * 2 // 3 :] = True
    padding_mask[1, :, width * 3 // 4 :] = True
    images.masked_fill_(padding_mask[:, None], 0)
    return images, padding_mask


def flat(outputs):
    """Every tensor among the outputs, by name."""
    tensors = {}
    for name, entry in outputs.items():
        if isinstance(entry, torch.Tensor):
            tensors[name] = entry
        for place, part in enumerate(entry) if isinstance(entry, list) else [("", entry)]:
            if isinstance(part, dict):
                tensors |= {f"{name}{place}.{key}": tensor for key, tensor in part.items()}
    return tensors


def loss(outputs):
    """A number that depends on all outputs; logits of padding are infinite, their boxes are not."""
    return sum(
        (
            tensor * torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        ).sum()
        for tensor in flat(outputs).values()
    )


class ReferenceAttention(MSDeformAttn):
    """MSDeformAttn on the plain PyTorch definition of the operator."""

    def forward(self, query, reference_points, input_flatten, shapes, start=None, mask=None):
        samples = (self.n_levels, self.n_points)
        output = ms_deform_attn_fused_reference(
            self.value_proj(input_flatten).unflatten(-1, (self.n_heads, -1)),
            shapes,
            start,
            reference_points,
            self.sampling_offsets(query).unflatten(-1, (self.n_heads, *samples, 2)),
            self.attention_weights(query).unflatten(-1, (self.n_heads, *samples)),
            padding_mask=mask,
        )
        return self.output_proj(output)


# ---- files ---------------------------------------------------------------------------------------


def load_weights(path):
    """State dict, model and names of classes of a checkpoint."""
    checkpoint = read_checkpoint(path)
    return checkpoint.state, checkpoint.config.model, checkpoint.categories


def checkpoint_of(model, categories=None):
    ids = list(range(10, 10 + model.config.num_classes))
    return Checkpoint(model.state_dict(), Config(model=model.config), categories, ids)


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def original_file(path, trained, **changes):
    """What the original's training writes."""
    arguments = dict(
        lr=2e-4, lr_backbone_names=["backbone.0"], nheads=4, dropout=0.25, dilation=False,
        num_queries=20, aux_loss=True, masks=False, output_dir="exps", device="cuda",
    )  # fmt: skip
    content = {
        "model": trained.state_dict(),
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler": {"step_size": 40, "_last_lr": [2e-4]},
        "epoch": 49,
        "args": argparse.Namespace(**arguments),
    }
    torch.save(content | changes, path)
    return path
