"""Average precision as COCO defines it, of all classes and of each."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from detector import distributed
from detector.data.annotations import read_annotations
from detector.data.coco import CocoDetection
from detector.data.loading import Batch
from detector.model import postprocess

Results = dict[str, Any]
# Rows x, y, width, height, score, category id; by the id of the image.
Detections = dict[int, np.ndarray]

NUM_LISTED = 10  # images that could not be read, in a table


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    dataset: CocoDetection,
    device: torch.device | str,
    areas: tuple[int, int] | None = None,
    top: int = 100,
    file: Path | None = None,
) -> Results:
    """Run the model on what the loader gives, and compare with the annotations of those images.

    Every process calls it, with a loader of its share, and gets the results of all.

    Args:
        model: called with images and padding mask; left in the mode it was in.
        loader: of ``dataset``; an image that several processes load counts once.
        dataset: not of training. An image that it could not read counts as one without
            detections.
        device: that the model is on.
        areas: sides of the squares that part small, medium and large objects, in pixels; None:
            those of the data set.
        top: detections per image.
        file: to write the detections to, as COCO's servers take them: a list of "image_id",
            "category_id", "bbox" and "score", with the ids of the data.

    Returns:
        See :func:`average_precision`, if the data set has annotations; also "images" and
        "unreadable_images", how many there were, and "unreadable", their names.
    """
    was_training = model.training
    model.eval()
    found: Detections = {}
    for batch in tqdm(loader, "evaluating", disable=None if distributed.rank() == 0 else True):
        batch = batch.to(device)
        outputs = model(batch.images, batch.padding_mask)
        sizes = torch.stack([target["orig_size"] for target in batch.targets])
        for target, detected in zip(batch.targets, postprocess(outputs, sizes, top), strict=True):
            position = dataset.position_of(int(target["image_id"]))
            found[position] = _rows(detected, position, dataset)
    model.train(was_training)

    dataset.merge_findings()
    shares = distributed.gather(found)
    results = None
    if distributed.rank() == 0:
        found = {image: rows for share in shares for image, rows in share.items()}
        bad = set(dataset.bad_images.nonzero()[:, 0].tolist()) & found.keys()
        found |= {image: np.zeros((0, 6)) for image in bad}
        results = {}
        if dataset.annotations.has_objects:
            results = _compare(dataset, found, areas or dataset.area_sides)
        results |= {
            "images": len(found),
            "unreadable_images": len(bad),
            "unreadable": [dataset.annotations.file_names[image] for image in sorted(bad)],
        }
        if file:
            file.write_text(json.dumps(as_records(found, dataset)) + "\n")
    return distributed.gather(results)[0]


def _rows(detected: dict[str, Tensor], position: int, dataset: CocoDetection) -> np.ndarray:
    """Rows as in ``Detections``, but with the label in place of the category id."""
    # A model can know classes that the data lacks: there is nothing to compare them with.
    known = torch.isin(detected["labels"].cpu(), torch.tensor(dataset.named_labels))
    boxes, scores, labels = (detected[name].cpu()[known] for name in ("boxes", "scores", "labels"))
    start, end = dataset.as_annotated(position, boxes.double()).chunk(2, -1)
    return torch.cat([start, end - start, scores[:, None], labels[:, None]], -1).numpy()


def _compare(dataset: CocoDetection, found: Detections, areas: tuple[int, int]) -> Results:
    """The average precision of rows with labels, by the position of their image.

    Ids can be anything; the evaluation takes numbers only.
    """
    truth = dataset.annotations.as_coco(range(len(dataset)), dataset.labels_of_categories)
    results = average_precision(truth, found, areas)
    for entry in results["per_class"]:
        entry["id"] = dataset.category_ids[entry["id"]]
    return results


def as_records(found: Detections, dataset: CocoDetection) -> list[dict[str, Any]]:
    """Rows with labels, by the position of their image, in COCO's results form."""
    return [
        {
            "image_id": dataset.annotations.image_ids[image],
            "category_id": dataset.category_ids[int(label)],
            "bbox": [round(side, 4) for side in box],
            "score": round(score, 7),
        }
        for image, rows in sorted(found.items())
        for *box, score, label in rows.tolist()
    ]


def ground_truth(path: Path) -> dict[str, Any]:
    """An annotation file as COCO's evaluation takes it, by the rules of its parser."""
    annotations = read_annotations(path)
    return annotations.as_coco(annotations.image_keys, annotations.category_keys)


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
    unreadable = results.get("unreadable", [])
    names = unreadable[:NUM_LISTED]
    more = ", ..." if len(unreadable) > len(names) else ""
    counts = f"{results['images']} images, {results['unreadable_images']} unreadable"
    counts += f": {', '.join(names)}{more}" if names else ""
    if "AP" not in results:
        return f"There are no annotations to compare with, so no AP.\n\n{counts}"
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
    return "\n".join([*lines, "", counts])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
