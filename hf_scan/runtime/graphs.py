# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""ONNX graphs: cut a network into stages, nest stages into one graph, and share weights between files."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.compose import add_prefix
from onnx.utils import Extractor

from .manifest import WEIGHTS_NAME


IMAGE = "pixel_values"
OPSET = 20
# Smaller tensors are shapes and scales, which ONNX Runtime needs in the graph itself.
LEAST_SHARED_BYTES = 1024
# Channels of a block on processors with AVX-512; elsewhere 8 or 16.
BLOCK = 16
# The axes of a map of the other layout.
CHANNELS_LAST, CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """
    Return a network whose values have shapes. Weights are set aside meanwhile, because the inference serialises the
    network, and a message holds at most 2 GB.

    Args:
        model (`onnx.ModelProto`): The network. Its weights move to the one that is returned.
    """
    weights: dict[str, bytes] = {}
    for tensor in tensors_of(model.graph):
        if len(tensor.raw_data) >= LEAST_SHARED_BYTES:
            weights[tensor.name] = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", WEIGHTS_NAME
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for tensor in tensors_of(inferred.graph):
        if tensor.name in weights:
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            tensor.raw_data = weights.pop(tensor.name)
    return inferred


def fix_resize_scales(whole: onnx.ModelProto) -> None:
    """
    Give each `Resize` of a map of fixed size constant scales, in place of sizes that the exporter computes from the
    shape of the images. Where the scales are whole numbers, ONNX Runtime runs it in the blocked layout of its
    convolutions, which it leaves and enters again otherwise.

    Args:
        whole (`onnx.ModelProto`): The network, its values with shapes. Changed in place.
    """
    values = (*whole.graph.value_info, *whole.graph.input, *whole.graph.output)
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in values}
    for node in whole.graph.node:
        if node.op_type != "Resize" or len(node.input) < 4 or not node.input[3]:
            continue
        before, after = (shapes.get(name, [])[2:] for name in (node.input[0], node.output[0]))
        if not (all(before) and all(after) and len(before) == len(after) == 2):
            continue
        scales = np.array([1, 1, *map(_scale, before, after)], dtype=np.float32)
        node.input[2] = f"{node.output[0]}_scales"
        whole.graph.initializer.append(numpy_helper.from_array(scales, node.input[2]))
        del node.input[3:]


def _scale(before: int, after: int) -> np.float32:
    """Return the factor between two sizes, so that `floor(before * factor)`, which runtimes compute, is the second."""
    factor = np.float32(after / before)
    return factor if int(np.float32(before) * factor) == after else np.nextafter(factor, np.float32(np.inf))


def enter_blocked_layout_once(stage: onnx.ModelProto) -> None:
    """
    Let a stage in float32 bring the map that it receives into the blocked layout of ONNX Runtime's convolutions once,
    by a pooling of single pixels, which changes no value. A residual connection that reads the map as it comes stays
    out of that layout otherwise, and so does every one behind it: each is added by itself, between changes of layout.

    Args:
        stage (`onnx.ModelProto`): The graph of a stage. Changed in place.
    """
    for value in stage.graph.input:
        readers = [node for node in stage.graph.node if value.name in node.input and node.op_type != "Shape"]
        shape = value.type.tensor_type.shape.dim
        if not {"Add", "Conv"} <= {node.op_type for node in readers} or len(shape) != 4:
            continue
        if shape[1].dim_value % BLOCK == 0:
            blocked = f"{value.name}_blocked"
            _rename(readers, value.name, blocked)
            stage.graph.node.insert(0, helper.make_node("MaxPool", [value.name], [blocked], kernel_shape=[1, 1]))


def _rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new


def convolved(whole: onnx.ModelProto, names: Iterable[str]) -> set[str]:
    """
    Return which values are maps that a convolution reads as they come, or as they are after `DequantizeLinear`.

    Args:
        whole (`onnx.ModelProto`): The network.
        names (`Iterable[str]`): The values. Those that are there more than once are left out.
    """
    counts = Counter(names)
    read = {
        name: node.output[0] for node in whole.graph.node if node.op_type == "DequantizeLinear" for name in node.input
    }
    inputs = {node.input[0] for node in whole.graph.node if node.op_type == "Conv"}
    return {name for name, count in counts.items() if count == 1 and {name, read.get(name)} & inputs}


