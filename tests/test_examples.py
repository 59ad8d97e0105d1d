"""The scripts as a user starts them, in processes of their own, on a small folder of parquet files."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
from hf_scan.calibration import collect_exit_logits
from hf_scan.data import eval_transform
from hf_scan.demo.network import DemoNetwork, int8_folder
from hf_scan.reporting.saved_frontier import SavedFrontier
from hf_scan.runtime import ORTScanForImageClassification
from hf_scan.workflows.recipes import parse_arguments
from hf_scan.workflows.verdict import Verdict

from .forked import run_forked


EXAMPLES = Path(__file__).parent.parent / "examples"

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory) -> Path:
    """Four classes of coloured squares, in the columns of CIFAR-100."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    features = Features({"img": Image(), "fine_label": ClassLabel(names=["red", "green", "blue", "grey"])})
    for split, n in (("train", 120), ("test", 40)):
        labels = [i % 4 for i in range(n)]
        pixels = rng.integers(0, 120, (n, 16, 16, 3))
        for i, label in enumerate(labels):
            if label < 3:
                pixels[i, :, :, label] += 130
        images = [PILImage.fromarray(image.astype(np.uint8)) for image in pixels]
        rows = Dataset.from_dict({"img": images, "fine_label": labels}, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def flags(dataset_folder: Path, output_dir: Path, **changes) -> list[str]:
    values = {
        "dataset_name": dataset_folder,
        "image_column": "img",
        "label_column": "fine_label",
        "backbone": "cifar_resnet20",
        "image_size": 16,
        "holdout": 0.2,
        "max_steps": 20,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.01,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 10,
        "use_cpu": True,
        "output_dir": output_dir,
        **changes,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# Seconds: processors without AVX-512 take three times as long for the quickstart.
TIMEOUT = 540


def run(*command: str | Path, fails: bool = False) -> str:
    program, *arguments = command
    if program == sys.executable:
        code = arguments.pop(1) if arguments[0] == "-c" else Path(arguments[0])
        done = run_forked(code, arguments[1:], ENVIRONMENT, Path.cwd(), timeout=TIMEOUT)
    else:
        parts = [str(part) for part in command]
        done = subprocess.run(parts, capture_output=True, text=True, env=ENVIRONMENT, timeout=TIMEOUT)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def check_output(folder: Path, processes: int = 1) -> dict:
    """What a run leaves is whole, and belongs together."""
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["splits"] == {"train": 96, "test": 40, "search": 24}
    assert metrics["processes"] == processes
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue", 3: "grey"}
    assert model.exit_config.search["n"] == 24
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor([PILImage.new("RGB", (16, 16), (250, 60, 60))], return_tensors="pt")["pixel_values"]
    assert model.predict_adaptive(pixel_values).logits.isfinite().all()
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results
    assert "(frontier.png)" in card.text
    assert PILImage.open(folder / "frontier.png").width > 300
    assert SavedFrontier.load(folder / "frontier.json").samples == 24
    assert not (folder / "training_args.bin").exists()  # which would hold a token, if there was one
    return metrics


def test_where_weights_of_timm_are():
    """The base model on a card is a repository that there is, or none."""
    names = ["resnet50.a1_in1k", "resnet50", "hf-hub:alice/pets@main", "local-dir:/weights", "cifar_resnet20"]
    code = "import json; from hf_scan.workflows.model_arguments import source_on_the_hub; "
    code += f"print(json.dumps([source_on_the_hub(name) for name in {names}]))"
    found = json.loads(next(line for line in run(sys.executable, "-c", code).splitlines() if line.startswith("[")))
    assert found[0] == "timm/resnet50.a1_in1k"
    assert found[1].startswith("timm/resnet50.")  # the default tag of this version
    assert found[2:] == ["alice/pets", None, None]


def test_train_then_resume(dataset_folder, tmp_path):
    output = run(sys.executable, EXAMPLES / "train.py", *flags(dataset_folder, tmp_path / "run"))
    metrics = check_output(tmp_path / "run")
    assert metrics["rows"][2]["accuracy"] > 0.6  # four classes: it has learnt
    assert "| exit 0 (layer1) |" in output
    assert str(Verdict(**metrics["verdict"])) in output.splitlines()
    # Checkpoints outlive the exchange of the folder, and training goes on from the last.
    assert (tmp_path / "run" / "checkpoint-20").is_dir()
    again = flags(dataset_folder, tmp_path / "run", max_steps=30, resume_from_checkpoint="last")
    run(sys.executable, EXAMPLES / "train.py", *again)
    assert check_output(tmp_path / "run")["recipe"]["steps"] == 30


@pytest.mark.parametrize("in_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_and_resumed(dataset_folder, tmp_path, in_memory):
    """In the middle of an epoch, by the operating system: the weights end up the same, bit for bit."""
    changes = {"max_steps": 16, "save_steps": 2, "save_total_limit": 2, "in_memory": in_memory, "optim": "sgd"}
    run(sys.executable, EXAMPLES / "train.py", *flags(dataset_folder, tmp_path / "whole", **changes))

    command = [sys.executable, EXAMPLES / "train.py", *flags(dataset_folder, tmp_path / "killed", **changes)]
    process = subprocess.Popen([str(part) for part in command], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    # In the second epoch, which has six steps as the first.
    while not (tmp_path / "killed" / "checkpoint-8" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    steps = [int(folder.name.split("-")[1]) for folder in (tmp_path / "killed").glob("checkpoint-*")]
    assert max(steps) < 16
    assert not (tmp_path / "killed" / "config.json").exists()
    run(*command, "--resume_from_checkpoint", "last")
    for name in ("model.safetensors", "exit_config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_plain_by_the_same_recipe(dataset_folder, tmp_path):
    """From the same initial weights; its accuracy then stands in the table of the network with exits."""
    changes = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 1, "in_memory": True}
    flags_of_heads = {"crop": "none", "flip": False, "save_strategy": "no"}
    plain = tmp_path / "plain"
    run(sys.executable, EXAMPLES / "train.py", "--plain", *flags(dataset_folder, plain, **changes))
    metrics = json.loads((plain / "metrics.json").read_text())
    assert metrics["splits"] == {"train": 76, "test": 40, "search": 24, "validation": 20}
    assert AutoModelForImageClassification.from_pretrained(plain).config.id2label[3] == "grey"
    output = run(
        *(sys.executable, EXAMPLES / "train.py", *flags(dataset_folder, tmp_path / "scan", **changes)),
        *("--plain_metrics", plain / "metrics.json"),
    )
    (row,) = (line for line in output.splitlines() if line.startswith("| plain backbone"))
    assert f"{metrics['accuracy']:.2%}" in row
    assert str(dataset_folder) not in (tmp_path / "scan" / "README.md").read_text()  # a path of this machine

    # Heads for the plain network, which stays as it is and runs once over each train image.
    changes = {**flags_of_heads, "backbone_weights": plain, "freeze_backbone": True, "max_steps": 20}
    output = run(sys.executable, EXAMPLES / "train.py", *flags(dataset_folder, tmp_path / "heads", **changes))
    assert "features of the frozen stages" in output
    equipped = AutoModelForImageClassification.from_pretrained(tmp_path / "heads")
    weights = AutoModelForImageClassification.from_pretrained(plain).timm_model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in equipped.backbone.state_dict().items())
    assert not (tmp_path / "heads" / "features").exists()
    # The deepest exit is the plain network, whose accuracy is known, and what no exit is sure about gets its answer.
    rows = {row["name"]: row for row in json.loads((tmp_path / "heads" / "metrics.json").read_text())["rows"]}
    assert rows["plain backbone"]["accuracy"] == rows["exit 2 (layer3)"]["accuracy"] == metrics["accuracy"]
    assert equipped.exit_config.fallback == "deepest"


def test_recipe_with_flags_that_win(dataset_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "image_column: img\nlabel_column: fine_label\nbackbone: cifar_resnet20\nexit_points: [layer2]\nholdout: 0.2\n"
        "max_steps: 99\nuse_cpu: true\nimage_size: 16\nsave_strategy: 'no'\n"
    )
    output_dir = tmp_path / "run"
    run(
        *(sys.executable, EXAMPLES / "train.py", recipe, "--dataset_name", dataset_folder),
        *("--output_dir", output_dir, "--max_steps", "2"),
    )
    metrics = check_output(output_dir)
    assert metrics["recipe"]["steps"] == 2
    assert [row["name"] for row in metrics["rows"][:2]] == ["exit 0 (layer2)", "exit 1 (layer3)"]


FROM_SCRATCH = sorted(
    set((EXAMPLES / "recipes").glob("*_*.yaml")) - set((EXAMPLES / "recipes").glob("*_transfer.yaml"))
)


@pytest.mark.parametrize("recipe", FROM_SCRATCH, ids=lambda path: path.stem)
def test_every_recipe_is_one_for_its_network(recipe, tmp_path):
    """Every line of it is a flag, every network exists, and flags on the command line win."""
    given = [str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "--learning_rate", "0.5"]
    data, network, args = parse_arguments(given)
    dataset, backbone = recipe.stem.split("_", 1)
    assert data.dataset_name == {"cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}[dataset]
    # `fast_` is the recipe for little compute, alone the file that its networks include; `half_` the network's width.
    backbone = backbone.removeprefix("fast").removeprefix("_").removeprefix("half_")
    expected = ("cifar_" if dataset == "cifar100" else "") + (backbone or "resnet18")
    assert network.name == expected
    assert json.loads(network.backbone_kwargs) == ({"channels": [32, 64, 128, 256]} if "half_" in recipe.stem else {})
    assert args.learning_rate == 0.5
    assert args.max_grad_norm == 0
    with torch.device("meta"):
        ScanForImageClassification(ScanConfig(backbone=network.name, num_labels=100))


@pytest.mark.parametrize(("name", "crop"), [("photos", "resized"), ("cifar100_transfer", "pad")])
def test_recipes_that_start_from_weights(tmp_path, name, crop):
    data, network, args = parse_arguments([str(EXAMPLES / f"recipes/{name}.yaml"), "--output_dir", str(tmp_path)])
    assert (data.crop, network.backbone_weights, args.optim) == (crop, "timm", "adamw_torch")
    with torch.device("meta"):
        ScanForImageClassification(ScanConfig(backbone=network.name, num_labels=6))


def test_two_processes(dataset_folder, tmp_path):
    """Started with torchrun: `accelerate launch --cpu` would run one and say nothing."""
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", EXAMPLES / "train.py"]
    changes = {"per_device_train_batch_size": 8, "max_steps": 5, "save_strategy": "no", "logging_steps": 5}
    output = run(*command, *flags(dataset_folder, tmp_path / "run", **changes))
    metrics = check_output(tmp_path / "run", processes=2)
    assert metrics["recipe"]["images a step"] == 16
    # The terms are means over the processes, as the loss is.
    (line,) = re.findall(r"{'loss'.*?}", output)
    logs = {name: float(value) for name, value in ast.literal_eval(line).items()}
    assert sum(value for name, value in logs.items() if name.startswith("exit_")) == pytest.approx(
        logs["loss"], rel=2e-3
    )
    # What was scored, with both processes, is what was saved: the first one's batch norm statistics.
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    rows = load_dataset(str(dataset_folder), split="test").rename_columns({"img": "image", "fine_label": "labels"})
    test = rows.with_transform(eval_transform(AutoImageProcessor.from_pretrained(tmp_path / "run")))
    table = collect_exit_logits(model, test, "test")
    accuracies = (table.logits.argmax(-1) == table.labels[:, None]).mean(axis=0)
    assert [row["accuracy"] for row in metrics["rows"][:3]] == pytest.approx(accuracies.tolist())


@pytest.mark.parametrize("file", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(file):
    config = load_config_from_file(str(file))
    assert config.distributed_type == ("FSDP" if file.stem == "fsdp" else "MULTI_GPU")
    assert config.num_processes > 1


def test_accelerate_launch(dataset_folder, tmp_path):
    """In mixed precision. On some CPUs PyTorch's bfloat16 dies of an illegal instruction, unless kept from AMX."""
    command = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "1", EXAMPLES / "train.py"]
    run(*command, *flags(dataset_folder, tmp_path / "run", max_steps=2, save_strategy="no", bf16=True))
    check_output(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "coarse_label"}, "has no column 'coarse_label'; it has ['img', 'fine_label']"),
        ({"freeze_backbone": True}, "`--freeze_backbone` is for a trained backbone; name its weights"),
        ({"plain": True, "freeze_backbone": True}, "which mixes no images and freezes nothing"),
        ({"test_split": "validation"}, "has no split 'validation'; it has ['train', 'test']. Set `--test_split`."),
        (
            {"test_split": "train"},
            "`--train_split` and `--test_split` are both 'train'; expected splits that",
        ),
        ({"backbone": "resnet_of_dreams"}, "`backbone` is 'resnet_of_dreams', which timm"),
        ({"exit_points": "layer9"}, "`exit_points` holds 'layer9', which does not exist."),
        ({"holdout": "1.5"}, "The share of images to split off is 1.5; expected a number between 0 and 1."),
    ],
)
def test_bad_flags_leave_the_output_folder_alone(dataset_folder, tmp_path, changes, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "scan"}')
    output = run(
        sys.executable, EXAMPLES / "train.py", *flags(dataset_folder, tmp_path / "run", **changes), fails=True
    )
    assert message in output
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_folder_of_images(tmp_path):
    """One folder a class and no test split: a tenth is split off, and training is watched on images of its own."""
    rng = np.random.default_rng(0)
    for index, label in enumerate(("cat", "dog")):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(50):
            pixels = rng.integers(0, 120, (20, 24, 3)) + 120 * np.eye(3, dtype=int)[index]
            PILImage.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / label / f"{number}.png")
    changes = {"image_column": "image", "label_column": "label", "max_steps": 2, "save_strategy": "no"}
    changes |= {"eval_strategy": "steps", "eval_steps": 1, "exit_points": 1}
    run(sys.executable, EXAMPLES / "train.py", *flags(tmp_path / "images", tmp_path / "run", **changes))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["splits"] == {"train": 57, "test": 10, "search": 18, "validation": 15}
    assert metrics["rows"][0]["name"] == "exit 0 (layer2)"


def test_quickstart(tmp_path):
    """The whole of it with one pass over the images."""
    folder = tmp_path / "quickstart"
    output = run(sys.executable, EXAMPLES / "quickstart.py", "--epochs", "1", "--output_dir", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["splits"] == {"train": 1005, "search": 252, "test": 540}
    assert {file.name for file in folder.iterdir()} == {
        *("README.md", "attention.png", "config.json", "exit_config.json", "exits.png", "metrics.json"),
        *("model.safetensors", "preprocessor_config.json", "frontier.json", "int8", "samples"),
    }
    # Another process has loaded the folder and answered; then come the results, and what to do with them.
    end = output[output.index("More of them are in") :]
    assert "| adaptive " in end
    assert "images leave at  " in end
    assert re.search(r"^\| PyTorch +(\| +\d+\.\d\dx ){3}\|$", end, re.MULTILINE)
    assert len(end.partition("Next:\n")[0].splitlines()) < 30  # one screen
    demo = DemoNetwork(str(folder))
    assert (demo.frontier.samples, int8_folder(str(folder))) == (252, "int8")
    assert 16 <= len(demo.samples) <= 24
    exported = ORTScanForImageClassification.from_pretrained(folder, subfolder="int8")
    assert exported.exit_config.thresholds is not None
    deployed = [(row["precision"], row["batch_size"]) for row in metrics["onnx_runtime"]]
    assert deployed == [("float32", 1), ("float32", 64), ("INT8", 1), ("INT8", 64)]
    assert end.count("| ONNX Runtime, ") == 2
    adaptive = next(row for row in metrics["rows"] if row["name"] == "adaptive")["accuracy"]
    assert metrics["onnx_runtime"][0]["accuracy"] == pytest.approx(adaptive, abs=0.005)
    rows = metrics["rows"]
    assert [row["name"] for row in rows][-2:] == ["adaptive", "plain backbone"]
    assert sum(row.get("share", 0) for row in rows) == pytest.approx(1)
    picture = tmp_path / "attention.png"
    run(sys.executable, EXAMPLES / "show_attention.py", folder, folder / "exits.png", "--output", picture)
    assert PILImage.open(picture).size[1] > 300
    mean = sum(row["share"] * row["macs"] for row in rows if "share" in row)
    assert rows[-2]["macs"] == pytest.approx(mean, rel=1e-6)
    assert torch.isfinite(torch.tensor(list(metrics["speedup"].values()))).all()


@pytest.mark.slow
def test_calibrate(dataset_folder, tmp_path):
    """A target is met, tested, drawn and written; what else is in the folder stays."""
    folder = tmp_path / "run"
    run(sys.executable, EXAMPLES / "train.py", *flags(dataset_folder, folder))
    before = json.loads((folder / "metrics.json").read_text())
    columns = ["--image_column", "img", "--label_column", "fine_label", "--holdout", "0.2"]
    where = ["--model", folder, "--dataset_name", dataset_folder, *columns]
    output = run(sys.executable, EXAMPLES / "calibrate.py", *where, "--max_accuracy_drop", "10", "--batch_size", "2")
    config = ExitConfig.from_pretrained(folder)
    assert config.search["max_accuracy_drop"] == 10
    assert config.search["cost_unit"].startswith("milliseconds, measured in batches of 2")
    assert f"search, fingerprint: {config.search['fingerprint']}" in output
    verdict = json.loads((folder / "metrics.json").read_text())["verdict"]
    assert Verdict(**verdict).answer in ("pays", "may pay", "does not pay")
    assert str(Verdict(**verdict)) in output.splitlines()
    assert (folder / "checkpoint-20").is_dir()
    assert SavedFrontier.load(folder / "frontier.json").unit.startswith("milliseconds, measured in batches of 2")
    for name in ("frontier.png", "exits.png", "reliability.png", "training.png"):
        assert PILImage.open(folder / name).width > 300
    after = json.loads((folder / "metrics.json").read_text())
    assert after["splits"] == before["splits"]
    assert after["rows"][2]["accuracy"] == before["rows"][2]["accuracy"]
    assert "exact frontier" in (folder / "README.md").read_text()

    fast = [
        "--max_macs",
        "7e6",
        "--no_measure",
        "--exit_config_name",
        "exit_config_fast.json",
        "--fallback",
        "deepest",
        "--temperatures",
        *("1.5", "1.2", "1.0"),
    ]
    run(sys.executable, EXAMPLES / "calibrate.py", *where, *fast)
    found = ExitConfig.from_pretrained(folder, "exit_config_fast.json")
    assert (found.search["max_macs"], found.fallback, found.temperatures) == (7e6, "deepest", [1.5, 1.2, 1.0])
    assert ExitConfig.from_pretrained(folder) == config
    assert json.loads((folder / "metrics.json").read_text()) == after
    # Another test split changes no threshold.
    other = shutil.copytree(dataset_folder, tmp_path / "other")
    rows = Dataset.from_parquet(str(other / "test-00000-of-00001.parquet"))
    rows.select(range(12)).to_parquet(other / "test-00000-of-00001.parquet")
    where_else = [other if part == dataset_folder else part for part in where]
    fast = [part.replace("fast", "again") for part in fast]
    assert "12 test images" in run(sys.executable, EXAMPLES / "calibrate.py", *where_else, *fast)
    assert ExitConfig.from_pretrained(folder, "exit_config_again.json") == found
    model = AutoModelForImageClassification.from_pretrained(folder, exit_config=found)
    assert model.exit_config == found

    # Half of the train split was trained on for the most part, and so is refused; nothing is written.
    error = run(sys.executable, EXAMPLES / "calibrate.py", *where, "--holdout", "0.5", fails=True)
    assert "was trained on the 'search' split" in error
    error = run(sys.executable, EXAMPLES / "calibrate.py", *where, "--guarantee", "1.0", "--no_measure", fails=True)
    assert "12 samples do not certify a gap of at most 1 points" in error
    assert ExitConfig.from_pretrained(folder) == config
