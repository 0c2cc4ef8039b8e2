"""The detector's programs on data with everything that people's data has, from check to results."""

import json
import re

import evaluate
import numpy as np
import predict
import pytest
import torch
import train
from PIL import Image
from torch import nn

from detector import run_checkpoints
from detector.config import PRESETS, DataConfig
from detector.data import build_dataset, check
from detector.data.__main__ import main as check_command
from detector.data.loading import make_loader
from detector.evaluation import as_records, average_precision
from detector.evaluation import evaluate as evaluate_set
from tests.detector import messy_data

SETTINGS = (
    "--preset shapes-easy --hidden-dim 32 --num-heads 2 --num-encoder-layers 1 "
    "--feedforward-dim 32 --device cpu --num-workers 0"
)
TINY = SETTINGS.split()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A data set of each kind of image twice, in train, valid and test."""
    folder = tmp_path_factory.mktemp("messy")
    kinds = len(messy_data.KINDS) + len(messy_data.UNREADABLE)
    messy_data.write_split(folder / "train", 2 * kinds, seed=0)
    messy_data.write_split(folder / "valid", kinds, seed=1)
    messy_data.write_split(folder / "test", kinds, seed=2)
    (folder / "test/_annotations.coco.json").unlink()
    return folder


@pytest.fixture(scope="module")
def trained(messy, tmp_path_factory):
    """Folder of a run on it, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(train, "_say", said.append)
        given = ["--data-path", str(messy), "--output", str(folder), "--two-stage"]
        given += ["--num-queries", "40", "--batch-size", "3", "--epochs", "1", "--max-side", "96"]
        assert train.main([*TINY, *given]) == 0
    return folder, "\n".join(said)


def test_training_gets_to_its_end_and_says_what_was_left_out(messy, trained):
    folder, said = trained
    # Of 62 images an epoch leaves out 2, with a batch of 3.
    assert re.search(r"Training data: 1[0-2] images that cannot be read: 'cut-", said)
    assert re.search(r"Training data: \d images? of more than 8 bits, nearly black: --white-", said)
    assert re.search(r"Training data: \d+ images turned by EXIF, whose size does not tell", said)
    assert (folder / "last.pt").exists()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (evaluation,) = [record for record in log if record["event"] == "evaluation"]
    assert evaluation["unreadable_images"] == len(messy_data.UNREADABLE)
    assert evaluation["images"] == len(messy_data.KINDS) + len(messy_data.UNREADABLE)


def test_evaluation_writes_results_with_the_ids_that_were_given(messy, trained, tmp_path, capsys):
    folder, _ = trained
    arguments = [str(folder / "last.pt"), "--device", "cpu", "--num-workers", "0"]
    files = ["--json", str(tmp_path / "ap.json"), "--results", str(tmp_path / "results.json")]
    assert evaluate.main([*arguments, *files]) == 0
    printed = capsys.readouterr().out
    number = len(messy_data.UNREADABLE)
    assert f"{number} unreadable: cut-" in printed and "not_finite" in printed
    assert f"detections: {tmp_path / 'results.json'}" in printed

    results = json.loads((tmp_path / "results.json").read_text())
    content = json.loads((messy / "valid/_annotations.coco.json").read_bytes())
    names = {json.dumps(image["id"]): image["file_name"] for image in content["images"]}
    assert all(record.keys() == {"image_id", "category_id", "bbox", "score"} for record in results)
    found = {names[json.dumps(record["image_id"])] for record in results}
    unreadable = {name for name in names.values() if "-" in name and is_unreadable(name)}
    assert found == set(names.values()) - unreadable
    categories = {json.dumps(category["id"]) for category in content["categories"]}
    assert {json.dumps(record["category_id"]) for record in results} <= categories
    numbers = json.loads((tmp_path / "ap.json").read_text())
    assert {json.dumps(entry["id"]) for entry in numbers["per_class"]} == categories
    assert len(numbers["unreadable"]) == number


