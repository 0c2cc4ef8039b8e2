"""Training that starts from weights of other classes, or goes on with other data."""

import json
import os
import shutil

import pytest
import torch
import train

from detector import run_checkpoints
from detector.backbone import RESNET_BLOCKS
from detector.data.shapes import CATEGORIES
from detector.model import build_model
from tests.detector.small_models import original_file, randomise, resnet_config
from tests.detector.small_runs import SMALL_RUN

ONE_STEP = "--device cpu --max-minutes 1e-9"
# The ids of COCO's 80 categories: what is left of 1 to 90.
COCO_IDS = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def coco_like(shapes, folder, ids, names=None):
    """The rendered shapes as objects of the first, the last and other ones of these categories."""
    shutil.copytree(shapes, folder)
    names = names or [f"thing {number}" for number in ids]
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        old = [category["id"] for category in content["categories"]]
        used = [ids[round(i * (len(ids) - 1) / (len(old) - 1))] for i in range(len(old))]
        new = dict(zip(old, used, strict=True))
        for annotation in content["annotations"]:
            annotation["category_id"] = new[annotation["category_id"]]
        content["categories"] = [
            {"id": number, "name": name} for number, name in zip(ids, names, strict=True)
        ]
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def coco(shapes, tmp_path_factory):
    assert len(COCO_IDS) == 80
    return coco_like(shapes, tmp_path_factory.mktemp("data") / "coco", COCO_IDS)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file of the original's layout for COCO: 91 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RESNET_BLOCKS, "resnet50", (1, 1, 1, 1))
        model = randomise(
            build_model(resnet_config("two_stage", num_classes=91, dropout=0.25)), scale=0.2
        )
    path = tmp_path_factory.mktemp("official") / "r50_deformable_detr-checkpoint.pth"
    return original_file(path, model), model.state_dict()


def start(weights, data, folder, *more):
    """A step of training from weights."""
    arguments = ["--weights", weights, "--data-path", data, "--output", folder, *more]
    arguments += [
        "--device",
        "cpu",
        "--max-minutes",
        "1e-9",
        "--num-workers",
        "0",
        "--short-sides",
        "96",
    ]
    return train.main([*map(str, arguments), "--batch-size", "2", "--no-crop"])


def class_heads(state):
    return {key: tensor for key, tensor in state.items() if "class_embed" in key}


def assert_heads_are_kept(state, official):
    """After one step."""
    heads = class_heads(official)
    assert heads
    for key, tensor in heads.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=1e-3, msg=key)


def test_original_weights_for_coco_keep_their_classes_on_coco(
    shallow_resnet, coco, official, tmp_path, caplog
):
    path, weights = official
    assert start(path, coco, tmp_path / "run") == 0
    assert f"labels are category ids, as in {path}: --label-ids category" in caplog.text
    state = run_checkpoints.load(tmp_path / "run" / "last.pt")
    assert state["config"]["data"]["label_ids"] == "category"
    assert state["config"]["model"]["num_classes"] == 91
    assert state["category_ids"] == list(range(91))
    assert_heads_are_kept(state["model"], weights)

    # Asked for, it is the same without a word; and it goes on so.
    caplog.clear()
    assert start(path, coco, tmp_path / "asked", "--label-ids", "category") == 0
    assert "label" not in caplog.text
    last = tmp_path / "asked" / "last.pt"
    assert train.main(["--resume", str(last), *ONE_STEP.split()]) == 0


def test_the_other_choice_on_coco_is_answered_with_what_keeps_the_classes(
    shallow_resnet, coco, official, tmp_path, capsys
):
    path, _ = official
    assert start(path, coco, tmp_path / "run", "--label-ids", "contiguous") == 1
    said = capsys.readouterr().err
    assert said == (
        f"error: {path} knows 91 classes, the data has 80; to learn those of the data by new class "
        "heads: --reset-classes; to keep what it knows, where the category ids of the data mean "
        "what they did in its training, as COCO's do: --label-ids category\n"
    )
    assert not (tmp_path / "run").exists()
    assert start(path, coco, tmp_path / "run", "--reset-classes") == 0
    state = run_checkpoints.load(tmp_path / "run" / "last.pt")
    assert state["config"]["data"]["label_ids"] == "contiguous"
    assert state["model"]["class_embed.0.weight"].shape == (80, 32)


