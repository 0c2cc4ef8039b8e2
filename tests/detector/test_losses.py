"""Matching and losses against cases worked out by hand, and losses that are no numbers."""

import math

import pytest
import torch

from detector.config import TrainConfig
from detector.losses import NonFiniteLoss, SetCriterion, check_finite, sigmoid_focal_loss, total
from detector.matcher import Costs, match

LN2, LN4 = math.log(2), math.log(4)


def target(labels, boxes):
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
    }


def prediction(logits, boxes):
    return {"pred_logits": torch.tensor(logits), "pred_boxes": torch.tensor(boxes)}


def match_images(logits, boxes, targets, costs):
    """Matching of one layer: logits (B, Q, classes), boxes (B, Q, 4)."""
    group = {"pred_logits": torch.tensor([logits]), "pred_boxes": torch.tensor([boxes])}
    (matching,) = match([group], [targets], costs)
    return [tensor.tolist() for tensor in matching]


def at(*centres):
    return [[x, 0.5, 0.2, 0.2] for x in centres]


# ---- matching ------------------------------------------------------------------------------------


def test_matching_finds_the_least_total_cost_not_the_least_first():
    # Distances from queries at .5 and .9: to the object at .6 they are .1 and .3, to that at .1
    # .4 and .8. Taking the closest pair first would cost .1 + .8, the other way is .4 + .3.
    boxes, objects = at(0.5, 0.9), target([0, 0], at(0.6, 0.1))
    costs = Costs(class_weight=0, box_weight=1, giou_weight=0)
    images, queries, targets = match_images([[[0.0], [0.0]]], [boxes], [objects], costs)
    assert (images, queries, targets) == ([0, 0], [[0, 1]], [[1, 0]])


def test_matching_weighs_class_against_box():
    # Query 0 lies .1 beside the object of class 1 and says 3/4, query 1 on it and says 1/4.
    # Focal class costs: 1/64 ln(4/3) - 27/64 ln 4 = -.580, and 9/64 ln 4 - 3/64 ln(4/3) = .181.
    odds = math.log(3)
    logits, boxes = [[[0.0, odds], [0.0, -odds]]], [at(0.6, 0.5)]
    objects = [target([1], at(0.5))]
    cases = {7.0: 0, 8.0: 1}  # weight of the distance .1: .1 * 7 < .761 < .1 * 8
    for box_weight, best in cases.items():
        costs = Costs(class_weight=1, box_weight=box_weight, giou_weight=0)
        assert match_images(logits, boxes, objects, costs)[1] == [[best]]


def test_matching_weighs_overlap():
    # Same L1 distance .2: a box of half the width overlaps by 1/2, one moved by its width by 0.
    boxes = [[[0.7, 0.5, 0.2, 0.2], [0.5, 0.5, 0.1, 0.1]]]
    objects = [target([0], [0.5, 0.5, 0.2, 0.2])]
    for giou_weight, best in {1.0: 1, -1.0: 0}.items():
        costs = Costs(class_weight=0, box_weight=1, giou_weight=giou_weight)
        assert match_images([[[0.0], [0.0]]], boxes, objects, costs)[1] == [[best]]


def test_matching_counts_targets_through_images_that_may_be_empty():
    boxes = [at(0.1, 0.9), at(0.1, 0.9), at(0.1, 0.9)]
    objects = [target([0], at(0.8)), target([], []), target([0, 0], at(0.9, 0.2))]
    images, queries, targets = match_images([[[0.0]] * 2] * 3, boxes, objects, Costs())
    assert (images, queries, targets) == ([0, 2, 2], [[1, 0, 1]], [[0, 2, 1]])


def test_matching_takes_the_best_objects_where_queries_are_few():
    images, queries, targets = match_images(
        [[[0.0]]], [at(0.5)], [target([0, 0], at(0.9, 0.5))], Costs()
    )
    assert (images, queries, targets) == ([0], [[0]], [[1]])


def test_all_layers_reach_the_host_in_one_copy(monkeypatch):
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(1) or original(self))
    decoder = {"pred_logits": torch.randn(6, 2, 5, 3), "pred_boxes": torch.rand(6, 2, 5, 4)}
    encoder = {"pred_logits": torch.randn(1, 2, 9, 3), "pred_boxes": torch.rand(1, 2, 9, 4)}
    objects = [target([0, 2], at(0.1, 0.9)), target([1], at(0.5))]
    first, second = match([decoder, encoder], [objects, objects], Costs())
    assert len(copies) == 1
    assert first.queries.shape == (6, 3)
    assert second.queries.shape == (1, 3)


# ---- losses --------------------------------------------------------------------------------------


def test_focal_loss_is_the_hand_worked_one():
    # Probabilities 1/2 and 3/4, as background and as object; alpha 1/4.
    logits = torch.tensor([0.0, 0.0, math.log(3), math.log(3)])
    is_object = torch.tensor([0.0, 1.0, 0.0, 1.0])
    expected = [3 / 16 * LN2, 1 / 16 * LN2, 27 / 64 * LN4, 1 / 64 * math.log(4 / 3)]
    actual = sigmoid_focal_loss(logits, is_object, alpha=0.25)
    torch.testing.assert_close(actual, torch.tensor(expected))


