"""The page holds what was recorded, and a browser shows it."""

import base64
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import msda
from browser import CHROMIUM, Browser
from msda import drop_in, functional
from msda.explore import _png
from msda.plot import capture_sampling, explore
from test_plot import NUM_KEYS, QUERIES, SHAPES, TwoLayers, make_arguments, make_attention

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
    kept = layer["chosen"]
    kept = range(layer["total"]) if kept is None else numbers(kept, torch.int32).int().tolist()
    return (
        locations_of(layer["locations"]).view(*shape, 2),
        (numbers(layer["weights"]) / 65535).view(shape),
        references,
        list(kept),
    )


@pytest.fixture
def page(tmp_path):
    return tmp_path / "where.html"


@pytest.fixture
def image():
    return torch.rand(3, 40, 60)  # 60 wide


def assert_near(actual, expected, atol):
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=atol, equal_nan=True)


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


# ---- in a browser --------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture
def browser(tmp_path):
    for attempt in range(3):
        try:
            started = Browser(tmp_path / f"profile{attempt}")
            break
        except AssertionError:  # it ends at once, now and then, on a busy machine
            if attempt == 2:
                raise
    with started as browser:
        yield browser
        assert browser.problems == []
        assert all(url.startswith(("file:", "data:")) for url in browser.requests)


class TwoStages(nn.Module):
    """An encoder over the pixels of a map, then a decoder of 5 queries with reference boxes."""

    shapes = ((4, 6),)
    centres = torch.tensor([[(x + 0.5) / 6, (y + 0.5) / 4] for y in range(4) for x in range(6)])
    boxes = torch.tensor([[0.2, 0.3, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4], [0.7, 0.7, 0.1, 0.1]])

    def __init__(self):
        super().__init__()
        self.encoder = msda.MSDeformAttn(12, 1, 3, 4)
        self.decoder = msda.MSDeformAttn(12, 1, 3, 4)

    def forward(self, image):
        features = torch.rand(1, 24, 12)
        self.encoder(features, self.centres[None, :, None], features, self.shapes)
        references = torch.rand(1, 5, 1, 4)
        references[0, [4, 2, 0], 0] = self.boxes
        self.decoder(torch.rand(1, 5, 12), references, features, self.shapes)


@needs_chromium
def test_queries_are_picked_by_pointing_and_by_keys(page, image, browser):
    model = TwoStages()
    nn.init.normal_(model.decoder.attention_weights.bias)
    options = dict(boxes=TwoStages.boxes, box_queries=[4, 2, 0], box_labels=["cat", "dog", "<b>"])
    explore(model, image, page, **options)
    _, weights, _, _ = decode(read(page)["layers"][1])
    browser.open(page)

    def shows(**expected):
        state = browser.state()
        assert {name: state[name] for name in expected} == expected

    # At once: the first box's query, and how its attention spreads.
    shows(layer="decoder", head="all", query="4", box="0")
    assert int(browser.state()["points"]) > 0
    labels = browser.run("[...document.querySelectorAll('#boxes button')].map((b) => b.innerText)")
    assert labels == ["cat", "dog", "<b>"]

    browser.click(0.6, 0.6)
    shows(query="2", box="1")
    browser.click(0.7, 0.72)  # within two boxes
    shows(query="0", box="2")
    browser.key("ArrowRight")
    shows(query="1", box="-1")
    browser.key("ArrowRight", shift=True)
    shows(query="1", head="0")
    share = weights[1, 0].sum().item()
    assert json.loads(browser.state()["shares"]) == pytest.approx([share], abs=1e-4)
    browser.key("ArrowLeft", shift=True)
    browser.key("ArrowLeft", shift=True)
    shows(head="2")

    browser.key("ArrowUp")
    shows(layer="encoder", head="2", box="-1")
    for query, (x, y) in enumerate(TwoStages.centres.tolist()):
        if query % 5 == 0:
            browser.click(x + 0.05, y - 0.05)
            shows(query=str(query))
    assert "row 3, column 2" in browser.run("document.getElementById('said').innerText")
    browser.mouse("mousePressed", 0.1, 0.1, pressed=True)
    browser.mouse("mouseMoved", 0.9, 0.9, pressed=True)
    shows(query="23")
    browser.mouse("mouseReleased", 0.9, 0.9)
    browser.key("ArrowRight")
    shows(query="23")  # there is no other

    browser.run("document.querySelector('#boxes button').click()")
    shows(layer="decoder", query="4", box="0")
    browser.run(
        "((input) => { input.value = 3; input.dispatchEvent(new Event('change')); })"
        "(document.getElementById('query'))"
    )
    shows(query="3")


