# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Read the safetensors files of a checkpoint: names and shapes before a load, and the fingerprint of the weights."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import get_ident

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


Shape = tuple[int, ...]

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Limits for untrusted checkpoints. A network may hold a few tensors that the weights lack, such as new exit heads.
MOST_MISSING_ELEMENTS = 2**27
MOST_TENSORS = 50_000
QUANTIZED_BITS = 64  # of a packed element; no format packs more into one number


class DamagedWeightsError(OSError):
    """Raised if weights cannot be read. It names the file or the folder."""

    def __init__(self, place: object, error: Exception) -> None:
        super().__init__(
            f"The weights {place} cannot be read ({error}): the file is truncated or is not a safetensors file. "
            "Save or download it again."
        )


@dataclass
class CheckpointWeights:
    """
    A view of the tensors that are about to be loaded. The files are looked for at the first access, after Transformers
    has found, downloaded and cached them.

    Args:
        source (`str`): The folder or repository, for messages.
        find (`Callable`): Returns the safetensors files, or none for another format.
        given (`Mapping[str, torch.Tensor]`, *optional*): A state dict in place of files.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Whether tensors of another shape are
            initialised anew instead of refused.
    """

    source: str
    find: Callable[[], list[Path]]
    given: Mapping[str, torch.Tensor] | None = None
    ignore_mismatched_sizes: bool = False

    @cached_property
    def files(self) -> list[Path]:
        return self.find()

    @cached_property
    def headers(self) -> dict[str, tuple[str, Shape]]:
        """Return type and shape of each tensor, without reading any."""
        if self.given is not None:
            return {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in self.given.items()}
        headers: dict[str, tuple[str, Shape]] = {}
        for file in self.files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensor = tensors.get_slice(name)
                    headers[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
        return headers

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: shape for name, (_, shape) in self.headers.items()}

    @property
    def dtypes(self) -> set[str]:
        """Return the types of the tensors, by their names in safetensors."""
        return {dtype for dtype, _ in self.headers.values()}

    def fingerprint(self, names: Iterable[str], prefix: str) -> str:
        """
        Return the [`fingerprint_of`] the tensors in the files.

        Args:
            names (`Iterable[str]`): The tensors' names in the network.
            prefix (`str`): A prefix that names in the files may lack.
        """
        known = set(names)

        def read() -> Iterator[tuple[str, torch.Tensor]]:
            with ExitStack() as stack:
                places: dict[str, tuple[safe_open, str]] = {}
                for file in self.files:
                    tensors = stack.enter_context(_opened(file))
                    places |= {_own_name(name, known, prefix): (tensors, name) for name in tensors.keys()}  # noqa: SIM118
                for own in sorted(places):
                    tensors, name = places[own]
                    yield own, tensors.get_tensor(name)

        return fingerprint_of(read())


# The weights that are being loaded in this thread, for the network that is built for them.
being_loaded: ContextVar[CheckpointWeights | None] = ContextVar("being_loaded", default=None)