def hand_on_channels_last(stage: onnx.ModelProto, maps: Collection[str]) -> None:
    """
    Let a stage in 8 bits receive and hand on maps of shape `(batch_size, height, width, channels)`. That is the layout
    in which ONNX Runtime computes convolutions of 8 bits. A stage changes it at both ends otherwise, and for every
    residual connection behind one that reads the map as it comes.

    Args:
        stage (`onnx.ModelProto`): The graph of a stage. Changed in place.
        maps (`Collection[str]`): The maps that stages hand on.
    """
    graph = stage.graph
    for values, to_last in ((graph.input, False), (graph.output, True)):
        for value in values:
            shape = value.type.tensor_type.shape
            if value.name not in maps or len(shape.dim) != 4:
                continue
            first = f"{value.name}_channels_first"
            _rename(graph.node, value.name, first)
            shape.CopyFrom(onnx.TensorShapeProto(dim=[shape.dim[axis] for axis in CHANNELS_LAST]))
            if to_last:
                graph.node.append(helper.make_node("Transpose", [first], [value.name], perm=CHANNELS_LAST))
            else:
                graph.node.insert(0, helper.make_node("Transpose", [value.name], [first], perm=CHANNELS_FIRST))


def cut(whole: onnx.ModelProto, inputs: list[str], outputs: list[str], rows: str | None = None) -> onnx.ModelProto:
    """
    Cut a part out of a network.

    Args:
        whole (`onnx.ModelProto`): The network, its values with shapes.
        inputs, outputs (`list[str]`): Names of the values at which the part begins and ends.
        rows (`str`, *optional*): An input with one row per image. Where the network reads the batch size from the
            images, the part reads it from this input.

    Raises:
        `ValueError`: if the part needs the images themselves.
    """
    part = Extractor(whole).extract_model(inputs, outputs)
    for node in part.graph.node:  # source locations and paths of this machine
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*part.graph.value_info, *part.graph.input, *part.graph.output):
        del value.metadata_props[:]
    if IMAGE not in inputs:
        for node in part.graph.node:
            if IMAGE not in node.input:
                continue
            if node.op_type != "Shape" or rows is None:
                raise ValueError(
                    f"The network cannot be cut into stages for ONNX: {node.op_type} reads the images after an exit."
                )
            node.input[list(node.input).index(IMAGE)] = rows
    return part


def nest(stages: Sequence[onnx.ModelProto], states: list[list[str]], rule: dict[str, Any]) -> onnx.ModelProto:
    """
    Return one graph for a single image, in which later stages are branches of `If` that do not run for an image that
    leaves earlier. Inputs: `pixel_values`, and `thresholds` of shape `(num_exits,)`, float32, above 1 where no image
    leaves. Outputs: `logits`, `exit_index` and `confidence`.

    Args:
        stages (`Sequence[onnx.ModelProto]`): One graph per exit; without logits where the head does not run.
        states (`list[list[str]]`): Names of the state after each stage but the last.
        rule (`dict[str, Any]`): `criterion`, `temperatures`, `fallback` and `heads`.
    """
    builder = _Nest(stages, states, rule)
    graph = builder.graph()
    graph.input.extend([builder.parts[0].input[0], helper.make_tensor_value_info("thresholds", 1, [len(stages)])])
    opsets = [entry for entry in stages[0].opset_import if entry.domain != ""]
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", stages[0].opset_import[0].version), *opsets],
        ir_version=stages[0].ir_version,
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return model


