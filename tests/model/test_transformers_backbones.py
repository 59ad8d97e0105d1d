import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig

from hf_scan.model.transformers_backbones import FAMILIES, arguments_of, check_family, create_family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_made_again_from_what_is_not_the_default(name):
    config = FAMILIES[name].config(hidden_act="silu")
    assert arguments_of(config) == {"hidden_act": "silu"}
    check_family(name, arguments_of(config))


def test_weights_have_the_names_that_they_have_in_transformers():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=3)
    with torch.device("meta"):
        plain = ResNetForImageClassification(config)
        backbone = create_family("resnet", arguments_of(config), num_labels=3, num_channels=3, image_size=64)
    assert list(backbone.state_dict()) == list(plain.state_dict())


def test_what_is_not_on_the_list_is_refused():
    with pytest.raises(ValueError, match="'bert', which is no family"):
        check_family("bert", {})
    with pytest.raises(ValueError, match=r"`backbone_kwargs` names \['id2label', 'name_or_path'\]; expected some of"):
        check_family("vit", {"name_or_path": "org/model", "id2label": {}, "hidden_size": 8})
    with pytest.raises(ValueError, match=r"`patch_size` is \[8, 4\]; expected patches that are squares"):
        create_family("vit", {"patch_size": [8, 4], "num_hidden_layers": 1}, image_size=64)
    assert "num_channels" not in FAMILIES["vit"].arguments
    assert isinstance(ViTConfig().hidden_act, str)