def find_weight_files(find: Callable[[str], Path | None], variant: str | None = None) -> list[Path]:
    """
    Find the safetensors files of a checkpoint, as Transformers does.

    Args:
        find (`Callable[[str], Path | None]`): Finds a file by its name.
        variant (`str`, *optional*): As in [`~transformers.PreTrainedModel.from_pretrained`].

    Returns:
        `list[Path]`: one, or one a shard; none where there is neither a file nor an index.
    """
    whole, index = (_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if (file := find(whole)) is not None:
        return [file]
    if (file := find(index)) is None:
        return []
    shards = sorted(_shards_of(file))
    return [path for shard in shards if (path := find(shard)) is not None]


def check_shards(path: str | os.PathLike[str], subfolder: str) -> None:
    """
    Check that an index of weights names only files beside it. (A repository on the Hub holds no others.)

    Args:
        path (`str` or `Path`): A folder. A name on the Hub has no index here.
        subfolder (`str`): The folder in it that holds the checkpoint.

    Raises:
        `ValueError`: if an index cannot be read, or names a file elsewhere.
    """
    for index in Path(path, subfolder).glob("*.index*.json"):  # of any variant
        names = _shards_of(index)
        elsewhere = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
        if elsewhere:
            raise ValueError(
                f"{index} names {elsewhere[0]!r}, which is not a file beside it; shards must be in the same folder as "
                "the index. Correct it, or save the model again."
            )


def _shards_of(index: Path) -> set[str]:
    """Return the files that an index of weights names."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weights ({error}). Save or download it again.") from error


def _with_variant(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    start, end = name.rsplit(".", 1)
    return f"{start}.{variant}.{end}"


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise DamagedWeightsError(file, error) from error


def _own_name(name: str, known: set[str], prefix: str) -> str:
    """Return a tensor's name in the network from its name in a checkpoint, which may be of the backbone alone."""
    return name if name in known or f"{prefix}{name}" not in known else f"{prefix}{name}"


def check_fits(weights: CheckpointWeights, tensors: Mapping[str, torch.Tensor], prefix: str, quantized: bool) -> None:
    """
    Check that weights belong to a network, before memory is allocated for it.

    Args:
        weights ([`CheckpointWeights`]): The weights to load.
        tensors (`Mapping[str, torch.Tensor]`): The network's parameters and buffers, on the meta device.
        prefix (`str`): A prefix that names in the checkpoint may lack.
        quantized (`bool`): Whether the checkpoint packs tensors under other names and shapes.

    Raises:
        `RuntimeError`: if shapes differ, as Transformers raises it.
        `ValueError`: if the network is much larger than the weights.
    """
    known = set(tensors)
    held = {_own_name(name, known, prefix): shape for name, shape in weights.shapes.items()}
    if quantized:
        _check_size(weights, sum(t.numel() for t in tensors.values()), QUANTIZED_BITS * _elements(held.values()))
        return
    other = sorted(name for name in tensors if name in held and held[name] != tuple(tensors[name].shape))
    if other and not weights.ignore_mismatched_sizes:
        first = other[0]
        raise RuntimeError(
            f"The weights of {weights.source} hold {len(other)} tensors of another shape than the network that "
            f"config.json describes, the first being {first!r} with {held[first]} instead of "
            f"{tuple(tensors[first].shape)}. Correct config.json or the arguments that override it, or initialise "
            "these tensors anew with `ignore_mismatched_sizes=True`."
        )
    missing = sum(tensor.numel() for name, tensor in tensors.items() if name in other or name not in held)
    _check_size(weights, missing, 0)


def _elements(shapes: Iterable[Shape]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _check_size(weights: CheckpointWeights, elements: int, held: int) -> None:
    if elements > held + MOST_MISSING_ELEMENTS:
        raise ValueError(
            f"config.json of {weights.source} describes a network with {elements:,} numbers that its weights do not "
            f"hold; at most {MOST_MISSING_ELEMENTS:,} are initialised beside those loaded. Correct `backbone`, "
            "`backbone_kwargs` and `image_size`, or load other weights."
        )


@contextmanager
def limited_tensors(most: int | None) -> Iterator[None]:
    """
    Refuse a network with far more parameters than the weights hold, while this thread builds it.

    Args:
        most (`int`, *optional*): The most parameters that it may have. Defaults to any number.

    Raises:
        `ValueError`: if it has more, when the first of these is registered.
    """
    if most is None:
        yield
        return
    count, thread = 0, get_ident()

    def add(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += get_ident() == thread
        if count > most:
            raise ValueError(
                f"`backbone` and `backbone_kwargs` describe a network of more than {most:,} parameters, far more than "
                "its weights hold. Correct them, or load other weights."
            )

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def most_tensors(truncated: bool) -> int | None:
    """Return the most parameters of a network for the weights that are being loaded, or `None` outside of a load."""
    weights = being_loaded.get()
    if weights is None:
        return None
    # A truncated network may keep only a twentieth of what is built.
    return len(weights.headers) * (30 if truncated else 2) + 1000 if weights.headers else MOST_TENSORS


def fingerprint_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of tensors in the order given, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_state(folder: str | os.PathLike[str]) -> tuple[tuple[str, int, int, int], ...]:
    """Return names, inodes, times and sizes of a folder's files, which change when one is written or replaced."""
    entries = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_file():
                stat = entry.stat()
                entries.append((entry.name, stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(sorted(entries))


__all__ = [
    "SAFETENSORS_DTYPES",
    "CheckpointWeights",
    "DamagedWeightsError",
    "being_loaded",
    "check_fits",
    "check_shards",
    "find_weight_files",
    "fingerprint_of",
    "folder_state",
    "limited_tensors",
    "most_tensors",
]
