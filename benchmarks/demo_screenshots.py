"""Screenshots of the demo's page for the documentation: a real model, asked about held-out items of the starter corpus.

    python benchmarks/demo_screenshots.py quickstart-out/model docs

writes demo_desktop.png (1280 x 900) and demo_phone.png (390 x 844). Needs the extra `demo`, Playwright and Chromium.
"""

import argparse
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from unimoe.demo.server import DemoServer
from unimoe.demo.settings import DemoSettings
from unimoe.starter_corpus.corpus import load_samples

# What is asked, by the name of the picture.
_QUESTIONS = {
    "demo_desktop.png": ("image-rocket-openmoji-0", "speech-penguin_flite-awb"),
    "demo_phone.png": ("speech-penguin_flite-awb",),
}
_SIZES = {"demo_desktop.png": (1280, 900), "demo_phone.png": (390, 844)}
_ANSWERED = """count => {
    const answers = document.querySelectorAll("#chat [data-testid=bot]");
    return answers.length == count && answers[count - 1].innerText != "…" && !document.querySelector(".stop-button");
}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("There is no Chromium here: install Debian's package chromium.", file=sys.stderr)
        return 2
    samples = {sample["id"]: sample for sample in load_samples("heldout")}
    with served(args.model) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, questions in _QUESTIONS.items():
            width, height = _SIZES[name]
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(address)
            for count, question in enumerate(questions, start=1):
                ask(page, samples[question], count)
            # The pointer and the text cursor are no part of the page.
            page.evaluate("document.activeElement.blur()")
            page.wait_for_timeout(500)
            page.screenshot(path=args.out / name, full_page=True)
            print(args.out / name, page.locator("#chat [data-testid=bot]").all_inner_texts())
        browser.close()
    return 0


def ask(page: Any, sample: dict[str, Any], count: int) -> None:
    """Send a question with its media, and wait for the answer, which is the page's `count`-th."""
    for item in sample["messages"][0]["content"]:
        if item["type"] == "text":
            page.fill("#box textarea", item["text"])
        else:
            with page.expect_response(lambda response: "/upload?" in response.url):
                page.set_input_files("#box input[type=file]", item["path"])
    page.click("#box .submit-button")
    page.wait_for_function(_ANSWERED, arg=count, timeout=120_000)


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of a demo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = DemoServer(DemoSettings(model, port=port))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.server.started and thread.is_alive():
            thread.join(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
        thread.join()
        server.close()


if __name__ == "__main__":
    sys.exit(main())
