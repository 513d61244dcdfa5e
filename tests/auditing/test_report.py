"""The report as a browser shows it, and what it is made of."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from auditing.samples import NAMES, SCRIPT, loaded_model, settings, write_index

from diffsal.auditing.report import data_uri
from diffsal.auditing.run import audit
from diffsal.data.index import read_index

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND"),
    *("--enable-logging=stderr", "--window-size=1400,2000", "--virtual-time-budget=20000"),
)
DARK, LIGHT = 0, 1
WIDTHS = (1280, 390)
HARNESS = """<!doctype html>
<pre id="result"></pre>
%s
<script>
addEventListener("load", () => {
  document.getElementById("result").textContent = JSON.stringify(
    [...document.querySelectorAll("iframe")].map(({contentWindow: view}) => ({
      width: view.innerWidth,
      needed: view.document.documentElement.scrollWidth,
      images: [...view.document.images].map(image => image.complete && image.naturalWidth),
      texts: [...view.document.querySelectorAll("h4")].map(heading => heading.textContent),
      scripts: view.document.scripts.length,
      requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
      paper: view.getComputedStyle(view.document.body).backgroundColor,
      ink: view.getComputedStyle(view.document.body).color,
      plot: view.getComputedStyle(view.document.querySelector("svg text")).fill,
    })));
});
</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    index = read_index(write_index(folder / "data", (5, 5)), classes=NAMES[:2])
    loaded = loaded_model(folder)
    audit(index, loaded, folder, settings(), loaded)
    return folder / "report.html"


class Page(HTMLParser):
    """Elements with their attributes, and the elements that were never closed."""

    VOID = ("img", "meta", "link")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text("utf-8"))


def test_elements_are_closed(page):
    assert page.open == []


def test_everything_is_inline(page):
    assert not page.all("script", "iframe", "object", "embed", "style[src]")
    addresses = [a[name] for _, a in page.elements for name in ("src", "href") if name in a]
    assert len(addresses) > 20
    assert all(address.startswith("data:") for address in addresses)


def test_it_can_be_read_aloud(page):
    assert all(image["alt"] for image in page.all("img"))
    assert all("scope" in cell for cell in page.all("th"))
    drawings = page.all("svg")
    assert all("aria-label" in one or one.get("aria-hidden") == "true" for one in drawings)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))


def test_file_names_stay_text(audited):
    assert SCRIPT in {Path(path).name for path in audited.table["path"]}
    assert "<script" not in audited.page


def test_nothing_is_loaded_from_elsewhere(audited):
    assert "http" not in audited.page.split("<body>")[0].replace("http-equiv", "")
    assert "url(" not in audited.page
    assert "default-src 'none'" in audited.page


def measured(report, tmp_path, scheme):
    """What a browser makes of the report at both widths, and its log."""
    frames = "\n".join(
        f'<iframe src="{report.as_uri()}" width="{width}" height="900" frameborder="0"></iframe>'
        for width in WIDTHS
    )
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS % frames, "utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}"),
            *(f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", harness.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    unescaped = re.sub(
        "&(lt|gt|amp);", lambda m: {"lt": "<", "gt": ">", "amp": "&"}[m[1]], result[1]
    )
    return json.loads(unescaped), done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_in_a_browser(report, tmp_path, scheme):
    views, log = measured(report, tmp_path, scheme)
    assert "CONSOLE" not in log
    assert [view["width"] for view in views] == list(WIDTHS)
    for view in views:
        assert view["needed"] <= view["width"]
        assert len(view["images"]) >= 20
        assert all(view["images"])
        assert view["requests"] == []
        assert view["scripts"] == 0
        assert any(text.endswith(SCRIPT) for text in view["texts"])
        paper, ink, plot = (brightness(view[name]) for name in ("paper", "ink", "plot"))
        assert paper > 0.9 if scheme == LIGHT else paper < 0.1
        assert min(abs(ink - paper), abs(plot - paper)) > 0.5


def brightness(colour):
    return np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255


def test_pictures_are_no_larger_than_needed():
    uri = data_uri(np.full((300, 900, 3), (255, 0, 0), np.uint8))
    assert uri.startswith("data:image/png;base64,")
    assert len(uri) < 2000
