import copy
import json
import os
import pickle
import subprocess
import sys
import tempfile

import pytest
import timm
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    pipeline,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
from hf_scan.model.exit_criteria import confidence_of
from hf_scan.model.exit_rule import apply_exit_rule
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.model.stages import StageState

from ..conftest import random_scan_model
from .test_stages import EVERY_FAMILY


BACKBONES = ["cifar_resnet20", "test_resnet", "resnetblur18", "convnext_atto", "test_efficientnet"]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_is_the_original(name):
    """timm's own initialisation, timm's names, timm's answer to the bit."""
    torch.manual_seed(3)
    plain = timm.create_model(name, num_classes=5).eval()
    torch.manual_seed(3)
    model = ScanForImageClassification(ScanConfig(backbone=name, num_labels=5)).eval()
    assert type(model.backbone) is type(plain)
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.state_dict().values(), plain.state_dict().values()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = model(images)
        assert torch.equal(out.logits, plain(images))
        assert torch.equal(out.exit_logits[-1], model.backbone(images))
        assert torch.equal(out.logits, out.exit_logits[-1])
    assert len(out.exit_logits) == model.num_exits


@pytest.mark.parametrize("name", BACKBONES)
def test_save_and_load_give_the_same_bits(name, tmp_path):
    model = random_scan_model(backbone=name, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is ScanForImageClassification
    assert not loaded.training
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    buffers = zip(loaded.buffers(), model.buffers())
    assert all(torch.equal(a, b) for a, b in buffers)  # those that no file holds too
    # Weights read from a file lie at other addresses, for which oneDNN can choose another kernel. A copy's do not.
    with torch.no_grad():
        answers, expected = copy.deepcopy(loaded)(images).exit_logits, model(images).exit_logits
    torch.testing.assert_close(answers, expected)


def test_a_timm_checkpoint_loads_unchanged():
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    model = ScanForImageClassification(ScanConfig(backbone="test_resnet", num_labels=5)).eval()
    model.backbone.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).logits, plain(images))


def test_output_is_what_transformers_users_expect(model, images):
    out = model(images, labels=torch.arange(24) % 5)
    assert list(out.keys()) == ["loss", "logits", "exit_logits", "ensemble_logits"]
    assert out[0] is out.loss
    assert model(images)[0].shape == (24, 5)
    expected = sum(torch.nn.functional.cross_entropy(logits, torch.arange(24) % 5) for logits in out.exit_logits)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.ensemble_logits, sum(out.exit_logits) / 3)
    assert isinstance(model(images, return_dict=False), tuple)


def test_exit_features_lead_to_the_logits(model, images):
    out = model(images, output_exit_features=True)
    assert [feature.shape for feature in out.exit_features] == [(24, 64)] * 3
    torch.testing.assert_close(model.backbone.get_classifier()(out.exit_features[-1]), out.logits)
    torch.testing.assert_close(model.exit_heads[0].classifier.fc(out.exit_features[0]), out.exit_logits[0])
    assert not out.exit_features[-1].requires_grad
    # Where the deepest feature is wider than an exit's own, the two are made comparable.
    wide = ScanForImageClassification(ScanConfig(backbone="cifar_resnet50", image_size=8)).eval()
    assert {feature.shape for feature in wide(images[..., :8, :8], output_exit_features=True).exit_features} == {
        (24, 2048)
    }
    assert wide.exit_heads[0].classifier.fc.in_features == wide.config.head_feature_size == 256


def test_attention_masks(model, images):
    out = model(images, output_attentions=True)
    assert [mask.shape[:2] for mask in out.attentions] == [(24, width) for width in model.config.head_width]
    assert all(mask.min() > 0 and mask.max() < 1 for mask in out.attentions)
    # What the exit sees is its feature through the mask.
    (feature,) = model.run_stage(0, StageState.from_images(images)).values
    head = model.exit_heads[0]
    _, logits = head.classifier(head.squeeze(feature) * out.attentions[0])
    torch.testing.assert_close(logits, out.exit_logits[0])
    assert model(images).attentions is None
    without = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", attention_type="none", num_labels=3))
    assert without(images, output_attentions=True).attentions is None


