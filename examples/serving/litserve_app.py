"""Serve a network by LitServe: `MODEL=runs/photos python examples/serving/litserve_app.py`. Needs `litserve`.

LitServe calls `predict` for one request; with `enable_async` many are in flight, which the engine joins to batches.
"""

import base64
import os
from typing import Any

import litserve

from hf_scan.serving import Answer, AsyncEngine
from hf_scan.serving.images import ImageReader
from hf_scan.serving.loading import load_model


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        loaded = load_model(os.environ["MODEL"], threads=1)
        self.read, self.engine = ImageReader(loaded.processor, loaded.model), AsyncEngine(loaded.model)

    async def decode_request(self, request: dict[str, str]) -> Any:
        return self.read(base64.b64decode(request["image"]))

    async def predict(self, x: Any) -> Answer:
        return await self.engine(x)

    async def encode_response(self, output: Answer) -> dict[str, Any]:
        return {"label": output.label, "confidence": output.confidence, "exit_index": output.exit_index}


if __name__ == "__main__":
    litserve.LitServer(Classifier(enable_async=True), accelerator="cpu").run(
        host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), generate_client_file=False
    )
