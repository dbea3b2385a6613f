"""The page of ``rotq report``: what is in it, and how a browser takes it."""

import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_reports import layer_result, make_report

from rotq.report.figures import bits_figure, error_figure, positions_figure
from rotq.report.page import Page, Sample, foreign, render_page

HOSTILE = '<script>alert("x")</script>'


def compared(name: str, kl: float) -> dict[str, Any]:
    interval = {"mean": kl, "low": kl / 2, "high": 2 * kl}
    evaluation = {"ppl": 20.0, "kl": kl, "kl_p50": kl, "kl_p99": kl, "kl_p999": kl, "top1": 0.9}
    evaluation |= {"reference_ppl": 19.0, "tokens": 300, "protocol": "windowed"}
    return {
        "name": name,
        "bytes": 10**8,
        "bits_all_in": 4.0,
        "bits": 3.3,
        "seconds": 60.0,
        "evaluation": evaluation,
        "ln_ratio": interval,
        "against_first": None,
    }


def whole_page() -> Page:
    layers = tuple(
        layer_result(f"model.layers.{block}.{kind}", bits=bits, relative_error=0.01 * (block + 1))
        for block in range(4)
        for kind, bits in (("mlp.up_proj", 3), ("mlp.down_proj", 4))
    )
    change = {"before": {"max_over_rms": 9.0}, "after": {"max_over_rms": 3.0}}
    flatness = {f"model.layers.{block}.down": change for block in range(4)}
    job = make_report(layers=layers, flatness=flatness)
    return Page(
        title="a & b",
        jobs={"a": job, HOSTILE: None},
        comparison={
            "reference": "dense",
            "text": "t.txt",
            "checkpoints": [compared("a", 0.1), compared(HOSTILE, 0.4)],
        },
        positions={"a": [0.1, 0.2, 0.3], HOSTILE: [0.4] * 3},
        kv={"dense": [0.01, 0.02], "a": [0.02, 0.03]},
        kv_preset="k3v3",
        sample=Sample(prompt="Once", texts={"dense": " upon a time", "a": " </pre>"}),
    )


def test_every_part_is_there_and_foreign_text_is_text() -> None:
    html = render_page(whole_page())
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert titles[:4] == ["Quality and size", "Size against KL", "How sure", "KL over positions"]
    assert {"What was done: a", "Error of each layer", "Bits", "Flatness"} <= set(titles)
    assert titles[-2:] == ["Packed keys and values", "A text, side by side"]
    assert "<script" not in html
    assert html.count("<svg") == html.count("</svg>") == 7
    assert "&lt;/pre&gt;" in html


def test_a_page_asks_for_nothing() -> None:
    html = render_page(whole_page())
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_what_was_not_measured_is_said() -> None:
    html = render_page(Page(title="a", jobs={"a": make_report()}))
    assert "give --reference MODEL and --text FILE" in html
    assert "neither rotates nor rounds activations" in html
    assert "give --kv PRESET" in html


def test_bars_are_as_high_as_errors() -> None:
    layers = [layer_result(f"model.layers.{n}.up", relative_error=e) for n, e in enumerate((1, 2))]
    svg = error_figure(make_report(layers=tuple(layers))).svg()
    first, second = (float(height) for height in re.findall(r'height="([\d.]+)" stroke', svg))
    assert second == pytest.approx(2 * first, rel=0.01)
    assert "block 1, up: 200.000%" in svg


def test_experts_of_a_block_are_one_bar() -> None:
    layers = [
        layer_result(f"model.layers.0.mlp.experts.{n}.up", bits=bits)
        for n, bits in enumerate((2, 4))
    ]
    svg = bits_figure(make_report(layers=tuple(layers))).svg()
    assert svg.count("<rect") == 1
    assert "mlp.experts.*.up: 3 bits, 3.400 stored, mean of 2" in svg


def test_many_positions_are_means_of_neighbours() -> None:
    svg = positions_figure({"a": [0.0, 1.0] * 320}).svg()
    points = re.findall(r'points="(.*?)"', svg)[0].split()
    assert len(points) == 64
    assert len({point.split(",")[1] for point in points}) == 1


def test_only_a_page_of_its_own_is_known(tmp_path: Path) -> None:
    page, other = tmp_path / "page.html", tmp_path / "other.html"
    page.write_text(render_page(whole_page()))
    other.write_text("<!doctype html><title>mine</title>")
    assert foreign(page) is None
    assert foreign(other) == "exists and is no page of rotq's"
    assert foreign(tmp_path) == "is no plain file"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


def colours(png: bytes) -> set[bytes]:
    """Distinct pixels of a screenshot, on rows that are stored without a filter or with any."""
    width, height, _, kind = struct.unpack(">IIBB", png[16:26])
    chunks, at = b"", 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            chunks += png[at + 8 : at + 8 + size]
        at += size + 12
    depth = 4 if kind == 6 else 3
    raw = zlib.decompress(chunks)
    assert len(raw) == height * (1 + width * depth)
    return {raw[i : i + depth] for i in range(1, len(raw) - depth, depth)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_a_complaint(browser: Any, tmp_path: Path, scheme: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(render_page(whole_page()))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(file.as_uri())
    assert browser.get_log("browser") == []
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    shades = [int(number) for number in re.findall(r"\d+", back)[:3]]
    assert max(shades) < 60 if scheme == "dark" else min(shades) > 200
    texts = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    )
    inks = {sum(map(int, re.findall(r"\d+", fill)[:3])) for fill in texts}
    assert min(inks) > 380 if scheme == "dark" else max(inks) < 380
    charts = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(charts) == 7
    assert min(charts) > 50
    wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    assert len(colours(browser.get_screenshot_as_png())) > 20
