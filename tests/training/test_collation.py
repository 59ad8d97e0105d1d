"""Rows as users hold them: all of these train the same weights, and the rest is refused before training."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from transformers import Trainer

from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer

from .samples import arguments, plain_arguments, rows


NAMES = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "elk"}
IMAGES = rows(16)
PIXELS = torch.stack([row["pixel_values"] for row in IMAGES])
LABELS = torch.tensor([row["labels"] for row in IMAGES])


def with_labels(values) -> list[dict]:
    return [{**row, "labels": value} for row, value in zip(IMAGES, values)]


KINDS = {
    "pairs": [(row["pixel_values"], row["labels"]) for row in IMAGES],
    "pairs of arrays": [(row["pixel_values"].numpy(), np.int64(row["labels"])) for row in IMAGES],
    "tensors": TensorDataset(PIXELS, LABELS),
    "tensors with labels of shape (n, 1)": TensorDataset(PIXELS, LABELS[:, None]),
    "lists of one label": with_labels([[label] for label in LABELS.tolist()]),
    "labels of shape (1,)": with_labels(LABELS[:, None]),
    "other whole numbers": with_labels(LABELS.to(torch.int32)),
    "names": with_labels([NAMES[label] for label in LABELS.tolist()]),
    "names under label": [{"pixel_values": row["pixel_values"], "label": NAMES[row["labels"]]} for row in IMAGES],
    "distributions": with_labels(torch.nn.functional.one_hot(LABELS, 5).float()),
}


def train(dataset, folder):
    torch.manual_seed(0)
    config = ScanConfig(
        backbone="cifar_resnet20", image_size=16, id2label=NAMES, label2id={v: k for k, v in NAMES.items()}
    )
    model = ScanForImageClassification(config)
    trainer = ScanTrainer(model, arguments(folder, max_steps=2), train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    return model.state_dict(), trainer.evaluate()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return train(IMAGES, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_train_the_same_weights(kind, expected, tmp_path):
    weights, scores = train(KINDS[kind], tmp_path)
    for name, tensor in expected[0].items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for name, score in expected[1].items():
        if name.endswith("accuracy"):
            assert scores[name] == score


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (with_labels(["fox"] * 16), ValueError, r"has the label 'fox', which is not among the network's, \['ant'"),
        (with_labels([None] * 16), ValueError, "a row whose label is None"),
        ([(Image.new("RGB", (16, 16)), 0)] * 16, TypeError, "pairs of a Image and a label; expected the image as a"),
        ([{"image": 0, "label": 1}] * 16, ValueError, r"rows of \['image', 'label'\]; expected `pixel_values`"),
        ([{"pixel_values": PIXELS[0]}] * 16, TypeError, "first row has a label of type NoneType"),
        ([torch.rand(3, 16, 16)] * 16, TypeError, "rows of type Tensor; expected dictionaries"),
        (with_labels([0.5] * 16), ValueError, r"`labels` has shape \(1,\) and holds torch.float32; expected"),
        (with_labels(torch.ones(16, 5)), ValueError, "its rows are no distributions: they sum to 5 up to 5"),
        (with_labels(torch.ones(16, 5).long()), ValueError, r"shape \(1, 5\) and holds torch.int64; expected"),
        (with_labels(torch.ones(16, 4)), ValueError, r"shape \(1, 4\) and holds torch.float32; expected"),
        (with_labels([True] * 16), ValueError, r"holds torch.bool; expected \(batch_size,\) class indices"),
    ],
)
def test_other_rows_are_refused_before_training(dataset, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(dataset, tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


def test_labels_of_shape_n_1_in_a_plain_trainer(expected, tmp_path):
    """And types that the loss of PyTorch does not take."""
    for labels in (LABELS[:, None], LABELS.to(torch.uint8)):
        torch.manual_seed(0)
        model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", image_size=16, num_labels=5))
        Trainer(model, plain_arguments(tmp_path, max_steps=1), train_dataset=with_labels(labels)).train()
        assert model.config.problem_type == "single_label_classification"


def test_distributions_are_not_mixed(tmp_path):
    dataset = KINDS["distributions"]
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", image_size=16, num_labels=5))
    with pytest.raises(ValueError, match="mix class indices, and `labels` are distributions"):
        ScanTrainer(model, arguments(tmp_path, mixup_alpha=0.5), train_dataset=dataset).train()
