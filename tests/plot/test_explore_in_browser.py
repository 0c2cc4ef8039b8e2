"""A browser shows the page of msda.plot.explore, and its controls work."""

import json

import pytest
import torch
from torch import nn

import msda
from msda.plot import explore
from tests.plot.browser import CHROMIUM, Browser
from tests.plot.pages import Encoder, decode, read
from tests.plot.small_attention import make_arguments, make_attention

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
