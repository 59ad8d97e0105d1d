import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, pipeline

import hf_scan
from hf_scan import ExitConfig, ExitMonitor, apply_exit_rule, calibrate, measure_costs, realised_speedup
from hf_scan.runtime import ORTScanForImageClassification, OVScanForImageClassification, threaded_options
from hf_scan.runtime.manifest import Manifest
from hf_scan.runtime.numpy_rule import plan_steps
from hf_scan.runtime.sessions import available_cores

from ..conftest import random_scan_model
from ..model.test_adaptive import policies, rule_by_hand


FIXTURES = [HealthCheck.function_scoped_fixture]


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES)
@given(policy=policies, batch_size=st.integers(1, 24))
def test_equals_the_rule_on_the_logits_of_pytorch(model, images, engine, policy, batch_size):
    with torch.no_grad():
        exit_logits = model(images).exit_logits
    _, _, nearest = rule_by_hand([logits.double().numpy() for logits in exit_logits], **policy)
    assume(nearest > 1e-4)
    expected = apply_exit_rule(exit_logits, ExitConfig(**policy))
    answers = [engine.predict_adaptive(batch.numpy(), **policy) for batch in images.split(batch_size)]
    assert np.concatenate([answer.exit_index for answer in answers]).tolist() == expected.exit_index.tolist()
    found = np.concatenate([answer.logits for answer in answers])
    np.testing.assert_allclose(found, expected.logits.numpy(), rtol=1e-5, atol=5e-5 * np.abs(found).max())
    confidence = np.concatenate([answer.confidence for answer in answers])
    np.testing.assert_allclose(confidence, expected.confidence.numpy(), rtol=2e-4)


@pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy", "patience", "ensemble_confidence"])
@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
def test_one_file_holds_any_rule(exported, tmp_path, images, criterion, fallback):
    """Saved with a rule, `adaptive.onnx` is made anew for it, and one image runs it rather than stages."""
    engine = ORTScanForImageClassification.from_pretrained(exported)
    temperatures = [0.7, 1.5, 1.0]
    engine.exit_config = ExitConfig([0.45, None, 0.6], criterion, temperatures, fallback)
    engine.save_pretrained(tmp_path)
    again = ORTScanForImageClassification.from_pretrained(tmp_path)
    assert again.exit_config.rule == engine.exit_config.rule
    again.run = None  # so that running a stage would fail
    for image in images.numpy()[:12]:
        one, other = again.predict_adaptive(image[None]), engine.predict_adaptive(image[None])
        assert one.exit_index.tolist() == other.exit_index.tolist()
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-4)


@settings(max_examples=30, deadline=None, suppress_health_check=FIXTURES)
@given(policy=policies, batch_size=st.integers(2, 24))
def test_a_stage_runs_for_the_survivors_and_for_no_others(images, engine, policy, batch_size):
    assume(policy["fallback"] != "most_confident")
    seen: Counter[tuple[str, int]] = Counter()
    run = engine.run

    def counting(index, state, head):
        seen["stage", index] += len(state[0])
        seen["head", index] += len(state[0]) * head
        return run(index, state, head)

    engine.run = counting
    batches = [images[start : start + batch_size].numpy() for start in range(0, len(images), batch_size)]
    exits = np.concatenate([engine.predict_adaptive(b, **policy).exit_index for b in batches if len(b) > 1])
    plan = plan_steps(engine._settings(None, dict(policy)), 3)
    if plan[-1].limit is None and not any(step.runs for step in plan[:-1]):
        assert not seen  # the plain graph ran
        return
    for index, step in enumerate(plan):
        here = int((exits >= index).sum())
        assert seen["stage", index] == here
        assert seen["head", index] == here * step.runs


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.5, None, 0.6]])
def test_a_stream_gives_the_answers_of_single_images(engine, images, ordered, thresholds):
    expected = engine.predict_adaptive(images.numpy(), thresholds=thresholds)
    batches = [images[:7].numpy(), images[7:8].numpy(), images[8:].numpy()]
    found = list(engine.predict_adaptive_stream(batches, batch_size=5, thresholds=thresholds, ordered=ordered))
    ids = np.concatenate([answer.ids for answer in found])
    assert sorted(ids.tolist()) == list(range(24))
    assert not ordered or ids.tolist() == list(range(24))
    assert np.concatenate([a.exit_index for a in found]).tolist() == expected.exit_index[ids].tolist()
    np.testing.assert_allclose(np.concatenate([a.logits for a in found]), expected.logits[ids], rtol=1e-4, atol=1e-5)


