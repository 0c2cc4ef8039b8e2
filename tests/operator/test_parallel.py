"""Training as PyTorch offers it: several processes, checkpoints of activations, 16 bits."""

import functools
import os
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import msda
from detector.config import ModelConfig
from detector.model import build_model
from msda.reference import ms_deform_attn_fused_reference
from msda.testing import OPERATOR, TOLERANCES, call, make_inputs, relative_error
from tests.helpers.cases import sixteen_bits
from tests.helpers.results import assert_same_bits

pytestmark = pytest.mark.not_on_executor("threads and processes are torch's")

SHAPES = [(6, 9), (3, 5)]
NUM_KEYS = 69


def make_module(dtype=torch.float64, shapes=SHAPES):
    torch.manual_seed(0)
    module = msda.MSDeformAttn(16, len(shapes), 2, 2)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(module.attention_weights.weight)
    return module.to(dtype)


def make_batch(dtype=torch.float64, batch=2):
    random = torch.Generator().manual_seed(1)
    sizes = [(batch, 5, 16), (batch, 5, 2, 2), (batch, NUM_KEYS, 16)]
    return [torch.rand(size, generator=random, dtype=dtype) for size in sizes]


def gradients_of(loss, model):
    loss.backward()
    return {
        name: getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)()
        for name, parameter in model.named_parameters()
    }


# ---- several processes ---------------------------------------------------------------------------


def make_detector():
    torch.manual_seed(0)
    sizes = dict(hidden_dim=32, feedforward_dim=16, num_encoder_layers=1, num_decoder_layers=1)
    config = ModelConfig(
        backbone="tiny", num_classes=3, num_heads=2, num_queries=4, dropout=0.0, **sizes
    )
    # Not in training mode, in which batch norms see the images of one process alone.
    return build_model(config).double().eval()


def loss_of_module(module, part):
    return module(*[tensor[part] for tensor in make_batch()], SHAPES).square().mean()


def loss_of_detector(detector, part):
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)).double()
    outputs = detector(images[part])
    return outputs["pred_logits"].square().mean() + outputs["pred_boxes"].square().mean()


def data_parallel(rank):
    module = make_module()
    parallel = DistributedDataParallel(module)  # must live until backward
    return {"module": gradients_of(loss_of_module(parallel, [rank]), module)}


def sharded(rank):
    module, detector = make_module(), make_detector()
    mesh = dist.init_device_mesh("cpu", (2,))
    transformer = detector.transformer
    for part in (*transformer.encoder.layers, *transformer.decoder.layers, detector, module):
        fully_shard(part, mesh=mesh)
    return {
        "module": gradients_of(loss_of_module(module, [rank]), module),
        "detector": gradients_of(loss_of_detector(detector, [rank]), detector),
    }


