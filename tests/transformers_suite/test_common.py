"""Transformers' common tests of models and configurations, on networks with early exits."""

import unittest

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto

from hf_scan import ScanConfig, ScanForImageClassification

from .source import load


modeling = load("test_modeling_common")
configuration = load("test_configuration_common")

# Some tests ask by name what kind of model this is. Registered classes have no name there.
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["scan"] = "ScanForImageClassification"


class ScanTester:
    """What the common tests ask for."""

    is_training = True
    batch_size = 3
    num_labels = 3

    def __init__(self, **config) -> None:
        self.config = {"num_labels": self.num_labels, **config}
        self.image_size = self.config["image_size"]

    def get_config(self) -> ScanConfig:
        return ScanConfig(**self.config)

    def prepare_config_and_inputs_for_common(self):
        pixel_values = modeling.floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class ScanTests(modeling.ModelTesterMixin):
    all_model_classes = (ScanForImageClassification,)
    test_resize_embeddings = False  # as in the tests of ResNet and TimmWrapper: images have no table of embeddings
    config: dict

    def setUp(self) -> None:
        self.model_tester = ScanTester(**self.config)
        self.config_tester = configuration.ConfigTester(
            self, config_class=ScanConfig, has_text_modality=False, common_properties=[], **self.config
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    # What follows stands in place of tests that expect the tokens of a language model, or a base model. None of them
    # promises less.

    def test_hidden_states_output(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = ScanForImageClassification(config).eval()
        expected = model.extract_features(**inputs)
        asked = model(**inputs, output_hidden_states=True)
        model.config.output_hidden_states = True
        for output in (asked, model(**inputs)):
            assert len(output.hidden_states) == model.num_exits
            assert all(torch.equal(one, other) for one, other in zip(output.hidden_states, expected, strict=True))
        assert model(**inputs, output_hidden_states=False).hidden_states is None

    def test_attention_outputs(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = ScanForImageClassification(config).eval()
        features = model.extract_features(**inputs)
        asked = model(**inputs, output_attentions=True)
        model.config.output_attentions = True
        for output in (asked, model(**inputs)):
            assert len(output.attentions) == model.num_exits - 1
            assert all(len(mask) == len(feature) for mask, feature in zip(output.attentions, features))
        *others, last = model(**inputs, output_hidden_states=True, return_dict=False)
        assert len(others) == len(asked.to_tuple())
        assert all(torch.equal(one, other) for one, other in zip(last, asked.attentions, strict=True))

    def test_retain_grad_hidden_states_attentions(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = ScanForImageClassification(config)
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        values = [*output.hidden_states, *output.attentions]
        for value in values:
            value.retain_grad()
        # A mask belongs to its exit alone, and `logits` are the last one's.
        output.ensemble_logits.sum().backward()
        assert all(value.grad is not None for value in values)

    def test_correct_missing_keys(self) -> None:
        """The backbone alone is a model of timm. Of its weights, all heads are missing and none of the backbone."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        model = ScanForImageClassification(config)
        with modeling.tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            file = f"{folder}/model.safetensors"
            weights = {name: value for name, value in load_file(file).items() if name.startswith("backbone.")}
            save_file(weights, file, metadata={"format": "pt"})
            _, info = ScanForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert set(info["missing_keys"]) == {name for name in model.state_dict() if name.startswith("exit_heads.")}

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        """A checkpoint without the backbone's weights is refused instead of answered with random ones."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        with modeling.tempfile.TemporaryDirectory() as folder:
            ScanForImageClassification(config).save_pretrained(folder)
            save_file({"tensor": torch.tensor([1, 2])}, f"{folder}/model.safetensors", metadata={"format": "pt"})
            with pytest.raises(ValueError, match="lack"):
                ScanForImageClassification.from_pretrained(folder)

    # What follows is skipped. TimmWrapper skips the first two and more.

    @unittest.skip(reason="As TimmWrapper: images have no table of embeddings; get_input_embeddings returns None.")
    def test_model_get_set_embeddings(self) -> None: ...

    @unittest.skip(reason="As TimmWrapper: timm initialises its own weights; a checkpoint that lacks some is refused.")
    def test_can_init_all_missing_weights(self) -> None: ...

    @unittest.skip(reason="Early exits are for labels; ScanConfig refuses regression, one of the problem types.")
    def test_problem_types(self) -> None: ...


class CifarResNetTest(ScanTests, unittest.TestCase):
    config = {"backbone": "cifar_resnet20", "image_size": 16}


class PaperHeadsTest(ScanTests, unittest.TestCase):
    config = {
        "backbone": "cifar_resnet20",
        "image_size": 16,
        "attention_type": "conv",
        "classifier_type": "conv",
    }


class TimmResNetTest(ScanTests, unittest.TestCase):
    config = {"backbone": "test_resnet", "image_size": 64}


class ViTTest(ScanTests, unittest.TestCase):
    config = {"backbone": "test_vit", "image_size": 64}
