"""Average precision as COCO defines it, of all classes and of each."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from detector import processes
from detector.data.coco import CocoDetection
from detector.data.loading import Batch
from detector.model import postprocess

Results = dict[str, Any]
# Rows x, y, width, height, score, category id; by the id of the image.
Detections = dict[int, np.ndarray]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    dataset: CocoDetection,
    device: torch.device | str,
    areas: tuple[int, int] | None = None,
    top: int = 100,
) -> Results:
    """Run the model on what the loader gives, and compare with the annotations of those images.

    Every process calls it, with a loader of its share, and gets the results of all.

    Args:
        model: called with images and padding mask; left in the mode it was in.
        loader: of ``dataset``; an image that several processes load counts once.
        dataset: of validation. An image that it could not read counts as one without detections.
        device: that the model is on.
        areas: sides of the squares that part small, medium and large objects, in pixels; None:
            those of the data set.
        top: detections per image.

    Returns:
        See :func:`average_precision`; also "images" and "unreadable_images", how many there were.
    """
    was_training = model.training
    model.eval()
    found: Detections = {}
    for batch in tqdm(loader, "evaluating", disable=None if processes.rank() == 0 else True):
        batch = batch.to(device)
        outputs = model(batch.images, batch.padding_mask)
        sizes = torch.stack([target["orig_size"] for target in batch.targets])
        for target, detected in zip(batch.targets, postprocess(outputs, sizes, top), strict=True):
            found[int(target["image_id"])] = _rows(detected, dataset.category_ids)
    model.train(was_training)

    unreadable = dataset.image_ids[dataset.bad_images].tolist()
    shares = processes.gather((found, unreadable))
    results = None
    if processes.rank() == 0:
        found = {image: rows for share, _ in shares for image, rows in share.items()}
        bad = {image for _, share in shares for image in share}
        found |= {image: np.zeros((0, 6)) for image in bad & found.keys()}
        results = average_precision(
            ground_truth(dataset.coco_json), found, areas or dataset.area_sides
        )
        results |= {"images": len(found), "unreadable_images": len(bad & found.keys())}
    return processes.gather(results)[0]


def _rows(detected: dict[str, Tensor], category_ids: Sequence[int]) -> np.ndarray:
    # A model can know classes that the data lacks: there is nothing to compare them with.
    known = detected["labels"] < len(category_ids)
    boxes, scores, labels = (detected[name][known].cpu() for name in ("boxes", "scores", "labels"))
    start, end = boxes.double().chunk(2, -1)
    categories = torch.tensor(category_ids)[labels]
    return torch.cat([start, end - start, scores[:, None], categories[:, None]], -1).numpy()


def ground_truth(path: Path) -> dict[str, Any]:
    """The annotation file, with what COCO's evaluation needs and other files leave out."""
    content = json.loads(path.read_bytes())
    annotations = [
        {
            "id": i,  # from 1: COCO's evaluation takes a match with annotation 0 for none
            "image_id": record["image_id"],
            "category_id": record["category_id"],
            "bbox": record["bbox"],
            "area": record.get("area", record["bbox"][2] * record["bbox"][3]),
            "iscrowd": int(record.get("iscrowd", 0)),
        }
        for i, record in enumerate(content["annotations"], 1)
    ]
    return {
        "images": [{"id": image["id"]} for image in content["images"]],
        "categories": content["categories"],
        "annotations": annotations,
    }


def coco_api() -> tuple[Any, Any]:
    """Classes of annotations and of their evaluation, by whichever package is installed."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        pass
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ImportError("evaluation needs faster-coco-eval or pycocotools") from None
    return COCO, COCOeval


def average_precision(
    truth: dict[str, Any],
    found: Detections,
    areas: tuple[int, int],
    api: tuple[Any, Any] | None = None,
) -> Results:
    """COCO's twelve numbers and a table by class; None where there is no object to be found.

    Args:
        truth: images, categories and annotations, as in COCO's json files.
        found: detections of the images that count; those of images not in it are not missed.
        areas: sides of the squares that part small, medium and large objects, in pixels.
        api: what to compute it by; None: :func:`coco_api`.

    Returns:
        "AP" (mean over IoU thresholds .5 to .95), "AP50", "AP75", "AP_small" .. "AP_large", "AR1",
        "AR10", "AR100", "AR_small" .. "AR_large", and "per_class", a list of dictionaries with
        "category", "id", "objects", "AP" and "AP50".
    """
    annotations_class, evaluation_class = api or coco_api()
    detections = [
        {
            "id": number,
            "image_id": image,
            "category_id": int(category),
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": 0,
        }
        for number, (image, (*box, score, category)) in enumerate(
            ((image, row) for image, rows in found.items() for row in rows.tolist()), 1
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints how long it takes
        sets = []
        for annotations in (truth["annotations"], detections):
            sets.append(annotations_class())
            sets[-1].dataset = truth | {"annotations": annotations}
            sets[-1].createIndex()
        evaluation = evaluation_class(*sets, iouType="bbox")
        evaluation.params.imgIds = list(found)
        small, large, most = areas[0] ** 2, areas[1] ** 2, 1e5**2
        ranges = {"all": [0, most], "small": [0, small], "medium": [small, large]}
        ranges["large"] = [large, most]
        evaluation.params.areaRng = list(ranges.values())
        evaluation.params.areaRngLbl = list(ranges)
        evaluation.evaluate()
        evaluation.accumulate()

    # (IoU thresholds, recall thresholds, categories, areas, 1 / 10 / 100 detections), and the same
    # without recall thresholds; -1 where there is no object.
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    results: Results = {
        "AP": _mean(precision[:, :, :, 0, -1]),
        "AP50": _mean(precision[0, :, :, 0, -1]),
        "AP75": _mean(precision[5, :, :, 0, -1]),
    }
    for i, size in enumerate(("small", "medium", "large"), 1):
        results[f"AP_{size}"] = _mean(precision[:, :, :, i, -1])
    for i, most_detections in enumerate((1, 10, 100)):
        results[f"AR{most_detections}"] = _mean(recall[:, :, 0, i])
    for i, size in enumerate(("small", "medium", "large"), 1):
        results[f"AR_{size}"] = _mean(recall[:, :, i, -1])

    names = {category["id"]: category["name"] for category in truth["categories"]}
    objects = Counter(
        record["category_id"]
        for record in truth["annotations"]
        if record["image_id"] in found and not record["iscrowd"]
    )
    results["per_class"] = [
        {
            "category": names[number],
            "id": number,
            "objects": objects[number],
            "AP": _mean(precision[:, :, i, 0, -1]),
            "AP50": _mean(precision[0, :, i, 0, -1]),
        }
        for i, number in enumerate(sorted(names))
    ]
    return results


def _mean(numbers: np.ndarray) -> float | None:
    """Mean of what there is: -1 stands for a class without objects."""
    numbers = numbers[numbers > -1]
    return float(numbers.mean()) if numbers.size else None


def table(results: Results) -> str:
    """The results as text, in percent."""
    lines = [
        "  ".join(f"{name} {_percent(results[name]):>5}" for name in names)
        for names in (
            ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
            ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
        )
    ]
    width = max(len(entry["category"]) for entry in results["per_class"])
    lines += ["", f"{'class':{width}}  objects     AP   AP50"]
    for entry in results["per_class"]:
        shares = "  ".join(f"{_percent(entry[name]):>5}" for name in ("AP", "AP50"))
        lines.append(f"{entry['category']:{width}}  {entry['objects']:7}  {shares}")
    lines.append(f"\n{results['images']} images, {results['unreadable_images']} unreadable")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
