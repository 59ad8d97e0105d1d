"""The page in a browser, clicked as a person clicks it. Needs gradio, playwright and Debian's chromium."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from hf_scan.demo.network import DemoNetwork


CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if Path(CHROMIUM).exists() else [CHROMIUM]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def address(checkpoint, tmp_path_factory):
    """A page of a network with an export in INT8."""
    import numpy as np
    from PIL import Image

    from hf_scan import ScanForImageClassification
    from hf_scan.demo.page import build_page, launch_page

    folder = tmp_path_factory.mktemp("page") / "network"
    shutil.copytree(checkpoint, folder)
    model = ScanForImageClassification.from_pretrained(folder).eval()
    pixels = DemoNetwork(str(folder)).pixels([Image.open(path) for path in sorted((folder / "samples").iterdir())])
    rows = [{"pixel_values": image, "labels": 0} for image in pixels.contiguous()]
    model.export_onnx(folder / "exported", calibration_dataset=rows)
    shutil.move(folder / "exported" / "int8", folder / "int8")
    assert np.isfinite(pixels.numpy()).all()
    blocks = build_page(str(folder))
    _, local, _ = launch_page(blocks, server_port=0 or None, prevent_thread_lock=True, quiet=True)
    yield local
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(browser, address, request):
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.set_default_timeout(60_000)
    elsewhere, errors = [], []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#answer")
    yield page
    context.close()
    assert errors == []
    outside = [url for url in elsewhere if not url.startswith((address.rstrip("/"), "data:", "blob:"))]
    assert outside == []  # no fonts, code or counters of others


def test_an_image_and_the_slider(page, checkpoint):
    assert "Drop an image" in page.locator("#answer").inner_text()
    page.locator("#image input[type=file]").set_input_files(checkpoint / "samples" / "0.png")
    page.wait_for_selector("#answer .verdict")
    assert page.locator("#answer .exit").count() == 3
    assert page.locator("#answer .exit[data-state=answered]").count() == 1
    assert page.locator("#attention img").count() == 2
    assert page.locator("#frontier .dot").count() == 0  # the checkpoint's own thresholds
    assert "plain network" in page.locator("#answer .costs").inner_text()
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1
    number = page.locator("#drop input[type=number]")
    number.fill("0.1")
    number.press("Enter")
    page.wait_for_selector("#frontier .dot")
    assert "points lost" in page.locator("#rule").inner_text() or "no loss" in page.locator("#rule").inner_text()
    place = float(page.locator("#frontier .dot").get_attribute("cx"))
    number.fill("5")
    number.press("Enter")
    # What may lose more costs less.
    page.wait_for_function("x => Number(document.querySelector('#frontier .dot').getAttribute('cx')) < x", arg=place)
    page.locator("#own").click()
    page.wait_for_selector("#frontier .dot", state="detached")


def test_many_images(page):
    page.get_by_role("tab", name="Many images").click()
    page.get_by_role("button", name="Sort them").click()
    page.wait_for_selector("#shares .stack")
    assert "Where 6 images left" in page.locator("#shares").inner_text()
    page.wait_for_selector("#gallery img")
    captions = page.locator("#gallery .caption-label").all_inner_texts()
    assert len(captions) == 6
    assert captions == sorted(captions, key=lambda text: text.split(":")[0])


def test_eight_bits(page):
    if not page.get_by_role("tab", name="In 8-bit integers").is_visible():  # behind the dots of a narrow screen
        page.get_by_role("button", name="…").or_(page.locator(".overflow-menu > button")).first.click()
        page.locator(".overflow-dropdown button", has_text="In 8-bit integers").click()
    else:
        page.get_by_role("tab", name="In 8-bit integers").click()
    page.locator("[class*=gallery-item]:visible").first.click()
    page.wait_for_selector("#int8 .verdict")
    assert page.locator("#int8 .exit").count() == 3
