"""What an export writes and refuses, and how it is loaded: from a folder, a checkpoint, in a bare environment."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from datasets import Dataset

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification, measure_costs
from hf_scan.runtime import ExitSettings, ORTScanForImageClassification, compare, graphs, quantize
from hf_scan.runtime.manifest import Manifest

from ..conftest import full_disk, random_scan_model


ROOT = Path(__file__).parents[2]
THRESHOLDS = [0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Images as cameras give them."""
    return torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def with_preprocessing(tmp_path_factory, pixels) -> Path:
    """An export that normalises images itself, quantised with its weights in a file of their own as large ones are."""
    folder = tmp_path_factory.mktemp("preprocessing") / "exported"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "MOST_BYTES_IN_A_FILE", 0)
        random_scan_model().export_onnx(folder, calibration_dataset=pixels, include_preprocessing=True)
    return folder


def test_preprocessing_is_part_of_the_first_stage(with_preprocessing, model, pixels):
    engine = ORTScanForImageClassification.from_pretrained(with_preprocessing)
    mean, std = (torch.tensor(model.config.preprocessing[name])[:, None, None] for name in ("mean", "std"))
    normalised = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        expected = model(normalised).exit_logits
    for found, logits in zip(engine(pixels).exit_logits, expected):
        torch.testing.assert_close(found, logits, rtol=1e-3, atol=2e-4)
    exits = model.predict_adaptive(normalised[:12], thresholds=THRESHOLDS).exit_index
    assert engine.predict_adaptive(pixels[:12].numpy(), thresholds=THRESHOLDS).exit_index.tolist() == exits.tolist()
    assert engine.predict_adaptive(pixels[:1].numpy(), thresholds=THRESHOLDS).exit_index[0] == exits[0]
    assert sorted(measure_costs(engine, batch_size=2, rounds=1).plain) == [1, 2]
    with pytest.raises(ValueError, match="takes uint8"):
        engine(pixels.float())


