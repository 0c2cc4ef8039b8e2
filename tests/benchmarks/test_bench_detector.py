"""The benchmarks of the detector: both sides equal, where time goes, counts, and their tables."""

import collections
import json
import time
import typing

import pytest
import torch

import msda
from benchmarks.__main__ import main
from benchmarks.common import harness
from benchmarks.models import detector as bench
from benchmarks.models import paper
from benchmarks.report import command as report
from detector.config import ModelConfig

SMALL = dict(
    backbone="tiny",
    num_classes=5,
    hidden_dim=32,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    feedforward_dim=48,
    num_queries=11,
)
SIZE = (64, 96)
NUM_TOKENS = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2


def small_task(amp="off"):
    return bench.Task(ModelConfig(**SMALL), SIZE, 1, "cpu", amp)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


@pytest.fixture(autouse=True)
def still_norms(monkeypatch):
    """The tiny backbone's norms learn from every pass in training; ResNet's are frozen."""
    make_model = bench.make_model

    def make(config, device="cpu"):
        model = make_model(config, device)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
        return model

    monkeypatch.setattr(bench, "make_model", make)


# ---- both sides ----------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_both_sides_agree_in_outputs_loss_and_gradients(amp):
    errors = bench.checked(small_task(amp))
    assert list(errors) == ["pred_logits", "pred_boxes", "loss", "gradients"]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_an_operator_that_computes_something_else_is_refused(monkeypatch, factor):
    def wrong(*arguments, **options):
        return factor * msda.ms_deform_attn_fused(*arguments, **options)

    monkeypatch.setitem(bench.OPERATORS, "msda", wrong)
    with pytest.raises(AssertionError, match=r"^pred_logits must differ by at most 1.0e-04, got "):
        bench.checked(small_task())


def test_boxes_and_gradients_depend_on_the_operator():
    task, results = small_task(), []
    for scale in (1, 2):

        def scaled(*arguments, scale=scale, **options):
            return scale * msda.ms_deform_attn_fused(*arguments, **options)

        with bench.on(scaled):
            results.append(bench.results_of(task))
    for name, tensor in results[0].items():
        assert not torch.allclose(tensor, results[1][name], rtol=1e-3), name


def test_each_side_runs_its_own_operator_and_leaves_the_module_as_it_was(monkeypatch):
    called = []

    def recording(name, operator):
        def call(*arguments, **options):
            called.append(name)
            return operator(*arguments, **options)

        return call

    before = msda.modules.ms_deform_attn_fused
    for name, operator in bench.OPERATORS.items():
        monkeypatch.setitem(bench.OPERATORS, name, recording(name, operator))
    task = small_task()
    for direction in bench.DIRECTIONS:
        for name, run in task.runs(direction).items():
            called.clear()
            run()
            assert called == [name] * 4  # attention modules
            assert msda.modules.ms_deform_attn_fused is before
    assert all(parameter.grad is None for parameter in task.model.parameters())


# ---- where the time goes -------------------------------------------------------------------------


class Slow(torch.autograd.Function):
    """The identity, and a rest in either direction that is booked under a name."""

    rested: typing.ClassVar = collections.Counter()

    @staticmethod
    def rest(name, seconds):
        time.sleep(seconds)
        Slow.rested[name] += seconds

    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        Slow.rest(name, 0.02)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Slow.rest(ctx.name, 0.06)
        return grad, None


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_time_is_put_down_to_the_part_that_took_it(direction, monkeypatch):
    task, calls = small_task(), []
    for name, module in (
        ("backbone", task.model.backbone[0].body.stem),
        ("input projections", task.model.input_proj[0][0]),
        ("encoder, rest", task.model.transformer.encoder.layers[1].norm2),
        ("decoder, rest", task.model.transformer.decoder.layers[0].norm1),
        ("heads", task.model.bbox_embed[0].layers[0]),
        ("other", task.model.backbone[1]),
    ):
        module.register_forward_hook(
            lambda module, inputs, output, name=name: Slow.apply(output, name)
        )
    criterion = task.criterion
    task.criterion = lambda outputs, targets: {
        name: Slow.apply(loss, "losses") if name == "loss_giou" else loss
        for name, loss in criterion(outputs, targets).items()
    }

    def slow(*arguments, **options):
        calls.append("encoder, operator" if len(calls) < 2 else "decoder, operator")
        return Slow.apply(msda.ms_deform_attn_fused(*arguments, **options), calls[-1])

    monkeypatch.setitem(bench.OPERATORS, "msda", slow)
    Slow.rested.clear()
    seconds = bench.profiled(task, task.runs(direction)["msda"])
    assert list(seconds) == list(bench.PARTS)
    expected = set(bench.PARTS) - ({"losses"} if direction == "forward" else set())
    assert set(Slow.rested) == expected
    if direction == "both":
        assert min(seconds for part, seconds in Slow.rested.items() if part != "other") > 0.07
    for part, rested in Slow.rested.items():
        assert seconds[part] >= rested, part


