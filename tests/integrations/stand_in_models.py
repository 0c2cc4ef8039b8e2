"""Modules that stand for those of libraries, with cores in every layout that there is."""

import functools

import torch
from torch import nn

from tests.integrations.plain_attention import as_maps, attend, bilinear, discrete

B, Q, M, D, L, P = 2, 5, 2, 4, 2, 3
WIDE = [(3, 7), (2, 5)]  # wider than high
S = 31


# ---- stand-ins for the libraries' cores, in their layouts ----------------------------------------


def plain(value, value_spatial_shapes, sampling_locations, attention_weights):
    """kornia's and RT-DETR v1's; `ms_deform_attn_core_pytorch` in Deformable DETR's kin."""
    shapes = [(int(height), int(width)) for height, width in value_spatial_shapes]
    locations, weights = sampling_locations.unbind(3), attention_weights.unbind(3)
    return attend(as_maps(value, shapes), locations, weights)


def flat(value, value_spatial_shapes, sampling_locations, attention_weights):
    """ultralytics': levels and points share an axis."""
    if sampling_locations.dim() != 5:
        raise TypeError("rank 5")
    split = sampling_locations.shape[3] // len(value_spatial_shapes)
    maps = as_maps(value, value_spatial_shapes)
    return attend(maps, sampling_locations.split(split, 3), attention_weights.split(split, 3))


def channels_first(value, value_spatial_shapes, sampling_locations, attention_weights):
    """LW-DETR's: sizes as a tensor, (B, M, D, S) values that are viewed as maps."""
    num_levels, num_points = sampling_locations.shape[3:5]
    sizes = (value_spatial_shapes[:, 0] * value_spatial_shapes[:, 1]).tolist()
    shapes = value_spatial_shapes.tolist()
    maps = [
        part.view(*value.shape[:3], *shape)
        for part, shape in zip(value.split(sizes, 3), shapes, strict=True)
    ]
    weights = attention_weights.unflatten(3, (num_levels, num_points)).unbind(3)
    return attend(maps, sampling_locations.unbind(3), weights)


def with_sizes(
    value,
    value_spatial_shapes,
    sampling_locations,
    attention_weights,
    value_spatial_shapes_hw=None,
):
    """RF-DETR's, which its `export` calls with merged axes."""
    if sampling_locations.dim() == 5:
        split = (len(value_spatial_shapes_hw), -1)
        sampling_locations = sampling_locations.unflatten(3, split)
    if value_spatial_shapes_hw is not None:
        value_spatial_shapes = torch.tensor(value_spatial_shapes_hw)
    elif not isinstance(value_spatial_shapes, torch.Tensor):
        value_spatial_shapes = torch.tensor(value_spatial_shapes)
    return channels_first(value, value_spatial_shapes, sampling_locations, attention_weights)


def ragged_of(maps, locations, weights, counts, method, by_height):
    if method not in ("default", "discrete"):
        raise UnboundLocalError(method)
    sample = functools.partial(discrete, clamp_by_height=by_height)
    sample = bilinear if method == "default" else sample
    return attend(maps, locations.split(counts, 3), weights.split(counts, 3), sample)


def ragged(
    value,
    value_spatial_shapes,
    sampling_locations,
    attention_weights,
    num_points_list,
    method="default",
):
    """RT-DETR v2's, whose 'discrete' clamps both coordinates by the height."""
    maps = as_maps(value, value_spatial_shapes)
    return ragged_of(
        maps, sampling_locations, attention_weights, num_points_list, method, by_height=True
    )


def levels(
    value,
    value_spatial_shapes,
    sampling_locations,
    attention_weights,
    num_points_list,
    method="default",
):
    """D-FINE's: a (B, M, D, H * W) for each level."""
    _, _, _, _ = value[0].shape
    shapes = value_spatial_shapes
    maps = [level.unflatten(-1, shape) for level, shape in zip(value, shapes, strict=True)]
    return ragged_of(
        maps, sampling_locations, attention_weights, num_points_list, method, by_height=True
    )


def either(
    value,
    value_spatial_shapes,
    sampling_locations,
    attention_weights,
    num_points_list,
    method="default",
    value_shape="default",
):
    """DEIM's, for both decoders."""
    core = {"default": levels, "reshape": ragged}[value_shape]
    return core(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method
    )


# ---- stand-ins for the libraries' modules --------------------------------------------------------


class Layer(nn.Module):
    """The parameters that every such attention has; the core is called by `attend`."""

    def __init__(self):
        super().__init__()
        self.sampling_offsets = nn.Linear(M * D, M * L * P * 2)
        self.attention_weights = nn.Linear(M * D, M * L * P)
        self.value_proj = nn.Linear(M * D, M * D)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, query, reference_points, memory, shapes):
        value = self.value_proj(memory).unflatten(2, (M, D))
        offsets = self.sampling_offsets(query).unflatten(2, (M, L, P, 2))
        weights = self.attention_weights(query).unflatten(2, (M, L * P)).softmax(-1)
        locations = reference_points[:, :, None, None, None] + offsets
        return self.attend(value, shapes, locations, weights)


class Global(Layer):
    """kornia; OneFormer, LW-DETR and others on a CPU name the function otherwise."""

    def attend(self, value, shapes, locations, weights):
        return plain(value, shapes, locations, weights.unflatten(3, (L, P)))


