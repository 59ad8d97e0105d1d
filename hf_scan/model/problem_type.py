# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Several labels an image, or one: which exit configuration fits. Without PyTorch, which not every engine has."""

from typing import Any


MULTI_LABEL = "multi_label_classification"
LABEL_CONFIDENCE = "label_confidence"  # the criterion of networks that give several labels an image


def for_problem(exit_config: Any, problem_type: str | None) -> Any:
    """
    Return an exit configuration whose criterion fits what a network answers.

    Args:
        exit_config ([`ExitConfig`] or [`~hf_scan.runtime.ExitSettings`]):
            One without thresholds gets the criterion for several labels an image where the network gives them.
        problem_type (`str`, *optional*): The network's, as in its configuration.

    Raises:
        `ValueError`: if the criterion is for one label an image and the network gives several, or the other way.

    Example:

    ```python
    >>> from hf_scan import ExitConfig
    >>> from hf_scan.model.problem_type import for_problem

    >>> for_problem(ExitConfig(), "multi_label_classification").criterion
    'label_confidence'
    ```
    """
    several = problem_type == MULTI_LABEL
    if (exit_config.criterion == LABEL_CONFIDENCE) == several:
        return exit_config
    if several and exit_config.criterion == "confidence" and not exit_config.thresholds:
        return exit_config.replace(criterion=LABEL_CONFIDENCE)
    expected = f"{LABEL_CONFIDENCE!r}, as others compare classes" if several else "one for a single label an image"
    raise ValueError(
        f"`criterion` is {exit_config.criterion!r}, and the network's `problem_type` is {problem_type!r}; expected "
        f"{expected}."
    )


__all__ = ["LABEL_CONFIDENCE", "MULTI_LABEL", "for_problem"]
