# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Static quantisation to 8 bits, calibrated on real images: the whole network at once, and then cut."""

import platform
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .manifest import Manifest


if TYPE_CHECKING:
    import onnx

# Images that ranges are chosen by, and how many are run at a time.
MOST_IMAGES = 256
BATCH = 32
# Networks above it have their weights in a second file while they are quantised: one file holds at most 2 GB.
MOST_BYTES_IN_A_FILE = 2**30


def quantize(whole: "onnx.ModelProto", manifest: Manifest, dataset: Any) -> tuple["onnx.ModelProto", Manifest]:
    """
    Quantise a network: weights by channel, activations by ranges seen on real images. The network is
    quantised as a whole and then cut, so that its stages, `adaptive.onnx` and `plain.onnx` are one network, and what
    a stage hands on is a quarter as large.

    Args:
        whole (`onnx.ModelProto`): With every exit's logits and every state as outputs.
        manifest ([`Manifest`]): Of the network in float32.
        dataset: Rows with `pixel_values`, or a tensor of images.

    Returns:
        `tuple[onnx.ModelProto, Manifest]`: the network in 8 bits, and the manifest that describes it.

    Raises:
        `ValueError`: if the images are not those that the network takes.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = _images_of(dataset, manifest)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(np.array_split(images, max(1, len(images) // BATCH)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixel_values": batch}

    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch, name) for name in ("float.onnx", "prepared.onnx", "int8.onnx")]
        external = whole.ByteSize() > MOST_BYTES_IN_A_FILE
        onnx.save(deepcopy(whole) if external else whole, paths[0], save_as_external_data=external)
        quant_pre_process(paths[0], paths[1], skip_symbolic_shape=True, save_as_external_data=external)
        quantize_static(
            paths[1],
            paths[2],
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=_needs_reduced_range(),
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=external,
            # Logits stay float: rounded to 256 values, their scores would meet thresholds.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        quantized = onnx.load(paths[2])
    states = [[_handed_on(quantized, value) for value in values] for values in manifest.states]
    own = Manifest(
        network=manifest.network,
        precision="int8",
        num_labels=manifest.num_labels,
        image=manifest.image,
        states=states,
        counted=manifest.counted,
    )
    return quantized, own


def _handed_on(quantized: "onnx.ModelProto", state: dict[str, Any]) -> dict[str, Any]:
    """A state where it is 8 bits: before the node that makes it float again, if there is one."""
    import onnx

    for node in quantized.graph.node:
        if node.op_type == "DequantizeLinear" and state["name"] in node.output:
            name = node.input[0]
            # The cut needs to know what stands there.
            if not any(value.name == name for value in (*quantized.graph.value_info, *quantized.graph.output)):
                shape = next(value for value in quantized.graph.output if value.name == state["name"])
                info = onnx.ValueInfoProto()
                info.CopyFrom(shape)
                info.name = name
                info.type.tensor_type.elem_type = onnx.TensorProto.UINT8
                quantized.graph.value_info.append(info)
            return {**state, "name": name, "dtype": "uint8"}
    return state


def _images_of(dataset: Any, manifest: Manifest) -> np.ndarray:
    if hasattr(dataset, "dtype"):  # an array; a `datasets.Dataset` has a shape too
        rows = list(dataset[:MOST_IMAGES])
    else:
        # Evenly from all of it, as datasets are often sorted by class.
        count = min(len(dataset), MOST_IMAGES)
        rows = [dataset[int(index)]["pixel_values"] for index in np.linspace(0, len(dataset) - 1, count)]
    images = np.stack([np.asarray(row) for row in rows]) if rows else np.zeros(0)
    if list(images.shape[1:]) != list(manifest.image["shape"]) or images.dtype != manifest.image["dtype"]:
        raise ValueError(
            f"`calibration_dataset` gives images of {images.dtype} and shape {images.shape[1:]}; expected "
            f"{manifest.image['dtype']} and {tuple(manifest.image['shape'])}, as the network takes them."
        )
    return images


def _needs_reduced_range() -> bool:
    """Whether products of 8 bits overflow here: on x86 without VNNI, whose sums of two are 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "vnni" not in flags


__all__ = ["quantize"]