@pytest.mark.parametrize(
    ("ids", "advice"),
    [
        ([1, 3, 44, 62], True),
        (list(range(90)), True),
        (list(range(7)), True),
        ([1, 7, 5000], False),
    ],
    ids=["part_of_coco", "90", "own", "large_ids"],
)
def test_other_classes_are_answered_with_what_fits(
    shallow_resnet, shapes, official, tmp_path, capsys, ids, advice
):
    path, weights = official
    data = coco_like(shapes, tmp_path / "data", ids)
    assert start(path, data, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert f"knows 91 classes, the data has {len(ids)}; to learn those of the data" in said
    assert ("--label-ids category" in said) == advice
    if not advice:
        return
    # Either piece of advice works; ids keep all that the heads know.
    assert start(path, data, tmp_path / "run", "--label-ids", "category") == 0
    state = run_checkpoints.load(tmp_path / "run" / "last.pt")
    assert_heads_are_kept(state["model"], weights)
    last = str(tmp_path / "run" / "last.pt")
    assert train.main(["--resume", last, *ONE_STEP.split()]) == 0
    assert start(path, data, tmp_path / "new", "--reset-classes") == 0
    state = run_checkpoints.load(tmp_path / "new" / "last.pt")
    assert state["model"]["class_embed.0.weight"].shape == (len(ids), 32)


def small_run(*arguments):
    return train.main([*map(str, arguments), "--num-workers", "0", "--max-minutes", "1e-9"])


@pytest.fixture(scope="module")
def own(shapes, tmp_path_factory):
    """The folder of a run of ours."""
    folder = tmp_path_factory.mktemp("own") / "run"
    assert small_run(*SMALL_RUN.split(), "--data-path", shapes, "--output", folder) == 0
    return folder


def test_our_weights_on_other_classes_are_answered_with_the_flag(
    own, shapes, tmp_path, capsys, caplog
):
    weights = own / "last.pt"
    arguments = ["--weights", weights, "--output", tmp_path / "run", "--short-sides", 0]
    few = coco_like(shapes, tmp_path / "few", [1, 2, 3])
    assert small_run(*arguments, "--data-path", few) == 1
    said = capsys.readouterr().err
    assert f"{weights} knows 6 classes, the data has 3; to learn those" in said
    assert said.endswith("--reset-classes\n")
    assert small_run(*arguments, "--data-path", few, "--reset-classes") == 0

    # As many of other names are taken for those of the data, which is said.
    arguments[3] = tmp_path / "others"
    others = coco_like(shapes, tmp_path / "six", [1, 2, 3, 4, 5, 6], list("abcdef"))
    caplog.clear()
    assert small_run(*arguments, "--data-path", others) == 0
    assert (
        f"the classes of {weights} have other names ({', '.join(CATEGORIES[:4])} and" in caplog.text
    )


def test_a_run_cannot_go_on_with_other_classes(own, shapes, tmp_path, capsys):
    others = coco_like(shapes, tmp_path / "data", [1, 2, 7, 8, 9, 10])
    before = sorted(os.listdir(own))
    assert small_run("--resume", own / "last.pt", "--data-path", others) == 1
    said = capsys.readouterr().err
    assert f"a run must be resumed on its classes, the ids 0, 1, 2, 3 and 2 more in {own}" in said
    assert said.endswith(f"--weights {own}/last.pt --reset-classes\n")
    assert sorted(os.listdir(own)) == before


def test_a_finished_run_says_so_and_how_to_go_on(shapes, tmp_path, capsys):
    folder = tmp_path / "run"
    last = folder / "last.pt"
    run = [*SMALL_RUN.split(), "--data-path", shapes, "--output", str(folder), "--num-workers", "0"]
    assert train.main([*run, "--epochs", "1"]) == 0
    before = last.read_bytes()
    capsys.readouterr()
    for more in ([], ["--epochs", "1"]):
        assert train.main(["--resume", str(last), *more]) == 0
        assert capsys.readouterr().err == (
            f"{last} is of a run that is finished, 1 epochs. "
            f"To go on: --resume {last} --epochs N, with N above 1\n"
        )
    assert last.read_bytes() == before
    assert train.main(["--resume", str(last), "--epochs", "2", "--num-workers", "0"]) == 0
    assert run_checkpoints.load(last)["epoch"] == 2


def test_weights_alone_are_no_run_to_go_on_with(own, tmp_path, capsys):
    state = run_checkpoints.load(own / "last.pt")
    weights = {name: state[name] for name in ("model", "config", "categories", "category_ids")}
    run_checkpoints.save(weights, tmp_path / "best.pt")
    assert small_run("--resume", tmp_path / "best.pt") == 1
    assert capsys.readouterr().err.endswith(
        f"but holds weights alone; --weights {tmp_path}/best.pt starts anew from it\n"
    )
    shutil.copy(own / "last.pt", tmp_path)
    assert small_run("--resume", tmp_path / "best.pt") == 1
    assert f"--resume {tmp_path}/last.pt goes on, --weights" in capsys.readouterr().err
