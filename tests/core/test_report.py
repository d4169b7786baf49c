"""The report page and the terminal's tables: right figures, nothing from outside, and no trust in names."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph.pipeline import Report, Skipped
from qgraph.report import charts, units
from qgraph.report.data import ReportData, comparisons, deployable_bytes
from qgraph.report.html import render
from qgraph.report.ladder import Rung
from qgraph.report.layers import LayerFacts, Picture
from qgraph.report.markup import Markup, clip, element, printable
from qgraph.report.terminal import Table, before_after, before_after_rich, step, step_rich, to_rich, to_text
from qgraph.runtime.benchmark import Benchmark, Machine, Timing
from qgraph.runtime.difference import TensorError
from qgraph.runtime.figures import OutputFigures, Verification

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>\u202e\x00\x1b[31m\ud800&amp;"

VERIFICATION = Verification(
    samples=64,
    outputs=(
        OutputFigures("logits", "float32", 640, 31.2, 0.9993, 0.1234, top1_agreement=0.984375),
        OutputFigures("classes", "int64", 64, match=0.984375),
    ),
    labelled=599,
    accuracy_before=0.985,
    accuracy_after=0.9833,
)
BENCH = Benchmark(
    candidates=(
        Timing("before", 0.00493, 1000.0, (0.00493,), 90_000_000),
        Timing("after", 0.00164, 3000.0, (0.00164,), 45_000_000),
    ),
    batch="8 x 32",
    rounds=50,
    threads=2,
    machine=Machine("A processor", 2, "Linux x86_64", "onnxruntime 1.31.1"),
)


def manifest(**changes):
    facts = {
        "format": 1,
        "qgraph": "0.1.0",
        "source": {"name": "minilm.onnx", "bytes": 90_800_000, "sha256": "ab" * 32},
        "target": "cpu-int8",
        "seed": 3,
        "versions": {"python": "3.11", "onnx": "1.23"},
        "skipped": [{"node": f"/block.{i}/MatMul", "reason": "both operands are activations"} for i in range(12)],
        "kernels": {
            "integer": {"QLinearConv": 24, "QGemm": 1},
            "float": {"Softmax": 2},
            "other": {"Reshape": 3},
            "left_in_float": [{"node": "/softmax", "reason": "Softmax has no integer kernel for this axis"}],
        },
        "verification": {"data": "held-back samples", **VERIFICATION.to_json()},
        "tolerance": {"sqnr": 30.0, "top1": 0.005},
        "failures": [],
        "verified": True,
        "files": {
            "model.onnx": {"bytes": 22_900_000, "sha256": "cd" * 32},
            "recipe.toml": {"bytes": 500, "sha256": "ef" * 32},
        },
    }
    return {**facts, **changes}


TENSORS = (
    TensorError("stem", "stem", "Conv", 40.0, cosine=0.99995),
    TensorError("moved", "moved", "Reshape", 40.0, loss_db=0.0),
    TensorError("gelu_3", "gelu_3", "Gelu", 20.0, loss_db=20.0),
    TensorError("same", "same", "Add", None, exact=True),
)
PICTURES = (
    Picture("gelu_3", "gelu_3", "activation", (0, 5, 90, 5, 1), -1.0, 4.0, -0.5, 3.0, "uint8", 0.0137, beyond=0.0123),
    Picture("gelu_3", "w3", "weight", (1, 8, 8, 1), -128.0, 127.0, -128.0, 127.0, "int8", None, 64, 0.0),
    Picture("stem", "stem", "activation", (1, 2), 0.0, 1.0, remark="stays in float"),
)
LAYERS = LayerFacts(TENSORS, PICTURES, 4)
RUNGS = (
    Rung("the default", "qdq", {"sqnr": 28.0}, 4_000_000, 0.002, 2.5),
    Rung("bias correction", "qdq,bias-correction", {"sqnr": 29.0}, 4_000_000, 0.0021, 2.4, remark="no gain"),
    Rung("learned rounding", "adaround,qdq", remark="the worker died twice"),
    Rung("2 layers in float", "mixed-precision,qdq", {"sqnr": 31.2}, 4_500_000, 0.0025, 2.0, met=True, chosen=True),
)
REPORTS = {
    "prepare": Report(
        parts=(
            Report(name="fold-constants", changed=41, nodes_before=308, nodes_after=181, seconds=0.34, notes=("n1",)),
        )
    ),
    "compress": Report(
        parts=(
            Report(
                name="qdq", changed=36, nodes_before=181, nodes_after=205, seconds=2.3, skipped=(Skipped("a", "b"),)
            ),
        )
    ),
}


def data(tmp_path=None, **changes):
    recipe = None
    if tmp_path is not None:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text('target = "cpu-int8"\n', encoding="utf-8")
    return ReportData.build(
        manifest(**changes), BENCH.to_json(), REPORTS, seconds=11.2, recipe=recipe, layers=LAYERS, search=RUNGS
    )  # fmt: skip


class Page(HTMLParser):
    """Checks that elements nest, and gathers what a test may ask for."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)

    @property
    def text(self):
        return " ".join(self.words).replace("\u00a0", " ")


