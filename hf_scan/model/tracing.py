# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Write a network's forward pass down, without running it, and make functions of parts of it."""

import inspect
import linecache
import operator
import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import get_notrace_functions
from torch import fx, nn

from .stage import smallest_batch


@dataclass(frozen=True)
class Program:
    """
    What a network does in its forward pass, step by step.

    Args:
        name (`str`): The network's class, for messages.
        image (`torch.fx.Node`): Its input.
        nodes (`list[torch.fx.Node]`): Its steps in order.
        result (`Any`): What it returns of them: a node, or several in a tuple.
        calls (`dict[str, list[tuple[int, Any]]]`): For each module that was called, for each call: the number of steps
            that have run when it ends, and what it returned of them.
        kinds (`dict[torch.fx.Node, str]`): The kind of each value, see [`kinds_of`].
        ran (`dict[torch.fx.Node, tuple[list[torch.Tensor], bool]]`, *optional*): What [`run_on_meta`] returned for all
            values, if it has run.
    """

    name: str
    image: fx.Node
    nodes: list[fx.Node]
    result: Any
    calls: dict[str, list[tuple[int, Any]]]
    kinds: dict[fx.Node, str]
    ran: dict[fx.Node, tuple[list[torch.Tensor], bool]] | None = None

    def bypassed(self, feature: fx.Node) -> bool:
        """Return whether some of the result depends on the images in another way than through a value."""
        reached = {self.image}
        for node in self.nodes:
            if node is not feature and self.kinds[node] == "images" and reached.intersection(node.all_input_nodes):
                reached.add(node)
        final: set[fx.Node] = set()
        fx.node.map_arg(self.result, final.add)
        return not final.isdisjoint(reached)


class _Buffer(fx.Proxy):
    """A proxy of a buffer, whose size is known."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.numel = buffer.numel


class _Tracer(fx.Tracer):
    def __init__(self, names: Iterable[str], method: str) -> None:
        # timm registers the functions that its own feature extraction does not look into either.
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.traced_func_name = method
        self.opened = containers_of(names)
        self.ends: list[tuple[str, fx.Node, Any]] = []  # of a module, its last step and what it returned

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        value = super().call_module(m, forward, args, kwargs)
        returned = fx.node.map_aggregate(value, lambda one: one.node if isinstance(one, fx.Proxy) else one)
        self.ends.append((self.path_of_module(m), next(iter(reversed(self.graph.nodes))), returned))
        return value

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # Buffers are read from the backbone at each run, as parameters are: they move, and their values are loaded.
        for name, buffer in self.root.named_buffers() if isinstance(attr_val, torch.Tensor) else ():
            if buffer is attr_val:
                return _Buffer(self.create_node("get_attr", name, (), {}), self, buffer)
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def containers_of(names: Iterable[str]) -> set[str]:
    """Return the names of all modules that have one of these modules inside."""
    return {name[:position] for name in names for position, sign in enumerate(name) if sign == "."}


def trace(backbone: Any, names: Iterable[str], method: str = "forward_features") -> Program:
    """
    Write a network's forward pass down: the modules that it calls, and what it does between them.

    Args:
        backbone (`torch.nn.Module`): The network.
        names (`Iterable[str]`): Modules whose calls are to be seen. Those that have one of them inside are looked
            into; all others stay the calls that they are.
        method (`str`, *optional*, defaults to `"forward_features"`): Which of the network's methods.

    Returns:
        [`Program`]

    Raises:
        `ValueError`: if the network does not do the same for all images.
    """
    name = type(backbone).__name__
    _, _, *further = inspect.signature(getattr(type(backbone), method)).parameters.values()
    attributes = set(vars(backbone))
    was_training = {module: module.training for module in backbone.modules()}
    tracer = _Tracer(names, method)
    try:
        backbone.eval()
        # Masks and the like are left at their defaults.
        graph = tracer.trace(backbone, {parameter.name: parameter.default for parameter in further})
    except Exception as error:  # whatever the model's code says to a value that has none
        raise ValueError(
            f"{name} cannot be cut into stages: between its modules, it decides by what it computes ({error})"
            f"{_place_of(error)}. Choose another backbone, such as 'resnet50'."
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
    places, steps = {image: 0}, []
    for node in nodes:
        if node not in checks:
            steps.append(node)
        places[node] = len(steps)
    result = output.args[0]
    if constants or isinstance(result, dict):
        what = "makes tensors outside of its modules" if constants else f"returns {sorted(result)}, not one tensor"
        raise ValueError(f"{name} cannot be cut into stages: it {what}. Choose another backbone, such as 'resnet50'.")
    calls: dict[str, list[tuple[int, Any]]] = {}
    for module_name, last, returned in tracer.ends:
        calls.setdefault(module_name, []).append((places[last], returned))
    return Program(name, image, steps, result, calls, kinds_of(image, steps))


def _place_of(error: Exception) -> str:
    """Return the line of the network's code that could not be written down, for the end of a sentence."""
    own = os.path.dirname(torch.__file__)
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    lines = [frame for frame in lines if frame.filename != __file__]
    if not lines:
        return ""
    last = lines[-1]
    return f", in line {last.lineno} of {os.path.basename(last.filename)}: `{last.line}`"


def kinds_of(image: fx.Node, nodes: list[fx.Node]) -> dict[fx.Node, str]:
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


def needed_after(program: Program, end: int, feature: fx.Node) -> list[fx.Node]:
    """
    Return what a stage passes on: the value at the exit point first, and all that later steps or the head read.

    Args:
        program ([`Program`]): The network's forward pass.
        end (`int`): The number of its steps that have run at the exit point.
        feature (`torch.fx.Node`): The value there.

    Raises:
        `ValueError`: if that does not belong to the images one by one.
    """
    readers = set(program.nodes[end:])
    final: set[fx.Node] = set()
    fx.node.map_arg(program.result, final.add)
    before = [program.image, *program.nodes[:end]]
    later = [
        node for node in before if node is not feature and (node in final or not readers.isdisjoint(set(node.users)))
    ]
    if any(program.kinds[node] == "shape" for node in later):
        raise ValueError(
            f"{program.name} cannot be cut after {feature.target!r}: it keeps the shape of the whole batch for later. "
            "Choose other `exit_points` or another backbone."
        )
    # Weights are read again where they are needed, and the batch may have shrunk.
    return [feature, *(node for node in later if program.kinds[node] not in ("weights", "batch size"))]


def as_function(
    program: Program, received: list[fx.Node], steps: list[fx.Node], results: list[Any], name: str
) -> tuple[Callable[..., tuple[Any, ...]], frozenset[str]]:
    """
    Return some steps as a function of the backbone and the values received, and the names of the parts it uses.

    Args:
        program ([`Program`]): The network's forward pass.
        received (`list[torch.fx.Node]`): Values that the function takes.
        steps (`list[torch.fx.Node]`): What it does.
        results (`list`): What it returns, in a tuple.
        name (`str`): For tracebacks.
    """
    kinds, graph = program.kinds, fx.Graph()
    here = {node: graph.placeholder(node.name) for node in received}

    def find(node: fx.Node) -> fx.Node:
        if node not in here and kinds[node] == "weights":
            here[node] = graph.node_copy(node)
        if node not in here and kinds[node] == "batch size":
            here[node] = graph.call_function(smallest_batch, (here[received[0]],))
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


__all__ = ["Program", "as_function", "containers_of", "needed_after", "trace"]
