import re
from dataclasses import replace

import pytest

from hf_scan.demo.html import answer_html, frontier_svg, rule_html, shares_html
from hf_scan.demo.network import ExitView, ImageView
from hf_scan.demo.page import points_and_step
from hf_scan.reporting.saved_frontier import SavedFrontier


FRONTIER = SavedFrontier(
    accuracy=[0.80, 0.89, 0.90],
    cost=[0.4, 0.5, 0.8],
    thresholds=[[0.2, 0.0], [0.6, 0.0], [0.9, None]],
    deepest_accuracy=0.90,
    unit="MACs, computed",
    split="search",
    samples=500,
)
# Up to three of 252 images more are wrong than at the deepest exit.
FEW_IMAGES = replace(
    FRONTIER,
    accuracy=[247 / 252, 248 / 252, 249 / 252, 250 / 252],
    cost=[0.3, 0.4, 0.5, 0.8],
    thresholds=[[level, 0.0] for level in (0.2, 0.4, 0.6, 0.9)],
    deepest_accuracy=250 / 252,
    samples=252,
)
VIEW = ImageView(
    label="<b>cat",
    confidence=0.93,
    exit_index=1,
    exits=[
        ExitView("exit 0", "dog", 0.41, 0.9, "passed on", 0.3),
        ExitView("exit 1", "<b>cat", 0.93, 0.8, "answered", 0.6),
        ExitView("exit 2", "cow", 0.97, None, "not run", 1.05),
    ],
    macs=0.6,
    plain_label="cow",
)


def test_every_step_of_the_slider_changes_the_thresholds():
    most, step = points_and_step(FEW_IMAGES)
    assert (most, step) == (1.2, 0.4)
    assert [FEW_IMAGES.cheapest(count * step) for count in range(4)] == [3, 2, 1, 0]
    assert points_and_step(FRONTIER) == (5.0, 0.2)  # the cheapest policy loses ten points
    assert points_and_step(replace(FRONTIER, accuracy=[0.9] * 3)) == (0.2, 0.2)  # nothing to lose, but a slider


def test_an_answer_says_where_the_image_left():
    page = answer_html(VIEW, num_exits=3)
    assert re.findall(r'data-state="([a-z ]+)"', page) == ["passed on", "answered", "not run"]
    assert re.findall(r"left: (\d+\.\d)%", page) == ["90.0", "80.0"]  # thresholds
    assert re.findall(r"width: (\d+\.\d)%", page) == ["41.0", "93.0", "97.0"]  # scores
    assert "answered by exit 1, early: and not cow, as the plain network" in page
    assert "would have said <b>cow</b>" in page
    assert "&lt;b&gt;cat" in page  # names of classes are text
    assert "<b>cat" not in page.replace("<b>&lt;b&gt;cat", "")


def test_the_dot_stands_at_the_policy():
    places = []
    for policy in range(len(FRONTIER)):
        picture = frontier_svg(FRONTIER, policy, None)
        ((x, y),) = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="7" fill="#D55E00" class="dot"', picture)
        places.append((float(x), float(y)))
    assert [x for x, _ in places] == sorted(x for x, _ in places)  # dearer to the right
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)  # better to the top
    assert 'class="dot"' not in frontier_svg(FRONTIER, None, None)
    assert "the checkpoint's own thresholds" in frontier_svg(FRONTIER, None, (0.85, 0.45))


@pytest.mark.parametrize(
    ("policy", "words"),
    [(0, "Thresholds: 0.200, 0.000<br>10.0 points lost, 40% of the multiplications"), (2, "0.900, off<br>no loss")],
)
def test_thresholds_in_words(policy, words):
    assert words in rule_html(FRONTIER, policy, FRONTIER.thresholds[policy])


def test_shares_are_counts():
    page = shares_html([0, 0, 2, 0], ["exit 0", "exit 1", "exit 2", "all exits together"], macs=0.5)
    assert re.findall(r"flex: (\d+)", page) == ["3", "1"]
    assert "exit 0: 3 of 4" in page
    assert "exit 1" not in page
