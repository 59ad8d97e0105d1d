"""Classify a table of Spark: `spark-submit examples/serving/spark_udf.py runs/photos photos answers`. Needs `pyspark`.

Each Python worker loads the network once; every stage runs full batches of what Spark hands over. What is no image
gets an empty label, the exit -1 and no confidence.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import FloatType, LongType, StringType, StructField, StructType


ANSWER = [("label", StringType()), ("exit_index", LongType()), ("confidence", FloatType())]


def classifier(model: str, batch_size: int = 512) -> Any:
    """Return a function of a column of image files."""

    def load() -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        from hf_scan.ray import ScanPredictor  # which needs no Ray

        predictor = ScanPredictor(model, on_error="skip")

        def predict(files: np.ndarray) -> dict[str, np.ndarray]:
            found = list(predictor({"path": np.arange(len(files)), "bytes": files}))
            order = np.concatenate([part["id"] for part in found]).argsort()  # answers come as images leave
            return {name: np.concatenate([part[name] for part in found])[order] for name, _ in ANSWER}

        return predict

    schema = StructType([StructField(name, kind) for name, kind in ANSWER])
    return predict_batch_udf(load, return_type=schema, batch_size=batch_size)


if __name__ == "__main__":
    model, images, output = sys.argv[1:]
    table = SparkSession.builder.getOrCreate().read.format("binaryFile").load(images)
    answers = table.select("path", classifier(model)("content").alias("answer")).select("path", "answer.*")
    answers.write.parquet(output)
