"""Panels show their features, marks need no colour, and every picture is valid SVG of finite numbers."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from hf_hyla.demo import drawing


SVG = "{http://www.w3.org/2000/svg}"


def panel(values, **settings) -> ElementTree.Element:
    return ElementTree.fromstring(drawing.svg(100, 100, drawing.panel(values, **settings), "a panel"))


def items(values) -> list[ElementTree.Element]:
    return panel(values).findall(f".//{SVG}path")


def test_every_value_of_every_feature_looks_different():
    for feature in range(4):
        pictures = {drawing.panel([*[3] * feature, value, *[3] * (3 - feature)]) for value in range(8)}
        assert len(pictures) == 8, drawing.FEATURES[feature]


def test_a_panel_has_as_many_items_as_its_number_says_and_none_leaves_it():
    for number, size, shape in itertools.product(range(8), (0, 7), range(8)):
        found = items([shape, size, 2, number])
        assert len(found) == number + 1
    places = set()
    for place in panel([1, 7, 2, 7]).findall(f".//{SVG}g[@transform]"):
        if match := re.fullmatch(r"translate\((\d+) (\d+)\)", place.get("transform")):
            places.add((int(match[1]), int(match[2])))
    radius = max(abs(float(n)) for n in re.findall(r"-?\d+\.\d+", items([1, 7, 2, 7])[0].get("d")))
    assert len(places) == 8
    assert all(radius <= min(x, y, 100 - x, 100 - y) for x, y in places)


def test_larger_values_of_size_are_larger_and_colours_differ_in_nothing_else():
    def width(size):
        return max(abs(float(n)) for n in re.findall(r"-?\d+\.\d+", items([2, size, 0, 0])[0].get("d")))

    assert [width(size) for size in range(8)] == sorted({width(size) for size in range(8)})
    red, green = drawing.panel([2, 3, 0, 0]), drawing.panel([2, 3, 3, 0])
    assert red != green and re.sub('fill="#[0-9a-f]+"', "", red) == re.sub('fill="#[0-9a-f]+"', "", green)


def test_marks_differ_by_sign_and_line_and_not_by_colour_alone():
    texts = {mark: "".join(panel([1, 2, 3, 4], mark=mark).itertext()) for mark in ("right", "possible", "wrong")}
    assert texts == {"right": "✓", "possible": "≈", "wrong": "✗"}
    dashes = {drawing.panel([0] * 4, mark=mark).partition('stroke-dasharray="')[2][:3] for mark in texts}
    assert len(dashes) == 3


def test_digits_are_written_on_request_and_where_a_panel_cannot_be_drawn():
    assert "".join(panel([1, 2, 3, 4]).itertext()) == ""
    assert "".join(panel([1, 2, 3, 4], digits=True).itertext()) == "1 2 3 4"
    assert "".join(panel([1, 2, 3, 4, 5]).itertext()) == "1 2 3 4 5"
    assert "".join(panel([1, 2, 3, 8]).itertext()) == "1 2 3 8" and not items([1, 2, 3, 8])
    assert "".join(panel(None).itertext()) == "?"
    assert len(items([1, 2])) == 1


def test_the_board_names_its_panels_and_eight_of_them_can_be_reached_by_keyboard():
    panels = [[i] * 4 for i in range(8)]
    board = ElementTree.fromstring(drawing.board([*panels, None], selected=4))
    reached = board.findall(f"./{SVG}g[@tabindex='0']")
    assert [int(one.get("data-panel")) for one in reached] == list(range(8))
    assert reached[5].get("aria-label") == "row 2, column 3: 6 blue pluses of size 6, digits 5 5 5 5"
    assert [len(one.findall(f"./{SVG}rect")) for one in reached] == [1, 1, 1, 1, 2, 1, 1, 1]
    assert board.findall(f"./{SVG}g")[8].get("aria-label") == "row 3, column 3: to be answered"


def test_bars_are_as_high_as_their_probabilities_and_frame_the_right_digit():
    probabilities = [0.5, 0.25, 0.125, 0.125]
    bars = ElementTree.fromstring(drawing.bars(probabilities, answer=0, right=2))
    heights = [float(one.find(f"{SVG}rect").get("height")) for one in bars.findall(f"{SVG}g")]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 0.5, 0.25, 0.25], abs=0.01)
    [dot] = bars.findall(f"{SVG}circle")
    third = bars.findall(f"{SVG}g")[2].find(f"{SVG}text")
    assert dot.get("cx") == third.get("x") and third.text == "2"
    assert not ElementTree.fromstring(drawing.bars(probabilities, answer=0, right=None)).findall(f"{SVG}circle")


def test_the_heat_map_has_a_cell_for_every_score_and_its_colour_follows_the_score():
    codes = [[[0.0, 2.0, -2.0], [1.0, -1.0, 4.0]], [[0.0, 0.1, 0.2], [0.3, 0.4, math.nan]]]
    picture = ElementTree.fromstring(drawing.heat_map(codes, [2.0, 0.0], "codes"))
    cells = picture.findall(f"{SVG}rect")
    assert len(cells) == 12
    fills = [cell.get("fill") for cell in cells]
    assert fills[:3] == ["#f4f4f4", "#d95f02", "#2166ac"] and fills[8] == "#d95f02"
    assert fills[-1] == "#f4f4f4"  # a layer without a scale
    assert drawing.shade(math.nan) == "#888888"
    assert cells[1].find(f"{SVG}title").text == "layer 1, head 2: 2.00"


def test_the_curve_draws_each_model_with_a_dash_pattern_of_its_own_and_stays_inside():
    x = [0.0, 0.5, 1.0]
    answers = {name: [0.0, 9.0, -9.0] for name in ("a<b", "c", "d", "e", "f")}
    text = drawing.curve(x, [0.0, 1.0, 0.0], answers, "x1")
    picture = ElementTree.fromstring(text)
    truth, *lines = picture.findall(f"{SVG}polyline")
    assert len(lines) == 5 and len({line.get("stroke-dasharray") for line in lines[:4]}) == 4
    numbers = [float(n) for n in re.split("[ ,]", lines[0].get("points"))]
    height = float(picture.get("height"))
    assert all(0 <= y <= height for y in numbers[1::2])
    assert {"a<b", "true value", "x1"} <= set(picture.itertext())
    assert truth.get("stroke-dasharray") is None
