"""The page in a real browser; needs Chromium and the extra `browser`."""

import base64
import io
import re
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from serving.site import serving

from diffsal.serving.composing import Rectangle, composed
from diffsal.serving.explained import explained, read_picture
from diffsal.serving.requests import Desk

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'diffsal[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

DESKTOP, PHONE = (1280, 900), (390, 844)
WAIT = 60_000  # milliseconds, on a machine that does other things


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def one(served):
    return served(3, ("ant", "bee", "cat"))


@pytest.fixture
def opened(chromium, one):
    """Opens the page: a further user each time. What goes wrong in it fails the test."""
    contexts, faults = [], []
    with serving(Desk(one)) as url:

        def open_page(size=DESKTOP, scheme="light"):
            width, height = size
            context = chromium.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            contexts.append(context)
            page = context.new_page()
            page.set_default_timeout(WAIT)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", lambda sent: faults.append(sent.url) if is_foreign(sent.url) else 0)
            # Choosers are intercepted some time after somebody first listens to them: in time.
            page.on("filechooser", lambda chooser: None)
            page.goto(url)
            page.wait_for_selector("#first .drop")
            return page

        def is_foreign(address):
            return not address.startswith((url, "data:", "blob:"))

        yield open_page
        for context in contexts:
            context.close()
    assert faults == []


@pytest.fixture
def file(png):
    """What a browser uploads."""

    def make(seed=0, **size):
        return {"name": f"{seed}.png", "mimeType": "image/png", "buffer": png(seed, **size)}

    return make


def give(page, file, where="#first"):
    page.set_input_files(f"{where} input", file)


def explain(page, file):
    give(page, file)
    page.wait_for_selector("#verdict strong")
    page.wait_for_selector("#lie-result img[src]")


def words(page, selector):
    return page.locator(selector).inner_text().replace("−", "-")


def numbers(page, selector):
    return [float(one) for one in re.findall(r"[-+]\d[\d.]*", words(page, selector))]


def settled(page, selector, before):
    """Waits until an element's words are others."""
    for _ in range(WAIT // 50):
        if words(page, selector) != before:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{selector} still says: {before}")


def test_an_image_is_explained(opened, one, file, png) -> None:
    page = opened()
    explain(page, file())
    told = explained(one, read_picture(one, png(), "0.png"))
    terms = [told[name] for name in ("evidence_for", "evidence_against", "residual", "margin")]
    assert numbers(page, "#sum") == pytest.approx(terms, abs=0.006)
    assert words(page, "#verdict").startswith(f"{told['true_name']} over {told['false_name']} by")
    shown = re.findall(r"\d\.\d{3}", words(page, "#probabilities"))
    expected = sorted(told["probabilities"], reverse=True)
    assert [float(p) for p in shown] == pytest.approx(expected, abs=6e-4)


@pytest.mark.slow
def test_a_click_reads_a_cell_and_a_region(opened, one, file, png) -> None:
    page = opened()
    explain(page, file())
    told = explained(one, read_picture(one, png(), "0.png"))
    box = page.locator("#map").bounding_box()
    row, column = 2, 5
    x, y = ((at + 0.5) / 8 for at in (column, row))
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    assert "row 3, column 6" in words(page, "#reading")
    cells = [told["cells"][name][row][column] for name in ("difference", "true", "false")]
    assert numbers(page, "#reading")[:3] == pytest.approx(cells, abs=6e-4)
    page.locator("#regions button").first.click()
    region = told["regions"][0]
    assert numbers(page, "#reading")[0] == pytest.approx(region["logits"], abs=6e-3)
    assert f"{region['cells']} cells" in words(page, "#reading")
    assert page.locator("#regions button").first.get_attribute("aria-pressed") == "true"


@pytest.mark.slow
def test_the_contrast_is_chosen(opened, one, file, png) -> None:
    page = opened()
    explain(page, file())
    told = explained(one, read_picture(one, png(), "0.png"), 1, "rest")
    before = words(page, "#verdict")
    page.select_option("#true", "1")
    settled(page, "#verdict", before)
    page.select_option("#false", "rest")
    sync_api.expect(page.locator("#verdict")).to_contain_text("bee over the rest by", timeout=WAIT)
    assert numbers(page, "#sum")[-1] == pytest.approx(told["margin"], abs=6e-3)
    page.select_option("#false", "1")
    sync_api.expect(page.locator("#explain-error")).to_contain_text("name another class")


@pytest.mark.slow
def test_opacity_shows_the_image_below(opened, file) -> None:
    page = opened()
    explain(page, file())
    looks = []
    for percent in ("0", "100"):
        page.locator("#opacity").fill(percent)
        looks.append(np.asarray(Image.open(io.BytesIO(page.locator("#map").screenshot()))))
    own = np.asarray(Image.open(io.BytesIO(file()["buffer"])).resize(looks[0].shape[1::-1]))
    distances = [np.abs(look[..., :3].astype(int) - own).mean() for look in looks]
    assert distances[0] < 20 < 40 < distances[1]


@pytest.mark.slow
def test_the_slider_makes_the_class_map_lie_and_nothing_else(opened, file) -> None:
    page = opened()
    explain(page, file())
    pictures = page.locator("#lie-result img")
    honest = [pictures.nth(index).get_attribute("src") for index in range(3)]
    page.locator("#strength").fill("100")
    page.wait_for_selector("#compared .moved")
    lying = [pictures.nth(index).get_attribute("src") for index in range(3)]
    true, false, difference = map(_distance, honest, lying)
    assert true > 15 < false
    assert difference < 1
    rows = page.locator("#compared .row").all_inner_texts()
    probability, margin, cells, class_map, share = (row.split("\n") for row in rows[1:])
    assert probability[1] == probability[2]
    assert margin[1] == margin[2]
    assert "10⁻" in cells[1] or "unchanged" in cells[1]
    assert float(class_map[1].removeprefix("changed by ")) > 0.01
    assert int(share[2].split()[0]) > int(share[1].split()[0]) + 30
    page.locator("#strength").fill("0")
    sync_api.expect(page.locator("#compared .moved")).to_have_count(0, timeout=WAIT)
    assert pictures.nth(0).get_attribute("src") == honest[0]


def _distance(one, other):
    """Mean difference of two pictures, in grey levels."""
    data = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), int)
        for uri in (one, other)
    ]
    return np.abs(data[0] - data[1]).mean()


