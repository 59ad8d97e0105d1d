# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The demo's page, with Gradio: [`build_page`] and [`launch_page`]."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..extras import require_extra
from ..model.exit_config import ExitConfig
from ..reporting.saved_frontier import SavedFrontier
from .html import CSS, answer_html, attention_html, frontier_svg, rule_html, shares_html
from .network import DemoNetwork, int8_folder


# What thresholds are in use: None for the checkpoint's own, a whole number for a policy of the frontier, and a number
# with a point for one threshold at all exits.
Setting = int | float | None

MOST_POINTS, LEAST_STEP = 5.0, 0.1
NOTHING_YET = '<div class="scan quiet">Drop an image, or choose one of those below it.</div>'
INTRODUCTION = (
    "Each exit answers as soon as it is sure enough; an image that leaves early skips the rest of the network. "
    "Move the slider to trade accuracy for speed."
)


class Page:
    """
    What happens when someone clicks: methods from values of the page to values of the page.

    Args:
        network ([`DemoNetwork`]): What answers.
    """

    def __init__(self, network: DemoNetwork) -> None:
        self.network = network
        self._int8: DemoNetwork | None = None

    def rule(self, setting: Setting) -> ExitConfig:
        """Return the rule of a setting."""
        if setting is None:
            return self.network.first_rule()
        if isinstance(setting, int):
            assert self.network.frontier is not None  # without which there are no policies to choose
            return self.network.frontier.exit_config(setting)
        return self.network.one_threshold(setting)

    def show_setting(self, setting: Setting) -> tuple[str, str]:
        """Return the frontier with its dot, and the thresholds in words."""
        frontier, rule = self.network.frontier, self.rule(setting)
        policy = setting if isinstance(setting, int) else None
        thresholds = rule.resolve(self.network.num_exits)[: self.network.num_exits - 1]
        words = rule_html(frontier, policy, thresholds)
        if frontier is None:
            return "", words
        search: dict[str, Any] = self.network.network.exit_config.search or {}
        same_unit = str(search.get("cost_unit", "")).split(",")[0] == frontier.unit.split(",")[0]
        found = (search["accuracy"], search["cost"]) if same_unit and {"accuracy", "cost"} <= set(search) else None
        return frontier_svg(frontier, policy, found), words

    def explain(self, image: Image.Image | None, setting: Setting) -> tuple[str, str]:
        """Return the answer to an image and where the exits look; a hint where there is no image."""
        if image is None:
            return NOTHING_YET, ""
        view = self.network.explain(image, self.rule(setting))
        return answer_html(view, self.network.num_exits), attention_html(view)

    def choose(self, value: float | None, image: Image.Image | None) -> tuple[Setting, str, str, str, str]:
        """Return all that changes when the slider moves to a value, or back to the checkpoint's own thresholds."""
        frontier = self.network.frontier
        setting: Setting = value if value is None or frontier is None else frontier.cheapest(value)
        if isinstance(setting, (int, float)) and frontier is None:
            setting = float(setting)
        return (setting, *self.show_setting(setting), *self.explain(image, setting))

    def sort(self, files: Sequence[str] | None, setting: Setting) -> tuple[list[tuple[Image.Image, str]], str]:
        """Return images in the order of their exits, with captions, and where they left as a bar."""
        paths = list(files or self.network.samples)
        if not paths:
            return [], '<div class="scan quiet">Drop some images first.</div>'
        images = []
        for path in paths:
            with Image.open(path) as image:
                image.load()
                images.append(image.copy())
        rule = self.rule(setting)
        answers = self.network.answer(images, rule)
        order = sorted(range(len(images)), key=lambda index: (answers[index][1], -answers[index][2]))
        shown = []
        for index in order:
            label, place, sure = answers[index]
            name = "all exits" if place == self.network.num_exits else f"exit {place}"
            shown.append((_enlarged(images[index]), f"{name}: {label}, {sure:.0%}"))
        exits = [place for _, place, _ in answers]
        mean = sum(self.network.macs_of(rule, place) for place in exits) / len(exits)
        return shown, shares_html(exits, [*self.network.exit_names, "all exits together"], mean)

    def explain_int8(self, image: Image.Image | None) -> str:
        """Return the answer of the network in 8-bit integers, which is loaded when it is first asked."""
        if image is None:
            return NOTHING_YET
        if self._int8 is None:
            self._int8 = DemoNetwork(self.network.name, subfolder=int8_folder(self.network.name))
        return answer_html(self._int8.explain(image, self._int8.first_rule()), self._int8.num_exits)