def is_unreadable(name):
    return re.split(r"[/\\]", name)[-1].split("-")[0] in messy_data.UNREADABLE


def test_images_without_annotations_give_results_without_a_precision(trained, tmp_path, capsys):
    folder, _ = trained
    arguments = [str(folder / "last.pt"), "--device", "cpu", "--num-workers", "0"]
    arguments += ["--split", "test"]
    assert evaluate.main(arguments) == 1
    assert "results must be given (--results FILE) for" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--results", str(tmp_path / "results.json")]) == 0
    assert "no annotations to compare with, so no AP" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert "plain-0000.png" in {record["image_id"] for record in results}
    assert evaluate.main([*arguments[:-1], "night"]) == 1
    assert "night/_annotations.coco.json" in capsys.readouterr().err


def test_prediction_gets_to_its_end_and_its_status_tells(messy, trained, tmp_path, capsys):
    folder, _ = trained
    arguments = [str(messy / "test"), "--checkpoint", str(folder / "last.pt"), "--threshold", "0"]
    assert predict.main([*arguments, "--output", str(tmp_path), "--device", "cpu"]) == 1
    errors = capsys.readouterr().err
    content = json.loads((tmp_path / "predictions.json").read_text())
    there = {path.name for path in (messy / "test").iterdir() if path.is_file()}
    unreadable = {name for name in there if is_unreadable(name)}
    assert {entry["file"] for entry in content["unreadable"]} == unreadable
    assert {entry["file"] for entry in content["images"]} == there - unreadable
    assert content["failed"] == []
    assert f"{len(unreadable)} of {len(there)} images could not be read" in errors
    assert re.search("images? with several pictures in the file: the first is taken: '", errors)
    ids = dict(zip(("red thing", "green thing", "blue thing", "things"), "72c0", strict=True))
    for image in content["images"]:
        for detection in image["detections"]:
            assert str(detection["category_id"])[0] == ids[detection["name"]]


def test_the_check_says_what_is_there_and_draws_it(messy, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["x", str(messy), "--output", str(tmp_path / "look")])
        assert check_command() == 0
    printed = capsys.readouterr().out
    kinds, unreadable = len(messy_data.KINDS), len(messy_data.UNREADABLE)
    # What is missing cannot be listed where there is no annotation file.
    for split, number, missing in (("train", 2, 0), ("val", 1, 0), ("test", 1, 1)):
        part = printed.split(f"{split}: ")[1].split("samples")[0]
        bad = number * unreadable - missing
        assert f"  images     {number * kinds + bad}, {bad} of which cannot be read\n" in part
        with Image.open(tmp_path / "look" / f"{split}.png") as sheet:
            assert sheet.width == 4 * 430 + 10 and len(sheet.convert("L").getcolors()) > 50
    part = printed.split("val: ")[0]
    for line in (
        "1  image is listed twice, and counts once",
        "5  annotations are of images not listed, and left out",
        "2  images transparent all over: the alpha channel is ignored",
        "2  it is empty",
        "classes without an object: things",
    ):
        assert line in part
    assert re.search(r"\n  green thing  2\.0 +\d+ +\d+", part)
    assert max(map(len, printed.splitlines())) < 110


# ---- what stands for what ------------------------------------------------------------------------


class Oracle(nn.Module):
    """Finds what is there, the images being given in their order."""

    def __init__(self, dataset):
        super().__init__()
        self.targets = iter([target for _, target in dataset])
        self.num_classes = dataset.num_classes

    def forward(self, images, padding_mask):
        logits = torch.full((len(images), 12, self.num_classes), -20.0)
        boxes = torch.rand(len(images), 12, 4)
        for i in range(len(images)):
            target = next(self.targets)
            rows = range(len(target["labels"]))
            logits[i, rows, target["labels"]] = 10
            boxes[i, rows] = target["boxes"]
        return {"pred_logits": logits, "pred_boxes": boxes}