def test_the_page_tells_the_figures(tmp_path):
    page = Page(render(data(tmp_path)))
    for told in (
        "minilm.onnx", "for cpu-int8", "64 held-back samples", "4.0x", "90.8 MB → 22.9 MB", "3.0x", "4.93 ms → 1.64 ms",
        "2.0x", "31.2 dB", "−0.17", "98.50 % → 98.33 %", "top-1 on 599 labels", "fold-constants", "308 → 181", "2.30 s",
        "0.99930", "0.123", "98.44 %", "24 QLinearConv, 1 QGemm", "2 Softmax", "both operands are activations",
        "/block.11/MatMul", "Softmax has no integer kernel", "ab" * 32, "seed", 'target = "cpu-int8"', "A processor",
        "qgraph compile minilm.onnx --target cpu-int8 --calib DATA --recipe recipe.toml --seed 3", "11.2 s",
    ):  # fmt: skip
        assert told in page.text, told


def test_the_page_needs_nothing_from_outside():
    text = render(data())
    page = Page(text)
    names = {name for _, attributes in page.elements for name in attributes}
    assert {attributes["href"][0] for _, attributes in page.elements if "href" in attributes} == {"#"}
    assert not names & {"src", "srcset", "action", "background", "poster", "data", "xlink:href"}
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    assert not re.search(r"url\(|@import|https?://|//\w", text)
    policy = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_names_from_models_cannot_break_out():
    evil = {"node": EVIL, "reason": EVIL}
    output = OutputFigures(EVIL, "float32", 1, 3.0, 0.5, 1.0, remark=EVIL).to_json()
    page_data = ReportData.build(
        manifest(
            source={"name": EVIL, "bytes": 10, "sha256": EVIL},
            target=EVIL,
            qgraph=EVIL,
            skipped=[evil],
            versions={EVIL: EVIL},
            failures=[EVIL],
            tolerance={EVIL: 1.0},
            kernels={"integer": {EVIL: 1}, "float": {EVIL: 1}, "other": {EVIL: 1}, "left_in_float": [evil]},
            verification={"data": EVIL, **VERIFICATION.to_json(), "outputs": [output]},
            files={EVIL: {"bytes": 1, "sha256": EVIL}},
        ),
        dataclasses.replace(BENCH, batch=EVIL, machine=Machine(EVIL, 1, EVIL, EVIL)).to_json(),
        {EVIL: Report(parts=(Report(name=EVIL, notes=(EVIL,)),))},
        seconds=1.0,
        command=EVIL,
        layers=LayerFacts(
            (*TENSORS, TensorError(EVIL, EVIL, EVIL, 1.0), TensorError(EVIL, EVIL, EVIL, 1.0, broken=2)),
            (Picture(EVIL, EVIL, "weight", (1, 2), 0.0, 1.0, 0.0, 1.0, EVIL, 1.0, remark=EVIL),),
            1,
        ),
        search=(Rung(EVIL, EVIL, {EVIL: 1.0}, 1, 1.0, remark=EVIL), Rung(EVIL, EVIL, {EVIL: 2.0}, 2, 2.0)),
    )
    text = render(page_data)
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count("<script>alert('x')</script>") > 15
    assert not set(text) & set("\u202e\x00\x1b")
    text.encode("utf-8")