def test_losses_are_the_hand_worked_ones():
    # One object of class 1, twice as wide as query 0, which lies in its middle: the L1 distance is
    # .4, the overlap 1/4. All logits are 0: one is an object, three are background.
    outputs = prediction([[[0.0, 0.0]] * 2], [[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    losses = SetCriterion(TrainConfig())(outputs, [target([1], [0.5, 0.5, 0.4, 0.4])])
    expected = {
        "loss_class": 2 * (1 + 3 * 3) / 16 * LN2,
        "loss_box": 5 * 0.4,
        "loss_giou": 2 * 0.75,
        "class_error": 1.0,  # of equal logits the first class wins
        "cardinality_error": 1.0,  # nothing is more likely than not
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
    trained = sum(value for name, value in expected.items() if name.startswith("loss"))
    assert total(losses).item() == pytest.approx(trained)


def test_losses_are_divided_by_the_number_of_objects():
    outputs = prediction([[[0.0]] * 2] * 2, [at(0.2, 0.8)] * 2)
    targets = [target([0], at(0.3)), target([0, 0], at(0.3, 0.7))]
    losses = SetCriterion(TrainConfig())(outputs, targets)
    assert losses["loss_box"].item() == pytest.approx(5 * 3 * 0.1 / 3)
    assert losses["loss_class"].item() == pytest.approx(2 * (3 * 1 + 1 * 3) / 16 * LN2 / 3)


def test_each_layer_is_matched_for_itself_and_named():
    boxes = [at(0.2, 0.8)], [at(0.8, 0.2)], [at(0.5, 0.9)]
    last, first, second = (prediction([[[0.0, 0.0]] * 2], box) for box in boxes)
    proposals = prediction([[[0.0, 9.0]] * 3], [at(0.1, 0.2, 0.3)])
    outputs = last | {"aux_outputs": [first, second], "enc_outputs": proposals}
    losses = SetCriterion(TrainConfig())(outputs, [target([1, 0], at(0.2, 0.8))])
    terms = [f"loss_{t}{k}" for k in ("", "_0", "_1", "_enc") for t in ("class", "box", "giou")]
    assert sorted(losses) == sorted([*terms, "class_error", "cardinality_error"])
    distances = [losses[f"loss_box{k}"].item() / 5 for k in ("", "_0", "_1", "_enc")]
    assert distances == pytest.approx([0, 0, (0.3 + 0.1) / 2, (0 + 0.5) / 2], abs=1e-6)
    for layer in ("", "_0", "_1"):  # two of four logits are objects
        expected = 2 * (2 * 1 + 2 * 3) / 16 * LN2 / 2
        assert losses[f"loss_class{layer}"].item() == pytest.approx(expected)


def test_proposals_have_one_class_whatever_the_object_is():
    proposals = prediction([[[0.0, -20.0]]], [at(0.2)])
    outputs = prediction([[[0.0, 0.0]]], [at(0.2)]) | {"enc_outputs": proposals}
    losses = SetCriterion(TrainConfig())(outputs, [target([1], at(0.2))])
    assert losses["loss_class_enc"].item() == pytest.approx(2 * LN2 / 16)


def test_images_without_objects_give_zero_box_losses_and_gradients():
    outputs = prediction([[[0.0, 0.0]] * 2], [at(0.2, 0.8)])
    for tensor in outputs.values():
        tensor.requires_grad_()
    losses = SetCriterion(TrainConfig())(outputs, [target([], [])])
    assert losses["loss_class"].item() == pytest.approx(2 * 4 * 3 / 16 * LN2)
    assert losses["loss_box"].item() == losses["loss_giou"].item() == 0
    total(losses).backward()
    assert outputs["pred_boxes"].grad.abs().sum() == 0
    assert outputs["pred_logits"].grad.isfinite().all()


def test_gradients_of_the_losses_match_finite_differences():
    random = torch.Generator().manual_seed(3)
    criterion = SetCriterion(TrainConfig())
    targets = [target([0, 1], at(0.2, 0.7)), target([1], at(0.4))]
    targets = [{"labels": t["labels"], "boxes": t["boxes"].double()} for t in targets]

    def compute(logits, boxes):
        return total(criterion({"pred_logits": logits, "pred_boxes": boxes}, targets))

    logits = torch.randn(2, 4, 2, generator=random, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(2, 4, 4, generator=random, dtype=torch.float64) * 0.2 + 0.3
    assert torch.autograd.gradcheck(compute, (logits, boxes.requires_grad_()))


def test_losses_of_16_bit_outputs_are_computed_in_float32():
    outputs = prediction([[[0.1, 0.2]] * 2], [at(0.2, 0.8)])
    outputs = {name: tensor.bfloat16() for name, tensor in outputs.items()}
    losses = SetCriterion(TrainConfig())(outputs, [target([1], at(0.2))])
    assert total(losses).dtype == torch.float32


@pytest.mark.parametrize("spoiled", ["pred_logits", "pred_boxes"])
def test_outputs_that_are_no_numbers_end_in_losses_that_are_none(spoiled):
    outputs = prediction([[[0.0, 0.0]] * 2], [at(0.2, 0.8)])
    outputs[spoiled].fill_(math.nan)
    losses = SetCriterion(TrainConfig())(outputs, [target([1], at(0.2))])
    name = "loss_class" if spoiled == "pred_logits" else "loss_giou"
    assert losses[name].isnan()


def test_a_loss_that_is_no_number_is_named_with_step_and_images():
    losses = {"loss_box": 1.0, "loss_giou_2": math.nan, "loss_class": math.inf}
    message = (
        "losses must be finite, got loss_giou_2 = nan, loss_class = inf in step 17; "
        "images of the batch by id: 4, 8"
    )
    with pytest.raises(NonFiniteLoss, match=f"^{message}$"):
        check_finite(losses, 17, [4, 8])
    check_finite({"loss_box": 1.0}, 17, [4, 8])
