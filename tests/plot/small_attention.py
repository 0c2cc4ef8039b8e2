"""Small attention modules to record, and their arguments."""

import torch
from torch import nn

import msda

SHAPES = [(6, 9), (3, 5)]
NUM_KEYS = 69
QUERIES = 7


def make_attention(n_points=3, dtype=torch.float32):
    """12 channels, 2 levels and 3 heads; offsets and attention depend on the queries."""
    attention = msda.MSDeformAttn(d_model=12, n_levels=2, n_heads=3, n_points=n_points)
    nn.init.normal_(attention.sampling_offsets.weight, std=0.3)
    nn.init.normal_(attention.attention_weights.weight)
    nn.init.normal_(attention.value_proj.bias)
    return attention.to(dtype)


def make_arguments(reference_size=2, levels=2, dtype=torch.float32, device="cpu"):
    query = torch.randn(2, QUERIES, 12)
    reference = torch.rand(2, QUERIES, levels, reference_size) * 0.8 + 0.1
    features = torch.randn(2, NUM_KEYS, 12)
    tensors = (tensor.to(device, dtype) for tensor in (query, reference, features))
    return (*tensors, SHAPES)


class TwoLayers(nn.Module):
    """Attention over itself, then the same module by another name, then one with more points."""

    def __init__(self):
        super().__init__()
        self.first = make_attention()
        self.again = self.first
        self.last = nn.Sequential(make_attention(n_points=[1, 4]))

    def forward(self, query, reference, features, shapes):
        query = self.first(query, reference, features, shapes)
        query = self.again(query, reference, features, shapes)
        return self.last[0](
            query=query,
            reference_points=reference,
            input_flatten=features,
            input_spatial_shapes=torch.tensor(shapes),
        )