def test_int8_is_one_network_however_it_is_run(int8, images, exported):
    pixels = images.numpy()
    every = int8.forward(pixels)
    np.testing.assert_allclose(int8.plain(pixels), every.logits, rtol=1e-4, atol=1e-4)
    assert {value["dtype"] for values in int8.manifest.states for value in values} == {"uint8"}
    for image in pixels[:8]:
        single = int8.predict_adaptive(image[None], thresholds=[0.5, 0.5, 0.5])
        stages = int8.predict_adaptive(np.stack([image, image]), thresholds=[0.5, 0.5, 0.5])
        assert single.exit_index[0] == stages.exit_index[0]
    assert int8.exit_config.thresholds is None  # those of float32 are another network's
    assert int8.fingerprint() != ORTScanForImageClassification.from_pretrained(exported).fingerprint()


@pytest.mark.parametrize("precision", ["", "int8"])
def test_stands_where_a_model_does(exported, images, precision):
    """Thresholds are found on the engine's own logits, costs measured, speed-ups realised, answers monitored."""
    engine = ORTScanForImageClassification.from_pretrained(exported, subfolder=precision)
    rows = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(torch.randn(200, 3, 16, 16))]
    engine.exit_config = calibrate(engine, rows, max_accuracy_drop=20.0)
    assert engine.exit_config.search["n"] == 200
    costs = measure_costs(engine, batch_size=2, rounds=1)
    assert costs.macs.stages == engine.counted["macs"]["stages"]
    assert sorted(costs.milliseconds) == [1, 2]
    found = realised_speedup(engine, images, batch_size=4, rounds=1)
    assert sum(found.shares) == pytest.approx(1)
    monitor = ExitMonitor(engine, shadow_every=2)
    monitor.predict(images)
    assert (monitor.drift().n, monitor.disagreement().n) == (24, 12)


def test_in_a_pipeline(exported):
    engine = ORTScanForImageClassification.from_pretrained(exported)
    processor = AutoImageProcessor.from_pretrained(exported)
    classify = pipeline("image-classification", model=engine, image_processor=processor)
    assert "exit" not in classify(Image.new("RGB", (16, 16)))[0]
    config = ExitConfig([0.0, 0.0, 0.0])
    assert classify(Image.new("RGB", (16, 16)), exit_config=config, return_exit=True)[0]["exit"] == 0