class _Nest:
    def __init__(self, stages: Sequence[onnx.ModelProto], states: list[list[str]], rule: dict[str, Any]) -> None:
        self.rule, self.states = rule, states
        self.heads: list[bool] = rule["heads"]
        self.parts = [self._renamed(index, stage) for index, stage in enumerate(stages)]
        last = len(stages) - 1
        self.num_labels = self.parts[last].output[0].type.tensor_type.shape.dim[1].dim_value
        self.count = 0

    def _renamed(self, index: int, stage: onnx.ModelProto) -> onnx.GraphProto:
        """Return the graph of a stage, with a prefix to all its names but the state that it receives."""
        prefix = f"{index}/"
        graph = add_prefix(stage, prefix).graph
        received = [IMAGE] if index == 0 else self.states[index - 1]
        outer = {prefix + name: name if index == 0 else f"{index - 1}/{name}" for name in received}
        for values in (node.input for node in graph.node):
            for position, name in enumerate(values):
                values[position] = outer.get(name, name)
        for value in graph.input:
            value.name = outer[value.name]
        return graph

    def graph(
        self, index: int = 0, seen: tuple[str, ...] = (), exits: tuple[int, ...] = (), tag: str = ""
    ) -> onnx.GraphProto:
        """Return the network from a stage on, given the names of the logits of earlier heads."""
        part = self.parts[index]
        nodes = list(part.node)
        initializers = list(part.initializer)
        if self.heads[index]:
            seen, exits = (*seen, f"{index}/logits_{index}"), (*exits, index)
        prefix = f"e{index}/"
        last = index == len(self.parts) - 1
        if not self.heads[index]:
            inner = self.graph(index + 1, seen, exits, tag)
            whole = onnx.GraphProto()
            whole.CopyFrom(inner)
            del whole.node[:]
            whole.node.extend([*nodes, *inner.node])
            whole.initializer.extend(initializers)
            return whole
        steps: list[onnx.NodeProto] = []
        score = self._score(steps, prefix + "score/", seen, exits)
        steps.append(self._constant(prefix + "index", np.array([index], dtype=np.int64)))
        steps.append(helper.make_node("Gather", ["thresholds", prefix + "index"], [prefix + "threshold"]))
        steps.append(helper.make_node("Greater", [score, prefix + "threshold"], [prefix + "leaves"]))
        steps.append(
            helper.make_node(
                "If",
                [prefix + "leaves"],
                ["logits", "exit_index", "confidence"],
                then_branch=self._leave(index, prefix, score),
                else_branch=self._fallback(prefix, seen, exits)
                if last
                else self.graph(index + 1, seen, exits, f"@{index + 1}"),
            )
        )
        return self._graph(tag, [*nodes, *steps], initializers)

    def _graph(
        self, tag: str, nodes: list[onnx.NodeProto], initializers: list[TensorProto] | None = None
    ) -> onnx.GraphProto:
        """Return a graph or branch. A tag makes its outputs unique, as ONNX requires of names in nested graphs."""
        names = ["logits", "exit_index", "confidence"]
        for node in nodes:
            for values in (node.input, node.output):
                for position, name in enumerate(values):
                    if name in names:
                        values[position] = name + tag
        outputs = [
            helper.make_tensor_value_info("logits" + tag, TensorProto.FLOAT, [1, self.num_labels]),
            helper.make_tensor_value_info("exit_index" + tag, TensorProto.INT64, [1]),
            helper.make_tensor_value_info("confidence" + tag, TensorProto.FLOAT, [1]),
        ]
        return helper.make_graph(nodes, f"exits{tag}", [], outputs, initializer=initializers or [])

    def _leave(self, index: int, prefix: str, score: str) -> onnx.GraphProto:
        steps: list[onnx.NodeProto] = [
            helper.make_node("Identity", [f"{index}/logits_{index}"], ["logits"]),
            self._constant("exit_index", np.array([index], dtype=np.int64)),
        ]
        if self.rule["criterion"] in ("confidence", "label_confidence"):
            steps.append(helper.make_node("Identity", [score], ["confidence"]))
        else:
            scaled = self._scaled(steps, prefix + "out/", f"{index}/logits_{index}", index)
            self._confidence(steps, prefix + "out/", scaled, "confidence")
        return self._graph(f"@leave_{index}", steps)

    def _fallback(self, prefix: str, seen: tuple[str, ...], exits: tuple[int, ...]) -> onnx.GraphProto:
        steps: list[onnx.NodeProto] = []
        prefix += "fallback/"
        fallback = self.rule["fallback"]
        if fallback == "ensemble":
            steps.append(helper.make_node("Mean", list(seen), ["logits"]))
            steps.append(self._constant("exit_index", np.array([len(self.parts)], dtype=np.int64)))
            self._confidence(steps, prefix, "logits", "confidence")
        elif fallback == "deepest":
            steps.append(helper.make_node("Identity", [seen[-1]], ["logits"]))
            steps.append(self._constant("exit_index", np.array([exits[-1]], dtype=np.int64)))
            self._confidence(steps, prefix, self._scaled(steps, prefix, seen[-1], exits[-1]), "confidence")
        else:
            each = []
            for name, exit_index in zip(seen, exits):
                own = f"{prefix}{exit_index}/"
                self._confidence(steps, own, self._scaled(steps, own, name, exit_index), own + "confidence")
                each.append(own + "confidence")
            steps.append(helper.make_node("Concat", each, [prefix + "all"], axis=0))
            steps.append(helper.make_node("ArgMax", [prefix + "all"], [prefix + "best"], axis=0, keepdims=1))
            steps.append(helper.make_node("Concat", list(seen), [prefix + "logits"], axis=0))
            steps.append(self._constant(prefix + "exits", np.array(exits, dtype=np.int64)))
            for source, target in (("logits", "logits"), ("exits", "exit_index"), ("all", "confidence")):
                steps.append(helper.make_node("Gather", [prefix + source, prefix + "best"], [target], axis=0))
        return self._graph("@fallback", steps)

    def _score(self, steps: list[onnx.NodeProto], prefix: str, seen: tuple[str, ...], exits: tuple[int, ...]) -> str:
        criterion, result = self.rule["criterion"], prefix + "score"
        if criterion in ("confidence", "margin", "entropy", "label_confidence"):
            seen, exits = seen[-1:], exits[-1:]
        scaled = [self._scaled(steps, f"{prefix}{e}/", name, e) for name, e in zip(seen, exits)]
        if criterion in ("confidence", "label_confidence"):
            self._confidence(steps, prefix, scaled[-1], result)
        elif criterion == "ensemble_confidence":
            steps.append(helper.make_node("Mean", scaled, [prefix + "mean"]))
            self._confidence(steps, prefix, prefix + "mean", result)
        elif criterion == "margin":
            steps.append(helper.make_node("Softmax", [scaled[-1]], [prefix + "p"], axis=-1))
            steps.append(self._constant(prefix + "two", np.array([2], dtype=np.int64)))
            steps.append(helper.make_node("TopK", [prefix + "p", prefix + "two"], [prefix + "top", prefix + "at"]))
            first = helper.make_node("Split", [prefix + "top"], [prefix + "a", prefix + "b"], axis=1, num_outputs=2)
            steps.append(first)
            steps.append(helper.make_node("Sub", [prefix + "a", prefix + "b"], [prefix + "margin"]))
            self._flat(steps, prefix, prefix + "margin", result)
        elif criterion == "entropy":
            steps.append(helper.make_node("LogSoftmax", [scaled[-1]], [prefix + "log"], axis=-1))
            steps.append(helper.make_node("Exp", [prefix + "log"], [prefix + "p"]))
            steps.append(helper.make_node("Mul", [prefix + "p", prefix + "log"], [prefix + "product"]))
            steps.append(self._constant(prefix + "axis", np.array([-1], dtype=np.int64)))
            names = [prefix + "product", prefix + "axis"]
            steps.append(helper.make_node("ReduceSum", names, [prefix + "sum"], keepdims=0))
            steps.append(self._constant(prefix + "most", np.log(np.float32(self.num_labels))))
            steps.append(helper.make_node("Div", [prefix + "sum", prefix + "most"], [prefix + "share"]))
            steps.append(self._constant(prefix + "one", np.float32(1)))
            steps.append(self._constant(prefix + "zero", np.float32(0)))
            steps.append(helper.make_node("Add", [prefix + "one", prefix + "share"], [prefix + "certainty"]))
            steps.append(helper.make_node("Clip", [prefix + "certainty", prefix + "zero", prefix + "one"], [result]))
        elif criterion == "patience":
            self._patience(steps, prefix, scaled, result)
        else:
            raise ValueError(
                f"`criterion` is {criterion!r}, which `adaptive.onnx` cannot hold; expected a known name."
            )
        return result

    def _patience(self, steps: list[onnx.NodeProto], prefix: str, scaled: list[str], result: str) -> None:
        """Add n / (n + 1) for the last n exits that agree; NaN where the last one's logits are not finite."""
        for number, name in enumerate(reversed(scaled)):
            steps.append(helper.make_node("ArgMax", [name], [f"{prefix}class{number}"], axis=-1, keepdims=0))
            pair = [f"{prefix}class{number}", f"{prefix}class0"]
            steps.append(helper.make_node("Equal", pair, [f"{prefix}same{number}"]))
            steps.append(helper.make_node("Cast", [f"{prefix}same{number}"], [f"{prefix}one{number}"], to=1))
            if number:
                pair = [f"{prefix}run{number - 1}", f"{prefix}one{number}"]
                steps.append(helper.make_node("Mul", pair, [f"{prefix}run{number}"]))
            else:
                steps.append(helper.make_node("Identity", [f"{prefix}one0"], [f"{prefix}run0"]))
        runs = [f"{prefix}run{number}" for number in range(len(scaled))]
        steps.append(helper.make_node("Sum", runs, [prefix + "n"]))
        steps.append(self._constant(prefix + "unit", np.float32(1)))
        steps.append(helper.make_node("Add", [prefix + "n", prefix + "unit"], [prefix + "next"]))
        steps.append(helper.make_node("Div", [prefix + "n", prefix + "next"], [prefix + "ratio"]))
        steps.append(helper.make_node("Sub", [scaled[-1], scaled[-1]], [prefix + "zeros"]))  # NaN where not finite
        steps.append(self._constant(prefix + "axis", np.array([-1], dtype=np.int64)))
        steps.append(
            helper.make_node("ReduceSum", [prefix + "zeros", prefix + "axis"], [prefix + "nothing"], keepdims=0)
        )
        steps.append(helper.make_node("Add", [prefix + "ratio", prefix + "nothing"], [result]))

    def _scaled(self, steps: list[onnx.NodeProto], prefix: str, logits: str, exit_index: int) -> str:
        if self.rule["temperatures"] is None:
            return logits
        temperature = np.float32(self.rule["temperatures"][exit_index])
        steps.append(self._constant(prefix + "temperature", temperature))
        steps.append(helper.make_node("Div", [logits, prefix + "temperature"], [prefix + "scaled"]))
        return prefix + "scaled"

    def _confidence(self, steps: list[onnx.NodeProto], prefix: str, logits: str, result: str) -> None:
        steps.append(self._constant(prefix + "last", np.array([-1], dtype=np.int64)))
        if self.rule["criterion"] == "label_confidence":
            steps.append(helper.make_node("Abs", [logits], [prefix + "distances"]))
            names = [prefix + "distances", prefix + "last"]
            steps.append(helper.make_node("ReduceMin", names, [prefix + "least"], keepdims=0))
            steps.append(helper.make_node("Sigmoid", [prefix + "least"], [prefix + "sure"]))
            # NaN where logits are not finite, which a minimum may pass over.
            steps.append(helper.make_node("Sub", [logits, logits], [prefix + "nothing"]))
            steps.append(
                helper.make_node("ReduceSum", [prefix + "nothing", prefix + "last"], [prefix + "zero"], keepdims=0)
            )
            steps.append(helper.make_node("Add", [prefix + "sure", prefix + "zero"], [result]))
            return
        steps.append(helper.make_node("Softmax", [logits], [prefix + "probabilities"], axis=-1))
        names = [prefix + "probabilities", prefix + "last"]
        steps.append(helper.make_node("ReduceMax", names, [result], keepdims=0))

    def _flat(self, steps: list[onnx.NodeProto], prefix: str, value: str, result: str) -> None:
        steps.append(self._constant(prefix + "flat", np.array([1], dtype=np.int64)))
        steps.append(helper.make_node("Reshape", [value, prefix + "flat"], [result]))

    @staticmethod
    def _constant(name: str, value: Any) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))


