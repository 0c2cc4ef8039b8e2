"""The detector's predictions: the command line, and the pictures."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import predict as command
import pytest
import torch
from PIL import Image

from detector import drawing, run_checkpoints
from detector.checkpoint_formats import load_model
from detector.config import PRESETS, DataConfig
from detector.data import build_dataset
from detector.data.transforms import normalise, resize
from detector.model import build_model, postprocess
from msda.plot import SamplingRecord, capture_sampling

CONFIG = PRESETS["shapes-easy"].replace(
    num_classes=3,
    hidden_dim=32,
    num_heads=2,
    num_encoder_layers=1,
    feedforward_dim=32,
    num_queries=10,
    num_workers=0,
    short_sides=(40, 64),
    max_side=72,
)
NAMES = ["cat", "dog", "mouse"]


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(**changes):
    """Random, but its boxes and points differ from query to query and its scores lie around 0.5."""
    torch.manual_seed(3)
    model = build_model(CONFIG.replace(**changes).model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                parameter.normal_(std=0.3)
            if "class_embed" in name or ("bbox_embed" in name and "layers.2.weight" in name):
                parameter.normal_(std=0.3)
    return model


def save_model(path, model, categories=NAMES):
    checkpoint = {"model": model.state_dict(), "config": CONFIG.to_dict()}
    checkpoint["config"]["model"] = dataclasses.asdict(model.config)
    ids = list(range(len(NAMES)))
    run_checkpoints.save(checkpoint | {"categories": categories, "category_ids": ids}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save_model(tmp_path / "model.pt", make_model())


def make_image(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def images(tmp_path):
    """Two frames and something else."""
    folder = tmp_path / "frames"
    folder.mkdir()
    make_image(96, 64).save(folder / "frame_10.png")
    make_image(48, 120, seed=1).save(folder / "frame_9.JPG")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def read_json(folder):
    return json.loads((folder / "predictions.json").read_text())


# ---- command line --------------------------------------------------------------------------------


def test_images_are_predicted_and_drawn_from_end_to_end(tmp_path, images, checkpoint):
    output = tmp_path / "new" / "folder"
    arguments = [images, "--checkpoint", checkpoint, "--output", output, "--threshold", "0.4"]
    arguments += ["--device", "cpu", "--show-points", "3", "--attention-map"]
    result = subprocess.run(
        [sys.executable, command.__file__, *arguments], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    predictions = read_json(output)
    assert predictions["threshold"] == 0.4 and predictions["unreadable"] == []
    assert [image["file"] for image in predictions["images"]] == ["frame_9.JPG", "frame_10.png"]
    kinds = ("boxes", "points", "attention")
    names = {f"frame_{number}.{kind}.png" for number in (9, 10) for kind in kinds}
    assert {path.name for path in output.iterdir()} == names | {"predictions.json"}
    for name in names:
        with Image.open(output / name) as picture:
            assert max(picture.size) >= drawing.SMALLEST_PICTURE
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 100

    # The numbers are those of the model for the image in the size of its evaluation.
    (image,) = [image for image in predictions["images"] if image["file"] == "frame_10.png"]
    assert (image["width"], image["height"]) == (96, 64)
    with Image.open(images / "frame_10.png") as file:
        small, _ = resize(file.convert("RGB"), torch.zeros(0, 4), 64, 72)
    assert small.size == (72, 48)
    with torch.no_grad():
        outputs = make_model()(normalise(small)[None])
    (expected,) = postprocess(outputs, torch.tensor([[64, 96]]))
    kept = expected["scores"] >= 0.4
    assert 3 < kept.sum() < 30
    detections = image["detections"]
    for key, name in (("score", "scores"), ("label", "labels"), ("box", "boxes")):
        actual = torch.tensor([detection[key] for detection in detections])
        torch.testing.assert_close(actual, expected[name][kept], rtol=0, atol=0.01)
    assert all(detection["name"] == NAMES[detection["label"]] for detection in detections)


@pytest.mark.parametrize("threshold", [0.4, 1.0], ids=["detections", "none"])
def test_the_page_of_explore_has_the_detections_as_boxes(tmp_path, checkpoint, threshold):
    image, page = tmp_path / "image.png", tmp_path / "where.html"
    make_image(96, 64).save(image)
    arguments = [image, "--checkpoint", checkpoint, "--output", tmp_path, "--explore", page]
    assert run(*arguments, "--threshold", threshold, "--device", "cpu") == 0
    detections = read_json(tmp_path)["images"][0]["detections"]
    content = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    data = json.loads(content)
    config = make_model().config
    layers = config.num_encoder_layers + config.num_decoder_layers
    assert len(data["layers"]) == layers and data["size"] == [96, 64]
    assert len(data["boxes"]) == max(1, len(detections))  # the best, where there is no detection
    for shown, detection in zip(data["boxes"], detections, strict=False):
        assert shown["query"] == detection["query"]
        assert shown["label"] == f"{detection['name']} {detection['score']:.2f}"
        x, y, width, height = shown["box"]
        corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        pixels = torch.tensor(corners) * torch.tensor([96.0, 64, 96, 64])
        torch.testing.assert_close(pixels, torch.tensor(detection["box"]), rtol=0, atol=0.02)


def test_explore_takes_one_image_and_a_place_that_can_be_written(
    tmp_path, images, checkpoint, capsys
):
    arguments = ["--checkpoint", checkpoint, "--output", tmp_path / "out", "--explore"]
    assert run(images, *arguments, tmp_path / "where.html") == 1
    assert "error: --explore must come with one image, got 2" in capsys.readouterr().err
    assert run(images / "frame_10.png", *arguments, tmp_path / "none" / "where.html") == 1
    assert "error: path must be writable, got " in capsys.readouterr().err


def test_a_corrupt_image_is_named_and_left_out_and_makes_the_status_1(
    tmp_path, images, checkpoint, capsys
):
    whole = (images / "frame_10.png").read_bytes()
    (images / "frame_11.png").write_bytes(whole[: len(whole) // 2])
    (images / "frame_8.png").write_bytes(b"")
    assert run(images, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 1
    predictions = read_json(tmp_path / "out")
    assert [image["file"] for image in predictions["images"]] == ["frame_9.JPG", "frame_10.png"]
    assert [entry["file"] for entry in predictions["unreadable"]] == ["frame_8.png", "frame_11.png"]
    assert all(entry["cause"] for entry in predictions["unreadable"])
    messages = capsys.readouterr().err
    for name in ("frame_8.png", "frame_11.png"):
        assert f"{images / name} cannot be read and is left out: " in messages
    assert "2 of 4 images could not be read" in messages


def test_a_single_corrupt_image_makes_the_status_1(tmp_path, checkpoint):
    path = tmp_path / "bad.png"
    path.write_bytes(b"no image")
    assert run(path, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 1
    assert read_json(tmp_path / "out")["images"] == []


def test_images_are_turned_upright_as_the_camera_says(tmp_path, checkpoint):
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    make_image(96, 64).save(path, exif=exif)
    assert run(path, "--checkpoint", checkpoint, "--output", tmp_path) == 0
    (image,) = read_json(tmp_path)["images"]
    assert (image["width"], image["height"]) == (64, 96)
    with Image.open(tmp_path / "turned.boxes.png") as picture:
        assert picture.height > picture.width


def test_images_that_differ_in_their_suffix_only_get_a_picture_each(tmp_path, checkpoint):
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "a.bmp", "b.png"):
        make_image(40, 40).save(folder / name)
    assert run(folder, "--checkpoint", checkpoint, "--output", output) == 0
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"a.png.boxes.png", "a.bmp.boxes.png", "b.boxes.png"}


def test_sizes_are_those_of_the_checkpoint_unless_given(tmp_path, checkpoint, monkeypatch):
    seen = []

    def keep(image):
        seen.append(image.size)
        return normalise(image)

    monkeypatch.setattr(command, "normalise", keep)
    path = tmp_path / "image.png"
    make_image(96, 64).save(path)
    arguments = [path, "--checkpoint", checkpoint, "--output", tmp_path / "out"]
    run(*arguments)
    run(*arguments, "--short-side", 0)
    run(*arguments, "--max-side", 48)
    assert seen == [(72, 48), (96, 64), (48, 32)]


def test_a_checkpoint_of_weights_alone_has_the_original_s_sizes_and_numbered_classes(tmp_path):
    model = make_model(backbone="resnet50", num_feature_levels=1, num_heads=8)
    torch.save({"model": model.state_dict()}, tmp_path / "original.pth")
    loaded, read = load_model(tmp_path / "original.pth")
    assert not loaded.training
    assert read.categories is None and read.config.data == DataConfig(label_ids="category")
    assert drawing.name_of(2, read.categories) == "class 2"


def test_what_was_predicted_before_ctrl_c_is_written(tmp_path, images, checkpoint, monkeypatch):
    def interrupt(*arguments):
        if len(pictures) == 1:
            raise KeyboardInterrupt
        pictures.append(arguments)

    pictures = []
    monkeypatch.setattr(command, "save_pictures", interrupt)
    assert run(images, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 130
    assert read_json(tmp_path / "out")["images"][0]["file"] == "frame_9.JPG"


@pytest.mark.parametrize(
    ("input", "message"),
    [
        ("nowhere", "error: input must be an image or a folder, got "),
        ("", "error: input must hold images, got "),
    ],
    ids=["missing", "empty"],
)
def test_input_without_images_is_refused(tmp_path, checkpoint, capsys, input, message):
    assert run(tmp_path / input, "--checkpoint", checkpoint) == 1
    assert capsys.readouterr().err.startswith(message)


def test_a_missing_checkpoint_is_refused(images, capsys):
    assert run(images, "--checkpoint", images / "none.pt") == 1
    assert "none.pt" in capsys.readouterr().err


def test_a_dense_model_has_no_sampling_points_to_show(tmp_path, images, capsys):
    path = save_model(tmp_path / "dense.pt", make_model(attention="dense"))
    assert run(images, "--checkpoint", path, "--output", tmp_path / "out", "--show-points") == 1
    assert "must come with deformable attention" in capsys.readouterr().err
    assert run(images, "--checkpoint", path, "--output", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--threshold", "1.5"), "--threshold must be from 0 to 1, got 1.5"),
        (("--threshold", "nan"), "--threshold must be from 0 to 1, got nan"),
        (("--show-points", "-1"), "--show-points must be at least 0, got -1"),
        (("--max-side", "0"), "--max-side must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(checkpoint, images, capsys, option, message):
    with pytest.raises(SystemExit):
        run(images, "--checkpoint", checkpoint, *option)
    assert message in capsys.readouterr().err


# ---- detections and their points -----------------------------------------------------------------


def test_the_record_is_that_of_the_last_decoder_layer():
    model, image = make_model(), torch.randn(3, 48, 64)
    detected, record = drawing.detect(model, image, torch.tensor([48, 64]), points=True)
    with capture_sampling(model) as samples, torch.no_grad():
        outputs = model(image[None])
    assert samples[-1].name == "transformer.decoder.layers.1.cross_attn"
    assert record.sampling_locations.equal(samples[-1].sampling_locations)
    (expected,) = postprocess(outputs, torch.tensor([[48, 64]]))
    assert all(detected[name].equal(tensor) for name, tensor in expected.items())


def test_the_best_detection_of_each_query_is_chosen():
    detected = {"queries": torch.tensor([4, 4, 1, 4, 0, 1])}
    assert drawing.best_queries(detected, 2) == [0, 2]
    assert drawing.best_queries(detected, 9) == [0, 2, 4]


def test_points_are_drawn_in_the_box_and_with_the_name_of_their_detection():
    pytest.importorskip("matplotlib")
    model, picture = make_model(), make_image(96, 64)
    size = torch.tensor([64, 96])
    detected, record = drawing.detect(model, normalise(picture), size, points=True)
    (axes,) = drawing.draw_detection_points(picture, record, detected, [2], NAMES).axes
    label, score = NAMES[detected["labels"][2]], detected["scores"][2]
    assert axes.get_title() == f"{label} {score:.2f}"
    x0, y0, x1, y1 = detected["boxes"][2].tolist()
    bounds = axes.patches[0].get_bbox().extents
    assert bounds == pytest.approx((x0, y0, x1, y1), abs=1e-3)
    locations = record.sampling_locations[0, detected["queries"][2]].flatten(0, 2)
    centre = torch.as_tensor(axes.collections[0].get_offsets().data).mean(0)
    torch.testing.assert_close(centre.float(), locations.mean(0) * torch.tensor([96, 64]))


def record_of(samples, shapes=((4, 6), (2, 3))):
    """One query and head: a list of (x, y, weight) for each level."""
    table = torch.tensor(samples)  # (L, P, 3)
    return SamplingRecord(
        "", table[None, None, None, ..., :2], table[None, None, None, ..., 2], None, shapes
    )


def test_the_attention_map_shows_the_weights_where_they_are_sampled():
    # On the centre of pixel (4, 1) of the first level, and of pixel (0, 1) of the second.
    first, second = [4.5 / 6, 1.5 / 4, 0.75], [0.5 / 3, 1.5 / 2, 0.25]
    density = drawing.attention_map(record_of([[first], [second]]), 0, (6, 4))
    assert density.shape == (4, 6)
    assert density.argmax() == 1 * 6 + 4
    torch.testing.assert_close(density[1, 4], torch.tensor(0.75 * 24))
    assert density.mean().item() == pytest.approx(1, abs=1e-5)
    left = density[:, :4].sum() / 24  # the second level's alone
    assert left.item() == pytest.approx(0.25, abs=0.01)
    outside = drawing.attention_map(record_of([[[1.5, 0.5, 1.0]], [[0.5, -3.0, 1.0]]]), 0, (6, 4))
    assert outside.max() == 0


def test_the_attention_map_is_laid_over_the_image():
    image = Image.new("RGB", (60, 40), (10, 200, 10))
    heat = drawing.draw_attention(image, record_of([[[0.75, 0.375, 1.0]], [[0.75, 0.375, 0.0]]]), 0)
    there, elsewhere = heat.getpixel((45, 15)), heat.getpixel((5, 35))
    assert elsewhere[0] == elsewhere[1] == elsewhere[2]  # grey
    assert there[0] > there[2] + 50  # towards light yellow


# ---- boxes and texts -----------------------------------------------------------------------------


def test_a_box_is_drawn_in_its_place_and_in_the_colour_of_its_class():
    image = Image.new("RGB", (1000, 500), "white")
    picture = drawing.draw_boxes(image, torch.tensor([[300.0, 200, 600, 400]]), [1], ["a"])
    assert picture.size == image.size
    colour = tuple(int(drawing.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5))
    for place in ((300, 300), (600, 300), (450, 200), (450, 400)):
        assert picture.getpixel(place) == colour
    assert picture.getpixel((450, 300)) == (255, 255, 255)
    assert image.getcolors() == [(500000, (255, 255, 255))]  # the original is left alone


def test_the_first_box_is_drawn_on_top():
    box = torch.tensor([300.0, 200, 600, 400])
    picture = drawing.draw_boxes(Image.new("RGB", (1000, 500)), box.expand(2, 4), [2, 0], ["", ""])
    assert picture.getpixel((600, 300)) == (0x00, 0x9E, 0x73)  # COLOURS[2]


def test_small_images_are_enlarged_with_their_boxes():
    image = Image.new("RGB", (64, 32), "white")
    picture = drawing.draw_boxes(image, torch.tensor([[16.0, 8, 48, 24]]), [0], ["a"])
    assert picture.size == (640, 320)
    assert picture.getpixel((320, 240)) != (255, 255, 255)
    assert picture.getpixel((320, 160)) == (255, 255, 255)


def test_texts_neither_hide_each_other_nor_leave_the_picture(monkeypatch):
    places, place_text = [], drawing._place_text

    def keep(*arguments):
        places.append(place_text(*arguments))
        return places[-1]

    monkeypatch.setattr(drawing, "_place_text", keep)
    boxes = torch.rand(12, 4) * 400
    boxes[:, 2:] += boxes[:, :2] + 20  # also beyond the right and the lower end
    boxes[6:] = boxes[:6]  # and twice the same
    drawing.draw_boxes(Image.new("RGB", (640, 640)), boxes, [0] * 12, ["traffic light 0.50"] * 12)
    assert len(places) == 12
    for i, place in enumerate(places):
        assert 0 <= place[0] < place[2] <= 640 and 0 <= place[1] < place[3] <= 640
        assert not any(drawing._overlap(place, other) for other in places[:i])


def test_boxes_without_extent_and_pictures_without_boxes_are_drawn():
    image = Image.new("RGB", (50, 50))
    drawing.draw_boxes(
        image, torch.tensor([[9.0, 9, 9, 9], [80.0, 80, 70, 70]]), [0, 1], ["a", "b"]
    )
    assert drawing.draw_boxes(image, torch.zeros(0, 4), [], []).size == (640, 640)


# ---- sheet ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    annotations, images = [], []
    for i in range(2):
        make_image(64, 48, seed=i).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        box = {"bbox": [8, 8, 24, 16], "area": 384, "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": i, **box})
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "valid").mkdir()
    for path in folder.glob("*.png"):
        path.rename(folder / "valid" / path.name)
    (folder / "valid" / "_annotations.coco.json").write_text(json.dumps(content))
    config = CONFIG.replace(dataset="coco", data_path=str(folder), short_sides=(0,))
    return build_dataset(config.data, "val")


@pytest.mark.parametrize(("attention", "rows"), [("deformable", 3), ("dense", 2)])
def test_a_sheet_shows_truth_predictions_and_points_of_each_image(
    dataset, tmp_path, monkeypatch, attention, rows
):
    pytest.importorskip("matplotlib")
    drawn, draw_boxes = [], drawing.draw_boxes

    def keep(image, boxes, labels, texts, font_share):
        drawn.append((boxes, texts))
        return draw_boxes(image, boxes, labels, texts, font_share)

    monkeypatch.setattr(drawing, "draw_boxes", keep)
    model = make_model(attention=attention).train()
    figure = drawing.picture_sheet(model, dataset, [0, 1], "cpu", threshold=0.4)
    assert len(figure.axes) == rows * 2
    assert all(len(axes.images) == 1 for axes in figure.axes)
    assert model.training
    (truth, texts), (_, predicted) = drawn[:2]
    torch.testing.assert_close(truth, torch.tensor([[8.0, 8.0, 32.0, 24.0]]))
    assert texts == ["cat"]
    assert predicted and all(text.split()[0] in NAMES for text in predicted)
    points = [axes for axes in figure.axes if axes.collections]
    assert len(points) == 2 * (rows - 2)
    assert len(figure.legends) == rows - 2
    figure.savefig(tmp_path / "sheet.png", dpi=50)
