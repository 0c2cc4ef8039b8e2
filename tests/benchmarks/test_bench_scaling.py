"""Dense against deformable attention: fits, what is computed, the run itself, figure and table."""

import json
import math

import pytest
import torch

import msda.modules
from benchmarks.__main__ import main
from benchmarks.common import harness, timing
from benchmarks.models import scaling as bench
from benchmarks.report import command as report
from benchmarks.report import figures, tables

SIZES = [bench.tokens_of(side) for side in (256, 512, 1024, 2048)]
LAYER, BOTH = bench.Case("layer", "forward"), bench.Case("layer", "both")


# ---- fits ----------------------------------------------------------------------------------------


def test_exponent_is_the_slope_between_logarithms():
    assert bench.exponent(SIZES, [3e-4 * size**1.5 for size in SIZES]) == pytest.approx(1.5)
    assert bench.exponent(SIZES[:1], [1.0]) is None


def test_law_finds_what_made_the_values():
    values = [3e-2 * size + 5e-6 * size**2 for size in SIZES]
    fitted = bench.law(SIZES, values, (1, 2))
    assert fitted == pytest.approx({1: 3e-2, 2: 5e-6})
    assert bench.at(fitted, 2000) == pytest.approx(60 + 20)


def test_law_has_no_negative_part():
    steep = [1e-6 * size**2.1 for size in SIZES]
    assert list(bench.law(SIZES, steep, (1, 2))) == [2]


def test_law_of_one_point_is_the_least_that_dense_attention_may_take():
    assert bench.law([100], [50.0], (1, 2)) == pytest.approx({1: 0.5})


def test_curves_cross_between_the_points_of_their_lines():
    sizes = [10, 1000]
    dense, ours = [size**2 for size in sizes], [100 * size for size in sizes]
    assert bench.crossover(sizes, dense, ours) == pytest.approx(100)
    assert bench.crossover(sizes[1:], dense[1:], ours[1:]) is None
    assert bench.crossover(sizes[:1], dense[:1], ours[:1]) == math.inf
    # For good: what noise did among the smallest does not count.
    assert bench.crossover([1, 5, *sizes], [9, 9, *dense], [3, 3, *ours]) == pytest.approx(100)


# ---- what is compared ----------------------------------------------------------------------------


def test_tokens_are_the_pixels_of_four_levels():
    assert bench.shapes_of(100) == [(13, 13), (7, 7), (4, 4), (2, 2)]
    assert bench.make_tokens(100, torch.float32).features.shape == (1, bench.tokens_of(100), 256)


def test_samples_of_different_tokens_lie_apart():
    layer = bench.make_encoder("msda").layers[0]
    tokens = bench.make_tokens(100, torch.float32)
    offsets = layer.self_attn.sampling_offsets(tokens.features + tokens.positions)
    torch.testing.assert_close(offsets.std(1).mean(), torch.tensor(2.5), rtol=0.1, atol=0)


@pytest.mark.parametrize("attention", bench.ATTENTIONS)
def test_each_attention_equals_its_definition(attention):
    encoder = bench.make_encoder(attention)
    bench.check(attention, encoder, bench.make_tokens(60, torch.float32))


def test_wrong_result_is_not_timed(monkeypatch):
    right = msda.modules.ms_deform_attn_fused
    monkeypatch.setattr(
        msda.modules, "ms_deform_attn_fused", lambda *args, **kwargs: 1.001 * right(*args, **kwargs)
    )
    with pytest.raises(AssertionError, match="msda: output must differ"):
        bench.check("msda", bench.make_encoder("msda"), bench.make_tokens(60, torch.float32))


def test_flops_are_those_of_the_formulas():
    size, channels = bench.tokens_of(64), 256
    dense = 2 * (4 * size * channels**2 + 2 * size**2 * channels)
    assert bench.flops_of(LAYER, "dense", 64) == dense
    assert bench.flops_of(BOTH, "dense", 64) == 3 * dense
    # value, output, 256 numbers of offsets and 128 logits; then 16 samples for each channel.
    ours = 2 * (3.5 * size * channels**2 + 5 * size * channels * 16)
    assert bench.flops_of(LAYER, "msda", 64) == ours
    feed_forward = 2 * 2 * size * channels * 1024
    encoder = bench.Case("encoder", "forward")
    assert bench.flops_of(encoder, "msda", 64) == 6 * (ours + feed_forward)


# ---- what is not measured ------------------------------------------------------------------------