def tensors_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Yield the weights of a graph and of the branches in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from tensors_of(attribute.g)


def save_sharing_weights(models: dict[str, onnx.ModelProto], folder: Path) -> None:
    """
    Write graphs with one shared `weights.bin`, in which each tensor is stored once. It may exceed 2 GB.

    Args:
        models (`dict[str, onnx.ModelProto]`): Graphs by file name. Their weights are removed in place.
        folder (`Path`): The folder to write to.
    """
    places: dict[str, int] = {}
    with (folder / WEIGHTS_NAME).open("wb") as file:
        for model in models.values():
            for tensor in tensors_of(model.graph):
                data = numpy_helper.to_array(tensor).tobytes()
                if len(data) < LEAST_SHARED_BYTES:
                    continue
                digest = hashlib.sha256(data).hexdigest()
                if digest not in places:
                    file.write(b"\0" * (-file.tell() % 64))
                    places[digest] = file.tell()
                    file.write(data)
                for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                    tensor.ClearField(name)
                tensor.data_location = TensorProto.EXTERNAL
                del tensor.external_data[:]
                for key, value in (("location", WEIGHTS_NAME), ("offset", places[digest]), ("length", len(data))):
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, str(value)
    for name, model in models.items():
        onnx.save(model, folder / name)


__all__ = [
    "IMAGE",
    "OPSET",
    "convolved",
    "cut",
    "enter_blocked_layout_once",
    "fix_resize_scales",
    "hand_on_channels_last",
    "infer_shapes",
    "nest",
    "save_sharing_weights",
    "tensors_of",
]