def test_quantised_with_weights_in_a_file_of_their_own(with_preprocessing, pixels):
    int8 = ORTScanForImageClassification.from_pretrained(with_preprocessing, subfolder="int8")
    np.testing.assert_allclose(int8.plain(pixels), int8(pixels).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_int8_of_a_network_that_reads_the_batch_size_in_a_later_stage(tmp_path):
    """It is read from the images, which INT8 rounds first, and a later stage does not get them."""
    model = random_scan_model(backbone="test_convnext", image_size=64)
    pixels = torch.randn(16, 3, 64, 64)
    model.export_onnx(tmp_path / "exported", calibration_dataset=pixels)
    int8 = ORTScanForImageClassification.from_pretrained(tmp_path / "exported", subfolder="int8")
    assert int8(pixels[:3]).logits.shape == (3, 5)


@pytest.mark.parametrize("sizes", [(4, 8), (4, 7), (3, 5), (7, 20), (49, 97)])
def test_scales_give_the_sizes_back(sizes):
    """ONNX gives the size of a `Resize` as floor(size * scale), which rounding would make one too small."""
    before, after = sizes
    scale = graphs._scale(before, after)
    assert scale.dtype == np.float32
    assert np.floor(np.float32(before) * scale) == after
    assert scale == pytest.approx(after / before, rel=2e-7)


def test_rows_of_a_dataset_are_images(engine, images):
    """A `datasets.Dataset` has a shape as arrays have, and is none."""
    rows = Dataset.from_dict({"pixel_values": images.numpy()}).with_format("torch")
    np.testing.assert_array_equal(quantize._images_of(rows, engine.manifest), images.numpy())
    found = list(engine.predict_adaptive_stream(rows, batch_size=10, thresholds=THRESHOLDS, ordered=True))
    expected = engine.predict_adaptive(images.numpy(), thresholds=THRESHOLDS).exit_index
    assert np.concatenate([answer.exit_index for answer in found]).tolist() == expected.tolist()


def test_preprocessing_that_is_not_known_is_refused(tmp_path):
    model = random_scan_model()
    model.config.preprocessing = None
    with pytest.raises(ValueError, match="needs a mean and standard deviation for each of the 3 channels"):
        model.export_onnx(tmp_path / "exported", include_preprocessing=True)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_pytorch_is_exported_when_it_is_loaded(tmp_path, model, images):
    model.save_pretrained(tmp_path / "checkpoint")
    engine = ORTScanForImageClassification.from_pretrained(tmp_path, export=True, subfolder="checkpoint")
    expected = model.predict_adaptive(images, thresholds=THRESHOLDS)
    found = engine.predict_adaptive(images, thresholds=THRESHOLDS)
    assert found.exit_index.tolist() == expected.exit_index.tolist()
    engine.exit_config = ExitConfig(THRESHOLDS)
    engine.save_pretrained(tmp_path / "saved")
    folder = engine.folder
    del engine
    assert ORTScanForImageClassification.from_pretrained(tmp_path / "saved").exit_config.thresholds == THRESHOLDS
    assert not folder.exists()  # what was exported for the engine alone goes with it


def test_exits_inside_of_stages(tmp_path):
    """The export compares itself with PyTorch, stage by stage. Masks are of maps of 5 x 5 pixels, which is odd."""
    model = random_scan_model(exit_points=["layer2.1", "layer3.0"], image_size=20, classifier_type="chain")
    model.export_onnx(tmp_path / "onnx")
    engine = ORTScanForImageClassification.from_pretrained(tmp_path / "onnx")
    assert engine.num_exits == 3


def test_arguments_that_mean_nothing_are_refused(exported):
    with pytest.raises(TypeError, match=r"'include_preprocessing'.*export=True"):
        ORTScanForImageClassification.from_pretrained(exported, include_preprocessing=True)


def test_saving_over_another_export_leaves_nothing_of_it(exported, tmp_path, engine):
    target = shutil.copytree(exported, tmp_path / "other")
    (target / "onnx" / "stage_7.onnx").write_bytes(b"of a deeper network")
    (target / "notes.txt").write_text("mine")
    engine.exit_config = ExitConfig([0.5, None, 0.5], fallback="deepest")
    engine.save_pretrained(target)
    names = {path.name for path in (target / "onnx").iterdir()}
    assert names == {*Manifest.load(target / "onnx").files, "manifest.json"}
    assert "stage_7.onnx" not in names
    assert (target / "notes.txt").read_text() == "mine"
    # In place: the engine itself runs the new file.
    again = ORTScanForImageClassification.from_pretrained(target)
    again.exit_config = ExitConfig(THRESHOLDS, "margin")
    again.save_pretrained(target)
    again.run = None  # so that running a stage would fail
    assert again.predict_adaptive(np.zeros((1, 3, 16, 16), np.float32)).logits.shape == (1, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        engine.save_pretrained(tmp_path / "file")


def test_graphs_that_differ_are_not_put_in_place(exported, tmp_path, images):
    """Those in 8 bits too: one network, however it is run, and every graph has a session."""
    folder = shutil.copytree(exported / "int8", tmp_path / "int8")
    pixels = images[:5].numpy()
    compare.compare_with_itself("net", folder, pixels)

    def changed(name, change):
        graph = onnx.load(folder / "onnx" / name)
        change(graph)
        shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
        onnx.save(graph, tmp_path / "changed" / "onnx" / name)
        Manifest._parsed(folder / "onnx" / "manifest.json").save(tmp_path / "changed" / "onnx")
        return tmp_path / "changed"

    def negate(graph):
        name = graph.graph.output[0].name
        for node in graph.graph.node:
            for position, output in enumerate(node.output):
                if output == name:
                    node.output[position] = "before"
        graph.graph.node.append(onnx.helper.make_node("Neg", ["before"], [name]))

    with pytest.raises(ValueError, match=r"int8/plain.onnx, 1 images"):
        compare.compare_with_itself("net", changed("plain.onnx", negate), pixels)
    with pytest.raises(ValueError, match=r"ONNX Runtime does not run it"):
        compare.compare_with_itself(
            "net",
            changed("stage_1_without_head.onnx", lambda graph: setattr(graph.graph.node[0], "op_type", "Fly")),
            pixels,
        )


def test_what_differs_from_pytorch_is_not_put_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="differs from the network"):
        random_scan_model().export_onnx(tmp_path / "exported")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads that Linux lists")
@pytest.mark.parametrize("own_options", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_pool_of_threads_for_all_sessions(exported, own_options):
    code = """
import os, sys
import onnxruntime
from hf_scan.runtime import ORTScanForImageClassification, share_thread_pool
share_thread_pool(4)
options = onnxruntime.SessionOptions() if sys.argv[2] == "True" else None
engine = ORTScanForImageClassification.from_pretrained(sys.argv[1], session_options=options)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
engine.open_sessions()
print(threads() - before, len(engine.manifest.files))
"""
    done = subprocess.run([sys.executable, "-c", code, exported, str(own_options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0", str(len(Manifest.load(exported / "onnx").files))]


BARE = """
import sys
import numpy as np
from hf_scan.runtime import ORTScanForImageClassification
engine = ORTScanForImageClassification.from_pretrained(sys.argv[1])
print(engine.predict_adaptive(np.load(sys.argv[2]), thresholds=[0.5, 0.5, 0.5]).exit_index.tolist())
try:
    import torch
except ImportError:
    print("bare")
"""


@pytest.mark.slow
def test_answers_in_an_environment_of_numpy_and_onnxruntime_alone(exported, tmp_path, images, engine):
    """Installs both from the package registry, and nothing else."""
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    needed = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *needed], check=True)
    np.save(tmp_path / "images.npy", images.numpy())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-c", BARE, exported, tmp_path / "images.npy"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    exits, bare = done.stdout.splitlines()
    assert bare == "bare"
    assert json.loads(exits) == engine.predict_adaptive(images.numpy(), thresholds=THRESHOLDS).exit_index.tolist()


def test_an_engine_keeps_what_its_weights_were_trained_on(engine, tmp_path):
    """Through another rule, a save without thresholds, and a load with another rule."""
    engine.exit_config = ExitConfig(trained_on="1: ab")
    for rule in (ExitConfig(thresholds=[0.5, 0.5]), ExitSettings(thresholds=[0.5, 0.5]), ExitConfig()):
        engine.exit_config = rule
        assert engine.exit_config.trained_on == "1: ab"
    engine.save_pretrained(tmp_path)
    for given in (None, ExitConfig(), ExitSettings(thresholds=[0.5, 0.5])):
        loaded = ORTScanForImageClassification.from_pretrained(tmp_path, exit_config=given)
        assert loaded.exit_config.trained_on == "1: ab"


def optimised(path: Path, folder: Path) -> Counter[str]:
    """Return how many nodes of each kind ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options)
    graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_maps_stay_in_the_layout_of_convolutions(tmp_path):
    """From one stage to the next, also where a residual connection reads the map as it comes from an exit."""
    config = ScanConfig(backbone="cifar_resnet20", exit_points=["layer2.0"], attention_type="none", num_labels=2)
    model, folder = ScanForImageClassification(config).eval(), tmp_path / "exported"
    model.export_onnx(folder, calibration_dataset=torch.randn(8, 3, 32, 32))
    names = ("plain", "stage_0_without_head", "stage_1")
    plain, _, behind = (optimised(folder / "onnx" / f"{name}.onnx", tmp_path) for name in names)
    if plain["ReorderOutput"]:  # on processors for which there is such a layout
        assert behind["Add"] == plain["Add"] == 0
        assert behind["ReorderInput"] == 1
    plain, *stages = (optimised(folder / "int8" / "onnx" / f"{name}.onnx", tmp_path) for name in names)
    assert sum(stage["Transpose"] for stage in stages) == plain["Transpose"]
    # As the next stage reads it: an array, in which the images come first.
    (state,) = Manifest.load(folder / "int8" / "onnx").states[0]
    engine = ORTScanForImageClassification.from_pretrained(folder / "int8")
    (handed_on,), _ = engine.run(0, [np.zeros((2, 3, 32, 32), dtype=np.float32)], head=False)
    assert (handed_on.shape, handed_on.dtype.name) == ((2, 16, 16, 32), state["dtype"])


def test_enlargements_stay_in_the_layout_of_convolutions(exported, tmp_path):
    """Bilinear ones too: their scales are numbers, so that ONNX Runtime needs neither `Resize` nor a batch size."""
    for index in range(2):
        graph = onnx.load(exported / "onnx" / f"stage_{index}.onnx", load_external_data=False)
        (resize,) = (node for node in graph.graph.node if node.op_type == "Resize")
        assert len(resize.input) == 3
        found = optimised(exported / "onnx" / f"stage_{index}.onnx", tmp_path)
        assert "Shape" not in found
        # On processors for which there is such a layout, and not in ONNX Runtime 1.23, the last for Python 3.10.
        if found["ReorderOutput"] and not version("onnxruntime").startswith("1.23."):
            assert (found["Upsample"], found["Resize"]) == (1, 0)


def test_one_file_refuses_a_criterion_that_it_cannot_hold(exported):
    manifest = Manifest.load(exported / "onnx")
    stages = [onnx.load(exported / "onnx" / f"stage_{index}.onnx", load_external_data=False) for index in range(3)]
    states = [[value["name"] for value in values] for values in manifest.states]
    with pytest.raises(ValueError, match="`criterion` is 'luck'"):
        graphs.nest(stages, states, {**manifest.adaptive, "criterion": "luck"})


@pytest.mark.parametrize(("size", "in_8_bits"), [(1000, False), (2**20, False), (2**20, True)])
def test_a_full_disk_leaves_what_was_there(tmp_path, model, size, in_8_bits):
    """While the first file is written, a later one, and those of the quantised network."""
    (tmp_path / "exported" / "onnx").mkdir(parents=True)
    calibration = torch.randn(4, 3, 16, 16) if in_8_bits else None
    said = r"exported could not be written: the disk is full, and what was there has not changed\. Make space"
    with full_disk(size), pytest.raises(OSError, match=said):
        model.export_onnx(tmp_path / "exported", calibration_dataset=calibration)
    assert [path.name for path in tmp_path.rglob("*")] == ["exported", "onnx"]


def test_a_full_disk_when_an_engine_is_saved(tmp_path, engine):
    said = r"copy could not be written: the disk is full, and what was there has not changed\. Make space"
    with full_disk(1000), pytest.raises(OSError, match=said):
        engine.save_pretrained(tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