def test_parts_add_up_to_the_whole_call():
    task, times = small_task(), []

    def run():
        start = time.perf_counter()
        task.runs("both")["reference"]()
        times.append(time.perf_counter() - start)

    run()
    seconds = bench.profiled(task, run)
    assert all(seconds[part] > 0 for part in bench.PARTS)
    assert sum(seconds.values()) == pytest.approx(times[1], rel=0.1)


# ---- counts --------------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_the_layers():
    counted = paper.multiply_adds(ModelConfig(**SMALL), SIZE)
    samples = 2 * (NUM_TOKENS + 11) * 2 * 4 * 4  # layers, queries, heads, levels, points
    assert counted["sampling"] == 5 * samples * 16
    # Per token: values and output, offsets and weights of 32 samples, the feed-forward net.
    layer = NUM_TOKENS * (2 * 32 * 32 + 32 * 3 * 32 + 2 * 32 * 48)
    assert counted["encoder"] == 2 * layer + 5 * 2 * NUM_TOKENS * 2 * 4 * 4 * 16
    # Self-attention, values of the tokens, the rest of the cross-attention, feed-forward, box head.
    layer = 11 * 4 * 32 * 32 + 2 * 11 * 11 * 32 + NUM_TOKENS * 32 * 32
    layer += 11 * (32 * 32 + 32 * 3 * 32 + 2 * 32 * 48) + 11 * (2 * 32 * 32 + 32 * 4)
    assert counted["decoder"] == 2 * layer + 5 * 2 * 11 * 2 * 4 * 4 * 16
    assert counted["total"] == sum(
        counted[part] for part in ("backbone", "encoder", "decoder", "rest")
    )


def test_parameters_are_the_papers():
    rounded = {
        name: round(paper.parameters(paper.PRESETS[name].model)["trained"] / 1e6)
        for name in paper.PUBLISHED
    }
    assert rounded == {name: row.parameters_m for name, row in paper.PUBLISHED.items()}


def test_matching_width_is_where_the_count_is_the_one_wanted(monkeypatch):
    def counted(config, size):
        height, width = size
        return {"total": 100 + 7 * height * width}

    monkeypatch.setattr(paper, "multiply_adds", counted)
    there, wanted = (counted(None, (800, width))["total"] for width in (1333, 1066))
    assert paper.matching_width(None, (800, 1333), there, wanted) == 1066


# ---- files and tables ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path / "machine"


def test_detector_file_becomes_a_table(folder, monkeypatch, capsys):
    small = {bench.PRESET: paper.PRESETS["digits"].replace(**SMALL)}
    monkeypatch.setattr(bench, "PRESETS", small)
    options = ["--size", *map(str, SIZE), "--rounds=2", "--threads=1"]
    assert main(["detector", *options, f"--output={folder / 'detector.json'}"]) == 0
    assert "encoder, operator" in capsys.readouterr().out
    results = json.loads((folder / "detector.json").read_text())
    for row in results["rows"]:
        speed = row["images_per_second"]
        assert row["ratio"] == pytest.approx(speed["msda"] / speed["reference"])
        assert row["extra_bytes"]["reference"] >= row["extra_bytes"]["msda"] > 0
        for side, (lower, upper) in row["quartiles"].items():
            assert lower <= speed[side] <= upper
    table = report.block("detector")
    assert "| forward + backward |" in table
    assert f"| **{results['rows'][1]['ratio']:.2f}x** |" in table
    assert "| encoder, operator |" in report.block("parts")


def test_paper_file_becomes_a_table(folder, monkeypatch, capsys):
    presets = {name: paper.PRESETS["digits"].replace(**SMALL) for name in paper.PUBLISHED}
    monkeypatch.setattr(paper, "PRESETS", presets)
    options = ["--size", *map(str, SIZE), "--rounds=1", "--threads=1"]
    assert main(["paper", *options, f"--output={folder / 'paper.json'}"]) == 0
    assert "++ two-stage" in capsys.readouterr().out
    table = report.block("paper")
    assert "| ++ two-stage |" in table
    assert "**0** / 173 |" in table
