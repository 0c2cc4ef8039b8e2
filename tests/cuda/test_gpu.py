"""What only a CUDA device promises: streams, graphs, no waiting for the GPU, the right device.

The operator itself is tested on CUDA by the other files, with another device; its kernels are
tested without one by test_kernels.py.
"""

import subprocess
import sys

import pytest
import torch

import msda
from msda.testing import (
    OPERATOR,
    call,
    gradient_names,
    leaves,
    make_inputs,
    map_tensors,
    random_like_output,
)
from tests.helpers.cases import every_dtype, every_form
from tests.helpers.results import (
    assert_close,
    assert_gradients_close,
    assert_same_bits,
    compute,
    compute_exactly,
    compute_gradients,
    exact_gradients,
)

SHAPES = [(16, 21), (8, 11), (4, 6)]
SIZES = dict(batch=2, num_queries=50, num_heads=8, head_dim=32, num_points=4)


# The fixture, for this device alone.
pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)


def with_shapes_on_gpu(inputs):
    """The two functions, with spatial shapes as a tensor that the host does not know."""
    shapes = torch.tensor(inputs.spatial_shapes, device="cuda")
    return {
        kind: lambda value, _, *others, function=function, **options: function(
            value, shapes, *others, **options
        )
        for kind, function in OPERATOR.items()
    }


@every_form
def test_spatial_shapes_on_the_gpu_give_the_same_bits(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    assert_same_bits(call(with_shapes_on_gpu(inputs), inputs), compute(inputs))


@every_form
def test_nothing_waits_for_the_gpu(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    grad_output = random_like_output(inputs)
    compute(inputs)  # the first call may load the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for core in (with_shapes_on_gpu(inputs), OPERATOR):
            compute_gradients(core, inputs, grad_output, gradient_names(inputs))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_spatial_shapes_that_do_not_cover_value_end_the_kernel(device):
    program = """if True:
        import torch, msda
        value = torch.rand(1, 12, 1, 4, device="cuda")
        shapes = torch.tensor([[4, 4]], device="cuda")
        points = torch.rand(1, 5, 1, 1, 2, 2, device="cuda")
        msda.ms_deform_attn(value, shapes, None, points, points[..., 0])
        torch.cuda.synchronize()
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0
    assert "spatial_shapes must" in run.stderr
    assert "device-side assert" in run.stderr


@every_form
def test_forward_and_backward_replay_in_a_graph(device, make):
    inputs = leaves(make(SHAPES, **SIZES, device=device))
    grad_output = random_like_output(inputs)

    def step():
        output = compute(inputs)
        return output, torch.autograd.grad(output, inputs.tensors(), grad_output)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = step()

    changed = make(SHAPES, **SIZES, device=device, seed=5)
    with torch.no_grad():
        for tensor, new in zip(inputs.tensors(), changed.tensors(), strict=True):
            tensor.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(output, compute_exactly(inputs))
    names = gradient_names(inputs)
    actual = dict(zip(names, gradients, strict=True))
    assert_gradients_close(inputs, actual, exact_gradients(inputs, grad_output))


def test_work_is_enqueued_on_the_current_stream(device):
    inputs = make_inputs([(128, 128)], batch=8, device=device)
    stream = torch.cuda.Stream()
    # Long work ahead on the stream: a kernel on any other one would read value before it is there.
    value = torch.zeros_like(inputs.value)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        value.copy_(inputs.value)
        shapes, points, weights = inputs.spatial_shapes, *inputs.tensors()[1:]
        output = msda.ms_deform_attn(value, shapes, None, points, weights)
    stream.synchronize()
    assert_same_bits(output, compute(inputs))


def test_runs_on_the_device_of_its_inputs(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device only")
    inputs = make_inputs(SHAPES, **SIZES, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(compute(inputs), compute_exactly(inputs))
    assert torch.cuda.current_device() == 0


@every_dtype
@every_form
def test_deterministic_backward_matches_and_repeats(device, make, dtype, deterministic):
    inputs = make(SHAPES, **SIZES, dtype=dtype, device=device)
    grad_output = random_like_output(inputs)
    names = gradient_names(inputs)
    first, second = (compute_gradients(OPERATOR, inputs, grad_output, names) for _ in range(2))
    for name in names:
        assert_same_bits(first[name], second[name])
    assert_gradients_close(inputs, first, exact_gradients(inputs, grad_output))


def test_tensors_at_odd_addresses_are_read_right(device):
    inputs = make_inputs(SHAPES, **SIZES, device=device)

    def shifted(tensor):
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=device)
        return storage[1:].view(tensor.shape).copy_(tensor)

    odd = map_tensors(inputs, shifted)
    assert_close(compute(odd), compute_exactly(inputs))
    grad_output = shifted(random_like_output(inputs))
    gradients = compute_gradients(OPERATOR, odd, grad_output, gradient_names(odd))
    assert_gradients_close(inputs, gradients, exact_gradients(inputs, grad_output))


@pytest.mark.parametrize("name", ["sampling_locations", "attention_weights"])
def test_a_tensor_on_the_cpu_among_those_on_the_gpu_is_refused(device, name):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    setattr(inputs, name, getattr(inputs, name).cpu())
    with pytest.raises(RuntimeError, match=f"^{name} must be on the device of value"):
        compute(inputs)


def test_training_in_16_bits_with_a_gradient_scaler(device):
    module = msda.MSDeformAttn(64, 3, 4, 2).to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    num_keys = sum(height * width for height, width in SHAPES)
    query = torch.rand(2, num_keys, 64, device=device)
    reference = torch.rand(2, num_keys, 3, 2, device=device)
    before = module.value_proj.weight.clone()
    for _ in range(3):
        with torch.autocast("cuda", torch.float16):
            loss = module(query, reference, query, SHAPES).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert loss.isfinite()
    assert not torch.equal(module.value_proj.weight, before)
