import copy

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from hf_scan.calibration import exact_frontier
from hf_scan.reporting.plotting import (
    describe_answers,
    plot_answers,
    plot_attention,
    plot_exit_shares,
    plot_frontier,
    plot_reliability,
    plot_training,
)

from ..conftest import random_scan_model


def test_picture_shows_every_image_and_names_every_exit(model, images, tmp_path):
    answers = model.predict_adaptive(images[:6], thresholds=[0.6, 0.6, 0.6])
    plot_answers(images[:6].permute(0, 2, 3, 1).sigmoid().numpy(), answers, model, tmp_path / "exits.png")
    picture = np.asarray(Image.open(tmp_path / "exits.png").convert("L"))
    # Two rows of four places, the last two of them empty.
    rows, columns = (np.array_split(picture, 2, axis=0), 4)
    ink = [[(part < 128).mean() > 0.05 for part in np.array_split(row, columns, axis=1)] for row in rows]
    assert ink == [[True] * 4, [True, True, False, False]]


def test_descriptions(images):
    model = random_scan_model()
    answers = model.predict_adaptive(images[:1], thresholds=[1.0, 1.0, 1.0])
    (text,) = describe_answers(answers, model)
    assert text == f"LABEL_{int(answers.logits.argmax())}\nensemble, {float(answers.confidence):.3f}"
    assert "\nexit 0, " in describe_answers(model.predict_adaptive(images[:1], thresholds=[0.0, 0.0]), model)[0]


def ink(path, rows: int, columns: int) -> list[list[float]]:
    """How much of each part of a picture is drawn on."""
    picture = np.asarray(Image.open(path).convert("L"))
    parts = (np.array_split(row, columns, axis=1) for row in np.array_split(picture, rows, axis=0))
    return [[float((part < 250).mean()) for part in row] for row in parts]


def test_attention_of_every_exit_over_every_image(model, images, tmp_path):
    plot_attention(model, images[:2], tmp_path / "attention.png")
    assert not model.training
    assert all(part > 0.3 for row in ink(tmp_path / "attention.png", 3, 2) for part in row)
    # Where the mask lets nothing through is dark: another mask is another picture.
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.exit_heads[0].attention.mask[-1].weight.mul_(-3)
    plot_attention(other, images[:2], tmp_path / "other.png")
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("attention.png", "other.png"))
    rows = np.array_split((first != second).any(axis=-1), 3, axis=0)
    assert [bool(row.mean() > 0.05) for row in rows] == [True, False, False]
    with pytest.raises(ValueError, match="The network has no attention modules"):
        plot_attention(random_scan_model(attention_type="none"), images[:2], tmp_path / "none.png")


def test_training_curves_of_every_exit(tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot

    def remember(self, x, y, **kwargs):
        drawn.setdefault(kwargs["label"], []).append(list(y))
        return plot(self, x, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", remember)
    log = [
        {"epoch": 1.0, "loss": 3.0, "exit_0_label_loss": 1.0, "exit_0_hint_loss": 0.5, "exit_1_label_loss": 1.5},
        {"epoch": 1.0, "eval_accuracy": 0.4, "eval_exit_0_accuracy": 0.3, "eval_ensemble_accuracy": 0.5},
        {"epoch": 2.0, "loss": 2.0, "exit_0_label_loss": 0.7, "exit_0_hint_loss": 0.1, "exit_1_label_loss": 1.2},
    ]
    plot_training(log, tmp_path / "training.png")
    assert drawn == {"exit 0": [[1.5, pytest.approx(0.8)], [0.3]], "exit 1": [[1.5, 1.2]], "ensemble": [[0.5]]}
    assert Image.open(tmp_path / "training.png").size[0] > 600
    with pytest.raises(ValueError, match="holds no exit's loss or accuracy"):
        plot_training([{"epoch": 1.0, "train_loss": 3.0}], tmp_path / "none.png")


def test_what_calibration_draws(tmp_path):
    """Every exit has its bars and its panel; the line of the frontier is there, and so are the points."""
    rng = np.random.default_rng(0)
    confidences = rng.random((300, 3))
    correct = rng.random((300, 3)) < confidences
    frontier = exact_frontier(confidences, correct, np.array([1.0, 2.0, 3.0]))
    plot_frontier(frontier, tmp_path / "frontier.png", "MACs", frontier, {"chosen": (0.5, 2.0)})
    plot_exit_shares({"search": [0.5, 0.3, 0.2], "test": [0.4, 0.4, 0.2]}, ["a", "b", "c"], tmp_path / "exits.png")
    plot_reliability(confidences, correct, ["a", "b", "c"], tmp_path / "reliability.png")
    assert all(share > 0.01 for row in ink(tmp_path / "frontier.png", 2, 2) for share in row)
    assert all(share > 0.1 for share in ink(tmp_path / "exits.png", 1, 3)[0])
    assert all(share > 0.02 for share in ink(tmp_path / "reliability.png", 1, 3)[0])
