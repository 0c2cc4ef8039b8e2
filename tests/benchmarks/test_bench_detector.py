"""The benchmarks of the detector: both sides equal, where time goes, counts, and their tables."""

import collections
import json
import sys
import time
import typing
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_detector
import bench_paper
import report

import msda
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
    return bench_detector.Task(ModelConfig(**SMALL), SIZE, 1, "cpu", amp)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


@pytest.fixture(autouse=True)
def still_norms(monkeypatch):
    """The tiny backbone's norms learn from every pass in training; ResNet's are frozen."""
    make_model = bench_detector.make_model

    def make(config, device="cpu"):
        model = make_model(config, device)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
        return model

    monkeypatch.setattr(bench_detector, "make_model", make)


# ---- both sides ----------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_both_sides_agree_in_outputs_loss_and_gradients(amp):
    errors = bench_detector.errors_of(small_task(amp))
    assert list(errors) == ["pred_logits", "pred_boxes", "loss", "gradients"]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_an_operator_that_computes_something_else_is_refused(monkeypatch, factor):
    def wrong(*arguments, **options):
        return factor * msda.ms_deform_attn_fused(*arguments, **options)

    monkeypatch.setitem(bench_detector.OPERATORS, "msda", wrong)
    with pytest.raises(AssertionError, match=r"^pred_logits must differ by at most 1e-04, got "):
        bench_detector.errors_of(small_task())


def test_boxes_and_gradients_depend_on_the_operator():
    task, results = small_task(), []
    for scale in (1, 2):

        def scaled(*arguments, scale=scale, **options):
            return scale * msda.ms_deform_attn_fused(*arguments, **options)

        with bench_detector.on(scaled):
            results.append(bench_detector.results_of(task))
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
    for name, operator in bench_detector.OPERATORS.items():
        monkeypatch.setitem(bench_detector.OPERATORS, name, recording(name, operator))
    task = small_task()
    for direction in bench_detector.DIRECTIONS:
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

    monkeypatch.setitem(bench_detector.OPERATORS, "msda", slow)
    Slow.rested.clear()
    seconds = bench_detector.profiled(task, task.runs(direction)["msda"])
    assert list(seconds) == list(bench_detector.PARTS)
    expected = set(bench_detector.PARTS) - ({"losses"} if direction == "forward" else set())
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
    seconds = bench_detector.profiled(task, run)
    assert all(seconds[part] > 0 for part in bench_detector.PARTS)
    assert sum(seconds.values()) == pytest.approx(times[1], rel=0.1)


# ---- counts --------------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_the_layers():
    counted = bench_paper.multiply_adds(ModelConfig(**SMALL), SIZE)
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
        name: round(bench_paper.parameters(bench_paper.PRESETS[name].model)["trained"] / 1e6)
        for name in bench_paper.PUBLISHED
    }
    assert rounded == {name: row.parameters_m for name, row in bench_paper.PUBLISHED.items()}


def test_matching_width_is_where_the_count_is_the_one_wanted(monkeypatch):
    def counted(config, size):
        height, width = size
        return {"total": 100 + 7 * height * width}

    monkeypatch.setattr(bench_paper, "multiply_adds", counted)
    there, wanted = (counted(None, (800, width))["total"] for width in (1333, 1066))
    assert bench_paper.matching_width(None, (800, 1333), there, wanted) == 1066


# ---- files and tables ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "machine").mkdir()
    return tmp_path / "machine"


def test_detector_file_becomes_a_table(folder, monkeypatch, capsys):
    assert report.detector_table() == report.NO_DETECTOR_FIGURE
    small = {bench_detector.PRESET: bench_paper.PRESETS["digits"].replace(**SMALL)}
    monkeypatch.setattr(bench_detector, "PRESETS", small)
    size = ["--size", *map(str, SIZE)]
    options = ["--rounds", "1", "--threads", "1", "--output", str(folder / "detector.json")]
    monkeypatch.setattr(sys, "argv", ["bench_detector.py", *size, *options])
    assert bench_detector.main() == 0
    assert "encoder, operator" in capsys.readouterr().out
    results = json.loads((folder / "detector.json").read_text())
    for row in results["rows"]:
        speed = row["images_per_second"]
        assert row["ratio"] == pytest.approx(speed["msda"] / speed["reference"])
        assert row["extra_bytes"]["reference"] >= row["extra_bytes"]["msda"] > 0
    table = report.detector_table()
    assert "| forward + backward |" in table
    assert f"| **{results['rows'][1]['ratio']:.2f}x** |" in table
    assert "| encoder, operator |" in report.parts_table()


def test_paper_file_becomes_a_table(folder, monkeypatch, capsys):
    assert report.paper_table() == report.NO_PAPER_FIGURE
    presets = {
        name: bench_paper.PRESETS["digits"].replace(**SMALL) for name in bench_paper.PUBLISHED
    }
    monkeypatch.setattr(bench_paper, "PRESETS", presets)
    size = ["--size", *map(str, SIZE)]
    options = ["--rounds", "1", "--threads", "1", "--output", str(folder / "paper.json")]
    monkeypatch.setattr(sys, "argv", ["bench_paper.py", *size, *options])
    assert bench_paper.main() == 0
    assert "++ two-stage" in capsys.readouterr().out
    table = report.paper_table()
    assert "| ++ two-stage |" in table
    assert "**0** / 173 |" in table
