"""Run by the interpreter that has playwright: lays pages out and prints what does not fit.

python look.py CHROMIUM FOLDER_OF_SCREENSHOTS PAGE.html …

Each page is opened at every width, in light and dark, with everything unfolded, and printed. An
element with text must be as wide as its content, and inside the page; the page must not scroll to
the side. Prints one JSON object: page and setting → problems.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

WIDTHS = (400, 1000, 1600)
SCHEMES = ("light", "dark")
_FIND = """
() => {
  const hidden = (element) => element.closest("thead")?.offsetWidth === 1;
  document.querySelectorAll('details').forEach((one) => { one.open = true; });
  const width = document.documentElement.clientWidth, wrong = [];
  if (document.documentElement.scrollWidth > width) wrong.push('the page scrolls to the side');
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const box = element.getBoundingClientRect();
    const style = getComputedStyle(element);
    if (!own || !box.width || style.clipPath !== 'none' || hidden(element))
      continue;
    const name = `${element.tagName} ${element.textContent.trim().slice(0, 60)}`;
    const wide = element.scrollWidth > element.clientWidth + 1;
    if (!element.closest('svg') && element.clientWidth && wide)
      wrong.push(`clipped: ${name}`);
    if (box.left < -1 || box.right > width + 1) wrong.push(`outside: ${name}`);
    const drawing = element.closest('svg')?.getBoundingClientRect();
    if (drawing && (box.left < drawing.left - 2 || box.right > drawing.right + 2))
      wrong.push(`outside of its drawing: ${name}`);
    const size = drawing ? parseFloat(style.fontSize) * drawing.width /
      element.closest('svg').viewBox.baseVal.width : parseFloat(style.fontSize);
    if (size < 9) wrong.push(`${size.toFixed(1)} px: ${name}`);
    const ink = style.color.match(/[0-9.]+/g), paper = getComputedStyle(document.body)
      .backgroundColor.match(/[0-9.]+/g);
    if (!drawing && ink.slice(0, 3).join() === paper.slice(0, 3).join())
      wrong.push(`invisible: ${name}`);
  }
  return wrong;
}
"""


def look(browser: Browser, page: Path, shots: Path) -> dict[str, list[str]]:
    """The problems of one page, by setting; screenshots go to `shots`."""
    found = {}
    for width in WIDTHS:
        for scheme in SCHEMES:
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
            tab = context.new_page()
            problems: list[str] = []
            tab.on("pageerror", lambda error, said=problems: said.append(str(error)))
            tab.on(
                "request",
                lambda r, said=problems: said.append(r.url) if r.url[:5] != "file:" else None,
            )
            tab.goto(page.as_uri())
            name = f"{page.stem}-{width}-{scheme}"
            if scheme == "light" or width == WIDTHS[1]:
                tab.screenshot(path=shots / f"{name}.png", full_page=True)
            problems += tab.evaluate(_FIND)
            if width == WIDTHS[1]:
                tab.emulate_media(media="print")
                problems += [f"printed: {text}" for text in tab.evaluate(_FIND)]
            found[name] = problems
            context.close()
    return found


def main(chromium: str, shots: str, *pages: str) -> None:
    """Print the problems of all pages."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        found: dict[str, list[str]] = {}
        for page in pages:
            found |= look(browser, Path(page).resolve(), Path(shots))
        browser.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
