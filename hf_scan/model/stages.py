# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Cut a timm model into stages that run one after another; its modules and their names stay as they are.

PyTorch's symbolic tracer writes the model's `forward_features` down without running it: the modules that it calls, and
what it does between them. Only modules that have an exit point inside are looked into; all others stay the calls that
they are. A stage is a part of that list, made a function of the backbone, and passes on what later parts need.
"""

import inspect
import itertools
import linecache
import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import get_notrace_functions
from torch import fx, nn


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
        for value in _tensors(state.values[0]):
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
            f"{self.name!r} returns {[tuple(value.shape) for value in _tensors(state.values[0])]} for images of "
            f"{state.image_size}; expected {self.channels} channels, in a map or in a grid of tokens as "
            f"{self._grids(state.image_size)}. Choose other `exit_points`, or another image size."
        )

    def _grids(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return how many tokens a map may be high and wide: incomplete patches at the border are left out or not."""
        (height, width), (patch_height, patch_width) = image_size, self.patch_size or (self.reduction, self.reduction)
        whole = (height // patch_height, width // patch_width)
        padded = (-(-height // patch_height), -(-width // patch_width))
        return [whole, padded] if whole != padded else [whole]


def cut_into_stages(backbone: Any, exit_points: list[int | str] | None = None) -> list[Stage]:
    """
    Cut a timm model after each exit point. The last stage ends where the model's own head begins.

    Args:
        backbone (`torch.nn.Module`): A model of timm, on any device, the meta device included.
        exit_points (`list[int | str]`, *optional*): Indices into the model's `feature_info`, or module names that
            stand there, from shallow to deep. Defaults to those of [`default_exit_points`].

    Returns:
        `list[Stage]`: One more than exit points.

    Raises:
        `ValueError`: if the model has no taps, an exit point is unknown, out of order or the last tap, or the model
            does not run through them one after another.

    Example:

    ```python
    >>> import timm, torch
    >>> from hf_scan.model.stages import StageState, cut_into_stages

    >>> backbone = timm.create_model("resnet18", num_classes=10).eval()
    >>> state = StageState.from_images(torch.rand(2, 3, 64, 64))
    >>> for stage in cut_into_stages(backbone):
    ...     state = stage.run(backbone, state)
    ...     print(stage.name, tuple(stage.feature(state).shape))
    layer1 (2, 64, 16, 16)
    layer2 (2, 128, 8, 8)
    layer3 (2, 256, 4, 4)
    layer4 (2, 512, 2, 2)
    ```
    """
    taps = _taps(backbone)
    name = type(backbone).__name__
    chosen = default_exit_points(backbone) if exit_points is None else _resolve(exit_points, taps, name)
    image, nodes, result = _trace(backbone, [tap["module"] for tap in chosen])
    ends = [_end(nodes, tap["module"], name) for tap in chosen]
    if ends != sorted(ends):
        raise ValueError(f"{name} does not run {[tap['module'] for tap in chosen]} in this order; expected its own.")
    kinds = _kinds(image, nodes)

    stages, start, received = [], 0, [image]
    for tap, end in zip([*chosen, taps[-1]], [*ends, len(nodes)]):
        handed_on = _needed_after([image, *nodes[:end]], nodes[end:], result, kinds, name) if tap in chosen else []
        forward, parts = _function(
            received, nodes[start:end], handed_on or [result], kinds, f"{name}, {tap['module']}"
        )
        stages.append(
            Stage(
                name=tap["module"],
                channels=tap["num_chs"],
                reduction=tap["reduction"],
                forward=forward,
                batched=tuple(kinds[node] == "images" for node in handed_on) or (True,),
                parts=parts,
                channels_last=getattr(backbone, "output_fmt", None) == "NHWC",
                num_prefix_tokens=getattr(backbone, "num_prefix_tokens", 1),
                patch_size=_patch_size(backbone, tap["reduction"]),
            )
        )
        start, received = end, handed_on
    return stages


def keep_parts(backbone: nn.Module, parts: Collection[str]) -> None:
    """
    Remove all modules, parameters and buffers of a backbone but some parts and what is in them.

    Args:
        backbone (`torch.nn.Module`): Changed in place.
        parts (`Collection[str]`): Names of modules, parameters and buffers.
    """
    around = {name[:position] for name in parts for position, sign in enumerate(name) if sign == "."}
    for prefix, module in list(backbone.named_modules()):
        if any(prefix == part or prefix.startswith(f"{part}.") for part in parts):
            continue
        for members in (module._modules, module._parameters, module._buffers):
            for name in list(members):
                full_name = f"{prefix}.{name}" if prefix else name
                if full_name not in parts and full_name not in around:
                    del members[name]


def default_exit_points(backbone: Any) -> list[dict[str, Any]]:
    """
    Return the taps where exits are by default: all but the last, without those whose map is more than 8 times finer
    than the last one's (on a network that reduces by 32: those shallower than reduction 4). Where all maps are of one
    size, as in a vision transformer, with a tap after every block: at a quarter, half and three quarters of the depth.
    """
    taps = _taps(backbone)
    last = taps[-1]["reduction"]
    if len(taps) > 4 and all(tap["reduction"] == last for tap in taps):
        return [taps[len(taps) * quarter // 4 - 1] for quarter in (1, 2, 3)]
    return [tap for tap in taps[:-1] if tap["reduction"] * 8 >= last]


def _taps(backbone: Any) -> list[dict[str, Any]]:
    info = getattr(backbone, "feature_info", None)
    # A list on the models themselves, timm's `FeatureInfo` on what its feature extraction returns. Where a module has
    # several, one for each of the tensors that it returns, the first stands for it.
    taps = list({tap["module"]: tap for tap in reversed(getattr(info, "info", info) or [])}.values())[::-1]
    if len(taps) < 2 or not hasattr(backbone, "forward_head"):
        raise ValueError(
            f"{type(backbone).__name__} gives {len(taps)} `feature_info` taps; a backbone with early exits needs two "
            "or more, and timm's `forward_features` and `forward_head`. Choose another backbone, such as 'resnet50'."
        )
    return taps


def _patch_size(backbone: Any, reduction: int) -> tuple[int, int] | None:
    """Return timm's own patch size, which need not be a square, where a map is as fine as the patches."""
    patch_embed: Any = getattr(backbone, "patch_embed", None)
    if not hasattr(patch_embed, "feat_ratio"):
        return None
    height, width = patch_embed.feat_ratio(as_scalar=False)
    return (height, width) if max(height, width) == reduction else None


def _resolve(exit_points: list[int | str], taps: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    names = [tap["module"] for tap in taps]
    valid = f"{name} can exit after {names[:-1]} (indices 0 to {len(names) - 2}), given from shallow to deep"
    indices = []
    for point in exit_points:
        index = names.index(point) if point in names else point
        if not isinstance(index, int) or not 0 <= index < len(names) - 1:
            raise ValueError(f"`exit_points` holds {point!r}, which does not exist. {valid}.")
        indices.append(index)
    if indices != sorted(set(indices)) or not indices:
        raise ValueError(f"`exit_points` is {exit_points!r}, which is not in order or is empty. {valid}, each once.")
    return [taps[index] for index in indices]


class _Buffer(fx.Proxy):
    """A proxy of a buffer, whose size is known."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.numel = buffer.numel


class _Tracer(fx.Tracer):
    traced_func_name = "forward_features"

    def __init__(self, tap_names: list[str]) -> None:
        # timm registers the functions that its own feature extraction does not look into either.
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.opened = {name[:position] for name in tap_names for position, sign in enumerate(name) if sign == "."}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # Buffers are read from the backbone at each run, as parameters are: they move, and their values are loaded.
        for name, buffer in self.root.named_buffers() if isinstance(attr_val, torch.Tensor) else ():
            if buffer is attr_val:
                return _Buffer(self.create_node("get_attr", name, (), {}), self, buffer)
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _trace(backbone: Any, tap_names: list[str]) -> tuple[fx.Node, list[fx.Node], Any]:
    """Return what `forward_features` does: its input, its steps in order, and what it returns of them."""
    name = type(backbone).__name__
    _, _, *further = inspect.signature(type(backbone).forward_features).parameters.values()
    attributes = set(vars(backbone))
    was_training = {module: module.training for module in backbone.modules()}
    try:
        backbone.eval()
        # Masks and the like are left at their defaults.
        graph = _Tracer(tap_names).trace(backbone, {parameter.name: parameter.default for parameter in further})
    except Exception as error:  # whatever the model's code says to a value that has none
        raise ValueError(
            f"{name} cannot be cut into stages: between its modules, it decides by what it computes ({error}). "
            "Choose another backbone, such as 'resnet50'."
        ) from error
    finally:
        for module, mode in was_training.items():
            module.training = mode
        constants = set(vars(backbone)) - attributes
        for constant in constants:
            delattr(backbone, constant)
    image, *nodes, output = graph.nodes
    # The tracer also writes down that the further arguments are their defaults, on which nothing else depends.
    checks: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or checks.intersection(node.all_input_nodes):
            checks.add(node)
    nodes = [node for node in nodes if node not in checks]
    result = output.args[0]
    if constants or isinstance(result, dict):
        what = "makes tensors outside of its modules" if constants else f"returns {sorted(result)} as its feature"
        raise ValueError(f"{name} cannot be cut into stages: it {what}. Choose another backbone, such as 'resnet50'.")
    return image, nodes, result


def _end(nodes: list[fx.Node], tap_name: str, name: str) -> int:
    """Return the position behind the call of a module."""
    calls = [index for index, node in enumerate(nodes) if node.op == "call_module" and node.target == tap_name]
    if len(calls) != 1:
        raise ValueError(
            f"{name} calls the module {tap_name!r}, a tap of its `feature_info`, {len(calls)} times on the way to its "
            "final feature; expected once. Choose other `exit_points` or another backbone."
        )
    return calls[0] + 1


def _kinds(image: fx.Node, nodes: list[fx.Node]) -> dict[fx.Node, str]:
    """
    Return the kind of each step's value: one of the model's own parameters (`"weights"`), something of the `"images"`
    of the batch, their number (`"batch size"`) or a number that depends on it (`"shape"`), or the same for every batch
    (`"fixed"`).
    """
    kinds = {image: "images"}
    for node in nodes:
        inputs = {kinds[other] for other in node.all_input_nodes}
        target, index = node.target, node.args[1] if len(node.args) > 1 else None
        if node.op == "get_attr":
            kind = "weights"
        elif (target, index) in ((getattr, "shape"), ("size", None)):
            kind = "shape" if "images" in inputs else "fixed"
        elif target in ("size", "dim") or (target is getattr and index in ("dtype", "device", "ndim")):
            kind = "batch size" if (target, index) == ("size", 0) and "images" in inputs else "fixed"
        elif target is operator.getitem and inputs == {"shape"} and isinstance(index, int):
            kind = "fixed" if index else "batch size"
        elif "images" in inputs:
            kind = "images"
        elif inputs & {"batch size", "shape"}:
            # Arithmetic gives a number again; anything else is taken to make a tensor for the batch.
            kind = "shape" if getattr(target, "__module__", None) == "_operator" else "images"
        else:
            kind = "fixed"
        kinds[node] = kind
    return kinds


def _needed_after(
    before: list[fx.Node], after: list[fx.Node], result: Any, kinds: dict[fx.Node, str], name: str
) -> list[fx.Node]:
    """Return what a stage passes on: the value at the exit point first, and all that later steps or the head read."""
    *before, feature = before
    readers = set(after)
    final: set[fx.Node] = set()
    fx.node.map_arg(result, final.add)
    later = [node for node in before if node in final or readers.intersection(node.users)]
    if any(kinds[node] == "shape" for node in later):
        raise ValueError(
            f"{name} cannot be cut after {feature.target!r}: it keeps the shape of the whole batch for later. Choose "
            "other `exit_points` or another backbone."
        )
    # Weights are read again where they are needed, and the batch may have shrunk.
    return [feature, *(node for node in later if kinds[node] not in ("weights", "batch size"))]


def _function(
    received: list[fx.Node], steps: list[fx.Node], results: list[Any], kinds: dict[fx.Node, str], name: str
) -> tuple[Callable[..., tuple[Any, ...]], frozenset[str]]:
    """Return some steps as a function of the backbone and the values received, and the names of the parts it uses."""
    graph = fx.Graph()
    here = {node: graph.placeholder(node.name) for node in received}

    def find(node: fx.Node) -> fx.Node:
        if node not in here and kinds[node] == "weights":
            here[node] = graph.node_copy(node)
        if node not in here and kinds[node] == "batch size":
            here[node] = graph.call_function(_batch_size, (here[received[0]],))
        return here[node]

    for step in steps:
        here[step] = graph.node_copy(step, find)
    graph.output(tuple(fx.node.map_arg(results, find)))
    code = graph.python_code("self")
    namespace = dict(code.globals)
    filename = f"<stages of {name}>"
    exec(compile(code.src, filename, "exec"), namespace)
    # For tracebacks, and for `torch.compile`, which does not look into functions without a source.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    parts = frozenset(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return namespace["forward"], parts


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _batch_size(value: Any) -> int:
    return min(tensor.shape[0] for tensor in _tensors(value))


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
