"""Run by the interpreter that has playwright: opens a page, asks, and prints what it says.

python browser.py CHROMIUM URL [FIELD TEXT]
"""

from __future__ import annotations

import json
import sys

from playwright.sync_api import sync_playwright

_MS = 300_000


def ask(chromium: str, url: str, field: str = "", text: str = "") -> dict[str, object]:
    """The data attributes of the page and its visible texts after the answer.

    A page that is ready gets `text` in `field`; one that asks nothing is answered by itself.
    """
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        outside: list[str] = []
        page.on("request", lambda r: outside.append(r.url) if "//127.0.0.1" not in r.url else None)
        page.goto(url)
        adapter = page.evaluate("navigator.gpu?.requestAdapter().then((found) => found !== null)")
        ended = "body[data-state=answered], body[data-state=failed]"
        page.wait_for_selector(f"body[data-state=ready], {ended}", timeout=_MS)
        if page.get_attribute("body", "data-state") == "ready":
            page.fill(field, text)
            page.click("#ask")
            page.wait_for_selector(ended, timeout=_MS)
        found = {
            "adapter": bool(adapter),
            "state": page.get_attribute("body", "data-state"),
            "status": page.inner_text("#status"),
            "answer": page.inner_text("#answer"),
            "pieces": page.evaluate("document.querySelector('#answer').childNodes.length"),
            "ids": page.get_attribute("body", "data-ids"),
            "found": page.get_attribute("body", "data-found"),
            "problems": problems,
            "outside": [url for url in outside if not url.startswith(("blob:", "data:"))],
        }
        browser.close()
    return found


if __name__ == "__main__":
    print(json.dumps(ask(*sys.argv[1:])))