def test_the_page_stays_small_and_says_what_it_cuts():
    names = ["/\"very'\x00&long<" * 20 + str(i) for i in range(30_000)]
    layers = tuple(TensorError(name, name, "Conv", 30.0 + i % 7) for i, name in enumerate(names))
    outputs = [OutputFigures(name, "float32", 1, 30.0, 0.9, 0.1).to_json() for name in names[:3000]]
    text = render(
        dataclasses.replace(
            data(
                skipped=[{"node": name, "reason": f"reason {i % 150}"} for i, name in enumerate(names)],
                verification={"data": "samples", **VERIFICATION.to_json(), "outputs": outputs},
            ),
            layers=LayerFacts(layers, tuple(Picture(n, n, "activation", (1,), 0.0, 1.0) for n in names[:8]), 1),
            search=tuple(Rung(n, n, {"sqnr": 1.0}, 1, 1.0, remark=n) for n in names[:500]),
            recipe="<" * 3_000_000,
        )
    )
    assert len(text.encode("utf-8")) < 2_000_000
    assert "Not all of 3,000 are shown; manifest.json has them all." in text
    assert "Not all of 150 are shown" in text  # reasons
    assert "Not all of 200 are shown" in text  # nodes of one reason
    Page(text)


def test_the_page_can_be_made_again_from_its_data(tmp_path):
    first = data(tmp_path)
    again = ReportData.from_json(json.loads(json.dumps(first.to_json(), allow_nan=False)))
    assert again == first
    assert render(again) == render(first)


def test_a_page_without_timings_layers_kernels_or_passes():
    bare = ReportData(manifest(kernels=None, skipped=[]))
    page = Page(render(bare))
    for absent in ("latency", "Where the error arises", "What really runs", "What was left alone", "What was done"):
        assert absent not in page.text
    assert "Compiled by qgraph 0.1.0" in page.text


def test_what_failed_stands_at_the_top():
    text = render(data(failures=["SQNR is 31.20 dB, less than 40 (output 'logits')"], verified=False))
    page = Page(text)
    assert "Outside the tolerance" in page.text
    assert "less than 40" in page.text
    assert "Verified" not in page.text


def test_only_layers_that_add_to_the_error_are_listed():
    page = Page(render(data()))
    shown = page.text[page.text.index("Worst first") : page.text.index("In the order of the graph: all 4 tensors")]
    assert shown.index("gelu_3") < shown.index("stem")
    assert "moved" not in shown
    assert "10.0 %" in shown  # 20 dB
    assert "1.0 %" in shown  # 40 dB
    ordered = page.text[page.text.index("In the order of the graph") : page.text.index("The worst tensors")]
    places = [ordered.index(f" {name} ") for name in ("stem", "moved", "gelu_3", "same")]
    assert places == sorted(places)


