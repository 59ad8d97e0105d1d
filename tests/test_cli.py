"""The command line, called as a function but where its process matters."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from hf_scan import ExitConfig, ScanForImageClassification
from hf_scan.cli import COMMANDS, main
from hf_scan.costs import MeasuredCosts
from hf_scan.model.image_processing_scan import create_image_processor

from .conftest import random_scan_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of coloured noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(100):
        path = folder / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 120, (18, 16, 3)) + 120 * np.eye(3, dtype=int)[number % 2]
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = random_scan_model(num_labels=2)
    model.exit_config = ExitConfig(thresholds=[0.7, 0.7])
    model.save_pretrained(folder)
    create_image_processor(model).save_pretrained(folder)
    return folder


def test_the_entry_point_is_this_function():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'hf-scan = "hf_scan.cli:main"' in project


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys; sys.argv = ['/usr/bin/hf-scan', '--help']; from hf_scan.cli import main; code = main(); "
        "print(code, [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    for name in COMMANDS:
        assert re.search(rf"^ +{name}\b", done.stdout, re.MULTILINE)
    assert "example:\n  hf-scan " in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_explains_itself_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"hf-scan {name} " in " ".join(capsys.readouterr().out.lower().partition("example:")[2].split())


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["predict"], ["measure", "--no-such-flag"]])
def test_wrong_usage_is_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: hf-scan" in capsys.readouterr().err


def test_errors_are_one_sentence_and_code_1(tmp_path, capsys):
    for arguments in (
        ["predict", str(tmp_path / "none"), "photo.jpg"],
        ["train", "--dataset_name", str(tmp_path / "none"), "--output_dir", str(tmp_path / "run"), "--use_cpu"],
        ["measure", "no/such/model", "--save"],
        ["calibrate", "--model", str(tmp_path), "--dataset_name", str(tmp_path), "--holdout", "0"],
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert len(captured.err.strip().splitlines()) == 1
        assert captured.err.startswith("hf-scan: error: ")
    with pytest.raises(ValueError, match="`--holdout` is 0"):
        main([*arguments, "--debug"])


def test_predict(saved, photos, capsys):
    images = [str(path) for path in sorted(photos.rglob("*.png"))[:3]]
    assert main(["predict", str(saved), *images, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    model = ScanForImageClassification.from_pretrained(saved).eval()
    pixel_values = create_image_processor(model)([Image.open(path) for path in images], return_tensors="pt")
    expected = model.predict_adaptive(**pixel_values)
    assert [answer["exit"] for answer in answers] == expected.exit_index.tolist()
    assert [answer["confidence"] for answer in answers] == pytest.approx(expected.confidence.tolist(), abs=1e-5)
    assert [answer["image"] for answer in answers] == images
    assert main(["predict", str(saved), images[0]]) == 0
    assert f"{images[0]}: {answers[0]['label']}, " in capsys.readouterr().out


def test_measure_keeps_costs(saved, capsys):
    assert main(["measure", str(saved), "--batch-size", "2", "--rounds", "1", "--save"]) == 0
    table = capsys.readouterr().out
    costs = MeasuredCosts.from_dict(ExitConfig.from_pretrained(saved).costs)
    assert sorted(costs.milliseconds) == [1, 2]
    assert f"{costs.milliseconds[2].heads[0]:.3f} ± {costs.spread[2].heads[0]:.3f}" in table
    assert ExitConfig.from_pretrained(saved).thresholds == [0.7, 0.7]


def test_export_then_predict(saved, photos, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "onnx"), "--data", str(photos), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {"onnx/adaptive.onnx", "int8/onnx/stage_0.onnx"} <= set(files)
    image = str(next(photos.rglob("*.png")))
    answers = []
    for model in (saved, tmp_path / "onnx"):
        assert main(["predict", str(model), image, "--json"]) == 0
        answers += json.loads(capsys.readouterr().out)
    assert answers[0]["label"] == answers[1]["label"]
    assert answers[0]["confidence"] == pytest.approx(answers[1]["confidence"], abs=1e-4)


def test_advise(photos, tmp_path, capsys):
    given = ["--model", "cifar_resnet20", "--runtime", "macs"]
    assert main(["advise", *given, "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert {"layer1", "layer2"} <= {row["name"] for row in advice["rows"]}
    assert advice["verdict"]["answer"] == "may pay"
    # With images, heads are tried.
    file = tmp_path / "weights.safetensors"
    save_file(random_scan_model(num_labels=2).backbone.state_dict(), file)
    given += ["--weights", str(file), "--data", str(photos), "--image-size", "16", "--epochs", "1"]
    assert main(["advise", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in advice["rows"]]
    assert "accuracy" in found["rows"][0]
    assert found["verdict"]["answer"] in ("pays", "may pay", "does not pay")


def test_train_then_calibrate(photos, tmp_path):
    """In a process of its own, where only the result is on the standard output."""
    run = tmp_path / "run"
    flags = {"dataset_name": photos, "backbone": "cifar_resnet20", "image_size": 16, "holdout": 0.3, "max_steps": 2}
    flags |= {"max_accuracy_drop": 20, "output_dir": run, "save_strategy": "no", "use_cpu": True}
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_scan.cli"]
    done = subprocess.run(
        [*command, "train", *arguments, "--json"], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["splits"] == {"train": 63, "search": 27, "test": 10}
    assert ExitConfig.from_pretrained(run).search["max_accuracy_drop"] == 20
    given = ["--model", run, "--dataset_name", photos, "--holdout", "0.3", "--speedup", "0.5", "--no_measure"]
    assert main(["calibrate", *map(str, given)]) == 0
    assert ExitConfig.from_pretrained(run).search["speedup"] == 0.5
