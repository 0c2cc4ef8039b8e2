"""Small models of every family of transformers that has the operator's attention."""

import functools
import inspect

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

C = 32  # channels: the group norms of some families have 32 groups
HEADS = dict(encoder_attention_heads=2, decoder_attention_heads=2)
WIDTHS = dict(encoder_ffn_dim=16, decoder_ffn_dim=16)
SMALL = dict(num_queries=7, num_labels=3)
LAYERS = dict(encoder_layers=1, decoder_layers=2)


def stages(first):
    return [f"stage{number}" for number in range(first, 5)]


def resnet(config=None, first=2):
    config = config or transformers.ResNetConfig
    sizes = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4)
    return config(**sizes, layer_type="basic", out_features=stages(first))


def swin():
    sizes = dict(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, image_size=64)
    return transformers.SwinConfig(**sizes, out_features=stages(2))


def images(height=64, width=96):
    return dict(pixel_values=torch.randn(2, 3, height, width))


def deformable_detr(two_stage=False):
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet(),
        d_model=C,
        two_stage=two_stage,
        with_box_refine=two_stage,
        two_stage_num_proposals=7,
        **HEADS,
        **WIDTHS,
        **SMALL,
        **LAYERS,
    )
    return transformers.DeformableDetrForObjectDetection(config), images()


def grounding_dino(name="GroundingDino"):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = transformers.BertConfig(**sizes, vocab_size=1100, max_position_embeddings=32)
    config = getattr(transformers, f"{name}Config")(
        backbone_config=swin(),
        text_config=text,
        d_model=C,
        max_text_len=8,
        **HEADS,
        **WIDTHS,
        **SMALL,
        **LAYERS,
    )
    words = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102]] * 2)  # 101, 102, 1012: [CLS], [SEP], "."
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    return model, images() | dict(input_ids=words)


def like_rt_detr(name, first_stage=2, **options):
    """RT-DETR and what was made from it."""
    config = getattr(transformers, f"{name}Config")(
        backbone_config=resnet(transformers.RTDetrResNetConfig, first_stage),
        d_model=C,
        encoder_hidden_dim=C,
        encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[C] * 3,
        num_denoising=0,
        **HEADS,
        **WIDTHS,
        **SMALL,
        **LAYERS,
        **options,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config), images()


def pp_doclayout_v2():
    reading_order = dict(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
        coordinate_size=4,
        shape_size=2,
        num_classes=3,
        max_position_embeddings=32,
        relation_bias_embed_dim=4,
        global_pointer_head_size=4,
    )
    classes = dict(class_thresholds=[0.5] * 3, class_order=[0, 1, 2])
    return like_rt_detr("PPDocLayoutV2", reading_order_config=reading_order, **classes)


def pp_doclayout_v3():
    sizes = dict(x4_feat_dim=8, mask_feature_channels=[8, 8], num_prototypes=4)
    return like_rt_detr("PPDocLayoutV3", first_stage=1, **sizes)


def like_lw_detr(name, backbone, **options):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1)
    sizes |= dict(image_size=64, patch_size=8, out_features=["stage1", "stage2"])
    config = getattr(transformers, f"{name}Config")(
        backbone_config=getattr(transformers, backbone)(**sizes, **options.pop("vit")),
        d_model=C,
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=4,
        group_detr=2,
        c2f_num_blocks=1,
        **SMALL,
        **options,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config), images(64, 64)


def lw_detr():
    vit = dict(pretrain_image_size=64, num_windows=4)
    return like_lw_detr("LwDetr", "LwDetrViTConfig", vit=vit, projector_scale_factors=[2.0, 0.5])


def rf_detr():
    from transformers.models.rf_detr import configuration_rf_detr

    transformers.RfDetrDinov2Config = configuration_rf_detr.RfDetrDinov2Config
    return like_lw_detr("RfDetr", "RfDetrDinov2Config", vit=dict(num_windows=2), decoder_n_points=2)


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=resnet(first=1),
        feature_size=C,
        mask_feature_size=C,
        hidden_dim=C,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=2,
        **SMALL,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), images()


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=resnet(first=1),
        conv_dim=C,
        mask_dim=C,
        hidden_dim=C,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=2,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        text_encoder_width=16,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=20,
        text_encoder_context_length=5,
        task_seq_len=5,
        **SMALL,
    )
    task = dict(task_inputs=torch.randint(0, 20, (2, 5)))
    return transformers.OneFormerForUniversalSegmentation(config), images() | task