def made_up_row(case, side, dense=None, ours=None):
    """A row of laws 0.01 S + 1e-5 S² and 0.02 S milliseconds; reasons where they are computed."""
    tokens = bench.tokens_of(side)
    times = {"dense": 0.01 * tokens + 1e-5 * tokens**2, "msda": 0.02 * tokens}
    reasons = {"dense": dense, "msda": ours}
    attentions = {
        name: {"ms": ms, "extra_bytes": 7000 * tokens, "flops": 10**9, "computed": reasons[name]}
        for name, ms in times.items()
    }
    return {
        "part": case.part,
        "direction": case.direction,
        "side": side,
        "tokens": tokens,
        "ratio": times["dense"] / times["msda"],
        "attentions": attentions,
    }


@pytest.fixture
def setup():
    return bench.Setup("cpu", torch.float32, timing.make_timer("cpu"), encoders={}, budget=5.0)


def test_time_that_would_not_fit_is_not_spent(setup):
    rows = [made_up_row(LAYER, 512)]  # 0.35 s and 0.11 s
    assert bench.refusal(setup, rows, "msda", bench.tokens_of(1024)) is None
    # 16 times as many pairs: 11 s for two calls
    assert "time" in bench.refusal(setup, rows, "dense", bench.tokens_of(1024))


def test_memory_that_is_not_free_is_not_asked_for(setup, monkeypatch):
    rows = [made_up_row(LAYER, 512)]  # 38 MB
    monkeypatch.setattr(bench, "available_memory", lambda: 300e6)
    assert bench.refusal(setup, rows, "msda", bench.tokens_of(1024)) is None
    monkeypatch.setattr(bench, "available_memory", lambda: 200e6)
    assert "memory: 0.2 GB" in bench.refusal(setup, rows, "msda", bench.tokens_of(1024))


def test_after_a_refusal_no_larger_size_is_tried(setup):
    rows = [made_up_row(LAYER, 512), made_up_row(LAYER, 640, dense="time: too long")]
    assert bench.refusal(setup, rows, "dense", bench.tokens_of(641)) == "time: too long"


def test_images_that_are_toys_say_nothing_about_larger_ones(setup):
    slow = made_up_row(LAYER, 64)
    slow["attentions"]["dense"]["ms"] = 1e5
    assert bench.refusal(setup, [slow], "dense", bench.tokens_of(128)) is None
    rows = [slow, *(made_up_row(LAYER, side) for side in (256, 512))]
    value = bench.computed(rows, "dense", bench.tokens_of(1024), "time")
    assert value["ms"] == pytest.approx(made_up_row(LAYER, 1024)["attentions"]["dense"]["ms"])
    assert value["extra_bytes"] == pytest.approx(7000 * bench.tokens_of(1024))


def test_fits_and_crossover_use_measured_points_only():
    rows = [made_up_row(LAYER, side) for side in (64, 128, 256, 512, 1024)]
    rows.append(made_up_row(LAYER, 2048, dense="time"))
    rows[-1]["attentions"]["dense"]["ms"] = 1e-9
    fits = {(fit["attention"], fit["quantity"]): fit for fit in bench.fits_of(LAYER, rows)}
    dense = fits["dense", "ms"]
    assert dense["tokens"] == SIZES[:3] and dense["half"] == 2
    assert 1 < dense["exponent"] < dense["half_exponent"] < 2
    assert fits["msda", "ms"]["exponent"] == pytest.approx(1)
    assert len(fits["msda", "ms"]["tokens"]) == 4
    found = bench.crossover_of(LAYER, rows)
    assert found["tokens"] == pytest.approx(1000, rel=0.1)
    assert bench.tokens_of(round(found["side"])) == pytest.approx(1000, rel=0.1)
    assert bench.crossover_of(LAYER, rows[3:])["where"] == (
        "below the smallest size measured, 512 pixels"
    )
    assert "beyond the largest" in bench.crossover_of(LAYER, rows[:2])["where"]


# ---- the run -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, set_threads):
    """Run the benchmark; what it wrote."""
    set_threads(1)
    path = tmp_path / "scaling.json"

    def run(*arguments):
        assert main(["scaling", "--threads=1", f"--output={path}", *arguments]) == 0
        return json.loads(path.read_text())

    return run


