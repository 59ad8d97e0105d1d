# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Write the card of a repository that has none. The one with figures is written by `hf_scan.reporting`."""

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import logging


logger = logging.get_logger(__name__)

MINIMAL_CARD = """---
{metadata}
---

# {name}

An image classifier with early exits: a `{backbone}` of {source} that answers easy images before its last layer.
{thresholds}

```python
import hf_scan  # registers the model with Transformers
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{name}")
answer = {call}  # `image` as the model's image processor prepares it
```
"""


# What the card says of thresholds, and the call that it shows.
ADAPTIVE = ("Its thresholds are in `exit_config.json`.", "model.predict_adaptive(image[None]).logits")
STATIC = ("It has no thresholds yet: all images run to the end.", "model(image[None]).logits")


def minimal_card(
    repo_id: str, backbone: str, adaptive: bool, tags: list[str], token: str | None, source: str = "timm"
) -> ModelCard | None:
    """
    Return the card that a push adds to a repository.

    Args:
        repo_id (`str`): The repository.
        backbone (`str`): Name of the backbone.
        adaptive (`bool`): Whether the network has thresholds.
        tags (`list[str]`): The card's tags.
        token (`str`, *optional*): A token that may read the repository.
        source (`str`, *optional*, defaults to `"timm"`): The library that the backbone is from.

    Returns:
        `ModelCard`, *optional*: a new card where there is none, the repository's own where it lacks some of the tags,
        with these added, and `None` where there is nothing to change or the card cannot be read.
    """
    try:
        card = ModelCard.load(repo_id, token=token)
    except LocalEntryNotFoundError:
        return None
    except EntryNotFoundError:
        data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=tags)
        thresholds, call = ADAPTIVE if adaptive else STATIC
        return ModelCard(
            MINIMAL_CARD.format(
                metadata=data.to_yaml(),
                name=repo_id,
                backbone=backbone,
                source=source,
                thresholds=thresholds,
                call=call,
            )
        )
    except Exception as error:  # of the client, whose kinds differ between its versions
        logger.warning(f"The card of {repo_id} cannot be read ({error}), and is left as it is.")
        return None
    known = card.data.tags or []
    card.data.tags = list(dict.fromkeys([*known, *tags]))
    return card if card.data.tags != known else None


__all__ = ["minimal_card"]
