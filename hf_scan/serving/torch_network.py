# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A network of PyTorch for an engine that runs it stage by stage."""

import math
from typing import Any

import torch

from ..model.adaptive import Group, advance, check_eval_mode
from ..model.exit_rule import plan_exits
from ..model.problem_type import for_problem
from ..model.stages import StageState
from .networks import Row, one_image


class TorchNetwork:
    """A [`ServedNetwork`] of a [`ScanForImageClassification`]. Images wait on the host, and move as a batch."""

    def __init__(self, model: Any, exit_config: Any, max_exit: int | None, changes: dict[str, Any]) -> None:
        check_eval_mode(model)
        chosen = (exit_config or model.exit_config).replace(**changes)
        self.exit_config = for_problem(chosen, model.config.problem_type)
        self.plan = plan_exits(self.exit_config, model.num_exits, max_exit)
        self.model, self.num_stages, self.id2label = model, len(self.plan), model.config.id2label
        self._shape = (model.config.num_channels, model.config.image_size, model.config.image_size)

    def prepare(self, image: Any) -> torch.Tensor:
        """Return an image as a checked batch of one, on the host."""
        images = torch.as_tensor(one_image(image, self._shape), device="cpu")
        self.model.check_pixel_values(images)
        total = images.sum(dtype=torch.float32).item()
        if not math.isfinite(total):
            raise ValueError("The image holds NaN or infinite values; expected finite ones. Check the image.")
        self.model.warn_of_raw_pixels(total / images.numel())
        return images

    def group(self, number: int, image: torch.Tensor) -> Group:
        """Return a group of one image in front of the first stage."""
        return Group(torch.tensor([number]), StageState.from_images(image))

    @torch.inference_mode()
    def advance(self, index: int, group: Group) -> tuple[list[Row], Group | None]:
        """Run a stage and route its samples."""
        if index == 0:
            images = group.state.values[0].to(self.model.device, self.model.dtype)
            group = Group(group.ids.to(images.device), StageState.from_images(images))
        answers, stay = advance(self.model, self.exit_config, self.plan, index, group, failed=[])
        rows = []
        for some in answers:
            assert some.ids is not None
            logits = [one.clone() for one in some.logits.cpu()]  # or one answer would keep the whole batch's
            columns = zip(some.ids.tolist(), logits, some.exit_index.tolist(), some.confidence.tolist())
            rows += [Row(*column) for column in columns]
        return rows, stay


__all__ = ["TorchNetwork"]
