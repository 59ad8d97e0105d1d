"""A model of Triton's Python backend: it calls the stages of an export until an exit is confident enough."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from hf_scan.runtime import ORTScanForImageClassification
from hf_scan.runtime.numpy_rule import ExitSettings, fall_back, plan_steps


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        network = ORTScanForImageClassification.from_pretrained(Path(__file__).parent / "exported")
        self.states, self.num_exits = network.manifest.states, network.num_exits
        self.settings = ExitSettings.of(network.exit_config)
        self.plan = plan_steps(self.settings, self.num_exits)

    async def execute(self, requests: list[Any]) -> list[Any]:
        return await asyncio.gather(*(self.answer(request) for request in requests))

    async def answer(self, request: Any) -> Any:
        state = {"pixel_values": triton.get_input_tensor_by_name(request, "pixel_values").as_numpy()[None]}
        seen: list[np.ndarray] = []
        exits: list[int] = []
        for index, step in enumerate(self.plan):
            names = [value["name"] for value in self.states[index]] if index < self.num_exits - 1 else []
            stage = triton.InferenceRequest(
                model_name=f"stage_{index}" + ("" if step.runs else "_without_head"),
                inputs=[triton.Tensor(name, value) for name, value in state.items()],
                requested_output_names=[*([f"logits_{index}"] if step.runs else []), *names],
            )
            response = await stage.async_exec()
            if response.has_error():
                return triton.InferenceResponse(error=response.error())
            found = {name: triton.get_output_tensor_by_name(response, name) for name in stage.requested_output_names()}
            state = {name: found[name].as_numpy() for name in names}
            if step.runs:
                seen, exits = [*seen, found[f"logits_{index}"].as_numpy()], [*exits, index]
                if step.limit is not None and self.settings.score(seen, exits)[0] > step.limit:
                    confidence = self.settings.confidence(seen[-1], index)
                    return self.response(seen[-1], np.array([index]), confidence)
        return self.response(*fall_back(self.settings, seen, exits, self.num_exits))

    def response(self, logits: np.ndarray, exit_index: np.ndarray, confidence: np.ndarray) -> Any:
        columns = {"logits": logits[0], "exit_index": exit_index, "confidence": confidence.astype(np.float32)}
        return triton.InferenceResponse([triton.Tensor(name, value) for name, value in columns.items()])