def test_who_finds_everything_has_a_precision_of_one_whatever_the_data_looks_like(messy, tmp_path):
    data = DataConfig(data_path=str(messy), short_sides=(90,), max_side=400)
    dataset = build_dataset(data, "train")
    names = dict(zip(dataset.category_ids, dataset.categories, strict=True))
    readable = build_dataset(data, "val", categories=names)
    oracle = Oracle(readable)
    bad = readable.bad_images.clone()
    results = evaluate_set(
        oracle, make_loader(readable, 4), readable, "cpu", (32, 96), 100, tmp_path / "r.json"
    )
    assert results["unreadable_images"] == int(bad.sum()) == len(messy_data.UNREADABLE)

    # Anybody's evaluation of the file comes to the same, as ids of file and annotations agree.
    content = json.loads((tmp_path / "r.json").read_text())
    ids = readable.annotations.image_ids
    keys = [json.dumps(identifier) for identifier in ids]
    labels = [json.dumps(identifier) for identifier in readable.category_ids]
    found = {i: [] for i in range(len(ids))}
    for record in content:
        label = labels.index(json.dumps(record["category_id"]))
        found[keys.index(json.dumps(record["image_id"]))].append(
            [*record["bbox"], record["score"], label]
        )
    found = {i: np.array(rows).reshape(-1, 6) for i, rows in found.items()}
    truth = readable.annotations.as_coco(range(len(ids)), readable.labels_of_categories)
    again = average_precision(truth, found, (32, 96))
    for name in ("AP", "AP50", "AP_small", "AR100"):
        assert again[name] == pytest.approx(results[name], abs=1e-4)

    # What is missed is of images that cannot be read.
    of_readable = {i: rows for i, rows in found.items() if not bad[i]}
    assert average_precision(truth, of_readable, (32, 96))["AP"] > 0.95
    assert len(as_records(found, readable)) == len(content)


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_results_are_in_the_pixels_that_the_annotations_speak_of(tmp_path, orientation):
    chance = messy_data.random.Random(orientation)
    (tmp_path / "valid").mkdir()
    images, annotations = [], []
    for i, enlarged in enumerate((1, 1, 3)):
        picture, _ = messy_data.paint(60, 40, chance)
        picture = messy_data.stored(picture, orientation)
        images.append({"id": f"image {i}", "file_name": f"{i}.png"})
        images[-1] |= dict(zip(("width", "height"), picture.size, strict=True))
        exif = Image.Exif()
        exif[messy_data.ORIENTATION] = orientation
        large = picture.resize([side * enlarged for side in picture.size])
        large.save(tmp_path / f"valid/{i}.png", exif=exif)
        box = [3 + i, 5, 10, 15 - i]
        annotations.append({"image_id": f"image {i}", "category_id": "c", "bbox": box})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": "c", "name": "thing"}]
    (tmp_path / "valid/_annotations.coco.json").write_text(json.dumps(content))
    dataset = build_dataset(DataConfig(data_path=str(tmp_path), short_sides=(50,)), "val")
    assert dataset[0][0].shape == (3, 50, 75)  # upright
    loader, file = make_loader(dataset, 2), tmp_path / "r.json"
    results = evaluate_set(Oracle(dataset), loader, dataset, "cpu", (1, 2), 100, file)
    assert results["AP"] == pytest.approx(1)
    best = {}
    for record in json.loads(file.read_text()):
        best.setdefault(record["image_id"], record)
    for annotation in annotations:
        record = best[annotation["image_id"]]
        assert record["bbox"] == pytest.approx(annotation["bbox"], abs=1e-3)
        assert record["category_id"] == "c"