def test_colours_can_be_read_on_their_ground_in_both_schemes():
    style = re.search(r"<style>(.*?)</style>", render(data()), re.DOTALL)[1]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
        for name in ("ink", "muted", "accent", "warn", "bad"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, (name, colours)
        assert contrast(colours["ink"], colours["wash"]) >= 4.5


def contrast(one, other):
    """WCAG 2.2, contrast ratio."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_elements_escape_all_but_markup():
    assert element("b", "a<b", Markup("<i>x</i>"), None, 3) == "<b>a&lt;b<i>x</i>3</b>"
    assert element("td", 1, class_='"x"', data_label="a&b", hidden=True, id=None) == (
        '<td class="&quot;x&quot;" data-label="a&amp;b" hidden>1</td>'
    )
    assert printable("a\u202eb\x07\ud800\n") == "a\\u202eb\\x07\\ud800\n"
    assert clip("x" * 300, 11) == "xxxxx…xxxxx"


BEFORE_AFTER = """\
                 before      after
  size          90.8 MB    22.9 MB    4.0x smaller
  latency       4.93 ms    1.64 ms    3.0x faster    (batch 8 x 32, 2 threads; best of 50)
  memory        90.0 MB    45.0 MB    2.0x less      (peak of a fresh process)
  output          exact    31.2 dB                   (64 held-back samples)
  accuracy      98.50 %    98.33 %    -0.17 points   (top-1 on 599 labels)"""


def test_the_table_before_and_after_as_text():
    assert before_after(manifest(), BENCH.to_json()) == BEFORE_AFTER
    assert before_after_rich(manifest(), BENCH.to_json()).plain == BEFORE_AFTER


def test_the_table_without_timings_and_labels():
    plain = Verification(4, (OutputFigures("y", "float32", 4, float("inf"), 1.0, 0.0),))
    lines = comparisons(manifest(verification={"data": "random inputs", **plain.to_json()}), None)
    assert [(line.label, line.after, line.change) for line in lines] == [
        ("size", "22.9 MB", "4.0x smaller"),
        ("output", "exact", ""),
    ]


@pytest.mark.parametrize(
    ("before", "after", "change", "good"),
    [
        (100, 50, "2.0x smaller", True),
        (100, 99.5, "the same", None),
        (100, 95, "1.05x smaller", True),
        (100, 300, "3.0x larger", False),
        (0, 300, "", None),
    ],
)
def test_changes_in_words(before, after, change, good):
    changed = manifest(
        source={"name": "m", "bytes": before, "sha256": ""}, files={"m": {"bytes": after, "sha256": ""}}
    )  # fmt: skip
    size = comparisons(changed, None)[0]
    assert (size.change, size.good) == (change, good)


def test_the_recipe_is_not_deployed():
    assert deployable_bytes(manifest()) == 22_900_000


def test_integers_only_and_nothing_comparable():
    exact = Verification(4, (OutputFigures("y", "int64", 4, match=0.75),))
    text = Verification(4, (OutputFigures("y", "object", remark="not compared: text"),))
    for verification, after in ((exact, "75.00 % equal"), (text, "not compared")):
        lines = comparisons(manifest(verification=verification.to_json()), None)
        assert lines[1].after == after
        Page(render(data(verification=verification.to_json())))


def test_a_step_is_one_aligned_line_without_control_characters():
    assert step("prepare", "308 -> 181 nodes") == "prepare          308 -> 181 nodes"
    assert step("a-very-long-pass-name", "x") == "a-very-long-pass-name x"
    assert step("evil\x1b[2J", "a\nb\x07") == "evil\\x1b[2J      a\\nb\\x07"
    assert step_rich("prepare", "308 -> 181 nodes").plain == step("prepare", "308 -> 181 nodes")


def test_a_table_as_text_and_for_terminals():
    from rich.console import Console

    table = Table(("name", ">count"), (("[bold]a[/bold]", "1"), ("bb", "1,000")), title="Two", note="That is all.")
    assert to_text(table) == ("Two\nname            count\n[bold]a[/bold]      1\nbb              1,000\nThat is all.")
    console = Console(width=60, file=io.StringIO())
    console.print(to_rich(table))
    assert "[bold]a[/bold]" in console.file.getvalue()


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (units.bytes_text, 17, "17 B"),
        (units.bytes_text, 999, "999 B"),
        (units.bytes_text, 1000, "1.00 kB"),
        (units.bytes_text, 22_900_000, "22.9 MB"),
        (units.bytes_text, 999_999_999, "1.00 GB"),
        (units.bytes_text, 2.5e12, "2500 GB"),
        (units.seconds_text, 35e-6, "35.0 us"),
        (units.seconds_text, 0.00493, "4.93 ms"),
        (units.seconds_text, 0.9996, "1.00 s"),
        (units.seconds_text, 11.24, "11.2 s"),
        (units.seconds_text, 125, "2 min 5 s"),
        (units.count_text, 12_345, "12,345"),
        (units.count_text, 22_713_216, "22.7 M"),
        (units.count_text, 349_151_936, "349 M"),
        (units.ratio_text, 3.96, "4.0x"),
        (units.ratio_text, 1.05, "1.05x"),
        (units.ratio_text, 132.4, "132x"),
        (units.percent, 0.98328, "98.33 %"),
    ],
)
def test_units(function, value, text):
    assert function(value) == text


def drawn(text, kind):
    """Return the attributes of the elements of a class."""
    return [attributes for _, attributes in Page(text).elements if kind in (attributes.get("class") or "").split()]


def test_a_histogram_is_as_high_as_the_logarithm_and_sets_apart_what_is_cut_off():
    text = charts.histogram((0, 9, 99, 3, 1), -1.0, 4.0, (0.0, 3.0), "label")
    inside, outside = ([*re.findall(r"M(\d+) 100v-([\d.]+)h1", one["d"])] for one in drawn(text, "bars"))
    heights = {int(place): float(height) for place, height in inside}
    assert heights == {
        1: pytest.approx(50.0, abs=0.06),
        2: pytest.approx(100.0),
        3: pytest.approx(100 * np.log(4) / np.log(100), abs=0.06),
    }
    assert [(int(place), float(height)) for place, height in outside] == [(4, pytest.approx(15.1, abs=0.06))]
    (reach,) = drawn(text, "reach")
    assert (float(reach["x"]), float(reach["width"])) == (1.0, 3.0)


def test_a_histogram_of_nothing():
    assert "label" in charts.histogram((0, 0), 0.0, 1.0, None, "label")


def test_the_profile_tells_every_layer_and_leads_to_it():
    text = charts.profile([10.0, 40.0, 25.0], 10.0, 40.0, "label", told=["a<b", "b", "c"], links=["t0", "", "t2"])
    (line,) = drawn(text, "line")
    assert line["points"] == "0.00,100.0 50.00,0.0 100.00,50.0"
    assert [one.get("href") for tag, one in Page(text).elements if tag == "a"] == ["#t0", "#t2"]
    assert "a&lt;b" in text


def test_a_long_profile_keeps_the_worst_of_neighbours():
    values = [40.0] * 3000
    values[1234] = 3.0
    text = charts.profile(values, 0.0, 40.0, "label", told=[str(i) for i in range(3000)])
    assert len(drawn(text, "hit")) == 300
    assert "<title>1234</title>" in text


def test_the_front_is_what_nothing_beats():
    points = ((3.0, 5.0), (1.0, 1.0), (2.0, 4.0), (2.0, 3.0), (4.0, 5.0), (2.5, 0.0))
    dots = [charts.Dot(str(i), x, y, "") for i, (x, y) in enumerate(points)]
    assert [one.text for one in charts.step_front(dots, rising=True)] == ["1", "2", "0"]
    assert [one.text for one in charts.step_front(dots, rising=False)] == ["1", "5"]


def test_dots_lie_where_the_axes_say_with_the_better_end_up():
    axis = charts.Scale(0.0, 10.0, (0.0, 5.0))
    dots = [charts.Dot("1", 2.5, 8.0, "told", "chosen", "rung1")]
    marks = ["0", "5"]
    for falling, height in ((False, "20.00%"), (True, "80.00%")):
        text = charts.scatter(dots, (axis, marks), (axis, marks), "label", bound=5.0, falling=falling)
        (circle,) = (one for tag, one in Page(text).elements if tag == "circle")
        assert (circle["cx"], circle["cy"]) == ("25.00%", height)
        assert drawn(text, "bound")[0]["y1"] == "50.00%"


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=6))
def test_all_values_lie_on_their_axis(values):
    axis = charts.scale(values)
    assert axis.low < axis.high
    assert all(-1e-6 <= axis.place(value) <= 100 + 1e-6 for value in (*values, *axis.marks))
    assert len(axis.marks) <= 12


def test_the_ladder_is_told_as_it_was_climbed():
    text = render(data())
    page = Page(text)
    shown = page.text[page.text.index("How it was found") : page.text.index("What was done")]
    assert [shown.index(one.name) for one in RUNGS] == sorted(shown.index(one.name) for one in RUNGS)
    for told in ("28.0 dB", "4.00 MB", "2.00 ms (2.5x)", "the worker died twice", "failed", "not met", "chosen"):
        assert told in shown, told
    spots = [attributes.get("class") for attributes in drawn(text, "spot")]
    assert spots.count("spot chosen") == 2  # against size and against latency
    assert len(spots) == 6  # what failed has no place
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {one["href"][1:] for _, one in page.elements if "href" in one} <= ids


def test_budgets_and_measures_of_ones_own():
    own = dataclasses.replace(VERIFICATION, eval_before=0.91, eval_after=0.9)
    changes = {"budget": {"size": 4_200_000, "latency": 0.5}, "verification": {"data": "samples", **own.to_json()}}
    lines = {line.label: line for line in comparisons(manifest(**changes), None)}
    assert (lines["eval"].before, lines["eval"].after, lines["eval"].change) == ("0.91", "0.9", "-0.01")
    assert lines["eval"].good is False
    text = render(data(**changes))
    assert "Budget: size ≤ 4.20 MB, latency ≤ 0.5x." in Page(text).text
    across = [one for one in drawn(text, "bound") if one["y1"] == "0%"]
    assert len(across) == 1  # in the plot against size


def test_what_became_of_a_candidate():
    states = [
        Rung("a", "a", {"sqnr": 1.0}, 1, met=True),
        Rung("a", "a", {"sqnr": 1.0}, 1),
        Rung("a", "a", {"sqnr": 1.0}, 1, met=True, chosen=True),
        Rung("a", "a", {"sqnr": 1.0}, 1, chosen=True),
        Rung("a", "a", bytes=1),
        Rung("a", "a"),
    ]
    assert [one.state for one in states] == ["met", "not met", "chosen", "chosen, not met", "tried", "failed"]


def test_pictures_tell_range_steps_and_what_is_cut_off():
    text = Page(render(data())).text
    assert "uint8, −0.5 to 3 in steps of 0.0137,  1.2 % cut off" in text
    assert "int8, −128 to 127 steps, 64 scales, nothing cut off" in text
    assert "stays in float" in text


def test_layers_that_were_not_taken_say_why():
    page_data = dataclasses.replace(data(), layers=LayerFacts(remark="Not taken: for its size."))
    assert "Not taken: for its size." in Page(render(page_data)).text


def test_both_sections_count_the_same_kernels():
    """Functions that have no integer kernel are in float as well, whatever the target counts as left in float."""
    placed = {
        "runtime": "a runtime",
        "nodes": 40,
        "providers": {"CPUExecutionProvider": 40},
        "kernels": {"integer": {"com.microsoft.QGemm": 25}, "float": {"Relu": 8, "Softmax": 2}, "none": {"Reshape": 5}},
        "precisions": {},
        "copies": 0,
        "undone": [],
    }
    text = Page(render(ReportData(manifest(placement=placed)))).text
    really, where = text.index("What really runs"), text.index("What runs where")
    assert "10 in float" in text[really:where]
    assert "8 Relu, 2 Softmax" in text[really:where]
    assert "25 in integers" in text[really:where]
    assert "5 other operators" in text[really:where]