def test_runs_where_pytorch_is_not_installed(exported, tmp_path, images, engine):
    """A process that finds neither PyTorch nor Transformers nor anything else but NumPy and ONNX Runtime."""
    np.save(tmp_path / "images.npy", images.numpy())
    code = f"""
import importlib.abc, sys
ALLOWED = {{"numpy", "onnxruntime", "hf_scan"}} | set(sys.stdlib_module_names) | set(sys.modules)
REFUSED = {{"torch", "transformers", "timm", "huggingface_hub", "onnx", "scipy", "safetensors", "datasets"}}
class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in REFUSED else found(name, *rest)
sys.meta_path.insert(0, Bare())
import numpy as np
from hf_scan.runtime import ORTScanForImageClassification, OVScanForImageClassification, threaded_options
engine = ORTScanForImageClassification.from_pretrained({str(exported)!r})
images = np.load({str(tmp_path / "images.npy")!r})
print(engine.predict_adaptive(images, thresholds=[0.5, 0.5, 0.5]).exit_index.tolist())
stream = engine.predict_adaptive_stream([images], batch_size=4, thresholds=[0.5, 0.5, 0.5], ordered=True)
print(sum((answer.exit_index.tolist() for answer in stream), []))
print(sorted(REFUSED & set(sys.modules)), engine.config.num_labels)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    exits, streamed, loaded = done.stdout.strip().splitlines()
    assert json.loads(exits) == engine.predict_adaptive(images.numpy(), thresholds=[0.5] * 3).exit_index.tolist()
    assert streamed == exits
    assert loaded == "[] 5"


def test_thresholds_of_another_network_name_their_file(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "export")
    ExitConfig([0.5] * 4).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"^exit_config.json of .* holds 4 numbers"):
        ORTScanForImageClassification.from_pretrained(folder)


def test_threads_of_one_session_leave_the_cores_to_the_next(exported):
    """ONNX Runtime's own spin for a while after each run, when it is the turn of another stage."""
    engine = ORTScanForImageClassification.from_pretrained(exported)
    options = engine._sessions["plain.onnx"].get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == engine.threads == available_cores()
    own = onnxruntime.SessionOptions()
    own.intra_op_num_threads = 3
    assert ORTScanForImageClassification.from_pretrained(exported, session_options=own).threads == 3


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda onnx_: (onnx_ / "manifest.json").unlink(), OSError, "holds no 'manifest.json'"),
        (lambda onnx_: (onnx_ / "stage_1.onnx").unlink(), OSError, "lacks 'stage_1.onnx'"),
        (lambda onnx_: (onnx_ / "weights.bin").write_bytes(b"x" * 100), OSError, "checksum differs"),
        (lambda onnx_: shutil.copy(onnx_ / "stage_0.onnx", onnx_ / "stage_1.onnx"), OSError, "checksum differs"),
        (lambda onnx_: (onnx_ / "manifest.json").write_text("{}"), ValueError, "not a valid manifest"),
        (lambda onnx_: (onnx_ / "manifest.json").write_text("[" * 10000), ValueError, "not a valid manifest"),
        (lambda onnx_: (onnx_.parent / "config.json").unlink(), OSError, "holds no 'config.json'"),
    ],
)
def test_damaged_folders_are_refused(exported, tmp_path, damage, error, message):
    folder = shutil.copytree(exported, tmp_path / "copy")
    damage(folder / "onnx")
    with pytest.raises(error, match=message):
        ORTScanForImageClassification.from_pretrained(folder)


def test_a_manifest_names_no_path(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    path = folder / "onnx" / "manifest.json"
    values = json.loads(path.read_text())
    for name in ("../config.json", "/etc/hostname", "..", "a\\b"):
        path.write_text(json.dumps({**values, "files": {**values["files"], name: "0"}}))
        with pytest.raises(ValueError, match="not a file beside it"):
            ORTScanForImageClassification.from_pretrained(folder)


def test_weights_elsewhere_are_refused(exported, tmp_path, images):
    """Even where the manifest has the right checksum."""
    folder = shutil.copytree(exported, tmp_path / "copy")
    shutil.copy(folder / "onnx" / "weights.bin", tmp_path / "weights.bin")
    path = folder / "onnx" / "stage_0.onnx"
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../weights.bin"
    onnx.save(graph, path)
    Manifest._parsed(folder / "onnx" / "manifest.json").save(folder / "onnx")
    engine = ORTScanForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="names files of weights other than"):
        engine.forward(images.numpy())