def omdet_turbo():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = transformers.CLIPTextConfig(
        **sizes, vocab_size=50, max_position_embeddings=8, projection_dim=16, eos_token_id=49
    )
    config = transformers.OmDetTurboConfig(
        text_config=text,
        backbone_config=swin(),
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        task_encoder_hidden_dim=16,
        class_embed_dim=16,
        num_queries=7,
        encoder_hidden_dim=C,
        vision_features_channels=[C] * 3,
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=2,
        encoder_dim_feedforward=16,
        decoder_hidden_dim=C,
        decoder_num_heads=2,
        decoder_num_layers=2,
        decoder_dim_feedforward=16,
    )
    classes = torch.tensor([[5, 6, 49], [7, 8, 49], [5, 9, 49], [1, 2, 49]])
    tasks = torch.tensor([[3, 4, 49]] * 2)
    words = dict(
        classes_input_ids=classes,
        classes_attention_mask=torch.ones_like(classes),
        classes_structure=torch.tensor([2, 2]),
        tasks_input_ids=tasks,
        tasks_attention_mask=torch.ones_like(tasks),
    )
    return transformers.OmDetTurboForObjectDetection(config), images(64, 64) | words


# Models and the number of their layers with a core.
FAMILIES = {
    "deformable_detr": (deformable_detr, 3),
    "deformable_detr_two_stage": (functools.partial(deformable_detr, two_stage=True), 3),
    "grounding_dino": (grounding_dino, 3),
    "mm_grounding_dino": (functools.partial(grounding_dino, "MMGroundingDino"), 3),
    "rt_detr": (functools.partial(like_rt_detr, "RTDetr"), 2),
    "rt_detr_v2": (functools.partial(like_rt_detr, "RTDetrV2"), 2),
    "rt_detr_v2_discrete": (
        functools.partial(like_rt_detr, "RTDetrV2", decoder_method="discrete"),
        2,
    ),
    "d_fine": (functools.partial(like_rt_detr, "DFine", decoder_n_points=[3, 6, 3]), 2),
    "deimv2": (functools.partial(like_rt_detr, "Deimv2", decoder_n_points=[3, 6, 3]), 2),
    "pp_doclayout_v2": (pp_doclayout_v2, 2),
    "pp_doclayout_v3": (pp_doclayout_v3, 2),
    "pp_doclayout_v4": (
        functools.partial(like_rt_detr, "PPDocLayoutV4", hidden_size=C),
        2,
    ),
    "lw_detr": (lw_detr, 2),
    "rf_detr": (rf_detr, 2),
    "mask2former": (mask2former, 2),
    "oneformer": (oneformer, 2),
    "omdet_turbo": (omdet_turbo, 2),
}


def randomised(model):
    """The model with weights that make its outputs depend on where each query samples."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def make_model(family, dtype=torch.float64):
    """A random model and its inputs; float64, where top-k choices do not hang on rounding."""
    model, inputs = FAMILIES[family][0]()
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return randomised(model).to(dtype), inputs


def tensors_of(output, name=""):
    """Every tensor of a model's output, by name."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    if not isinstance(output, dict | list | tuple):
        return {}
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return {
        path: tensor for key, x in items for path, tensor in tensors_of(x, f"{name}.{key}").items()
    }


def forward(model, inputs):
    with torch.no_grad():
        return tensors_of(model(**inputs))


def make_layer(family):
    """The first layer with a core of a small model, and arguments for it."""
    model, inputs = make_model(family, torch.float32)
    name = next(name for name, x in model.named_modules() if hasattr(x, "sampling_offsets"))
    layer, taken = model.get_submodule(name), {}

    def keep(_, args, kwargs):
        taken.update(inspect.signature(layer.forward).bind(*args, **kwargs).arguments)

    with layer.register_forward_pre_hook(keep, with_kwargs=True):
        forward(model, inputs)
    taken.pop("kwargs", None)
    return layer, taken