def test_features_of_the_stages_lead_to_the_same_answers(model, images):
    features = model.extract_features(images)
    assert len(features) == 3
    for answer, expected in zip(model(stage_features=features).exit_logits, model(images).exit_logits):
        assert torch.equal(answer, expected)
    with pytest.raises(ValueError, match="Neither `pixel_values` nor `stage_features` are given"):
        model()


def test_the_saved_configuration_says_what_was_left_to_defaults(tmp_path):
    ScanForImageClassification(ScanConfig(backbone="test_resnet", num_labels=5)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["exit_points"] == ["layer1", "layer2", "layer3"]
    assert saved["image_size"] == 160


def test_exit_config_travels_with_the_weights(tmp_path, images):
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.3, 0.4, 0.5], search={"method": "genetic"})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.exit_config == model.exit_config
    answer, expected = loaded.predict_adaptive(images), model.predict_adaptive(images)
    assert torch.equal(answer.exit_index, expected.exit_index)
    # Weights read from a file lie at other addresses, for which oneDNN can choose another kernel at batch 1.
    torch.testing.assert_close(answer.logits, expected.logits)
    other = ExitConfig(thresholds=[0.1, 0.1, 0.1])
    assert ScanForImageClassification.from_pretrained(tmp_path, exit_config=other).exit_config == other
    # Thresholds of other weights do not stay behind.
    random_scan_model(seed=1).save_pretrained(tmp_path)
    assert ScanForImageClassification.from_pretrained(tmp_path).exit_config == ExitConfig()


def test_exit_config_is_there_before_anything_is_pushed(tmp_path, monkeypatch):
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.3, 0.4, 0.5])
    pushed = {}

    def push_to_hub(repo_id, **kwargs):
        pushed[repo_id] = (tmp_path / "exit_config.json").is_file()

    monkeypatch.setattr(model, "push_to_hub", push_to_hub)
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/scan")
    assert pushed == {"me/scan": True}


def test_thresholds_do_not_stay_with_new_weights(tmp_path):
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.3, 0.4], fallback="deepest")
    model.save_pretrained(tmp_path)
    loaded = ScanForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert loaded.exit_config == ExitConfig(fallback="deepest")
    # Heads without the attention they were trained with are others too.
    loaded = ScanForImageClassification.from_pretrained(tmp_path, attention_type="none")
    assert loaded.exit_config == ExitConfig(fallback="deepest")


def test_exit_config_of_another_network_is_refused(tmp_path):
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.5] * 9)
    with pytest.raises(ValueError, match="holds 9 numbers and the network has 3 exits"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    random_scan_model().save_pretrained(tmp_path)
    ExitConfig(thresholds=[0.5] * 9).save_pretrained(tmp_path)
    ExitConfig(thresholds=[]).save_pretrained(tmp_path, "exit_config_none.json")
    for name, count in ((None, 9), ("exit_config_none.json", 0)):
        file = name or "exit_config.json"
        with pytest.raises(ValueError, match=rf"^{file} of .* holds {count} numbers and the network has 3 exits"):
            ScanForImageClassification.from_pretrained(tmp_path, exit_config=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_loaded_as_any_type(dtype, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ScanForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()} == {dtype}
    expected = model.exit_heads[0].classifier.fc.weight
    assert torch.equal(loaded.exit_heads[0].classifier.fc.weight, expected.to(dtype))


def test_loading_information_and_dtype(tmp_path):
    random_scan_model().save_pretrained(tmp_path)
    model, info = ScanForImageClassification.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"]
    assert model.dtype == torch.float64


def test_other_number_of_labels(tmp_path, images):
    random_scan_model().save_pretrained(tmp_path)
    model = ScanForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert all(logits.shape == (24, 9) and logits.isfinite().all() for logits in model(images).exit_logits)


def test_pipeline_and_image_processor(tmp_path):
    model = random_scan_model(image_size=None)
    model.save_pretrained(tmp_path)
    create_image_processor(model).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = torch.randint(0, 255, (50, 40, 3), dtype=torch.uint8).numpy()
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 32, 32)
    from PIL import Image

    top = pipeline("image-classification", model=str(tmp_path), device="cpu")(Image.fromarray(image), top_k=1)
    with torch.no_grad():
        logits = model(pixel_values).logits
    assert top[0]["label"] == model.config.id2label[int(logits.argmax())]


def test_half_precision(images):
    model = random_scan_model().half()
    assert model.predict_adaptive(images.half(), thresholds=[0.4, 0.4]).logits.dtype == torch.float16


def test_compiles_as_a_whole(images):
    model = random_scan_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).exit_logits, model(images).exit_logits)


