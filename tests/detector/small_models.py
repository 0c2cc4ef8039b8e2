"""Small detectors and their files, for the tests of checkpoints."""

import argparse

import torch

from detector.backbone import FrozenBatchNorm2d
from detector.config import ModelConfig

VARIANTS = {
    "single_scale": dict(num_feature_levels=1),
    "multi_scale": dict(),
    "iter_refine": dict(box_refine=True),
    "two_stage": dict(box_refine=True, two_stage=True),
}


def small_config(variant="multi_scale", **changes):
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
    return ModelConfig(**(sizes | VARIANTS[variant] | changes))


def randomise(model):
    """Let every tensor matter, those that start at zero too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 if "backbone" in name else 0.2)
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.weight.uniform_(0.3, 0.6)
                module.bias.uniform_(-0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model


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
