"""Keys and shapes of the original's checkpoints."""

import itertools
import re

# The original's state dicts: the variants by their first letter, keys, shape. {a,b} stands for
# either, {0-5} for a digit.
OFFICIAL = """
smit backbone.0.body.conv1.weight                                      64 3 7 7
smit backbone.0.body.bn1.{weight,bias,running_mean,running_var}        64
smit backbone.0.body.layer1.0.conv1.weight                             64 64 1 1
smit backbone.0.body.layer1.{1-2}.conv1.weight                         64 256 1 1
smit backbone.0.body.layer1.{0-2}.conv2.weight                         64 64 3 3
smit backbone.0.body.layer1.{0-2}.conv3.weight                         256 64 1 1
smit backbone.0.body.layer1.{0-2}.bn{1,2}.{weight,bias,running_mean,running_var}  64
smit backbone.0.body.layer1.{0-2}.bn3.{weight,bias,running_mean,running_var}      256
smit backbone.0.body.layer1.0.downsample.0.weight                      256 64 1 1
smit backbone.0.body.layer1.0.downsample.1.{weight,bias,running_mean,running_var} 256
smit backbone.0.body.layer2.0.conv1.weight                             128 256 1 1
smit backbone.0.body.layer2.{1-3}.conv1.weight                         128 512 1 1
smit backbone.0.body.layer2.{0-3}.conv2.weight                         128 128 3 3
smit backbone.0.body.layer2.{0-3}.conv3.weight                         512 128 1 1
smit backbone.0.body.layer2.{0-3}.bn{1,2}.{weight,bias,running_mean,running_var}  128
smit backbone.0.body.layer2.{0-3}.bn3.{weight,bias,running_mean,running_var}      512
smit backbone.0.body.layer2.0.downsample.0.weight                      512 256 1 1
smit backbone.0.body.layer2.0.downsample.1.{weight,bias,running_mean,running_var} 512
smit backbone.0.body.layer3.0.conv1.weight                             256 512 1 1
smit backbone.0.body.layer3.{1-5}.conv1.weight                         256 1024 1 1
smit backbone.0.body.layer3.{0-5}.conv2.weight                         256 256 3 3
smit backbone.0.body.layer3.{0-5}.conv3.weight                         1024 256 1 1
smit backbone.0.body.layer3.{0-5}.bn{1,2}.{weight,bias,running_mean,running_var}  256
smit backbone.0.body.layer3.{0-5}.bn3.{weight,bias,running_mean,running_var}      1024
smit backbone.0.body.layer3.0.downsample.0.weight                      1024 512 1 1
smit backbone.0.body.layer3.0.downsample.1.{weight,bias,running_mean,running_var} 1024
smit backbone.0.body.layer4.0.conv1.weight                             512 1024 1 1
smit backbone.0.body.layer4.{1-2}.conv1.weight                         512 2048 1 1
smit backbone.0.body.layer4.{0-2}.conv2.weight                         512 512 3 3
smit backbone.0.body.layer4.{0-2}.conv3.weight                         2048 512 1 1
smit backbone.0.body.layer4.{0-2}.bn{1,2}.{weight,bias,running_mean,running_var}  512
smit backbone.0.body.layer4.{0-2}.bn3.{weight,bias,running_mean,running_var}      2048
smit backbone.0.body.layer4.0.downsample.0.weight                      2048 1024 1 1
smit backbone.0.body.layer4.0.downsample.1.{weight,bias,running_mean,running_var} 2048
s--- input_proj.0.0.weight                                             256 2048 1 1
-mit input_proj.0.0.weight                                             256 512 1 1
-mit input_proj.1.0.weight                                             256 1024 1 1
-mit input_proj.2.0.weight                                             256 2048 1 1
-mit input_proj.3.0.weight                                             256 2048 3 3
smit input_proj.0.0.bias                                               256
smit input_proj.0.1.{weight,bias}                                      256
-mit input_proj.{1-3}.0.bias                                           256
-mit input_proj.{1-3}.1.{weight,bias}                                  256
s--- transformer.level_embed                                           1 256
-mit transformer.level_embed                                           4 256
s--- transformer.encoder.layers.{0-5}.self_attn.sampling_offsets.weight   64 256
s--- transformer.encoder.layers.{0-5}.self_attn.sampling_offsets.bias     64
s--- transformer.encoder.layers.{0-5}.self_attn.attention_weights.weight  32 256
s--- transformer.encoder.layers.{0-5}.self_attn.attention_weights.bias    32
s--- transformer.decoder.layers.{0-5}.cross_attn.sampling_offsets.weight  64 256
s--- transformer.decoder.layers.{0-5}.cross_attn.sampling_offsets.bias    64
s--- transformer.decoder.layers.{0-5}.cross_attn.attention_weights.weight 32 256
s--- transformer.decoder.layers.{0-5}.cross_attn.attention_weights.bias   32
-mit transformer.encoder.layers.{0-5}.self_attn.sampling_offsets.weight   256 256
-mit transformer.encoder.layers.{0-5}.self_attn.sampling_offsets.bias     256
-mit transformer.encoder.layers.{0-5}.self_attn.attention_weights.weight  128 256
-mit transformer.encoder.layers.{0-5}.self_attn.attention_weights.bias    128
-mit transformer.decoder.layers.{0-5}.cross_attn.sampling_offsets.weight  256 256
-mit transformer.decoder.layers.{0-5}.cross_attn.sampling_offsets.bias    256
-mit transformer.decoder.layers.{0-5}.cross_attn.attention_weights.weight 128 256
-mit transformer.decoder.layers.{0-5}.cross_attn.attention_weights.bias   128
smit transformer.encoder.layers.{0-5}.self_attn.{value_proj,output_proj}.weight   256 256
smit transformer.encoder.layers.{0-5}.self_attn.{value_proj,output_proj}.bias     256
smit transformer.encoder.layers.{0-5}.linear1.weight                   1024 256
smit transformer.encoder.layers.{0-5}.linear1.bias                     1024
smit transformer.encoder.layers.{0-5}.linear2.weight                   256 1024
smit transformer.encoder.layers.{0-5}.linear2.bias                     256
smit transformer.encoder.layers.{0-5}.norm{1,2}.{weight,bias}          256
smit transformer.decoder.layers.{0-5}.cross_attn.{value_proj,output_proj}.weight  256 256
smit transformer.decoder.layers.{0-5}.cross_attn.{value_proj,output_proj}.bias    256
smit transformer.decoder.layers.{0-5}.self_attn.in_proj_weight         768 256
smit transformer.decoder.layers.{0-5}.self_attn.in_proj_bias           768
smit transformer.decoder.layers.{0-5}.self_attn.out_proj.weight        256 256
smit transformer.decoder.layers.{0-5}.self_attn.out_proj.bias          256
smit transformer.decoder.layers.{0-5}.linear1.weight                   1024 256
smit transformer.decoder.layers.{0-5}.linear1.bias                     1024
smit transformer.decoder.layers.{0-5}.linear2.weight                   256 1024
smit transformer.decoder.layers.{0-5}.linear2.bias                     256
smit transformer.decoder.layers.{0-5}.norm{1,2,3}.{weight,bias}        256
smi- transformer.reference_points.weight                               2 256
smi- transformer.reference_points.bias                                 2
smi- query_embed.weight                                                300 512
---t transformer.enc_output.weight                                     256 256
---t transformer.enc_output.bias                                       256
---t transformer.enc_output_norm.{weight,bias}                         256
---t transformer.pos_trans.weight                                      512 512
---t transformer.pos_trans.bias                                        512
---t transformer.pos_trans_norm.{weight,bias}                          512
smit class_embed.{0-5}.weight                                          91 256
smit class_embed.{0-5}.bias                                            91
---t class_embed.6.weight                                              91 256
---t class_embed.6.bias                                                91
smit bbox_embed.{0-5}.layers.{0,1}.weight                              256 256
smit bbox_embed.{0-5}.layers.{0,1}.bias                                256
smit bbox_embed.{0-5}.layers.2.weight                                  4 256
smit bbox_embed.{0-5}.layers.2.bias                                    4
---t bbox_embed.6.layers.{0,1}.weight                                  256 256
---t bbox_embed.6.layers.{0,1}.bias                                    256
---t bbox_embed.6.layers.2.weight                                      4 256
---t bbox_embed.6.layers.2.bias                                        4
--it transformer.decoder.bbox_embed.{0-5}.layers.{0,1}.weight          256 256
--it transformer.decoder.bbox_embed.{0-5}.layers.{0,1}.bias            256
--it transformer.decoder.bbox_embed.{0-5}.layers.2.weight              4 256
--it transformer.decoder.bbox_embed.{0-5}.layers.2.bias                4
---t transformer.decoder.bbox_embed.6.layers.{0,1}.weight              256 256
---t transformer.decoder.bbox_embed.6.layers.{0,1}.bias                256
---t transformer.decoder.bbox_embed.6.layers.2.weight                  4 256
---t transformer.decoder.bbox_embed.6.layers.2.bias                    4
---t transformer.decoder.class_embed.{0-6}.weight                      91 256
---t transformer.decoder.class_embed.{0-6}.bias                        91
"""
NUM_ENTRIES = {"single_scale": 549, "multi_scale": 561, "iter_refine": 597, "two_stage": 630}
NUM_ALIASES = {"single_scale": 40, "multi_scale": 40, "iter_refine": 36, "two_stage": 56}
NUM_TRAINABLE = {
    "single_scale": 33_844_193,
    "multi_scale": 39_847_265,
    "iter_refine": 40_627_260,
    "two_stage": 40_959_129,
}


def official_shapes(variant):
    """Key -> shape in the original's state dict."""
    shapes = {}
    for line in OFFICIAL.strip().splitlines():
        variants, keys, *shape = line.split()
        if variant[0] not in variants:
            continue
        keys = re.sub(
            r"\{(\d)-(\d)\}",
            lambda match: "{" + ",".join(map(str, range(int(match[1]), int(match[2]) + 1))) + "}",
            keys,
        )
        parts = [part.split(",") for part in re.split(r"[{}]", keys)]
        for key in map("".join, itertools.product(*parts)):
            shapes[key] = tuple(map(int, shape))
    return shapes