class Kept(Layer):
    """RT-DETR v1."""

    def __init__(self):
        super().__init__()
        self.ms_deformable_attn_core = plain

    def attend(self, value, shapes, locations, weights):
        return self.ms_deformable_attn_core(value, shapes, locations, weights.unflatten(3, (L, P)))


class KeptUnderItsName(Layer):
    """The attribute has the name of a global, which the method does not read."""

    def __init__(self):
        super().__init__()
        self.plain = plain

    def attend(self, value, shapes, locations, weights):
        return self.plain(value, shapes, locations, weights.unflatten(3, (L, P)))


def decorated(method):
    """As mmcv's deprecated_api_warning and torch's own decorators are written."""

    @functools.wraps(method)
    def outer(*args, **kwargs):
        return method(*args, **kwargs)

    return outer


class Decorated(Layer):
    """mmcv, mmdet."""

    @decorated
    @decorated
    def attend(self, value, shapes, locations, weights):
        return plain(value, shapes, locations, weights.unflatten(3, (L, P)))


class Flat(Layer):
    def attend(self, value, shapes, locations, weights):
        return flat(value, shapes, locations.flatten(3, 4), weights)


class ChannelsFirst(Layer):
    def attend(self, value, shapes, locations, weights):
        value = value.transpose(1, 2).transpose(2, 3).contiguous()
        return channels_first(value, torch.tensor(shapes), locations, weights)


class WithSizes(Layer):
    exported = False

    def export(self):
        self.exported = True

    def attend(self, value, shapes, locations, weights):
        value = value.permute(0, 2, 3, 1).contiguous()
        locations = locations.flatten(3, 4) if self.exported else locations
        sizes, tensor = shapes, torch.tensor(shapes)
        return with_sizes(value, tensor, locations, weights, value_spatial_shapes_hw=sizes)


class Ragged(Layer):
    per_level = False

    def __init__(self, method="default"):
        super().__init__()
        self.bound_core = functools.partial(ragged, method=method)

    def attend(self, value, shapes, locations, weights):
        if self.per_level:
            sizes = [height * width for height, width in shapes]
            value = value.permute(0, 2, 3, 1).split(sizes, -1)
        return self.bound_core(value, shapes, locations.flatten(3, 4), weights, [2, 4])


class Levels(Ragged):
    per_level = True

    def __init__(self, method="default"):
        super().__init__()
        self.bound_core = functools.partial(levels, method=method)


class DeimLevels(Ragged):
    per_level = True

    def __init__(self):
        super().__init__()
        self.bound_core = functools.partial(either, method="default")


class DeimTensor(Ragged):
    def __init__(self, method="default"):
        super().__init__()
        self.bound_core = functools.partial(either, method=method, value_shape="reshape")


class CallsWithMethod(Layer):
    """As transformers calls it: the method is an attribute, and given in each call."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def attend(self, value, shapes, locations, weights):
        return ragged(value, shapes, locations.flatten(3, 4), weights, [2, 4], self.method)


FORMS = {
    "kornia": (Global, "plain", "plain"),
    "rt_detr_v1": (Kept, "ms_deformable_attn_core", "plain"),
    "rt_detr_v1_own_name": (KeptUnderItsName, "plain", "plain"),
    "mmcv": (Decorated, "plain", "plain"),
    "ultralytics": (Flat, "flat", "flat points"),
    "lw_detr": (ChannelsFirst, "channels_first", "channels first"),
    "rf_detr": (WithSizes, "with_sizes", "channels first, exported"),
    "rt_detr_v2": (Ragged, "bound_core", "ragged"),
    "rt_detr_v2_discrete": (
        functools.partial(Ragged, "discrete"),
        "bound_core",
        "ragged, clamped by height",
    ),
    "rt_detr_v2_global": (
        functools.partial(CallsWithMethod, "discrete"),
        "ragged",
        "ragged, clamped by height",
    ),
    "d_fine": (Levels, "bound_core", "levels"),
    "d_fine_discrete": (
        functools.partial(Levels, "discrete"),
        "bound_core",
        "levels, clamped by height",
    ),
    "deim": (DeimLevels, "bound_core", "levels"),
    "deim_rt_detr_v2": (DeimTensor, "bound_core", "ragged"),
    "deim_rt_detr_v2_discrete": (
        functools.partial(DeimTensor, "discrete"),
        "bound_core",
        "ragged, clamped by height",
    ),
}


def model_of(layer):
    torch.manual_seed(0)
    return nn.ModuleList([layer(), layer()]).double()


def inputs():
    """Queries, points that reach beyond the map, keys; leaves."""
    random = torch.Generator().manual_seed(1)

    def rand(*size):
        return torch.rand(size, generator=random, dtype=torch.float64)

    points = rand(B, Q, 2) * 0.9 + 0.3  # so that many lie beyond the height of a wide map
    return [x.requires_grad_() for x in (rand(B, Q, M * D), points, rand(B, S, M * D))]


def run(model, shapes=WIDE):
    """Output, and the gradients of inputs and parameters; zero where there is none."""
    leaves = inputs()
    output = sum(layer(*leaves, shapes) for layer in model)
    leaves += list(model.parameters())
    gradients = torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True)
    return output.detach(), *gradients