def build_page(model: str, data: str | Path | None = None) -> Any:
    """
    Build the page for a network.

    Args:
        model (`str`): A folder or a repository on the Hub: a checkpoint, or an export to ONNX.
        data (`str` or `Path`, *optional*): A folder of images, with a folder for each class. The frontier is found on
            them where the checkpoint has no `frontier.json`, and some are shown.

    Returns:
        `gradio.Blocks`: to be launched with [`launch_page`].

    Raises:
        `ImportError`: if the extra `hf_scan[demo]` is not installed.
        `OSError`: if there is no such network.
        `ValueError`: if a folder of `data` is named like no class.
    """
    require_extra("demo", "The demo")
    import gradio as gr

    network = DemoNetwork(model, data)
    page = Page(network)
    drawing, words = page.show_setting(None)
    name = Path(model).name or model
    with gr.Blocks(title=f"{name}: early exits", analytics_enabled=False) as blocks:
        facts = f"`{name}`, {network.num_exits} exits, {network.runtime}"
        gr.Markdown(f"# Where does an image leave?\n{INTRODUCTION}\n\n{facts}")
        setting = gr.State(None)
        with gr.Tab("One image"):
            # Rows, so that on a phone the answer stands below the image, and the slider below the answer.
            with gr.Row():
                with gr.Column(scale=4, min_width=300):
                    image = _image_input(network, "image")
                with gr.Column(scale=6, min_width=320):
                    answer = gr.HTML(NOTHING_YET, elem_id="answer")
            with gr.Row():
                with gr.Column(scale=4, min_width=300):
                    slider, own = _knobs(network)
                    rule = gr.HTML(words, elem_id="rule")
                    frontier = gr.HTML(drawing, elem_id="frontier", visible=network.frontier is not None)
                with gr.Column(scale=6, min_width=320):
                    attention = gr.HTML("", elem_id="attention")
        with gr.Tab("Many images"):
            files = gr.File(label="Images", file_count="multiple", file_types=["image"], height=120)
            sort = gr.Button("Sort them by exit" if not network.samples else "Sort them, or the samples, by exit")
            shares = gr.HTML("", elem_id="shares")
            gallery = gr.Gallery(label="By exit, the surest first", columns=6, height="auto", elem_id="gallery")
        if network.runtime == "PyTorch" and int8_folder(model) is not None:
            with gr.Tab("In 8-bit integers"), gr.Row():
                with gr.Column(scale=4, min_width=300):
                    small = _image_input(network, "small")
                with gr.Column(scale=6, min_width=320):
                    gr.Markdown("The export in ONNX Runtime, with weights and activations of 8 bits.")
                    quantized = gr.HTML(NOTHING_YET, elem_id="int8")
            small.change(page.explain_int8, small, quantized, show_progress="minimal")
        changed = [setting, frontier, rule, answer, attention]
        slider.change(page.choose, [slider, image], changed, trigger_mode="always_last", show_progress="minimal")
        own.click(lambda image: page.choose(None, image), image, changed, show_progress="minimal")
        image.change(page.explain, [image, setting], [answer, attention], show_progress="minimal")
        sort.click(page.sort, [files, setting], [gallery, shares])
    return blocks


def _image_input(network: DemoNetwork, name: str) -> Any:
    """Return a place to drop an image, with the samples below it."""
    import gradio as gr

    image = gr.Image(type="pil", label="Image", height=260, sources=["upload", "clipboard"], elem_id=name)
    if network.samples:
        gr.Examples([[path] for path in network.samples], image, examples_per_page=12, label="Samples")
    return image


def _knobs(network: DemoNetwork) -> tuple[Any, Any]:
    """Return the slider, and the button that brings the checkpoint's own thresholds back."""
    import gradio as gr

    if network.frontier is not None:
        label, info = (
            "Points of accuracy you may lose",
            "of the deepest exit's, on the images that the frontier was found on",
        )
        most, step = points_and_step(network.frontier)
        slider = gr.Slider(0, most, 0, step=step, label=label, info=info, elem_id="drop")
    else:
        label, info = "One threshold for all exits", "The checkpoint has no frontier.json: start the demo with --data"
        slider = gr.Slider(0, 1, 0.9, step=0.01, label=label, info=info, elem_id="drop")
    return slider, gr.Button("Back to the checkpoint's thresholds", size="sm", elem_id="own")


def points_and_step(frontier: SavedFrontier) -> tuple[float, float]:
    """
    Return how far the slider goes and in which steps, in points of accuracy.

    It ends at what the cheapest policy loses. A step is one image more that may be answered wrongly, since less
    changes nothing; it is rounded up, so that steps add up to no less than the images.
    """
    step = max(LEAST_STEP, math.ceil(1e4 / max(1, frontier.samples)) / 100)
    most = min(MOST_POINTS, 100 * (frontier.deepest_accuracy - min(frontier.accuracy)))
    return round(step * max(1, math.ceil(most / step - 1e-9)), 2), step


def _enlarged(image: Image.Image, least: int = 128) -> Image.Image:
    """Return an image of at least some pixels, each of which stays a square, so that tiny ones can be seen."""
    times = -(-least // max(1, min(image.size)))
    shown = image.convert("RGB")
    return shown if times <= 1 else shown.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def launch_page(blocks: Any, **kwargs: Any) -> Any:
    """
    Launch a page in its look, without fonts, code or counters from elsewhere.

    Args:
        blocks (`gradio.Blocks`): From [`build_page`].
        kwargs: Of `gradio.Blocks.launch`, such as `server_port`.

    Returns:
        What `launch` returns.
    """
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return blocks.launch(**{"ssr_mode": False, "theme": theme, "css": CSS, "footer_links": [], **kwargs})


__all__ = ["Page", "build_page", "launch_page"]