@pytest.mark.slow
def test_a_composite_is_made_of_the_cells_that_are_dragged_over(opened, one, file, png) -> None:
    page = opened()
    explain(page, file())
    give(page, file(1), "#second")
    page.wait_for_selector("#margins .row")
    before = words(page, "#margins")
    donor = page.locator("#donor")
    donor.scroll_into_view_if_needed()
    box = donor.bounding_box()

    def at(row, column):
        share_x, share_y = (column + 0.5) / 8, (row + 0.5) / 8
        return box["x"] + share_x * box["width"], box["y"] + share_y * box["height"]

    page.mouse.move(*at(1, 2))
    page.mouse.down()
    page.mouse.move(*at(3, 4))
    page.mouse.move(*at(4, 6))
    page.mouse.up()
    settled(page, "#margins", before)
    pictures = (read_picture(one, png(seed), "a.png") for seed in (0, 1))
    found = composed(one, *pictures, Rectangle(1, 2, 5, 7))
    order = ("receiver", "donor", "uniform", "predicted", "actual")
    sync_api.expect(page.locator("#pasted")).to_contain_text(f"{round(100 * found['share'])} %")
    assert numbers(page, "#margins") == pytest.approx([found[one] for one in order], abs=6e-3)


@pytest.mark.slow
def test_bad_files_are_one_line_and_the_page_goes_on(opened, file, tmp_path) -> None:
    page = opened()
    bad = {"name": "<b>notes</b>.txt", "mimeType": "text/plain", "buffer": b"hello"}
    give(page, bad)
    error = page.locator("#first .error")
    sync_api.expect(error).to_contain_text("<b>notes</b>.txt: not a readable image")
    assert "Traceback" not in words(page, "body")
    assert page.locator("#explained").is_hidden()
    explain(page, file())
    assert error.inner_text() == ""
    verdict = words(page, "#verdict")
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(33 * 2**20)
    give(page, tmp_path / "large.png")
    sync_api.expect(error).to_contain_text("large.png: the file is larger than 32 MB")
    assert words(page, "#verdict") == verdict


