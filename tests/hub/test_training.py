"""Runs of `examples/train.py` that push, and what they leave on the Hub."""

from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import ModelCard
from PIL import Image as PILImage


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory) -> Path:
    """Three classes of coloured squares."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "green", "blue"])})
    for split, n in (("train", 90), ("test", 30)):
        labels = [i % 3 for i in range(n)]
        pixels = rng.integers(0, 120, (n, 16, 16, 3))
        pixels[np.arange(n), :, :, labels] += 130
        images = [PILImage.fromarray(image.astype(np.uint8)) for image in pixels]
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


LOAD = """
import torch, sys
from huggingface_hub import ModelCard
from hf_scan import ScanForImageClassification
places = ("alice/squares", sys.argv[1])
by_name, by_folder = (ScanForImageClassification.from_pretrained(place).eval() for place in places)
for one, other in zip(by_name.state_dict().values(), by_folder.state_dict().values()):
    assert torch.equal(one, other)
assert by_name.exit_config == by_folder.exit_config and by_name.exit_config.thresholds
images = torch.randn(8, 3, 16, 16)
assert torch.equal(by_name.predict_adaptive(images).logits, by_folder.predict_adaptive(images).logits)
results = ModelCard.load("alice/squares").data.eval_results
print(sorted(result.metric_name for result in results))
"""


def test_train_and_push(hub, dataset_folder, tmp_path):
    """Pushed on the way and at the end; loaded elsewhere by name, it is what the folder holds. No token goes along."""
    token = hub.tokens["alice"]
    flags = {
        "dataset_name": dataset_folder,
        "backbone": "cifar_resnet20",
        "image_size": 16,
        "holdout": 0.3,
        "max_steps": 6,
        "save_steps": 3,
        "save_strategy": "steps",
        "per_device_train_batch_size": 16,
        "learning_rate": 0.01,
        "use_cpu": True,
        "output_dir": tmp_path / "run",
        "push_to_hub": True,
        "hub_model_id": "alice/squares",
        "hub_token": token,
        "hub_always_push": True,
    }
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    hub.run(Path("examples/train.py"), *arguments)
    files = hub.files("alice/squares")
    expected = {
        "README.md",
        "config.json",
        "exit_config.json",
        "metrics.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert expected <= set(files)
    assert not any(name.startswith("checkpoint-") for name in files)
    for name in ("model.safetensors", "exit_config.json", "metrics.json", "README.md"):
        assert files[name] == (tmp_path / "run" / name).read_bytes()
    commits = hub.commits("alice/squares")
    assert commits[0].title == "End of training"
    assert any("Training in progress" in commit.title for commit in commits)
    for commit in commits:
        for name, blob in commit.files.items():
            assert token.encode() not in blob.data, (commit.title, name)
            assert not name.endswith(".bin"), (commit.title, name)  # a pickle
    data = ModelCard(files["README.md"].decode()).data
    assert (data.pipeline_tag, data.library_name) == ("image-classification", "transformers")
    said = hub.run(LOAD, tmp_path / "run", user="bob").stdout
    assert "Accuracy, adaptive" in said
    assert "Accuracy, exit 0 (layer1)" in said


def test_a_trainer_pushes_a_card_of_its_last_evaluation(hub, tmp_path):
    code = """
import torch
from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments
images = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 2} for index in range(16)]
model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2))
args = ScanTrainingArguments("net", max_steps=1, save_strategy="no", hub_model_id="alice/net", use_cpu=True)
trainer = ScanTrainer(model, args, train_dataset=images, eval_dataset=images)
trainer.train()
trainer.evaluate()
trainer.push_to_hub(dataset="noise", license="apache-2.0")
from hf_scan import ExitConfig
model.exit_config = ExitConfig(thresholds=[1.0, 1.0])
trainer.create_model_card()
card = open("net/README.md").read()
assert "Accuracy" not in card and 'from_pretrained("alice/net")' in card, card  # the figures are of another rule
"""
    hub.run(code)
    files = hub.files("alice/net")
    assert "training_args.bin" not in files
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    names = [result.metric_name for result in card.data.eval_results]
    assert names == [
        "Accuracy, exit 0 (layer1)",
        "Accuracy, exit 1 (layer2)",
        "Accuracy, exit 2 (layer3)",
        "Accuracy, ensemble",
    ]
    assert {result.dataset_split for result in card.data.eval_results} == {"evaluation"}
    assert "On the evaluation split of noise, 16 images" in card.text
