"""The card that a push adds. `tests/hub/test_models.py` runs what it says."""

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from hf_scan.model.minimal_card import minimal_card


def card_of(monkeypatch, found, tags=("scan",), adaptive=True):
    def load(*_, **__):
        if isinstance(found, Exception):
            raise found
        return ModelCard(found)

    monkeypatch.setattr(ModelCard, "load", load)
    return minimal_card("alice/scan", "resnet18", adaptive, list(tags), None)


@pytest.mark.parametrize(
    ("adaptive", "call"), [(True, "= model.predict_adaptive(image[None])"), (False, "= model(image[None])")]
)
def test_a_new_card(monkeypatch, adaptive, call):
    card = card_of(monkeypatch, EntryNotFoundError("none"), adaptive=adaptive)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["scan"],
    }
    assert "a `resnet18` of timm" in card.text
    assert call in card.text


def test_the_card_of_others_gets_tags_only(monkeypatch):
    text = "---\ntags:\n- mine\n---\n\n# Mine\n"
    card = card_of(monkeypatch, text)
    assert card.data.tags == ["mine", "scan"]
    assert "# Mine" in card.text
    assert card_of(monkeypatch, text, tags=["mine"]) is None


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), RuntimeError("no card")])
def test_a_card_that_cannot_be_read_stays(monkeypatch, error):
    assert card_of(monkeypatch, error) is None