def test_every_case_is_measured(run, capsys):
    results = run("--sides", "64", "32", "--seconds=0.01")
    assert [(row["part"], row["direction"], row["side"]) for row in results["rows"]] == [
        (thing, direction, side)
        for thing in bench.PARTS
        for direction in bench.DIRECTIONS
        for side in (32, 64)
    ]
    for row in results["rows"]:
        assert set(row["attentions"]) == {"dense", "msda"}
        for one in row["attentions"].values():
            assert one["computed"] is None
            assert one["ms"] > 0 and one["rounds"] >= 1 and one["extra_bytes"] > 0
    assert results["machine"]["torch"] == torch.__version__
    assert "exponents" in capsys.readouterr().out


def test_what_does_not_fit_is_computed_and_marked(run, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SMALLEST_IMAGE", 32)
    results = run("--sides", "32", "64", "--seconds=0", "--part=layer", "--direction=forward")
    first, second = (row["attentions"]["dense"] for row in results["rows"])
    assert first["computed"] is None
    assert second["computed"] == "time: two calls would take more than 0 s"
    assert second["ms"] == pytest.approx(first["ms"] * 85 / 22)
    assert f"~{second['ms']:.3f}" in capsys.readouterr().out


def test_full_precision_on_a_gpu_is_refused():
    with pytest.raises(SystemExit, match="--dtype must be of 16 bits on cuda"):
        main(["scaling", "--device=cuda"])


# ---- figure and table ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout with made-up results of one machine."""
    rows, crossovers, fits = [], [], []
    for case in (LAYER, BOTH):
        ours = [made_up_row(case, side) for side in (64, 256, 512, 640, 1024)]
        ours.append(made_up_row(case, 2048, dense="time"))
        rows += ours
        crossovers.append(bench.crossover_of(case, ours))
        fits += bench.fits_of(case, ours)
    machine = dict(cpu="some CPU", torch="2.13.0", msda="0.1.0", commit="1234567")
    machine["cpu_capability"] = "avx2"
    results = dict(machine=machine, dtype="float32", threads=2)
    results |= dict(rows=rows, fits=fits, crossovers=crossovers)
    folder = tmp_path / "benchmarks" / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (folder / "scaling.json").write_text(json.dumps(results))
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", folder.parent)
    return folder


def test_figure_shows_computed_points_hollow_and_the_crossover(folder, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = matplotlib.Figure.savefig
    monkeypatch.setattr(
        matplotlib.Figure,
        "savefig",
        lambda self, *args, **kw: drawn.append((self, save(self, *args, **kw))),
    )
    figures.draw_all()
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    ((figure, _),) = drawn
    assert len(figure.axes) == 4  # two cases; a row of times, one of memory
    times = figure.axes[0]
    lines = {line.get_label(): line for line in times.lines}
    assert list(lines["dense attention"].get_xdata())[-1] == bench.tokens_of(1024)
    hollow = lines["dense attention, computed"]
    assert list(hollow.get_xdata()) == [bench.tokens_of(2048)]
    assert hollow.get_markerfacecolor() == "white"
    assert lines["MSDeformAttn"].get_marker() != lines["dense attention"].get_marker()
    texts = [text.get_text() for text in times.texts]
    assert any(text.startswith("equal at S = ") for text in texts)
    assert {"O(S C²)", "O(S C² + S² C)"} <= set(texts)


def test_figure_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="results must hold rows of"):
        figures.scaling_figure({"rows": []}, tmp_path / "figure.png")


def test_report_marks_what_was_computed(folder):
    table = report.block("scaling")
    assert "some CPU, 2 threads, avx2 kernels, torch 2.13.0" in table
    assert "| layer | forward | 256 x 256 | 1360 | 32.1 | 27.2 | **1.2x** |" in table
    assert (
        "| layer | forward + backward | 2048 x 2048 | 87040 | ~76630.0 | 1740.8 | **~44.0x**"
        in table
    )
    assert "640 x 640" not in table
    assert "layer, forward, msda 1.00 (1.00)" in table
    assert "layer, forward: at about " in table
    assert "![" not in table
    (folder / "scaling.png").touch()
    table = report.block("scaling")
    assert "(../benchmarks/results/some-cpu/scaling.png)" in table


def test_report_says_where_no_figure_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    expected = "No figure exists yet: `python -m benchmarks scaling` measures them."
    assert report.block("scaling") == tables.no_figure("scaling") == expected


def test_a_record_of_old_is_read_under_the_keys_of_today(folder):
    record = json.loads((folder / "scaling.json").read_text())
    old = json.dumps(record).replace('"attentions"', '"rivals"').replace('"part"', '"thing"')
    (folder / "scaling.json").write_text(old.replace('"attention"', '"rival"'))
    assert harness.read_record(folder / "scaling.json") == record