def test_bad_input_is_a_sentence(engine, exported, images):
    with pytest.raises(ValueError, match="not installed"):
        ORTScanForImageClassification.from_pretrained(exported, provider="FlyingExecutionProvider")
    for pixels, message in (
        (images.numpy()[:, :, :8], "which was exported"),
        (images.double().numpy(), "float64"),
        (images.numpy()[:0], "empty"),
        (np.full((2, 3, 16, 16), np.nan, np.float32), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.predict_adaptive(pixels, thresholds=[0.5, 0.5])
    with pytest.raises(ValueError, match="4 numbers"):
        engine.predict_adaptive(images.numpy(), thresholds=[0.5] * 4)
    with pytest.raises(ValueError, match="no thresholds"):
        engine.predict_adaptive(images.numpy())
    with pytest.raises(ValueError, match="4 numbers"):
        engine.exit_config = ExitConfig([0.5] * 4)
    with pytest.raises(ValueError, match="not trained"):
        engine.train()


def test_a_deadline_answers_with_what_has_run(engine, images):
    answer = engine.predict_adaptive(images.numpy(), thresholds=[1.0, 1.0, 1.0], max_time_ms=1e-6)
    np.testing.assert_allclose(answer.logits, engine.forward(images.numpy()).exit_logits[0], rtol=1e-5, atol=1e-6)
    first = engine.predict_adaptive(images.numpy(), thresholds=[1.0, 1.0], max_exit=0, fallback="deepest")
    assert set(first.exit_index.tolist()) == {0}


def test_the_package_registers_what_transformers_knows():
    assert hf_scan.ScanForImageClassification is not None
    assert Path(hf_scan.__file__).with_name("registration.py").is_file()


FAMILIES = [
    ("test_vit", {"image_size": 160}),
    ("test_efficientnet", {"image_size": 64}),
    pytest.param("densenet121", {"image_size": 64}, marks=pytest.mark.slow),
    pytest.param("convnext_atto", {"image_size": 64}, marks=pytest.mark.slow),
    pytest.param("eva02_tiny_patch14_224", {"image_size": 224}, marks=pytest.mark.slow),
    pytest.param("swin_tiny_patch4_window7_224", {"image_size": 224}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backbone", "config"), FAMILIES)
def test_families_answer_alike(tmp_path, backbone, config):
    model = random_scan_model(backbone=backbone, **config)
    model.export_onnx(tmp_path / "exported")
    engine = ORTScanForImageClassification.from_pretrained(tmp_path / "exported")
    pixels = torch.randn(9, 3, config["image_size"], config["image_size"])
    thresholds = [0.45] * model.num_exits
    expected = model.predict_adaptive(pixels, thresholds=thresholds)
    found = engine.predict_adaptive(pixels, thresholds=thresholds)
    assert found.exit_index.tolist() == expected.exit_index.tolist()
    assert len(set(found.exit_index.tolist())) > 1
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=3e-4 * float(found.logits.abs().max()))
    one = engine.predict_adaptive(pixels[:1], thresholds=thresholds)
    assert one.exit_index.tolist() == expected.exit_index[:1].tolist()


@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
def test_with_all_exits_off_the_plain_graph_answers(engine, images, fallback):
    engine.run = None  # so that running a stage would fail
    policy = {"thresholds": [None, None, None][: engine.num_exits - 1], "fallback": fallback}
    every = engine.plain(images.numpy())
    expected = apply_exit_rule([torch.from_numpy(every)] * engine.num_exits, ExitConfig(**policy))
    for batch, rows in ((images.numpy(), slice(None)), (images.numpy()[3:4], slice(3, 4))):
        answer = engine.predict_adaptive(batch, **policy)
        assert answer.exit_index.tolist() == expected.exit_index[rows].tolist()
        np.testing.assert_allclose(answer.logits, every[rows], rtol=1e-4, atol=1e-5)


def test_costs_name_the_threads_of_the_engine(exported):
    engine = ORTScanForImageClassification.from_pretrained(exported, session_options=threaded_options(1))
    other = OVScanForImageClassification.from_pretrained(exported, ov_config={"INFERENCE_NUM_THREADS": 1})
    for one in (engine, other):
        assert measure_costs(one, rounds=1).threads == one.threads == 1
        with pytest.raises(ValueError, match="`threads` is 3, and the engine was loaded with 1"):
            measure_costs(one, threads=3)


def test_a_head_is_timed_between_two_passes(engine, images):
    """A stage that runs twice in a row finds its caches warm the second time."""
    ran = []
    run = engine.run
    engine.run = lambda index, state, head: ran.append((index, head)) or run(index, state, head)
    seconds = engine.time_parts(images.numpy()[:2])
    last = engine.num_exits
    assert ran == [(index, head) for head in (False, True) for index in range(last)]
    assert len(seconds) == 2 * last + 1
    assert min(seconds) > 0
