"""The pages in a real browser, where there is one: nothing hangs over on a telephone, in light and in dark."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qgraph.pipeline import Report
from qgraph.report.data import ReportData
from qgraph.report.html import render
from qgraph.report.ladder import Rung
from qgraph.report.layers import LayerFacts, Picture
from qgraph.report.side_by_side import Contender, SideBySide
from qgraph.report.side_by_side import render as render_comparison
from qgraph.runtime.difference import TensorError

LONG = "/model/backbone/stages.3/blocks.11/attention/very_long_name_without_any_place_to_break_it" * 2
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser() -> str:
    """Return the path of a Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser to look at the pages with: none of {', '.join(names)} is on the path")
    return found


MEASURE = """
<!doctype html><meta charset="utf-8"><title>waiting</title>
<body style="margin:0">{frames}<pre id="told"></pre>
<script>
addEventListener("load", () => {
  const told = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    for (const one of page.querySelectorAll("details")) one.open = true;
    const main = page.querySelector("main"), padding = parseFloat(getComputedStyle(main).paddingRight);
    const edge = main.getBoundingClientRect().right - padding;
    const over = [...page.querySelectorAll("body *")].filter((one) =>
      one.getBoundingClientRect().right > edge + 0.5 && one !== main && !one.closest("pre, svg"));
    const style = frame.contentWindow.getComputedStyle(page.body);
    const texts = [...page.querySelectorAll("svg.scatter text")].map((one) => one.getBoundingClientRect().height);
    return {
      width: root.clientWidth, scroll: root.scrollWidth, ground: style.backgroundColor, ink: style.color,
      over: over.slice(0, 5).map((one) => one.outerHTML.slice(0, 120)),
      least: Math.min(...texts), sections: page.querySelectorAll("section").length,
    };
  });
  document.getElementById("told").textContent = JSON.stringify(told);
});
</script>
"""


def measure(browser: str, page: str, folder: Path, *, dark: bool) -> list[dict]:
    """Return what the browser says of the page in frames of several widths."""
    frames = "".join(
        f'<iframe srcdoc="{html.escape(page)}" style="border:0;display:block;width:{width}px;height:900px"></iframe>'
        for width in WIDTHS
    )
    path = folder / "measure.html"
    path.write_text(MEASURE.replace("{frames}", frames), encoding="utf-8")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom",
        "--virtual-time-budget=5000",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=1400,2000", path.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert 'id="told">[' in done.stdout, done.stderr[-2000:]
    text = done.stdout.split('id="told">', 1)[1].split("</pre>", 1)[0]
    return json.loads(html.unescape(text))


def report_page() -> str:
    tensors = tuple(
        TensorError(f"{LONG}.{i}", f"{LONG}.{i}", "Conv", 20.0 + i % 17, loss_db=float(i % 5)) for i in range(60)
    )
    pictures = tuple(
        Picture(tensors[i].name, f"{LONG}.weight", kind, tuple(range(40)), -1.0, 1.0, -0.5, 0.75, "uint8", 0.01)
        for i in range(4)
        for kind in ("activation", "weight")
    )
    rungs = tuple(
        Rung(
            name=LONG, pipeline=f"mixed-precision{{nodes=[{LONG}]}}", figures={"top1": 0.02 / i, "sqnr": 20.0 + i},
            bytes=10**6 * i, seconds=0.001 * i, speedup=2.0, remark=LONG, met=i > 3, chosen=i == 4,
        )
        for i in range(1, 6)
    )  # fmt: skip
    output = {
        "name": LONG, "dtype": "float32", "values": 10, "sqnr_db": 30.0, "cosine": 0.99, "max_abs_error": 0.1,
        "match": None, "top1_agreement": 0.98, "broken": 0, "excluded": 0, "remark": LONG, "exact": False,
    }  # fmt: skip
    manifest = {
        "source": {"name": f"{LONG}.onnx", "bytes": 10**7, "sha256": "ab" * 32},
        "target": "cpu-int8",
        "versions": {"onnxruntime": "1.31.1"},
        "skipped": [{"node": LONG, "reason": f"{LONG} is not constant"}],
        "kernels": {"integer": {LONG: 3}, "float": {"Softmax": 1}, "other": {}, "left_in_float": []},
        "tolerance": {"top1": 0.005},
        "verification": {
            "data": "held-back samples", "samples": 10, "outputs": [output], "labelled": 10, "accuracy_before": 0.9,
            "accuracy_after": 0.8, "eval_before": None, "eval_after": None,
        },
        "files": {f"{LONG}.onnx": {"bytes": 10**6, "sha256": "cd" * 32}},
        "failures": [LONG],
    }  # fmt: skip
    reports = {"compress": Report(parts=(Report(name="qdq", changed=3, notes=(LONG,)), Report(name=LONG)))}
    layers = LayerFacts(tensors, pictures, 4)
    return render(ReportData.build(manifest, None, reports, seconds=3.0, layers=layers, search=rungs))


def comparison_page() -> str:
    contenders = tuple(
        Contender(
            label=f"{LONG}-{i}", path=LONG, target="cpu-int8", pipeline=f"qdq{{exclude=[{LONG}]}}", verified=i > 1,
            bytes=10**6 * i, seconds=0.001, speedup=2.0 / i, sqnr_db=20.0 + i, cosine=0.999, accuracy_before=0.9,
            accuracy=0.9 - 0.01 * i, samples=10, kernels={"integer": 3, "float": i},
        )
        for i in range(1, 5)
    )  # fmt: skip
    return render_comparison(SideBySide(f"{LONG}.onnx", 10**7, "ab" * 32, contenders))


@pytest.mark.parametrize("make", [report_page, comparison_page])
def test_nothing_hangs_over_and_both_schemes_are_drawn(browser: str, tmp_path: Path, make):
    page = make()
    light = measure(browser, page, tmp_path, dark=False)
    dark = measure(browser, page, tmp_path, dark=True)
    for told in (*light, *dark):
        assert told["scroll"] <= told["width"], told
        assert told["over"] == [], told
        assert told["sections"] >= 3
        assert told["least"] >= 11, "texts in drawings shrink"
    assert [one["width"] for one in light] == list(WIDTHS)
    assert {one["ground"] for one in light} == {"rgb(253, 253, 251)"}
    assert {one["ground"] for one in dark} == {"rgb(19, 21, 22)"}


def test_the_measuring_sees_what_hangs_over(browser: str, tmp_path: Path):
    page = report_page().replace("<footer", '<div style="width:500px">x</div><footer')
    narrow, wide = measure(browser, page, tmp_path, dark=False)
    assert narrow["over"]
    assert not wide["over"]
