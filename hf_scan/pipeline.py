# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Classify images with early exits in `pipeline("image-classification")`: [`ScanImageClassificationPipeline`]."""

from typing import Any

import numpy as np
import torch
from transformers import ImageClassificationPipeline
from transformers.utils import ModelOutput

from .model.exit_config import ExitConfig
from .model.image_files import eight_bits, read_image


class ScanImageClassificationPipeline(ImageClassificationPipeline):
    """
    A pipeline of Transformers that answers by [`~AdaptiveInferenceMixin.predict_adaptive`] if the model has
    thresholds. After `import hf_scan`, `pipeline("image-classification", ...)` uses it. Other models are answered as
    before.

    The arguments can be given to the pipeline or to a call.

    Args:
        adaptive (`bool`, *optional*):
            Whether samples exit early. `False` answers with the deepest exit. Defaults to whether the model's exit
            configuration has thresholds.
        exit_config ([`ExitConfig`], *optional*):
            An exit configuration to use instead of `model.exit_config`, as text pipelines take a `generation_config`.
        return_exit (`bool`, *optional*, defaults to `False`):
            Whether to add to each label the `exit` that answered, from 0; `num_exits` stands for the ensemble.
        kwargs: Arguments of [`~transformers.ImageClassificationPipeline`], such as `top_k`.

    Raises:
        `ValueError`: if `adaptive`, `exit_config` or `return_exit` is given for a model without early exits or
            thresholds, or `exit_config` together with `adaptive=False`; if an image holds values whose range cannot be
            known ([`~hf_scan.model.image_files.eight_bits`]).
        `OSError`: if an image cannot be read. It is named.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline

    >>> from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
    >>> from hf_scan.model.image_processing_scan import create_image_processor

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    >>> model.exit_config = ExitConfig(thresholds=[0.0, 0.0])
    >>> classify = pipeline("image-classification", model=model, image_processor=create_image_processor(model))
    >>> answer = classify(Image.new("RGB", (32, 32)), top_k=1, return_exit=True)
    >>> answer[0]["exit"]
    0
    >>> careful = ExitConfig(thresholds=[1.0, 1.0])
    >>> classify(Image.new("RGB", (32, 32)), top_k=1, return_exit=True, exit_config=careful)[0]["exit"]  # the ensemble
    3
    ```
    """

    def _sanitize_parameters(
        self,
        adaptive: bool | None = None,
        exit_config: ExitConfig | None = None,
        return_exit: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if adaptive is not None:
            forward["adaptive"] = adaptive
        if exit_config is not None:
            forward["exit_config"] = exit_config
        if return_exit is not None:
            postprocess["return_exit"] = return_exit
        return preprocess, forward, postprocess

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:
        if hasattr(self.model, "predict_adaptive"):
            if isinstance(image, (np.ndarray, torch.Tensor)):
                image = eight_bits(image, getattr(self.image_processor, "do_rescale", True))
            else:
                image = read_image(image, timeout)
        return super().preprocess(image, timeout)

    def _forward(self, model_inputs: Any, adaptive: bool | None = None, exit_config: ExitConfig | None = None) -> Any:
        has_exits = hasattr(self.model, "predict_adaptive")  # in PyTorch or exported
        if not has_exits and (adaptive or exit_config is not None):
            asked = "adaptive" if adaptive else "exit_config"
            raise ValueError(
                f"`{asked}` is given, and a {type(self.model).__name__} has no early exits; expected a "
                "`ScanForImageClassification`. Leave it out."
            )
        if adaptive is False and exit_config is not None:
            raise ValueError("An `exit_config` is given and `adaptive` is False; give one of them.")
        if adaptive is None:
            adaptive = exit_config is not None or (has_exits and self.model.exit_config.thresholds is not None)
        if adaptive:
            return self.model.predict_adaptive(model_inputs["pixel_values"], exit_config=exit_config)
        answer = super()._forward(model_inputs)
        # The pipeline splits each output of a batch by image, and would take the elements of a tuple for images. So
        # the outputs of the exits, which are tuples, are left out.
        return ModelOutput(logits=answer.logits) if has_exits else answer

    def postprocess(self, model_outputs: Any, return_exit: bool = False, **kwargs: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = super().postprocess(model_outputs, **kwargs)
        if return_exit:
            if "exit_index" not in model_outputs:
                raise ValueError(
                    "`return_exit` is given, and the answers are not adaptive; expected a model with thresholds, and "
                    "`adaptive` not False."
                )
            for answer in answers:
                answer["exit"] = int(model_outputs["exit_index"][0])
        return answers


__all__ = ["ScanImageClassificationPipeline"]
