"""The demo's page in headless Chromium, at the width of a desk and of a phone: asked, stopped, closed, attacked."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_demo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A laptop may lack the browser; CI installs it.
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="there is no Chromium here")
pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ICON, WORD = (tiny_demo.medium_of(sample) for sample in tiny_demo.learned_samples()[:2])

BUBBLE = "#chat [data-testid=bot]"
_ANSWERED = f"""count => {{
    const bubbles = document.querySelectorAll("{BUBBLE}");
    return bubbles.length == count && bubbles[count - 1].innerText != "…" && !document.querySelector(".stop-button");
}}"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    folder = tiny_demo.save_model(tmp_path_factory.mktemp("demo") / "tiny")
    with tiny_demo.serving(folder, options={"max_new_tokens": 4000, "do_sample": False}) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, whose microphone hears the word again and again."""
    import soundfile

    heard = tmp_path_factory.mktemp("microphone") / "word.wav"
    soundfile.write(heard, *soundfile.read(WORD))
    arguments = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={heard}",
    ]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


class Page:
    """An open page, with what went wrong on it and what it asked for elsewhere."""

    def __init__(self, browser: Any, address: str, size: dict[str, int]) -> None:
        self.page = browser.new_page(viewport=size)
        self.page.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#box textarea")

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", f"blob:{address}")):
            self.elsewhere.append(url)

    def ask(self, text: str, *files: str | dict[str, Any]) -> None:
        for file in files:
            with self.page.expect_response(lambda response: "/upload?" in response.url):
                self.page.set_input_files("#box input[type=file]", file)
        self.page.fill("#box textarea", text)
        self.page.click("#box button.submit-button")

    def begin_anew(self) -> None:
        self.page.click("#anew")
        playwright.expect(self.page.locator(BUBBLE)).to_have_count(0)

    def answers(self, count: int) -> list[str]:
        """The model's bubbles once there are so many, the last of them whole."""
        self.page.wait_for_function(_ANSWERED, arg=count)
        return self.page.locator(BUBBLE).all_inner_texts()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_an_icon_and_a_word_are_answered(
    demo: tuple[str, Any], browser: Any, size: dict[str, int], tmp_path: Path
) -> None:
    opened = Page(browser, demo[0], size)
    page = opened.page
    opened.ask("What is in the picture?", ICON)
    assert opened.answers(1) == [tiny_demo.ICON_ANSWER]
    assert "image" in page.inner_text("#experts").lower()
    opened.ask("What word is spoken?", WORD)
    assert opened.answers(2) == [tiny_demo.ICON_ANSWER, tiny_demo.WORD_ANSWER]
    assert "speech" in page.inner_text("#experts").lower()
    loaded = "[...document.querySelectorAll('#chat img')].every(image => image.naturalWidth > 0)"
    assert page.evaluate(loaded)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for part in ("#chat", "#box", "#anew"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"], part
        assert box["y"] + box["height"] <= size["height"], part
    shot = page.screenshot(path=tmp_path / "page.png")
    assert len(shot) > 10_000
    opened.begin_anew()
    page.click("#chat button:has-text('A spoken word')")
    assert opened.answers(1) == [tiny_demo.WORD_ANSWER]
    assert (opened.errors, opened.elsewhere) == ([], [])
    page.close()


def test_the_microphone_is_heard(demo: tuple[str, Any], browser: Any) -> None:
    opened = Page(browser, demo[0], PHONE)
    page = opened.page
    page.click("#box [data-testid=microphone-button]")
    page.click("#box [aria-label='Start recording']")
    playwright.expect(page.locator("#box .timestamp")).not_to_have_text("0:00")
    page.click("#box [aria-label='Stop recording']")
    with page.expect_response(lambda response: "/upload" in response.url):
        page.click("#box [aria-label='Attach audio']")
    opened.ask("What word is spoken?")
    [answer] = opened.answers(1)
    assert not answer.startswith("⚠")
    assert "speech" in page.inner_text("#experts").lower()
    page.close()


def test_an_answer_stops_at_the_button_and_when_its_page_closes(demo: tuple[str, Any], browser: Any) -> None:
    address, server = demo
    opened = Page(browser, address, DESK)
    page = opened.page
    opened.ask(tiny_demo.SONG)
    page.wait_for_function("document.querySelector('#chat [data-testid=bot]')?.innerText.length > 30")
    page.click("#box button.stop-button")
    [song] = opened.answers(1)
    assert song.startswith("la la")
    assert server.line.turns == []
    opened.ask(tiny_demo.SONG)
    page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]')[1]?.innerText.length > 30")
    [turn] = server.line.turns
    page.close()
    assert turn.stopped.wait(20)


def test_nothing_that_is_shown_can_act(demo: tuple[str, Any], browser: Any) -> None:
    opened = Page(browser, demo[0], DESK)
    page = opened.page
    name = "<img src=x onerror=document.title='hacked'>.png"
    opened.ask(tiny_demo.MARKUP, {"name": name, "mimeType": "image/png", "buffer": b"no picture"})
    [sentence] = opened.answers(1)
    assert sentence.startswith("⚠ The image cannot be used: not a readable image")
    opened.begin_anew()
    opened.ask(tiny_demo.MARKUP)
    assert opened.answers(1) == [tiny_demo.MARKED_UP]
    opened.ask(tiny_demo.MARKED_UP)
    opened.answers(2)
    assert page.locator("#chat [data-testid=user]").first.inner_text() == tiny_demo.MARKUP
    assert page.locator("#chat [data-testid=user]").last.inner_text() == tiny_demo.MARKED_UP
    assert "hacked" not in page.title()
    assert page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    page.close()
