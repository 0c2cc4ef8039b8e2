"""The page of msda.plot.explore holds what was recorded."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import msda
from msda import drop_in, functional
from msda.explore import _png
from msda.plot import capture_sampling, explore
from tests.plot.pages import LOCATION, WEIGHT, Encoder, assert_near, decode, read
from tests.plot.small_attention import (
    NUM_KEYS,
    QUERIES,
    SHAPES,
    TwoLayers,
    make_arguments,
    make_attention,
)

# ---- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 1], ids=["per_level", "shared"])
@pytest.mark.parametrize("reference_size", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("n_points", [3, [3, 1]], ids=["even", "ragged"])
def test_the_page_holds_what_the_module_sampled(page, image, n_points, reference_size, levels):
    attention, arguments = make_attention(n_points), make_arguments(reference_size, levels)
    with capture_sampling(attention) as samples, torch.no_grad():
        attention(*arguments)
    (record,) = samples
    assert explore(attention, image, page, inputs=arguments, batch_index=1) == page
    (layer,) = read(page)["layers"]
    assert layer["shapes"] == [[6, 9], [3, 5]]
    assert layer["points"] == ([3, 3] if n_points == 3 else [3, 1])
    locations, weights, references, kept = decode(layer)
    expected = record.sampling_locations[1].reshape(QUERIES, 3, -1, 2)
    assert_near(
        locations, torch.where((expected >= -1) & (expected <= 2), expected, torch.nan), LOCATION
    )
    assert_near(weights, record.attention_weights[1].flatten(2), WEIGHT)
    assert_near(references, arguments[1][1], LOCATION)
    assert kept == list(range(QUERIES)) and layer["rule"] == ""


class Direct(nn.Module):
    """Calls the functions themselves, imported by name, in a module of any other kind."""

    def __init__(self, function):
        super().__init__()
        self.core = nn.Identity()
        self.function = function

    def forward(self, value, reference_points, locations, weights):
        return self.function(value, locations, weights)


@pytest.mark.parametrize("how", ["operator", "drop_in"])
def test_calls_of_the_operator_are_recorded_whoever_makes_them(page, image, how):
    value, shapes = torch.randn(2, NUM_KEYS, 3, 4), torch.tensor(SHAPES)
    locations = torch.rand(2, QUERIES, 3, 2, 4, 2) * 1.4 - 0.2
    locations[0, 0, 0, 0, :3, 0] = torch.tensor([torch.nan, torch.inf, 2.5])
    weights = torch.rand(2, QUERIES, 3, 8).softmax(-1).view(2, QUERIES, 3, 2, 4)
    points = torch.rand(2, QUERIES, 1, 2)
    functions = {
        "operator": lambda *tensors: msda.ms_deform_attn(tensors[0], shapes, None, *tensors[1:]),
        "drop_in": lambda *tensors: drop_in.ms_deform_attn_forward(
            tensors[0], shapes, torch.tensor([0, 54]), *tensors[1:], 64
        ),
    }
    model = nn.Sequential()
    model.layer = Direct(functions[how])
    model.forward = lambda *tensors: model.layer(*tensors)
    explore(model, image, page, inputs=(value, points, locations, weights))
    (layer,) = read(page)["layers"]
    assert layer["name"] == "layer"
    actual, actual_weights, references, _ = decode(layer)
    expected = locations[0].flatten(2, 3).clone()
    expected[0, 0, :3, 0] = torch.nan
    assert_near(actual, expected, LOCATION)
    assert_near(actual_weights, weights[0].flatten(2), WEIGHT)
    assert_near(references, points[0], LOCATION)


def test_without_reference_points_there_are_none(page, image):
    value, weights = torch.rand(1, NUM_KEYS, 3, 4), torch.rand(1, 2, 3, 2, 4)

    def run(model):
        return msda.ms_deform_attn(value, SHAPES, None, torch.rand(1, 2, 3, 2, 4, 2), weights)

    explore(nn.Linear(1, 1), image, page, inputs=run)
    (layer,) = read(page)["layers"]
    assert layer["name"] == "attention" and layer["references"] is None


def test_a_patched_transformers_model_is_explored_with_its_boxes(page):
    transformers = pytest.importorskip("transformers")
    from msda.integrations.transformers import use_msda

    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
            out_features=["stage2", "stage3", "stage4"],
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=9,
        id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    model = use_msda(transformers.DeformableDetrForObjectDetection(config))
    picture = torch.rand(3, 64, 96)
    explore(model, picture, page)
    data = read(page)
    assert [layer["total"] for layer in data["layers"][1:]] == [9, 9]
    assert data["layers"][0]["isGrid"] and not data["layers"][0]["hasBoxes"]
    assert data["layers"][-1]["references"] is not None
    with torch.no_grad():
        output = model.eval()(picture[None])
    best = int(output.logits[0].max(-1).values.argmax())
    first = data["boxes"][0]
    assert first["query"] == best == data["start"]
    assert re.match(r"(cat|dog) 0\.\d\d$", first["label"])
    torch.testing.assert_close(
        torch.tensor(first["box"]), output.pred_boxes[0, best], rtol=0, atol=1e-5
    )


def test_every_call_is_a_layer_under_its_own_name(page, image):
    explore(TwoLayers(), image, page, inputs=make_arguments())
    names = [layer["name"] for layer in read(page)["layers"]]
    assert names == ["first", "first (call 2)", "last.0"]


def test_a_compiled_model_is_recorded(page, image):
    model = torch.compile(TwoLayers(), backend="eager")
    arguments = make_arguments()
    explore(model, image, page, inputs=arguments)
    assert len(read(page)["layers"]) == 3
    with torch.no_grad():
        assert model(*arguments).isfinite().all()


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored_and_nothing_stays_behind(page, image, fails):
    model, arguments = TwoLayers(), make_arguments()
    model.last.eval()
    seen = []

    def run(model):
        seen.append((any(part.training for part in model.modules()), torch.is_grad_enabled()))
        model(*arguments)
        if fails:
            raise KeyError("later")

    modes = [part.training for part in model.modules()]
    page.write_text("before")
    if fails:
        with pytest.raises(KeyError):
            explore(model, image, page, inputs=run)
        assert page.read_text() == "before"
    else:
        explore(model, image, page, inputs=run)
    assert seen == [(False, False)]
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert functional.observers == []
    assert list(page.parent.iterdir()) == [page]


class OfImage(nn.Module):
    """Attends from the image's grey mean, however it comes."""

    def __init__(self):
        super().__init__()
        self.attention = make_attention()
        self.seen = None

    def forward(self, image):
        self.seen = image
        query, reference, features, shapes = make_arguments()
        return self.attention(query[:1], reference[:1], features[:1], shapes)


