"""The page in a browser: it is drawn, in both modes, and loads nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from lit_accel.report import report
from tests.report.planted import write_arm, write_dense

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIGHT, DARK = "1", "0"
EVIL = "</script><b>evil</b>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_dense(folder / "runs", deviation=0.003)
    write_arm(folder / "runs", "method", 1.6, 0.2, deviation=0.003, sizes=(1000, 400))
    write_arm(folder / "evil", "evil", 1.2, 0.1)
    return report([folder / "runs", f"{EVIL}={folder / 'evil'}"], output=folder).page


def browse(page, tmp_path, mode, *options):
    """What the browser says on stdout and on stderr."""
    return subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=8000",
            "--window-size=1400,1000",
            f"--blink-settings=preferredColorScheme={mode}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


class Links(HTMLParser):
    """Every address that a tag would load, and the tags."""

    def __init__(self):
        super().__init__()
        self.addresses, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]


def test_nothing_is_loaded(page):
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.addresses == []
    assert not {"link", "iframe", "img", "object", "base", "form"} & set(links.tags)
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(styles) >= 1
    assert not any("url(" in style or "@import" in style for style in styles)
    # And the browser is told to load nothing, whatever plotly might want.
    assert "default-src 'none'" in text
    assert "unsafe-eval" not in text.split("</head>")[0]
    assert '"showSendToCloud": false' in text


def test_a_label_is_text(page):
    assert "<b>evil</b>" not in page.read_text()


def test_the_words_are_there(page):
    text = page.read_text()
    for words in ("Saved at equal loss", "Realised share", "Taken as dense: dense (12 runs)", "How to read this"):
        assert words in text


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize(("mode", "theme"), [(LIGHT, "light"), (DARK, "dark")])
def test_the_figure_is_in_the_dom_in_both_modes(page, tmp_path, mode, theme):
    result = browse(page, tmp_path, mode, "--dump-dom")
    dom = result.stdout
    assert f'data-theme="{theme}"' in dom
    # Two panels, in each of them a line and the ends of each arm; a legend with each arm once.
    assert len(re.findall(r'<g class="subplot (xy|x2y2)"', dom)) == 2
    assert len(re.findall(r'class="legendtoggle"', dom)) == 4
    assert len(re.findall(r'class="trace scatter', dom)) == 2 * (12 + 3 + 3 + 3 + 2)
    legend = re.findall(r'<text class="legendtext[^>]*>(.*?)</text>', dom)
    assert legend == ["dense frontier (95 %)", "dense", "method", "&lt;/script&gt;&lt;b&gt;evil&lt;/b&gt;"]
    assert "Refused to" not in result.stderr
    assert "Content Security Policy" not in result.stderr
    assert "Uncaught" not in result.stderr


CLICKS = """<script>
setTimeout(function () {
  document.getElementById("theme").click();
  for (const kind of ["mousedown", "mouseup"]) {
    document.querySelectorAll(".legendtoggle")[2].dispatchEvent(new MouseEvent(kind, { bubbles: true, view: window }));
  }
  setTimeout(function () {
    const hidden = document.getElementById("curves").data.filter((trace) => trace.visible === "legendonly");
    document.body.dataset.hidden = hidden.map((trace) => trace.legendgroup + " " + trace.xaxis).join(", ");
  }, 1500);
}, 1000);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
def test_one_click_hides_an_arm_and_one_switches_the_mode(page, tmp_path):
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text().replace("</body>", CLICKS))
    dom = browse(clicked, tmp_path, LIGHT, "--dump-dom").stdout
    # Three runs and their ends, in both panels.
    expected = ", ".join(["arm method x"] * 4 + ["arm method x2"] * 4)
    assert f'data-hidden="{expected}"' in dom
    assert 'data-theme="dark"' in dom


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
def test_light_and_dark_look_different_and_neither_is_blank(page, tmp_path):
    shades = {}
    for mode in (LIGHT, DARK):
        picture = tmp_path / f"{mode}.png"
        browse(page, tmp_path, mode, f"--screenshot={picture}")
        image = matplotlib.image.imread(picture)[..., :3]
        shades[mode] = np.median(image)
        assert len(np.unique((image * 255).astype(int).reshape(-1, 3), axis=0)) > 100
        assert image.std() > 0.05
    assert shades[LIGHT] > 0.9
    assert shades[DARK] < 0.2
