# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A part of a network's forward pass between two exit points, and what it passes on: [`Stage`], [`StageState`]."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class StageState:
    """
    All that later stages need of what ran so far, for the images of one batch.

    Args:
        values (`tuple`): What a stage returned; in front of the first stage, the images alone. The first value holds
            the stage's feature.
        batched (`tuple[bool, ...]`): Which of the values have rows that belong to the images. The others, such as a
            position encoding, are the same for all.
        batch_size (`int`): Number of images.
        image_size (`tuple[int, int]`): Height and width of the images in pixels.
    """

    values: tuple[Any, ...]
    batched: tuple[bool, ...]
    batch_size: int
    image_size: tuple[int, int]

    @classmethod
    def from_images(cls, pixel_values: torch.Tensor) -> "StageState":
        """Return the state in front of the first stage, from images `(batch_size, num_channels, height, width)`."""
        batch_size, _, height, width = pixel_values.shape  # symbolic in an export, as `len` is not
        return cls((pixel_values,), (True,), batch_size, (height, width))

    def after(self, values: tuple[Any, ...], batched: tuple[bool, ...]) -> "StageState":
        """Return the state behind a stage that returned `values` for these images."""
        return StageState(values, batched, self.batch_size, self.image_size)

    def select(self, rows: torch.Tensor | list[int] | slice) -> "StageState":
        """
        Return the state of some images only.

        Args:
            rows (`torch.LongTensor` of shape `(n,)`, `list[int]` or `slice`): Which images of the batch.
        """
        count = len(range(self.batch_size)[rows]) if isinstance(rows, slice) else len(rows)
        pairs = zip(self.values, self.batched)
        values = tuple(_rows(value, rows, self.batch_size) if batched else value for value, batched in pairs)
        return StageState(values, self.batched, count, self.image_size)

    @staticmethod
    def join(states: Sequence["StageState"]) -> "StageState":
        """Return the state of one batch of all images of several states, whose images are of one size."""
        first = states[0]
        columns = zip(zip(*(state.values for state in states)), first.batched)
        values = tuple(_cat(values) if batched else values[0] for values, batched in columns)
        return StageState(values, first.batched, sum(state.batch_size for state in states), first.image_size)


@dataclass(frozen=True)
class Stage:
    """
    A part of a backbone's forward pass, between two exit points.

    Args:
        name (`str`): The tap where it ends; after the last stage comes the backbone's own head.
        channels (`int`): Channels of the feature there.
        reduction (`int`): How many times smaller than the image its map is.
        forward (`Callable`): Takes the backbone and what the stage before returned (the first one: the images), and
            returns what later stages need. The first of these values holds the feature.
        batched (`tuple[bool, ...]`): Which of these values belong to the images of the batch, one by one. The others,
            such as a position encoding, are the same for all.
        parts (`frozenset[str]`): Names of the backbone's modules, parameters and buffers that it uses.
        channels_last (`bool`, *optional*, defaults to `False`): Whether the model's maps are
            `(batch_size, height, width, channels)`.
        num_prefix_tokens (`int`, *optional*, defaults to 1): Tokens in front of those that make up the map, if any.
        patch_size (`tuple[int, int]`, *optional*): Height and width of what a token stands for, in pixels. Defaults to
            the reduction.
    """

    name: str
    channels: int
    reduction: int
    forward: Callable[..., tuple[Any, ...]]
    batched: tuple[bool, ...]
    parts: frozenset[str]
    channels_last: bool = False
    num_prefix_tokens: int = 1
    patch_size: tuple[int, int] | None = None

    def run(self, backbone: nn.Module, state: StageState) -> StageState:
        """Run the stage on what the stage before returned."""
        return state.after(self.forward(backbone, *state.values), self.batched)

    def feature(self, state: StageState) -> torch.Tensor:
        """
        Return the stage's feature as a map, whatever it is in the model: channels first or last, or a grid of tokens,
        alone or the first fitting one of several tensors.

        Args:
            state ([`StageState`]): What [`~Stage.run`] returned.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: a view.

        Raises:
            `ValueError`: if there is no such map.
        """
        for value in tensors_in(state.values[0]):
            if value.ndim == 4 and self.channels in (value.shape[1], value.shape[3]):
                last = value.shape[3] == self.channels and (self.channels_last or value.shape[1] != self.channels)
                return value.permute(0, 3, 1, 2) if last else value
            if value.ndim == 3 and value.shape[2] == self.channels:
                # Class tokens are in front from the start in some models, and join later in others.
                for prefix, grid in itertools.product((self.num_prefix_tokens, 0), self._grids(state.image_size)):
                    if math.prod(grid) == value.shape[1] - prefix:
                        tokens: torch.Tensor = value[:, prefix:].transpose(1, 2)
                        return tokens.reshape(*tokens.shape[:2], *grid)
        raise ValueError(
            f"{self.name!r} returns {[tuple(value.shape) for value in tensors_in(state.values[0])]} for images of "
            f"{state.image_size}; expected {self.channels} channels, in a map or in a grid of tokens as "
            f"{self._grids(state.image_size)}. Choose other `exit_points`, or another image size."
        )

    def _grids(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return how many tokens a map may be high and wide: incomplete patches at the border are left out or not."""
        (height, width), (patch_height, patch_width) = image_size, self.patch_size or (self.reduction, self.reduction)
        whole = (height // patch_height, width // patch_width)
        padded = (-(-height // patch_height), -(-width // patch_width))
        return [whole, padded] if whole != padded else [whole]


@dataclass(frozen=True)
class BackboneHead:
    """
    The backbone's own classifier, from its last map on.

    Args:
        forward (`Callable`): Takes the backbone, what the last stage returned and whether to stop in front of the last
            layer. Returns the logits `(batch_size, num_labels)`, or what the last layer reads.
        feature_size (`int`): Width of what the last layer reads.
        num_labels (`int`, *optional*): Labels, where they were looked at.
    """

    forward: Callable[[nn.Module, Any, bool], torch.Tensor]
    feature_size: int
    num_labels: int | None = None

    def __call__(self, backbone: nn.Module, feature: Any, pre_logits: bool = False) -> torch.Tensor:
        return self.forward(backbone, feature, pre_logits)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def smallest_batch(value: Any) -> int:
    return min(tensor.shape[0] for tensor in tensors_in(value))


def _cat(values: Sequence[Any]) -> Any:
    if isinstance(values[0], (tuple, list)):
        return type(values[0])(_cat(items) for items in zip(*values))
    return torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else values[0]


def _rows(value: Any, rows: torch.Tensor | list[int] | slice, batch_size: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(item, rows, batch_size) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape[0] == batch_size:
        return value[rows]
    # Several rows for each image, one image after the other.
    return value.reshape(batch_size, -1, *value.shape[1:])[rows].flatten(0, 1)


__all__ = ["BackboneHead", "Stage", "StageState"]