def test_a_copy_runs_its_own_modules(images):
    model = random_scan_model()
    twin = copy.deepcopy(model)
    twin.backbone.conv1.weight.data.zero_()
    assert not torch.equal(twin(images).logits, model(images).logits)


def test_code_in_the_checkpoint_is_enough(tmp_path):
    """Saved with its code, it answers alike where `hf_scan` is not installed; and saving leaves no mark."""
    model = random_scan_model(image_size=32)
    model.exit_config = ExitConfig(thresholds=[0.5, 0.5, 0.5])
    model.save_pretrained(tmp_path / "code", include_code=True)
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    for folder in ("plain", "code"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert ("auto_map" in config) == (folder == "code")
        assert "_auto_class" not in config
    # With `hf_scan`, its own classes answer; saved again without code, the configuration names none.
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "code", trust_remote_code=True)
    assert type(again) is ScanForImageClassification
    again.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())

    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    load = """
import sys
sys.modules["hf_scan"] = None
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
images = torch.load("images.pt")
model = AutoModelForImageClassification.from_pretrained("code", trust_remote_code=True)
AutoImageProcessor.from_pretrained("code")
with torch.no_grad():
    logits = model(images).logits
torch.save((logits, model.predict_adaptive(images).exit_index), "answers.pt")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    logits, exit_index = torch.load(tmp_path / "answers.pt")
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(exit_index, model.predict_adaptive(images).exit_index)


def test_one_label_is_refused():
    with pytest.raises(ValueError, match="`num_labels` is 1; a classifier needs at least 2"):
        ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=1))


def test_folder_without_weights(tmp_path):
    ScanConfig().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors.* Write one there with `save_pretrained`"):
        ScanForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_truncated_weights(tmp_path, keep):
    random_scan_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OSError, match=r"truncated or is not a safetensors file\. Save or download it again"):
        ScanForImageClassification.from_pretrained(tmp_path)


def test_checkpoint_of_another_model_type(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="configuration of a 'resnet' model"):
        ScanForImageClassification.from_pretrained(tmp_path)


def test_missing_backbone_weights_are_refused(tmp_path):
    """Left alone, they would be raw memory."""
    model = random_scan_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if "backbone.layer2" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lack \d+ of the backbone's, the first being 'backbone\.layer2"):
        ScanForImageClassification.from_pretrained(tmp_path)


def test_a_pickle_is_not_loaded(tmp_path):
    """A checkpoint that has only a pickle is one without weights."""
    model = random_scan_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        ScanForImageClassification.from_pretrained(tmp_path)


FAMILIES = [
    "test_vit",
    "xcit_nano_12_p8_224",
    "swin_tiny_patch4_window7_224",
    "pit_ti_224",
    "selecsls42",
    "cifar_wrn20_8",
]


@pytest.mark.parametrize("backbone", FAMILIES)
def test_any_family_trains_and_exits(backbone):
    """Tokens, channels last, several tensors between stages: the promises are the same."""
    torch.manual_seed(0)
    model = ScanForImageClassification(ScanConfig(backbone=backbone, num_labels=4))
    size = model.config.image_size
    images = torch.randn(6, 3, size, size)
    output = model(images, labels=torch.tensor([0, 1, 2, 3, 0, 1]), output_exit_features=True)
    (output.loss + sum(feature.mean() for feature in output.exit_features)).backward()
    assert all(parameter.grad is not None for parameter in model.exit_heads.parameters())
    assert len({feature.shape for feature in output.exit_features}) == 1
    model.eval()
    with torch.no_grad():
        output = model(images)
        assert torch.equal(output.logits, model.backbone(images))
        # Thresholds in the middle of what these images give, so that some leave at each exit.
        config = ExitConfig([float(confidence_of(logits).median()) for logits in output.exit_logits[:-1]])
        simulated = apply_exit_rule(output.exit_logits, config)
    answer = model.predict_adaptive(images, config)
    assert torch.equal(answer.exit_index, simulated.exit_index)
    assert len(answer.exit_index.unique()) > 1
    torch.testing.assert_close(answer.logits, simulated.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_every_family_saves_and_loads(name):
    """The deepest answer is the plain model's to the bit, heads or not, and a checkpoint holds every bit."""
    torch.manual_seed(0)
    model = ScanForImageClassification(ScanConfig(backbone=name, num_labels=10)).eval()
    images = torch.randn(1, *model.backbone.pretrained_cfg["input_size"])
    with torch.no_grad():
        output = model(images)
        assert torch.equal(output.logits, model.backbone(images))
    # Not `tmp_path`, which pytest keeps: these are gigabytes.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = ScanForImageClassification.from_pretrained(folder)
        state, expected = loaded.state_dict(), model.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        with torch.no_grad():
            answers = loaded(images).exit_logits
        # After a run, since some networks compute theirs when they see the first image.
        assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), model.buffers(), strict=True))
    for answer, expected in zip(answers, output.exit_logits, strict=True):
        torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_hidden_states_are_the_stage_features_also_when_the_configuration_asks(images):
    model = random_scan_model()
    expected = model.extract_features(images)
    asked = model(images, output_hidden_states=True).hidden_states
    assert model(images).hidden_states is None
    model.config.output_hidden_states = True
    for given in (asked, model(images).hidden_states):
        assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
    assert model(images, output_hidden_states=False).hidden_states is None


