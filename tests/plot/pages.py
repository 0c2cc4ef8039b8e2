"""What stands on a page of msda.plot.explore, decoded."""

import base64
import json
import re

import torch
from torch import nn

from tests.plot.small_attention import make_attention

LOCATION = 3 / 65534 / 2 + 1e-6  # half a step, and what float32 adds
WEIGHT = 1 / 65535 / 2 + 1e-7


def read(path):
    """The data of a page."""
    text = path.read_text()
    content = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL
    )
    return json.loads(content[1])


def numbers(text, dtype=torch.uint16):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).double()


def locations_of(text):
    codes = numbers(text)
    return torch.where(codes == 65535, torch.nan, codes / 65534 * 3 - 1)


def decode(layer):
    """Locations (Q, M, K, 2), weights (Q, M, K), reference points or None, indices (Q,)."""
    shape = (layer["count"], layer["heads"], sum(layer["points"]))
    references = layer["references"]
    if references is not None:
        references = locations_of(references).view(layer["count"], *layer["referenceShape"])
    chosen = layer["chosen"]
    indices = (
        range(layer["total"]) if chosen is None else numbers(chosen, torch.int32).int().tolist()
    )
    return (
        locations_of(layer["locations"]).view(*shape, 2),
        (numbers(layer["weights"]) / 65535).view(shape),
        references,
        list(indices),
    )


def assert_near(actual, expected, atol):
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=atol, equal_nan=True)


class Encoder(nn.Module):
    """Queries are the pixels of two maps; then there are a few others, each with more points."""

    shapes = ((40, 60), (20, 30))

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = make_attention(), make_attention(8)

    def forward(self, image):
        features = torch.rand(1, 3000, 12)
        self.encoder(features, torch.rand(1, 3000, 1, 2), features, self.shapes)
        self.decoder(torch.rand(1, 90, 12), torch.rand(1, 90, 1, 2), features, self.shapes)
