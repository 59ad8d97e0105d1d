import numpy as np
from PIL import Image

from hf_scan.plotting import describe_answers, plot_answers

from .conftest import random_scan_model


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
