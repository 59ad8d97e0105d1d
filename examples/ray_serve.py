"""Serve a network with early exits on Ray Serve: replicas come and go with the load.

    MODEL=runs/photos serve run examples.ray_serve:app
    curl --data-binary @photo.jpg http://127.0.0.1:8000

`@serve.batch` would have all images of a batch wait for the slowest. Here a replica answers its requests one by one,
and the engine in it fills batches anew in front of each stage. Needs `pip install 'hf_scan[ray]'`.
"""

import os
from typing import Any

from ray import serve
from starlette.requests import Request

from hf_scan.serving import AsyncEngine
from hf_scan.serving.images import ImageReader
from hf_scan.serving.loading import load_model


@serve.deployment(
    max_ongoing_requests=64,  # what a replica holds at a time: several batches
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 24},
    ray_actor_options={"num_cpus": 1},
)
class Classifier:
    """A replica."""

    def __init__(self, model: str) -> None:
        loaded = load_model(model, threads=1)
        self.read, self.engine = ImageReader(loaded.processor, loaded.model), AsyncEngine(loaded.model)

    async def __call__(self, given: Request | bytes) -> dict[str, Any]:
        """Answer an image file, sent over HTTP or by a handle."""
        content = given if isinstance(given, bytes) else await given.body()
        try:
            answer = await self.engine(self.read(content), timeout_ms=30_000)
        except ValueError as error:
            return {"error": str(error)}
        return {"label": answer.label, "confidence": answer.confidence, "exit_index": answer.exit_index}

    def check_health(self) -> None:
        """Have Ray replace the replica if its engine has stopped."""
        if not self.engine.healthy:
            raise RuntimeError("The engine has stopped.")


app = Classifier.bind(os.environ["MODEL"]) if "MODEL" in os.environ else None  # type: ignore[attr-defined]
