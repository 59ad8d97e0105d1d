"""`examples/javascript`, in Node and in headless Chromium: images leave at the same exits as in Python."""

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from hf_scan import ExitConfig
from hf_scan.runtime import ORTScanForImageClassification
from hf_scan.runtime.numpy_rule import confidence_of

from ..conftest import random_scan_model


SOURCE = Path(__file__).parents[2] / "examples" / "javascript"
CHROMIUM = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
THRESHOLDS = [0.5, 0.55, 0.5]
# How far scores of the images lie from a threshold: other processors round 8-bit numbers differently.
MARGINS = {"": 1e-3, "int8": 0.05}
# It drives the page in a frame, because what a page shows is asked for when it is there.
DRIVER = """<!doctype html><iframe src="index.html?model=MODEL&images=IMAGES"></iframe><script>
const timer = setInterval(() => {
  const page = document.querySelector("iframe").contentDocument;
  const status = page?.getElementById("status")?.textContent ?? "";
  if (!status || status === "Loading the network") return;
  clearInterval(timer);
  const rows = [...page.querySelectorAll("#answers tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  fetch("done", { method: "POST", body: JSON.stringify({ status, rows }) });
}, 50);
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The example with its packages and two exports."""
    folder = tmp_path_factory.mktemp("javascript")
    for path in SOURCE.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    if (SOURCE / "node_modules").is_dir():
        (folder / "node_modules").symlink_to(SOURCE / "node_modules")
    else:
        install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        if subprocess.run(install, cwd=folder, capture_output=True).returncode:
            pytest.skip("npm could not install the packages of examples/javascript")
    pixels = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    random_scan_model().export_onnx(folder / "exported", calibration_dataset=pixels, include_preprocessing=True)
    for precision in MARGINS:
        engine = ORTScanForImageClassification.from_pretrained(folder / "exported", subfolder=precision)
        engine.exit_config = ExitConfig(THRESHOLDS)
        engine.save_pretrained(folder / f"model{precision}")
        graph = onnx.load(folder / f"model{precision}" / "onnx" / "adaptive.onnx")
        onnx.save(graph, folder / f"model{precision}" / "adaptive.onnx")
    return folder


def images_and_answers(site: Path, precision: str) -> tuple[list[str], Any]:
    """Images whose scores are away from the thresholds, written as PNG, and what Python answers."""
    engine = ORTScanForImageClassification.from_pretrained(site / f"model{precision}")
    pixels = np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), dtype=np.uint8)
    scores = np.stack([confidence_of(logits) for logits in engine(pixels).exit_logits], axis=1)
    far = (np.abs(scores - THRESHOLDS) > MARGINS[precision]).all(axis=1).nonzero()[0]
    exits = engine.predict_adaptive(pixels[far]).exit_index
    chosen = np.concatenate([far[exits == index][:10] for index in range(4)])  # every exit and the ensemble
    names = [f"image{precision}_{index}.png" for index in chosen]
    for name, index in zip(names, chosen):
        Image.fromarray(pixels[index]).save(site / name)
    answers = engine.predict_adaptive(pixels[chosen])
    assert len(set(answers.exit_index.tolist())) == 4
    return names, answers


@pytest.mark.parametrize("precision", MARGINS)
def test_node_leaves_where_python_leaves(site, precision):
    names, expected = images_and_answers(site, precision)
    command = ["node", "classify.mjs", f"model{precision}", *names]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["image"] for answer in found] == names
    assert [answer["exit"] for answer in found] == expected.exit_index.tolist()
    if not precision:
        assert [answer["label"] for answer in found] == [f"LABEL_{i}" for i in expected.logits.argmax(axis=-1)]
        np.testing.assert_allclose([answer["confidence"] for answer in found], expected.confidence, rtol=1e-4)
    assert all(answer["milliseconds"] > 0 for answer in found)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("precision", MARGINS)
def test_a_page_leaves_where_python_leaves(site, tmp_path, precision):
    names, expected = images_and_answers(site, precision)
    found = shown_by_page(site, tmp_path, f"model{precision}", names)
    assert found["status"] == "Ready: 16 x 16 pixels"
    exits = ["all together" if index == 3 else str(index) for index in expected.exit_index]
    assert [row[3] for row in found["rows"]] == exits
    if not precision:
        assert [row[1] for row in found["rows"]] == [f"LABEL_{i}" for i in expected.logits.argmax(axis=-1)]
    assert all(float(row[4]) >= 0 for row in found["rows"])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_says_what_is_missing(site, tmp_path):
    assert "nowhere/onnx/manifest.json is not there (404)" in shown_by_page(site, tmp_path, "nowhere", [])["status"]


def test_node_says_what_it_cannot_run(site, exported):
    """A network that wants normalised images, and one without thresholds."""
    for folder, message in ((exported, "Export with `include_preprocessing=True`"), (site / "bare", "no thresholds")):
        if folder.name == "bare":
            shutil.copytree(site / "model", folder)
            (folder / "exit_config.json").write_text("{}")
        command = ["node", "classify.mjs", folder, "image.png"]
        done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert message in done.stderr


def shown_by_page(site: Path, scratch: Path, model: str, names: list[str]) -> dict[str, Any]:
    """Open the page in headless Chromium and return what it shows."""
    (site / "drive.html").write_text(DRIVER.replace("MODEL", model).replace("IMAGES", ",".join(names)))
    posted: list[bytes] = []
    arrived = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()
            arrived.set()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    address = f"http://127.0.0.1:{server.server_port}/drive.html"
    browser = subprocess.Popen(
        [*command, f"--user-data-dir={scratch / 'profile'}", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert arrived.wait(120), "the page has not shown anything"
    finally:
        browser.terminate()
        browser.wait(30)
        server.shutdown()
        server.server_close()
    return json.loads(posted[0])
