"""The examples of other servers, where these are installed. Triton's own modules are replaced."""

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import httpx
import onnxruntime
import pytest

from hf_scan.runtime import ORTScanForImageClassification
from hf_scan.serving.images import ImageReader
from hf_scan.serving.loading import load_model

from .test_server import expected_answers, in_base64, picture


EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "serving"


def module_of(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [picture(number) for number in range(12)]


def test_litserve(checkpoint, pictures, monkeypatch):
    pytest.importorskip("litserve")
    monkeypatch.setenv("MODEL", str(checkpoint))
    api = module_of(EXAMPLES / "litserve_app.py").Classifier(enable_async=True)  # which checks the methods
    api.setup("cpu")

    async def ask(content):
        return await api.encode_response(await api.predict(await api.decode_request({"image": in_base64(content)})))

    async def ask_all():
        answers = await asyncio.gather(*map(ask, pictures))
        await api.engine.close()
        return answers

    assert asyncio.run(ask_all()) == expected_answers(checkpoint, pictures)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_litserve_as_a_process(checkpoint, pictures, tmp_path):
    pytest.importorskip("litserve")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MODEL": str(checkpoint), "PORT": str(port)}
    command = [sys.executable, str(EXAMPLES / "litserve_app.py")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 600  # imports, on a busy machine
        while not answers(url):
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.2)
        given = [{"image": in_base64(content)} for content in pictures]
        found = [httpx.post(f"{url}/predict", json=one, timeout=60).json() for one in given]
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the worker that it started
        process.wait()
    assert found == expected_answers(checkpoint, pictures)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


class Tensor:
    def __init__(self, name, value):
        self._name, self._value = name, value

    def name(self):
        return self._name

    def as_numpy(self):
        return self._value


def fake_triton(folder: Path, ran: list[str]) -> ModuleType:
    """Triton's module for the Python backend, whose models are graphs of an export."""

    class InferenceRequest:
        def __init__(self, model_name, inputs, requested_output_names):
            self.model_name, self.inputs, self.names = model_name, inputs, requested_output_names

        def requested_output_names(self):
            return self.names

        async def async_exec(self):
            ran.append(self.model_name)
            session = onnxruntime.InferenceSession(folder / "onnx" / f"{self.model_name}.onnx")
            values = session.run(self.names, {one.name(): one.as_numpy() for one in self.inputs})
            return Response([Tensor(*pair) for pair in zip(self.names, values)])

    class Response:
        def __init__(self, tensors):
            self.tensors = {one.name(): one for one in tensors}

        def has_error(self):
            return False

    module = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceRequest, module.InferenceResponse = Tensor, InferenceRequest, Response
    module.get_input_tensor_by_name = lambda request, name: request.tensors[name]
    module.get_output_tensor_by_name = lambda response, name: response.tensors[name]
    return module


def test_triton(exported, checkpoint, pictures, monkeypatch, tmp_path):
    ran: list[str] = []
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton(exported, ran))
    shutil.copytree(EXAMPLES / "triton" / "scan", tmp_path / "scan")
    shutil.copytree(exported, tmp_path / "scan" / "1" / "exported")
    model = module_of(tmp_path / "scan" / "1" / "model.py").TritonPythonModel()
    model.initialize({})
    loaded = load_model(str(exported), threads=1)
    read = ImageReader(loaded.processor, loaded.model)
    requests = [SimpleNamespace(tensors={"pixel_values": Tensor("pixel_values", read(one))}) for one in pictures]
    answers = asyncio.run(model.execute(requests))
    expected = expected_answers(checkpoint, pictures)
    found = [
        {
            "label": f"LABEL_{answer.tensors['logits'].as_numpy().argmax()}",
            "confidence": float(answer.tensors["confidence"].as_numpy()[0]),
            "exit_index": int(answer.tensors["exit_index"].as_numpy()[0]),
        }
        for answer in answers
    ]
    assert found == expected
    deep = sum(answer["exit_index"] > 0 for answer in expected)
    assert [ran.count(f"stage_{index}") for index in range(2)] == [len(pictures), deep]  # and no more
    assert ORTScanForImageClassification.from_pretrained(exported).num_exits == 3


@pytest.mark.slow
def test_spark(checkpoint, pictures, monkeypatch):
    pytest.importorskip("pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    from pyspark.sql import SparkSession

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        given = [(str(number), bytearray(content)) for number, content in enumerate([*pictures, b"none"])]
        table = spark.createDataFrame(given, "path string, content binary")
        classify = module_of(EXAMPLES / "spark_udf.py").classifier(str(checkpoint))
        rows = table.select("path", classify("content").alias("answer")).select("path", "answer.*").collect()
    finally:
        spark.stop()
    found = {int(row["path"]): row.asDict() for row in rows}
    # Spark reads the NaN of pandas as null.
    assert (found[12]["label"], found[12]["exit_index"], found[12]["confidence"]) == ("", -1, None)
    for number, one in enumerate(expected_answers(checkpoint, pictures)):
        assert {name: found[number][name] for name in one} == one