def test_images_have_no_input_embeddings(model):
    assert model.get_input_embeddings() is None  # as quantization in Transformers wants to hear


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model, images = random_scan_model(), torch.randn(4, 3, 16, 16)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # recomputing a stage counts its batch a second time
    model.train()
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
            assert sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()) == model.num_exits
        model.zero_grad()
        model(images, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients))


def test_copies_and_pickles(model, images):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images).logits, model(images).logits)
        assert torch.equal(
            other.predict_adaptive(images, thresholds=[0.5, 0.5]).logits.isfinite().all(), torch.tensor(True)
        )


def test_a_stage_can_be_exported(model, images):
    class FirstStage(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model.backbone

        def forward(self, pixel_values):
            return model.stages[0].forward(self.backbone, pixel_values)[0]

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(FirstStage(), (images,), dynamic_shapes={"pixel_values": {0: batch}})
    torch.testing.assert_close(
        program.module()(images[:5]), model.run_stage(0, StageState.from_images(images[:5])).values[0]
    )


def test_the_whole_model_and_a_stage_compile(model, images):
    """Traced and guarded by `torch.compile`, without the compiler of the machine."""
    with torch.no_grad():
        whole = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(whole(images).logits, model(images).logits)
        stage = torch.compile(model.stages[0].forward, backend="eager", fullgraph=True)
        assert torch.equal(
            stage(model.backbone, images)[0], model.run_stage(0, StageState.from_images(images)).values[0]
        )


def test_channels_last(model, images):
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    pixels = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(last(pixels).exit_logits, model(images).exit_logits, rtol=1e-3, atol=1e-4)
    (feature,) = last.run_stage(0, StageState.from_images(pixels)).values
    assert feature.is_contiguous(memory_format=torch.channels_last)


def test_autocast(model, images):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        output = model(images)
        answer = model.predict_adaptive(images, thresholds=[0.4, 0.4])
    assert {logits.dtype for logits in (*output.exit_logits, answer.logits)} == {torch.float16}
    for half, full in zip(output.exit_logits, model(images).exit_logits):
        assert (half - full).norm() < 0.05 * full.norm()
    assert answer.exit_index.unique().tolist() == [0, 1, 3]


def test_frozen_backbone_gets_no_gradient(images):
    model = random_scan_model().train()
    model.backbone.requires_grad_(False)
    model(images[:4], labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.exit_heads.parameters())


@pytest.mark.parametrize("placement", ["auto", {"backbone": "cpu", "exit_heads": "disk"}], ids=["auto", "heads"])
def test_device_map(model, images, placement, tmp_path):
    """Also with weights that stay on the disk until a module needs them."""
    model.save_pretrained(tmp_path)
    loaded = ScanForImageClassification.from_pretrained(
        tmp_path, device_map=placement, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).exit_logits, model(images).exit_logits)
    thresholds = [0.4, 0.4]
    answer = loaded.predict_adaptive(images, thresholds=thresholds)
    assert torch.equal(answer.exit_index, model.predict_adaptive(images, thresholds=thresholds).exit_index)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_other_channels(num_channels):
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_channels=num_channels)).eval()
    assert model(torch.randn(2, num_channels, 32, 32)).logits.shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_are_cast_to_the_models_dtype(dtype):
    """As TimmWrapper does, in whatever answers images: a checkpoint of 16 bits comes with a processor of 32."""
    model = random_scan_model().to(dtype)
    images = torch.randn(6, 3, 16, 16)
    policy = {"thresholds": [0.5, 0.5]}
    with torch.inference_mode():
        expected, answer = model(images.to(dtype)), model.predict_adaptive(images.to(dtype), **policy)
        features = model.extract_features(images)
        assert torch.equal(model(images).logits, expected.logits)
        assert torch.equal(model(stage_features=[each.double() for each in features]).logits, expected.logits)
        assert torch.equal(model.predict_adaptive(images, **policy).logits, answer.logits)
        streamed = list(model.predict_adaptive_stream([images], batch_size=6, ordered=True, **policy))
        assert torch.equal(torch.cat([some.exit_index for some in streamed]), answer.exit_index)
        assert {output.logits.dtype for output in (expected, answer, *streamed)} == {dtype}