def test_names_of_classes_can_be_taken_from_annotations(plain, trained, tmp_path, capsys):
    folder, _ = trained
    state = torch.load(folder / "last.pt", weights_only=True)
    state |= {"categories": None, "category_ids": list(range(4))}
    run_checkpoints.save(state, tmp_path / "nameless.pt")
    arguments = [str(plain / "train/0.png"), "--checkpoint", str(tmp_path / "nameless.pt")]
    arguments += ["--output", str(tmp_path), "--threshold", "0", "--device", "cpu"]

    def names():
        content = json.loads((tmp_path / "predictions.json").read_text())
        return {d["category_id"]: d["name"] for d in content["images"][0]["detections"]}

    assert predict.main(arguments) == 0
    assert names() == {i: f"class {i}" for i in range(4)}
    file = plain / "train/_annotations.coco.json"
    assert predict.main([*arguments, "--names", str(file)]) == 0
    assert names() == {0: "class 0", 1: "thing", 2: "class 2", 3: "class 3"}
    file.write_text("[]")
    assert predict.main([*arguments, "--names", str(file)]) == 1
    assert "file has no 'images'" in capsys.readouterr().err


@pytest.fixture
def plain(tmp_path):
    """A folder with train/ alone: four images, an object in each."""
    folder = tmp_path / "plain"
    (folder / "train").mkdir(parents=True)
    chance = messy_data.random.Random(0)
    images, annotations = [], []
    for i in range(4):
        picture, objects = messy_data.paint(32, 32, chance)
        picture.save(folder / f"train/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 32, "height": 32})
        annotations.append({"image_id": i, "category_id": 1, "bbox": objects[0][0]})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "thing"}]
    (folder / "train/_annotations.coco.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("variant", [[], ["--two-stage", "--num-queries", "300"]])
def test_a_folder_with_train_alone_and_32_pixels_trains_one_by_one(
    plain, tmp_path, capsys, variant
):
    folder = tmp_path / "run"
    given = ["--data-path", str(plain), "--output", str(folder), "--batch-size", "1"]
    assert train.main([*TINY, *given, "--epochs", "1", "--ema-decay", "0.5", *variant]) == 0
    said = capsys.readouterr().err
    assert "There is no split val: nothing is validated" in said
    assert f"Nothing was validated; weights of the last epoch in {folder}/last.pt" in said
    assert not (folder / "best.pt").exists()
    evaluation = [str(folder / "last.pt"), "--num-workers", "0", "--batch-size", "3"]
    files = ["--json", str(tmp_path / "ap.json")]
    assert evaluate.main([*evaluation, "--split", "train", *files]) == 0
    assert json.loads((tmp_path / "ap.json").read_text())["images"] == 4
    assert evaluate.main(evaluation) == 1
    assert "instances_val*.json and valid/_annotations" in capsys.readouterr().err


def test_a_training_split_is_evaluated_as_it_is(plain):
    config = DataConfig(data_path=str(plain), short_sides=(32,), horizontal_flip=1.0)
    as_is = build_dataset(config, "train", training=False)
    mirrored = build_dataset(config, "train")
    assert not as_is.training and mirrored.training
    (image, target), (other, _) = as_is[0], mirrored[0]
    assert target["size"].tolist() == [32, 32]
    assert not torch.equal(image, other)
    assert [int(t["image_id"]) for b in make_loader(as_is, 3) for t in b.targets] == [0, 1, 2, 3]


def test_the_training_program_checks_data_with_its_settings(plain, tmp_path, capsys):
    given = [*TINY, "--output", str(tmp_path / "run"), "--check-data"]
    assert train.main([*given, "--data-path", str(plain)]) == 0
    printed = capsys.readouterr().out
    assert "  images     4\n" in printed and "val: not there" in printed
    assert (tmp_path / "run/train.png").exists() and not (tmp_path / "run/last.pt").exists()
    # A run can still start there.
    assert (
        train.main([*given[:-1], "--data-path", str(plain), "--epochs", "1", "--batch-size", "2"])
        == 0
    )
    assert train.main(["--resume", str(tmp_path / "run/last.pt"), "--check-data"]) == 0


def test_a_check_of_what_cannot_be_used_says_why_and_has_status_1(plain, tmp_path, capsys):
    path = plain / "train/_annotations.coco.json"
    content = json.loads(path.read_text())
    for record in content["annotations"]:
        record["bbox"] = [side / 32 for side in record["bbox"]]
    path.write_text(json.dumps(content))
    config = DataConfig(data_path=str(plain))
    assert check.check_data(config, tmp_path / "look") == 1
    assert "train: error: " in capsys.readouterr().out
    config = DataConfig(data_path=str(plain), box_format="relative-xywh")
    assert check.check_data(config, tmp_path / "look") == 0
    assert check.check_data(DataConfig(data_path=str(tmp_path)), tmp_path / "look") == 1
    assert "data_path must hold one of" in capsys.readouterr().out


def test_boxes_that_use_a_corner_of_the_images_only_are_worth_a_thought(plain, tmp_path, capsys):
    path = plain / "train/_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"] = [
        {"image_id": i % 4, "category_id": 1, "bbox": [i / 4, 2, 8, 9]} for i in range(30)
    ]
    path.write_text(json.dumps(content))
    assert check.check_data(DataConfig(data_path=str(plain)), tmp_path) == 0
    assert "no box reaches beyond 48% of the width and 34% of the height" in capsys.readouterr().out


