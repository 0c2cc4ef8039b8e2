"""Average precision of the detector's predictions, and the command line that prints it."""

import json
import socket
import sys
from dataclasses import replace

import evaluate as command
import faster_coco_eval
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from detector import evaluation, run_checkpoints
from detector.data import build_dataset
from detector.data.loading import make_loader
from detector.data.shapes import CATEGORIES, EASY, make_shapes
from detector.evaluation import average_precision, evaluate, ground_truth, table
from detector.model import build_model
from tests.detector.small_runs import SMALL

FASTER = (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folder with 2 training images and 11 of validation, of 96x96 pixels."""
    preset = replace(EASY, num_train=2, num_val=11)
    return make_shapes(preset, str(tmp_path_factory.mktemp("shapes")))


class Oracle(nn.Module):
    """Finds what is there, the images being given in their order: ``[first::step]``."""

    def __init__(self, dataset, first=0, step=1, num_classes=None):
        super().__init__()
        order = range(first, len(dataset) + step, step)
        self.targets = iter([dataset[i % len(dataset)][1] for i in order])
        self.num_classes = num_classes or dataset.num_classes

    def forward(self, images, padding_mask):
        assert not self.training
        logits = torch.full((len(images), 12, self.num_classes), -20.0)
        boxes = torch.rand(len(images), 12, 4)
        for i in range(len(images)):
            target = next(self.targets)
            # Boxes are relative to the image, whatever the padding.
            assert (~padding_mask[i]).sum() == target["size"].prod()
            for query, (label, box) in enumerate(
                zip(target["labels"], target["boxes"], strict=True)
            ):
                logits[i, query, label], boxes[i, query] = 10, box
        return {"pred_logits": logits, "pred_boxes": boxes}


def run(model, dataset, batch_size=4, **options):
    return evaluate(model, make_loader(dataset, batch_size), dataset, "cpu", **options)


def truth_of(boxes, categories=(1, 2), **fields):
    """Annotations of one image by (x, y, width, height, category)."""
    annotations = [
        {"id": i, "image_id": 5, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": 0, **fields}
        for i, (*box, category) in enumerate(boxes, 1)
    ]
    return {
        "images": [{"id": 5}],
        "categories": [{"id": number, "name": f"class {number}"} for number in categories],
        "annotations": annotations,
    }


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("short_side", [0, 120])
@pytest.mark.parametrize("label_ids", ["contiguous", "category"])
def test_what_is_there_has_a_precision_of_one(shapes, short_side, label_ids):
    data = replace(SMALL.data, data_path=str(shapes), label_ids=label_ids)
    dataset = build_dataset(replace(data, short_sides=(short_side,)), "val")
    model = Oracle(dataset).train()
    results = run(model, dataset, areas=(20, 30))
    assert model.training
    names = [name for name in results if name.startswith("AP")]
    assert len(names) == 6
    for name in [*names, "AR100"]:
        assert results[name] == pytest.approx(1, abs=1e-6), name
    assert results["images"] == 11 and results["unreadable_images"] == 0
    assert [entry["category"] for entry in results["per_class"]] == list(CATEGORIES)
    content = json.loads(dataset.coco_json.read_text())
    assert sum(entry["objects"] for entry in results["per_class"]) == len(content["annotations"])
    assert all(entry["AP"] in (None, pytest.approx(1)) for entry in results["per_class"])
    assert json.loads(json.dumps(results)) == results


def test_precision_of_a_case_worked_out_by_hand():
    # Of class 1, one of two objects is found, at an IoU of 70 / 100; class 2 is not found; of class
    # 3 there is none. With half of the objects found, the precision is 1 at 51 of 101 recalls.
    truth = truth_of([(0, 0, 10, 10, 1), (50, 50, 10, 10, 1), (20, 20, 40, 40, 2)], (1, 2, 3))
    found = {5: np.array([[0, 0, 10, 7, 0.9, 1], [80, 80, 5, 5, 0.3, 3]])}
    results = average_precision(truth, found, (12, 24))
    half = 51 / 101
    assert results["AP50"] == pytest.approx(half / 2)
    assert results["AP75"] == 0
    assert results["AP"] == pytest.approx(half * 5 / 10 / 2)  # at .5, .55, .6, .65 and .7
    assert results["AP_small"] == pytest.approx(half * 5 / 10)
    assert results["AP_medium"] is None
    assert results["AP_large"] == 0
    assert results["AR1"] == pytest.approx(0.5 * 5 / 10 / 2)
    assert results["per_class"] == [
        {
            "category": "class 1",
            "id": 1,
            "objects": 2,
            "AP": pytest.approx(half * 5 / 10),
            "AP50": pytest.approx(half),
        },
        {"category": "class 2", "id": 2, "objects": 1, "AP": 0, "AP50": 0},
        {"category": "class 3", "id": 3, "objects": 0, "AP": None, "AP50": None},
    ]


@pytest.mark.parametrize(("areas", "size"), [((32, 96), "small"), ((12, 24), "medium")])
def test_sizes_are_parted_as_asked_for(areas, size):
    truth = truth_of([(0, 0, 20, 20, 1)])
    results = average_precision(truth, {5: np.array([[0, 0, 20, 20, 0.9, 1]])}, areas)
    by_size = {name: results[f"AP_{name}"] for name in ("small", "medium", "large")}
    assert by_size == {name: 1.0 if name == size else None for name in by_size}


def test_images_that_are_not_asked_for_do_not_count():
    truth = truth_of([(0, 0, 20, 20, 1)])
    truth["images"].append({"id": 6})
    truth["annotations"].append(truth["annotations"][0] | {"id": 2, "image_id": 6})
    found = {5: np.array([[0, 0, 20, 20, 0.9, 1]])}
    assert average_precision(truth, found, (32, 96))["AP"] == 1
    with_other = average_precision(truth, found | {6: np.zeros((0, 6))}, (32, 96))
    assert with_other["AP"] == pytest.approx(51 / 101)
    assert with_other["per_class"][0]["objects"] == 2


def test_both_packages_agree():
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    random = np.random.default_rng(0)
    truth, found = truth_of([]), {}
    truth["categories"] = [{"id": number, "name": str(number)} for number in range(5)]
    truth["images"] = [{"id": 3 * i} for i in range(60)]
    for image in truth["images"]:
        count = random.integers(0, 7)
        boxes = np.concatenate(
            [random.uniform(0, 60, (count, 2)), random.uniform(3, 40, (count, 2))], 1
        )
        categories = random.integers(0, 4, count)  # none of the last
        crowd = random.random(count) < 0.1
        for box, category, is_crowd in zip(boxes, categories, crowd, strict=True):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(category),
                    "bbox": box.tolist(),
                    "area": float(box[2:].prod() * random.uniform(0.5, 1)),
                    "iscrowd": int(is_crowd),
                }
            )
        # Each object is found several times, more or less well, and sometimes as another class.
        boxes = np.repeat(boxes, 3, 0) + random.normal(0, 2, (3 * count, 4))
        categories = np.where(
            random.random(3 * count) < 0.8,
            np.repeat(categories, 3),
            random.integers(0, 5, 3 * count),
        )
        found[image["id"]] = np.column_stack([boxes, random.random(3 * count), categories])

    ours = average_precision(truth, found, (12, 24), FASTER)
    theirs = average_precision(truth, found, (12, 24), (COCO, COCOeval))
    assert ours == theirs
    assert 0.05 < ours["AP"] < 0.9 and ours["AP_small"] > 0

    # The twelve numbers are those that the package sums up itself.
    with_detections = COCO()
    with_detections.dataset = truth
    with_detections.createIndex()
    rows = [
        [image, *row[:4], row[4], row[5]] for image, rows in found.items() for row in rows.tolist()
    ]
    official = COCOeval(with_detections, with_detections.loadRes(np.array(rows)), "bbox")
    official.evaluate()
    official.accumulate()
    official.summarize()
    results = average_precision(truth, found, (32, 96))
    numbers = [results[name] for name in list(results)[:12]]
    assert [-1 if number is None else number for number in numbers] == official.stats.tolist()


@pytest.mark.parametrize("api", ["faster_coco_eval", "pycocotools"])
def test_no_detection_at_all_is_a_precision_of_zero(api):
    if api == "pycocotools":
        coco = pytest.importorskip("pycocotools.coco")
        classes = (coco.COCO, pytest.importorskip("pycocotools.cocoeval").COCOeval)
    else:
        classes = FASTER
    found = {5: np.zeros((0, 6))}
    results = average_precision(truth_of([(0, 0, 20, 20, 1)]), found, (32, 96), classes)
    assert results["AP"] == results["AP50"] == results["AR100"] == 0


def test_files_with_the_least_that_is_needed_are_completed(tmp_path):
    content = truth_of([(0, 0, 20, 20, 1), (30, 0, 9, 9, 2)])
    for i, annotation in enumerate(content["annotations"]):
        del annotation["area"], annotation["iscrowd"]
        annotation["id"] = i  # 0 would pass for "no match"
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    found = {5: np.array([[0, 0, 20, 20, 0.9, 1], [30, 0, 9, 9, 0.8, 2]])}
    assert average_precision(ground_truth(path), found, (12, 24))["AP"] == 1


def test_an_unreadable_image_counts_as_one_without_detections(shapes, tmp_path):
    folder = tmp_path / "shapes"
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
        for path in (shapes / split).iterdir():
            (folder / split / path.name).write_bytes(path.read_bytes())
    dataset = build_dataset(replace(SMALL.data, data_path=str(folder)), "val")
    oracle = Oracle(dataset)
    (folder / "valid/000003.png").write_bytes(b"not a picture")
    results = run(oracle, dataset)
    assert results["unreadable_images"] == 1 and results["images"] == 11
    assert 0.4 < results["AP"] < 1
    objects = int((ground_truth_images(dataset) == 3).sum())
    assert results["AR100"] < 1 and objects > 0


def ground_truth_images(dataset):
    return np.array([entry["image_id"] for entry in ground_truth(dataset.coco_json)["annotations"]])


def test_classes_that_the_data_lacks_are_left_out(shapes):
    data = replace(SMALL.data, data_path=str(shapes), label_ids="category")
    dataset = build_dataset(data, "val")
    model = Oracle(dataset, num_classes=91)
    assert run(model, dataset)["AP"] == pytest.approx(1)


def test_results_hold_categories_of_the_data_alone(shapes, tmp_path):
    data = replace(SMALL.data, data_path=str(shapes), label_ids="category")
    names = {0: "disc", 2: "triangle", 5: "diamond"}
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        content = json.loads((shapes / split / "_annotations.coco.json").read_text())
        content["categories"] = [{"id": i, "name": name} for i, name in names.items()]
        for record in content["annotations"]:
            record["category_id"] = list(names)[record["category_id"] // 2]
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
        for path in (shapes / split).glob("*.png"):
            (tmp_path / split / path.name).symlink_to(path)
    dataset = build_dataset(replace(data, data_path=str(tmp_path)), "val")
    assert dataset.named_labels == [0, 2, 5]
    file = tmp_path / "results.json"
    assert run(Oracle(dataset, num_classes=91), dataset, file=file)["AP"] == pytest.approx(1)
    records = json.loads(file.read_text())
    # All 91 classes of 12 queries compete for the places of the 100 best.
    assert len(records) < 11 * 100
    assert {record["category_id"] for record in records} == set(names)


def evaluate_share(rank, folder, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    dataset = build_dataset(replace(SMALL.data, data_path=str(folder)), "val")
    loader = make_loader(dataset, 2, rank=rank, world_size=2)
    dataset._leave_out(7 + rank, "what each process finds alone")
    found = evaluate(Oracle(dataset, rank, 2), loader, dataset, "cpu")
    assert dataset.bad_images.nonzero()[:, 0].tolist() == [7, 8]
    (results / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_several_processes_get_the_results_of_one(shapes, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(evaluate_share, (shapes, port, tmp_path), nprocs=2)
    dataset = build_dataset(replace(SMALL.data, data_path=str(shapes)), "val")
    oracle = Oracle(dataset)
    dataset.bad_images[7:9] = True
    expected = run(oracle, dataset)
    assert expected["unreadable_images"] == 2
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_the_table_shows_every_class(shapes):
    dataset = build_dataset(replace(SMALL.data, data_path=str(shapes)), "val")
    lines = table(run(Oracle(dataset), dataset)).splitlines()
    assert lines[0].startswith("AP 100.0  AP50 100.0  AP75 100.0  AP_small")
    for name in CATEGORIES:
        assert any(line.startswith(name) and line.endswith(("100.0", "-")) for line in lines)
    assert lines[-1] == "11 images, 0 unreadable"


# ---- command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    """File of a model with random weights, trained on ``shapes`` as it says."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    config = SMALL.replace(data_path=str(shapes))
    contents = {
        "model": build_model(config.model).state_dict(),
        "config": config.to_dict(),
        "categories": list(CATEGORIES),
        "category_ids": list(range(6)),
    }
    run_checkpoints.save(contents, path)
    return path


def test_the_command_evaluates_a_checkpoint_on_its_data(checkpoint, shapes, tmp_path, capsys):
    arguments = [str(checkpoint), "--device", "cpu", "--num-workers", "1"]
    assert command.main([*arguments, "--json", str(tmp_path / "results.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["checkpoint"] == str(checkpoint)
    assert results["data"] == str(shapes / "valid/_annotations.coco.json")
    assert results["images"] == 11 and 0 <= results["AP"] < 0.5
    output = capsys.readouterr().out
    assert table(results) in output and "diamond" in output
    assert command.main([*arguments, "--data-path", str(shapes), "--areas", "20", "30"]) == 0
    assert capsys.readouterr().out != output


def test_the_command_uses_an_average_of_weights_where_there_is_one(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "evaluate", lambda model, *_: seen.append(model) or RESULTS)
    average = checkpoint.with_name("average.pt")
    contents = torch.load(checkpoint, weights_only=True)
    ema = {key: tensor + 1 for key, tensor in contents["model"].items()}
    run_checkpoints.save(contents | {"ema": ema}, average)
    command.main([str(average), "--device", "cpu"])
    torch.testing.assert_close(seen[0].state_dict(), ema)


RESULTS = average_precision(truth_of([(0, 0, 20, 20, 1)]), {5: np.zeros((0, 6))}, (32, 96)) | {
    "images": 1,
    "unreadable_images": 0,
}


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--data-path", "/no/such/folder"], "data_path must be a folder, got '/no/such/folder'"),
        (["--json", "/no/such/folder/a.json"], "json must be in a folder that exists"),
        (["--dataset", "shape"], "dataset must be one of coco, digits"),
        (["--max-side", "0"], "max_side must be at least 1, got 0"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_sentence(checkpoint, options, cause, capsys):
    assert command.main([str(checkpoint), "--device", "cpu", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and cause in error and error.count("\n") == 1


def test_a_missing_or_damaged_checkpoint_is_named(tmp_path, capsys):
    path = tmp_path / "best.pt"
    for content in (None, b"not a checkpoint"):
        if content:
            path.write_bytes(content)
        assert command.main([str(path), "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert str(path) in error and error.count("\n") == 1


def test_data_with_more_classes_than_the_model_is_refused(checkpoint, tmp_path, shapes, capsys):
    contents = torch.load(checkpoint, weights_only=True)
    few = SMALL.replace(num_classes=3, data_path=str(shapes), label_ids="category")
    contents |= {"model": build_model(few.model).state_dict(), "config": few.to_dict()}
    contents |= {"categories": None, "category_ids": None}
    run_checkpoints.save(contents, tmp_path / "few.pt")
    arguments = [str(tmp_path / "few.pt"), "--device", "cpu", "--data-path", str(shapes)]
    assert command.main([*arguments, "--short-side", "0"]) == 1
    assert "must know the 6 classes of" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--areas", "30", "20"], ["--batch-size", "0"]])
def test_options_that_make_no_sense_are_refused(checkpoint, options, capsys):
    with pytest.raises(SystemExit):
        command.main([str(checkpoint), *options])
    assert "must be" in capsys.readouterr().err


def test_evaluation_without_either_package_says_what_is_needed(monkeypatch):
    for name in ("faster_coco_eval", "pycocotools", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs faster-coco-eval or pycocotools"):
        evaluation.coco_api()