def test_weights_without_a_checkpoint():
    """`from_pretrained(None)` builds the network of a configuration with given weights."""
    model, policy = random_scan_model(), ExitConfig(thresholds=[0.5, 0.5])
    given = {"config": model.config, "state_dict": model.state_dict()}
    loaded = ScanForImageClassification.from_pretrained(None, exit_config=policy, **given)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.exit_config == policy
    heads = {name: value for name, value in model.state_dict().items() if name.startswith("exit_heads.")}
    with pytest.raises(ValueError, match="The weights of `state_dict` lack"):
        ScanForImageClassification.from_pretrained(None, config=model.config, state_dict=heads)


@pytest.mark.parametrize(
    ("name", "size"), [("cifar_resnet20", 32), pytest.param("test_resnet", 96, marks=pytest.mark.slow)]
)
def test_torch_export_with_any_height_and_width(name, size):
    """
    As users of Transformers export a model: PyTorch finds the ranges of the sizes. (It takes a height that is equal to
    a number of channels in the example for one that has to be.)
    """
    model = random_scan_model(backbone=name, image_size=size)
    any_size = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    images = torch.randn(2, 3, size, size)
    exported = torch.export.export(
        model, (), {"pixel_values": images}, dynamic_shapes={"pixel_values": any_size}
    ).module()
    for shape in ((3, 3, size + 32, size + 64), (1, 3, size, size)):
        others = torch.randn(*shape)
        for found, expected in zip(exported(pixel_values=others).exit_logits, model(others).exit_logits):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
