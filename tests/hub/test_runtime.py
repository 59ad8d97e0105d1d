"""Exported networks on the Hub: pushed by the engine, and loaded where PyTorch is not needed."""

import json

import numpy as np
import torch

from ..conftest import random_scan_model


PUSH = """
import sys
from hf_scan import ExitConfig
from hf_scan.runtime import ORTScanForImageClassification
engine = ORTScanForImageClassification.from_pretrained(sys.argv[1])
engine.exit_config = ExitConfig([0.5, None, 0.6])
engine.push_to_hub("alice/net", commit_message="First", private=False)
engine.exit_config = ExitConfig([0.4, 0.4, 0.4])
engine.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="alice/net", revision="work")
"""
LOAD = """
import json, sys
import numpy as np
from hf_scan.runtime import ORTScanForImageClassification
images = np.load(sys.argv[1])
for options in json.loads(sys.argv[2]):
    engine = ORTScanForImageClassification.from_pretrained("alice/net", **options)
    answer = engine.predict_adaptive(images)
    print(json.dumps([engine.exit_config.thresholds, answer.exit_index.tolist()]))
    engine.save_pretrained(sys.argv[3])  # out of the cache, whose files are links
"""


def test_pushed_by_one_and_loaded_by_another(hub, tmp_path):
    model = random_scan_model()
    model.export_onnx(tmp_path / "exported")
    # What an earlier export of a deeper network left there.
    hub.push("alice/net", {"onnx/stage_9.onnx": b"deeper", "model.safetensors": b"weights"})
    hub.run(PUSH, tmp_path / "exported", tmp_path / "saved")
    names = {f"onnx/{path.name}" for path in (tmp_path / "exported" / "onnx").iterdir()}
    beside = {".gitattributes", "README.md", "config.json", "exit_config.json", "preprocessor_config.json"}
    for revision in ("main", "work"):
        assert set(hub.files("alice/net", revision)) - {"model.safetensors"} >= names | beside - {".gitattributes"}
    assert "onnx/stage_9.onnx" not in hub.files("alice/net")
    assert "model.safetensors" in hub.files("alice/net")  # of PyTorch, and nobody's business here
    assert hub.commits("alice/net")[0].title == "First"

    images = np.random.default_rng(0).normal(size=(12, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    cache = hub.new_folder("home")
    options = json.dumps([{}, {"revision": "work"}])
    arguments = (tmp_path / "images.npy", options, tmp_path / "copy")
    found = [json.loads(line) for line in hub.run(LOAD, *arguments, user="bob", cache=cache).stdout.splitlines()]
    for thresholds, (saved, exits) in zip([[0.5, None, 0.6], [0.4, 0.4, 0.4]], found, strict=True):
        assert saved == thresholds
        expected = model.predict_adaptive(torch.from_numpy(images), thresholds=thresholds)
        assert exits == expected.exit_index.tolist()
    # From the cache, without a network.
    again = hub.run(LOAD, *arguments, user="bob", cache=cache, HF_HUB_OFFLINE="1").stdout.splitlines()
    assert [json.loads(line) for line in again] == found


REFUSED = """
import sys
from hf_scan import ExitConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments
from hf_scan.runtime import ORTScanForImageClassification
engine = ORTScanForImageClassification.from_pretrained(sys.argv[1])
model = ScanForImageClassification(engine.config)
args = {"output_dir": sys.argv[2], "hub_model_id": "alice/net", "use_cpu": True}
for push in (
    lambda: engine.push_to_hub("alice/net"),
    lambda: model.push_to_hub("alice/net"),
    lambda: ScanTrainer(model, ScanTrainingArguments(**args)).push_to_hub(),
    lambda: ScanTrainer(model, ScanTrainingArguments(**args, push_to_hub=True)),
    lambda: ExitConfig([0.5]).push_to_hub("alice/net"),
    lambda: ORTScanForImageClassification.from_pretrained("alice/net"),
):
    try:
        push()
        print("nothing was refused")
    except OSError as error:
        print("OSError", error)
"""


def test_what_the_hub_refuses_is_one_sentence(hub, tmp_path):
    random_scan_model().export_onnx(tmp_path / "exported")
    hub.misbehave("POST", "/api/repos/create", status=403, times=None)
    said = hub.run(REFUSED, tmp_path / "exported", tmp_path / "run").stdout.splitlines()
    assert len(said) == 6
    advice = "Check the name, a token that may write there (`hf auth login`) and the connection, and push again."
    for line in said[:5]:
        assert line.startswith("OSError alice/net could not be pushed to (")
        assert line.endswith(f"). {advice}")
    assert said[5].startswith("OSError alice/net could not be loaded (")
    assert said[5].endswith("). Check the name, the token and the connection, and try again.")
