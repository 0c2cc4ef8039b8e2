"""`kernelize` of Hugging Face's kernels package puts our layer into a model, from a folder."""

import json
import shutil

import pytest
import torch
from torch import nn

from msda.integrations.kernels import REPOSITORY, MultiScaleDeformableAttention
from msda.testing import make_inputs
from tests.helpers.results import assert_close, assert_same_bits
from tests.integrations.plain_attention import as_maps, attend

NAME = "MultiScaleDeformableAttention"
SHAPES = [(4, 6), (3, 2)]


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("kernels", reason="the kernels package is not installed")


class Core(nn.Module):
    """Stands for transformers' module of that name."""

    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        maps = as_maps(value, value_spatial_shapes_list)
        return attend(maps, sampling_locations.unbind(3), attention_weights.unbind(3))


def problem():
    """Arguments of the core, and those of them that are leaves."""
    inputs = make_inputs(
        SHAPES, batch=2, num_queries=5, num_heads=2, head_dim=4, num_points=3, dtype=torch.float64
    )
    value, locations, weights = leaves = [x.requires_grad_() for x in inputs.tensors()]
    shapes, start = torch.tensor(SHAPES), torch.tensor([0, 24])
    return (value, shapes, SHAPES, start, locations, weights, 64), leaves


def results(core):
    arguments, leaves = problem()
    output = core(*arguments)
    return output, *torch.autograd.grad(output.square().sum(), leaves)


def mapping(kernels, folder=REPOSITORY):
    layer = kernels.LocalLayerRepository(folder, layer_name=NAME)
    return kernels.use_kernel_mapping({NAME: {"cpu": layer}}, inherit_mapping=False)


@pytest.fixture
def model(kernels):
    @kernels.use_kernel_forward_from_hub(NAME)
    class Layer(Core):
        pass

    return nn.Sequential(Layer())


def test_the_layer_computes_what_it_replaces():
    for mine, theirs in zip(results(MultiScaleDeformableAttention()), results(Core()), strict=True):
        assert_close(mine, theirs, 1e-12)


@pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE"])
def test_kernelize_puts_our_layer_in_place_from_the_folder(kernels, model, mode):
    expected = results(model[0])
    mode = getattr(kernels.Mode, mode) | kernels.Mode.TORCH_COMPILE
    with mapping(kernels):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert model[0].forward.__func__ is MultiScaleDeformableAttention.forward
    for mine, theirs in zip(results(model[0]), expected, strict=True):
        assert_close(mine, theirs, 1e-12)
    compiled = torch.compile(model[0], fullgraph=True, backend="eager")
    assert_same_bits(results(compiled)[0], results(model[0])[0])


def test_the_folder_serves_every_device_and_torch_and_names_its_licence(kernels, tmp_path):
    """As a copy too, which is what is put on a hub."""
    (variant,) = (path.parent for path in REPOSITORY.glob("*/metadata.json"))
    assert variant.name == "torch-universal"
    assert json.loads((variant / "metadata.json").read_text())["license"] == "Apache-2.0"
    copy = shutil.copytree(variant, tmp_path / "build" / variant.name)
    module = kernels.get_local_kernel(tmp_path)
    assert module.__file__ == str(copy / "__init__.py")
    assert module.layers.MultiScaleDeformableAttention is MultiScaleDeformableAttention