@needs_chromium
def test_dots_are_drawn_where_and_as_large_as_the_samples_say(page, browser):
    value, weights = torch.rand(1, 96, 1, 4), torch.tensor([0.6, 0.3, 0.1, 0]).view(1, 1, 1, 1, 4)
    locations = torch.tensor([[0.25, 0.5], [0.75, 0.25], [0.5, 0.75], [-0.5, 0.5]])

    def run(model):
        return msda.ms_deform_attn(
            value, [(8, 12)], None, locations.view(1, 1, 1, 1, 4, 2) / 2, weights
        )

    explore(nn.Identity(), torch.full((80, 120), 0.5), page, inputs=run, valid_ratio=(0.5, 0.5))
    browser.open(page)
    assert browser.state()["points"] == "3"
    # The level's colour, in pixels along the row through a dot's centre, gives its diameter.
    script = """(([x, y]) => {
        const canvas = document.getElementById('canvas');
        const row = Math.round(y * canvas.height);
        const {data} = canvas.getContext('2d').getImageData(0, row, canvas.width, 1);
        const near = (i) => data[4 * i] > 240 && data[4 * i + 1] > 200 && data[4 * i + 2] < 60;
        let first = Math.round(x * canvas.width), last = first;
        if (!near(first)) return 0;
        while (near(first - 1)) first -= 1;
        while (near(last + 1)) last += 1;
        return (last - first + 1) / canvas.width;
    })"""
    for place, weight in zip(locations[:3].tolist(), weights.flatten()[:3].tolist(), strict=True):
        diameter = browser.run(f"{script}({place})")
        # The edge of a dot, a pixel or two of some hundreds, is of other colours.
        assert diameter == pytest.approx(weight**0.5 * 0.075, abs=0.005)
    assert browser.run(f"{script}([0.5, 0.5])") == 0


@needs_chromium
def test_a_hidden_level_is_not_drawn_and_still_counted(page, image, browser):
    explore(make_attention(), image, page, inputs=make_arguments())
    browser.open(page)
    before = browser.state()
    browser.run("document.querySelector('#levels button').click()")
    after = browser.state()
    assert int(after["points"]) < int(before["points"]) and after["shares"] == before["shares"]
    pressed = "[...document.querySelectorAll('#levels button')].map((b) => b.ariaPressed)"
    assert browser.run(pressed) == ["false", "true"]


@needs_chromium
def test_thinned_queries_are_found_by_the_nearest_number_and_the_rule_is_shown(
    page, image, browser
):
    explore(Encoder(), image, page, max_megabytes=0.15)
    encoder = read(page)["layers"][0]
    kept = torch.tensor(decode(encoder)[3])
    browser.open(page)
    browser.key("ArrowUp")
    for wanted in (0, 100, 2999):
        browser.run(
            f"((input) => {{ input.value = {wanted}; input.dispatchEvent(new Event('change')); }})"
            "(document.getElementById('query'))"
        )
        shown = int(browser.state()["query"])
        assert abs(shown - wanted) == (kept - wanted).abs().min()
    assert browser.run("document.getElementById('rule').innerText") == encoder["rule"]


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_a_phone_and_every_control_has_a_name(page, image, browser, width):
    explore(TwoStages(), image, page)
    size = dict(width=width, height=800, deviceScaleFactor=2, mobile=width < 600)
    browser.ask("Emulation.setDeviceMetricsOverride", **size)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.ask("Accessibility.enable")
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "combobox", "spinbutton", "radio", "image"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in controls
    ]
    assert {role for role, _ in named} == controls
    assert all(name for _, name in named)