@pytest.mark.slow
def test_two_users_at_once_do_not_meet(opened, one, file, png) -> None:
    pages = [opened(), opened()]
    for seed, page in enumerate(pages):
        give(page, file(seed))
    for page in pages:
        page.wait_for_selector("#compared .row")
    for page in pages:
        page.locator("#strength").fill("60")
    for seed, page in enumerate(pages):
        page.wait_for_selector("#compared .moved")
        told = explained(one, read_picture(one, png(seed), "a.png"))
        assert numbers(page, "#sum")[-1] == pytest.approx(told["margin"], abs=6e-3)
        margins = numbers(page, "#compared")[:2]
        assert margins == pytest.approx([told["margin"]] * 2, abs=6e-3)


@pytest.fixture
def room_for_one(monkeypatch):
    """Whoever gives an image has all others dropped."""
    monkeypatch.setattr("diffsal.serving.shelf.Shelf.__init__.__defaults__", (1,))


@pytest.mark.slow
def test_an_image_that_was_dropped_is_given_again(room_for_one, opened, file) -> None:
    mine, other = opened(), opened()
    explain(mine, file(0))
    verdict = words(mine, "#verdict")
    explain(other, file(1))
    mine.select_option("#true", "1")
    settled(mine, "#verdict", verdict)
    assert words(mine, "#explain-error") == ""


@pytest.mark.slow
def test_the_keyboard_is_enough(opened, file) -> None:
    page = opened()
    page.keyboard.press("Tab")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(file())
    page.wait_for_selector("#lie-result img[src]")
    to(page, "true")
    before = words(page, "#verdict")
    page.keyboard.press("b")  # of bee
    settled(page, "#verdict", before)
    to(page, "map")
    assert "row 5, column 5" in words(page, "#reading")
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert "row 4, column 3" in words(page, "#reading")
    to(page, "strength")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#compared .moved")
    assert words(page, "#strength-told") == "20 %"
    tab_until(page, "!!document.activeElement.closest('#second')")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(file(1))
    page.wait_for_selector("#margins .row")
    to(page, "donor")
    for key in ("ArrowDown", "ArrowUp", "Shift+ArrowLeft"):
        before = page.locator("#donor .chosen").get_attribute("d")
        page.keyboard.press(key)
        changed = page.locator("#donor .chosen").get_attribute("d") != before
        if changed:
            break
    assert changed


def to(page, name):
    tab_until(page, f"document.activeElement.id === '{name}'")


def tab_until(page, condition):
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate(condition):
            focus = page.evaluate(
                "getComputedStyle(document.activeElement.closest('.drop')"
                " ?? document.activeElement).outlineStyle"
            )
            assert focus != "none", "what has the focus does not show it"
            return
    raise AssertionError(f"not reached by Tab: {condition}")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 640)])
def test_nothing_runs_out_of_the_page(opened, file, size, scheme) -> None:
    page = opened(size, scheme)
    explain(page, file(0, height=60, width=90))
    give(page, file(1, height=90, width=30), "#second")
    page.wait_for_selector("#margins .row")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    inks = page.evaluate(_COLOURS)
    assert len(inks) > 30
    assert {ink for ink in inks if _contrast(*inks[ink]) < 4.5} == set()
    ground = _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.5) is (scheme == "light")


# The ink of every text, and the first ground behind it.
_COLOURS = """() => {
  const found = {};
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || !one.checkVisibility() || one.closest(".numbers")) continue;
    let behind = one, ground = "rgba(0, 0, 0, 0)";
    while (behind && ground === "rgba(0, 0, 0, 0)") {
      ground = getComputedStyle(behind).backgroundColor;
      behind = behind.parentElement;
    }
    const name = `${one.tagName} ${one.className} ${one.textContent.slice(0, 30)}`;
    found[name] = [getComputedStyle(one).color, ground];
  }
  return found;
}"""


def _luminance(colour):
    """Relative, as WCAG 2 has it."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _contrast(ink, ground):
    low, high = sorted([_luminance(ink), _luminance(ground)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
def test_names_are_text_however_they_are_written(chromium, served, file) -> None:
    names = ("<img src=x onerror=alert(1)>", "W" * 300, "a\nb\u202e" + "c " * 90)
    with serving(Desk(served(3, names))) as url:
        page = chromium.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(WAIT)
        page.goto(url)
        explain(page, file())
        assert page.locator("img[src=x]").count() == 0
        assert "<img src=x onerror=alert(1)>" in words(page, "#probabilities")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.close()