def test_an_image_that_the_model_cannot_take_is_named_and_the_others_are_done(
    plain, trained, tmp_path, capsys, monkeypatch
):
    folder, _ = trained
    detect = predict.detect

    def fail(model, image, *arguments, **options):
        if len(calls) == 1:
            calls.append(0)
            raise RuntimeError("not enough memory: you tried to allocate much\nand more lines")
        calls.append(1)
        return detect(model, image, *arguments, **options)

    calls = []
    monkeypatch.setattr(predict, "detect", fail)
    arguments = [str(plain / "train"), "--checkpoint", str(folder / "last.pt"), "--device", "cpu"]
    assert predict.main([*arguments, "--output", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "1.png cannot be predicted and is left out: not enough memory" in errors
    assert "1 of 4 images could not be predicted" in errors
    assert "1 file is not called as images are, and left out: '_annotations.coco.json'" in errors
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert [entry["file"] for entry in content["images"]] == ["0.png", "2.png", "3.png"]
    (entry,) = content["failed"]
    assert entry["file"] == "1.png" and "\n" not in entry["cause"]


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (32, 32)])
def test_thin_and_small_images_are_predicted_and_drawn(trained, tmp_path, size):
    pytest.importorskip("matplotlib")
    folder, _ = trained
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "--checkpoint", str(folder / "last.pt"), "--output"]
    arguments += [str(tmp_path / "out"), "--threshold", "0", "--show-points", "1"]
    assert predict.main([*arguments, "--attention-map", "1", "--device", "cpu"]) == 0
    for kind in ("boxes", "points", "attention"):
        with Image.open(tmp_path / f"out/a.{kind}.png") as picture:
            picture.load()


def test_prediction_reads_images_by_the_rules_of_training_or_its_own(trained, tmp_path, capsys):
    folder, _ = trained
    Image.fromarray(np.full((32, 32), 200, np.float32)).save(tmp_path / "a.tif")
    arguments = [str(tmp_path / "a.tif"), "--checkpoint", str(folder / "last.pt"), "--output"]
    arguments += [str(tmp_path / "out"), "--device", "cpu"]
    assert predict.main(arguments) == 1
    assert predict.main([*arguments, "--white-level", "255"]) == 0
    assert predict.main([*arguments, "--white-level", "255", "--max-pixels", "1023"]) == 1
    assert "1024 pixels, above the limit of 1023" in capsys.readouterr().err
    assert predict.main([*arguments, "--white-level", "-1"]) == 1
    assert "white_level must be at least 0" in capsys.readouterr().err
    state = torch.load(folder / "last.pt", weights_only=True)
    state["config"]["data"]["white_level"] = 255.0
    run_checkpoints.save(state, tmp_path / "other.pt")
    arguments[2] = str(tmp_path / "other.pt")
    assert predict.main(arguments) == 0


def test_presets_read_images_by_the_same_rules():
    rules = {(p.data.exif, p.data.white_level, p.data.max_pixels) for p in PRESETS.values()}
    assert rules == {("apply", 0.0, 0)}
