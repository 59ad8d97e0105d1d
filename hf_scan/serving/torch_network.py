# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A network of PyTorch for an engine that runs it stage by stage."""

from typing import Any

import torch

from ..model.adaptive import Group, advance, check_eval_mode, non_finite_images
from ..model.exit_rule import plan_exits
from ..model.problem_type import for_problem
from ..model.stages import StageState
from .networks import Arrivals, Result, Row, one_image, without_answer


class TorchNetwork:
    """A [`ServedNetwork`] of a [`ScanForImageClassification`]. Images wait on the host, and move as a batch."""

    def __init__(self, model: Any, exit_config: Any, max_exit: int | None, changes: dict[str, Any]) -> None:
        check_eval_mode(model)
        chosen = (exit_config or model.exit_config).replace(**changes)
        self.exit_config = for_problem(chosen, model.config.problem_type)
        self.plan = plan_exits(self.exit_config, model.num_exits, max_exit)
        self.model, self.num_stages, self.id2label = model, len(self.plan), model.config.id2label
        self._dtype, self._shape = (
            model.dtype,
            (model.config.num_channels, model.config.image_size, model.config.image_size),
        )

    def prepare(self, image: Any) -> torch.Tensor:
        """Return an image of the right shape and type, on the host."""
        prepared = torch.as_tensor(one_image(image, self._shape), device="cpu")
        if prepared.dtype != self._dtype:
            self.model.check_pixel_values(prepared[None])
        return prepared

    @torch.inference_mode()
    def advance(self, index: int, group: Any) -> tuple[list[Result], Group | None]:
        """Run a stage and route its samples."""
        results: list[Result] = []
        if index == 0:
            results, group = self._gathered(group)
            if len(group) == 0:
                return results, None
        answers, stay = advance(self.model, self.exit_config, self.plan, index, group, failed=[])
        for some in answers:
            assert some.ids is not None
            columns = (some.logits.argmax(-1), some.exit_index, some.confidence)
            # A copy, or a caller who keeps one answer would keep its whole batch's.
            logits = map(torch.clone, some.logits.cpu())
            results += map(Row._make, zip(some.ids.tolist(), logits, *(column.tolist() for column in columns)))
        return results, stay

    def _gathered(self, group: Arrivals) -> tuple[list[Result], Group]:
        """Return images that arrived as a batch on the network's device, and which are not finite."""
        images = torch.stack(group.images)
        results: list[Result] = []
        if bad := non_finite_images(self.model, images):
            good = [row for row in range(len(images)) if row not in set(bad)]
            results = without_answer(group, images.flatten(1).isfinite().all(dim=1).tolist())
            group, images = group.select(good), images[good]
        images = images.to(self.model.device, self.model.dtype)
        return results, Group(torch.tensor(group.ids, device=images.device), StageState.from_images(images))


__all__ = ["TorchNetwork"]
