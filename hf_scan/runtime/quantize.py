# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Quantise a whole network to 8 bits, calibrated on real images, before it is cut into stages."""

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

# Images to calibrate on, and images at a time.
MOST_IMAGES = 256
BATCH = 32
# Larger networks are quantised with their weights in a second file: one file holds at most 2 GB.
MOST_BYTES_IN_A_FILE = 2**30


def quantize(whole: "onnx.ModelProto", manifest: Manifest, dataset: Any) -> tuple["onnx.ModelProto", Manifest]:
    """
    Quantise a network: weights per channel, activations by their ranges on real images. The network is quantised as a
    whole and cut later, so that the stages, `adaptive.onnx` and `plain.onnx` agree, and the states between stages are
    8 bits, too.

    Args:
        whole (`onnx.ModelProto`): The network, with every exit's logits and every state as outputs.
        manifest ([`Manifest`]): The manifest of the float32 network.
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
    _read_shapes_before_rounding(quantized)
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


def _read_shapes_before_rounding(quantized: "onnx.ModelProto") -> None:
    """Let each `Shape` read a value where it is not quantised yet: a stage gets the batch size of the images alone."""
    source = {name: node for node in quantized.graph.node for name in node.output}
    for node in quantized.graph.node:
        if node.op_type != "Shape":
            continue
        while (before := source.get(node.input[0])) and before.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.input[0] = before.input[0]


def _handed_on(quantized: "onnx.ModelProto", state: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a state in 8 bits, before `DequantizeLinear`, if the graph has one for it."""
    import onnx

    for node in quantized.graph.node:
        if node.op_type == "DequantizeLinear" and state["name"] in node.output:
            name = node.input[0]
            # The cut needs the type and shape of the value.
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
        # Spread evenly, because datasets are often sorted by class.
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
    """Return whether 8-bit products can overflow: on x86 without VNNI, pairs are summed in 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "vnni" not in flags


__all__ = ["quantize"]