def run_process(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for train in (data_parallel, sharded):
        gradients = train(rank)
        if rank == 0:
            torch.save(gradients, folder / f"{train.__name__}.pt")
    dist.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = mp.spawn(run_process, (port, tmp_path), nprocs=2, join=False, daemon=True)
    deadline = time.monotonic() + 240
    while not both.join(timeout=10):
        assert time.monotonic() < deadline, "the processes wait for each other"

    module, detector = make_module(), make_detector()
    everything = slice(None)
    expected = {
        "module": gradients_of(loss_of_module(module, everything), module),
        "detector": gradients_of(loss_of_detector(detector, everything), detector),
    }
    for way, models in (("data_parallel", ["module"]), ("sharded", ["module", "detector"])):
        together = torch.load(tmp_path / f"{way}.pt")
        assert list(together) == models
        for model in models:
            assert together[model].keys() == expected[model].keys()
            for name, gradient in together[model].items():
                torch.testing.assert_close(
                    gradient, expected[model][name], rtol=1e-9, atol=1e-12, msg=f"{way} {name}"
                )


def attend_on_several_threads_and_fork():
    inputs = make_inputs([(32, 32)])
    attend = functools.partial(call, OPERATOR, inputs)
    torch.set_num_threads(2)
    expected = attend()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # should it hang
        torch.set_num_threads(1)  # the other thread stayed behind
        os._exit(0 if torch.equal(attend(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_process_computes_once_it_has_set_one_thread():
    process = mp.get_context("spawn").Process(target=attend_on_several_threads_and_fork)
    process.start()
    process.join(timeout=60)
    process.kill()
    assert process.exitcode == 0


# ---- activations that are computed again ---------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
def test_checkpointed_activations_change_no_bit(device, use_reentrant):
    module = make_module(torch.float32).to(device)
    query, reference, features = (tensor.to(device) for tensor in make_batch(torch.float32))
    inputs = [query.requires_grad_(), features.requires_grad_()]

    def run(again):
        arguments = (query, reference, features, SHAPES)
        output = (
            checkpoint(module, *arguments, use_reentrant=again)
            if again is not None
            else (module(*arguments))
        )
        leaves = [*inputs, *module.parameters()]
        for leaf in leaves:
            leaf.grad = None
        output.square().sum().backward()
        return [output, *(leaf.grad for leaf in leaves)]

    torch.use_deterministic_algorithms(device == "cuda")
    for actual, expected in zip(run(use_reentrant), run(None), strict=True):
        assert_same_bits(actual, expected)
    torch.use_deterministic_algorithms(False)


# ---- 16 bits -------------------------------------------------------------------------------------


@sixteen_bits
def test_autocast_gives_values_in_16_bits_and_computes_places_and_softmax_in_32(
    device, dtype, monkeypatch
):
    # A bfloat16 location would be off by half a pixel on maps this wide.
    shapes = [(4, 160), (2, 80)]
    module = make_module(torch.float32, shapes).to(device)
    query = torch.randn(2, 50, 16, device=device)
    reference = torch.rand(2, 50, 2, 2, device=device)
    features = torch.randn(2, 4 * 160 + 2 * 80, 16, device=device)
    calls = []

    def record(*arguments, **options):
        calls.append((arguments, operator(*arguments, **options)))
        return calls[-1][1]

    operator = msda.modules.ms_deform_attn_fused
    monkeypatch.setattr(msda.modules, "ms_deform_attn_fused", record)
    expected = module(query, reference, features, shapes)
    with torch.autocast(device, dtype):
        output = module(query, reference, features, shapes)

    _, ((value, _, _, *points), attended) = calls
    assert [tensor.dtype for tensor in points] == [torch.float32, dtype, dtype]
    assert (value.dtype, attended.dtype, output.dtype) == (dtype, dtype, dtype)
    # What the operator got is what it computes from: it rounds nothing but its result.
    exact = ms_deform_attn_fused_reference(
        value.double().cpu(), shapes, None, *(tensor.double().cpu() for tensor in points)
    )
    assert relative_error(attended, exact) <= TOLERANCES[dtype]
    # Weights, inputs and results of the projections are rounded; bfloat16 has 8 bits, float16 11.
    assert relative_error(output, expected) < 10 * torch.finfo(dtype).eps


def test_autocast_leaves_float32_values_alone(device):
    module = make_module(torch.float32).to(device)
    arguments = [tensor.to(device) for tensor in make_batch(torch.float32)]
    expected = module(*arguments, SHAPES)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert_same_bits(module(*arguments, SHAPES), expected)


@sixteen_bits
def test_scaled_losses_train_on_the_cpu(dtype):
    module = make_module(torch.float32)
    exact = make_module(torch.float32)
    query, reference, features = make_batch(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype):
        loss = module(query, reference, features, SHAPES).float().square().mean()
    scaler.scale(loss).backward()
    exact(query, reference, features, SHAPES).square().mean().backward()
    scaler.unscale_(optimizer)
    for (name, actual), expected in zip(module.named_parameters(), exact.parameters(), strict=True):
        # Six matrix products in 16 bits there and back.
        error = relative_error(actual.grad, expected.grad)
        assert error < 20 * torch.finfo(dtype).eps, name
    before = module.value_proj.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(module.value_proj.weight, before)


def test_an_overflow_makes_the_scaler_skip_the_step():
    module = make_module(torch.float32)
    query, reference, features = make_batch(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = module.value_proj.weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        loss = module(query, reference, features, SHAPES).float().square().mean()
    scaler.scale(loss).backward()
    assert not module.value_proj.weight.grad.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert_same_bits(module.value_proj.weight, before)