@pytest.mark.parametrize("kind", ["tuple", "mapping", "function", "anything"])
def test_inputs_say_how_the_model_is_run(page, image, kind):
    model, given = OfImage(), torch.rand(1, 3, 8, 8)
    inputs = {
        "tuple": (given,),
        "mapping": {"image": given},
        "function": lambda model: model(given),
        "anything": given,
    }
    explore(model, image, page, inputs=inputs[kind])
    assert model.seen is given


# ---- the image -----------------------------------------------------------------------------------


def test_any_kind_of_image_is_shown_and_given_to_the_model(page, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    photo.save(tmp_path / "photo.png")
    kinds = [photo, tmp_path / "photo.png", str(tmp_path / "photo.png"), pixels, pixels / 255]
    pages = set()
    for kind in kinds:
        model = OfImage()
        explore(model, kind, page)
        torch.testing.assert_close(model.seen, pixels[None] / 255)
        pages.add(re.search(r'picture.src = "(data:image/[^"]*)"', page.read_text())[1])
    assert len(pages) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_png_of_a_machine_without_pillow_is_the_picture(tmp_path, channels):
    Image = pytest.importorskip("PIL.Image")
    picture = torch.randint(256, (channels, 21, 34), dtype=torch.uint8)
    (tmp_path / "picture.png").write_bytes(_png(picture))
    with Image.open(tmp_path / "picture.png") as read_back:
        pixels = torch.tensor(list(read_back.tobytes())).view(21, 34, channels).permute(2, 0, 1)
    assert pixels.equal(picture.long())


def test_a_large_photo_is_scaled_down(page):
    explore(OfImage(), torch.rand(1, 100, 2000).sqrt(), page)
    assert read(page)["size"] == [1280, 64]


def test_a_page_needs_neither_pillow_nor_matplotlib_nor_numpy(page):
    code = f"""if True:
        import sys
        sys.modules["PIL"] = sys.modules["matplotlib"] = None  # importing them fails
        import torch
        from msda import MSDeformAttn
        from msda.plot import explore
        inputs = (torch.rand(1, 2, 8), torch.rand(1, 2, 1, 2), torch.rand(1, 12, 8), [(3, 4)])
        explore(MSDeformAttn(8, 1, 2, 1), torch.rand(6, 8), {str(page)!r}, inputs=inputs)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "data:image/png;base64," in page.read_text()


# ---- the size ------------------------------------------------------------------------------------


def test_too_many_queries_are_thinned_by_rows_and_columns_as_the_page_says(page, image):
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    options = dict(boxes=boxes, box_queries=[77])
    explore(Encoder(), image, page, **options)
    whole = page.stat().st_size
    data = read(page)
    assert [layer["count"] for layer in data["layers"]] == [3000, 90]
    for megabytes in (0.4, 0.15, 0.08):
        explore(Encoder(), image, page, max_megabytes=megabytes, **options)
        assert page.stat().st_size <= megabytes * 1e6 < whole
        encoder, decoder = read(page)["layers"]
        step = int(re.search(r"every (\d+)(?:nd|rd|th) row and column", encoder["rule"])[1])
        assert f"{encoder['count']} of 3000 queries" in encoder["rule"]
        kept, expected, start = decode(encoder)[3], set(), 0
        for height, width in Encoder.shapes:
            rows, columns = (range(min(step // 2, (n - 1) // 2), n, step) for n in (height, width))
            expected |= {start + row * width + column for row in rows for column in columns}
            start += height * width
        assert set(kept) == expected
        assert 77 in decode(decoder)[3]
    assert re.search("every .* query, and the first shown", decoder["rule"])


def test_a_page_that_cannot_be_small_enough_is_refused(page, image):
    with pytest.raises(ValueError, match=r"max_megabytes must leave room .* about 0\.\d, got 0.01"):
        explore(Encoder(), image, page, max_megabytes=0.01)
    assert not page.exists()


# ---- the file ------------------------------------------------------------------------------------


def test_no_text_breaks_the_page_and_nothing_is_loaded_from_elsewhere(page, image):
    label = "</script><script>alert(1)</script>{{data}}"
    options = dict(boxes=torch.rand(1, 4), box_queries=[3], box_labels=[label], title=label)
    explore(make_attention(), image, page, inputs=make_arguments(), **options)
    assert read(page)["boxes"][0]["label"] == label
    text = page.read_text()
    assert "<script>alert" not in text and text.count("</script>") == 2
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize("place", ["missing", "folder"])
def test_a_path_that_cannot_be_written_is_refused_before_the_model_runs(tmp_path, image, place):
    path = tmp_path / "none" / "page.html" if place == "missing" else tmp_path
    with pytest.raises(OSError, match=f"^path must be writable, got '{path}': "):
        explore(make_attention(), image, path, inputs=lambda model: pytest.fail("it ran"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_a_full_disk_leaves_the_page_of_before(page, image, monkeypatch):
    page.write_text("before")
    real_open = open

    def full(path, mode):
        real_open(path, mode).close()
        return real_open("/dev/full", mode)

    monkeypatch.setattr("msda.explore.open", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        explore(make_attention(), image, page, inputs=make_arguments())
    assert page.read_text() == "before" and list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(model=len), TypeError, "model must be a torch.nn.Module, got builtin_function"),
        (
            dict(inputs=lambda model: 0),
            ValueError,
            "model must call msda.ms_deform_attn or .*did not",
        ),
        (
            dict(image=3),
            TypeError,
            "image must be a PIL image, the path of one or a tensor, got int",
        ),
        (dict(image=torch.rand(2, 4, 4)), ValueError, r"image must have shape .*got \(2, 4, 4\)"),
        (
            dict(image=torch.ones(4, 4).int()),
            ValueError,
            "image must be uint8 or .*got torch.int32",
        ),
        (dict(batch_index=2), IndexError, "batch_index must be from 0 to 1, got 2"),
        (dict(valid_ratio=(0, 1)), ValueError, r"valid_ratio must be two numbers .* got \(0, 1\)"),
        (dict(query=7), ValueError, "query must be one of the 7 of the last layer, got 7"),
        (dict(boxes=torch.rand(4)), ValueError, r"boxes must be .* \(N, 4\), got \(4,\)"),
        (dict(boxes=torch.rand(2, 4)), ValueError, "box_queries must hold one entry .* got 0"),
        (
            dict(boxes=torch.rand(1, 4), box_queries=[9]),
            ValueError,
            "box_queries must be below the 7 queries of the last layer, got 9",
        ),
        (
            dict(boxes=torch.rand(1, 4), box_queries=[1], box_labels=["a", "b"]),
            ValueError,
            "box_labels must hold one entry for each of 1 boxes, got 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(page, image, changes, error, message):
    options = dict(model=make_attention(), image=image, inputs=make_arguments()) | changes
    with pytest.raises(error, match=message):
        explore(path=page, **options)
    assert list(page.parent.iterdir()) == []


def test_a_file_that_is_no_image_is_refused(page, tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(
        ValueError, match=r"image must be a file that Pillow can read, got .*text.png"
    ):
        explore(make_attention(), tmp_path / "text.png", page)
    with pytest.raises(FileNotFoundError):
        explore(make_attention(), tmp_path / "none.png", page)
