"""What the documentation site adds to docs/: pages of the repository's root, and notebooks.

mkdocs calls these functions (`hooks` in mkdocs.yml). CHANGELOG, CONTRIBUTING and SECURITY become
pages below `project/`, notebooks become pages as they were last run, and links to files that are no
pages become the files' names, since a site has no source tree.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PROJECT = {f"{name}.md": f"project/{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING")}
PROJECT |= {"SECURITY.md": "project/security.md", "README.md": "index.md"}
"""Pages of the root by their names there, and where the site has them."""
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]+)?\)")
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root and the notebooks; leave out the files of notebooks themselves."""
    for name, place in PROJECT.items():
        if place.startswith("project/"):
            text = (ROOT / name).read_text("utf-8")
            files.append(File.generated(config, place, content=text))
    for file in [found for found in files if found.src_uri.endswith(".ipynb")]:
        page = notebook_page(json.loads(file.content_string))
        place = file.src_uri.replace(".ipynb", ".md")
        files.append(File.generated(config, place, content=page))
    return files


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: texts, code, and what the code printed when it was last run."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join(printed_text(output) for output in cell["outputs"]).rstrip()
        if printed:
            parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def printed_text(output: dict[str, Any]) -> str:
    """What one output of a cell shows as text; nothing of what went to stderr."""
    if output["output_type"] == "stream":
        return "" if output["name"] == "stderr" else "".join(output["text"])
    return "".join(output.get("data", {}).get("text/plain", [])) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site, and leave only the name of what is no page."""
    here = source_of(page.file.src_uri)
    parts = FENCED.split(markdown)
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda m: relink(m, here, page, files), part)
        for part in parts
    )


def source_of(place: str) -> str:
    """Where a page's text is in the repository."""
    back = {target: name for name, target in PROJECT.items() if target != "index.md"}
    return back.get(place, f"docs/{place}")


def relink(match: re.Match[str], here: str, page: Page, files: Files) -> str:
    """A link of the repository as a link of the site."""
    picture, text, target, fragment = match.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    place = PROJECT.get(path) or re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    if not path.startswith("docs/") and path not in PROJECT:
        return text
    found = files.get_file_from_path(place)
    if found is None:
        return match.group(0)  # mkdocs names what is missing
    if text in {target, posixpath.basename(target)}:
        text = title_of(found) or text
    start = posixpath.dirname(page.file.src_uri) or "."
    return f"{picture}[{text}]({posixpath.relpath(place, start)}{fragment or ''})"


def title_of(file: File) -> str:
    """The first heading of a page, which says more than its file's name."""
    heading = re.search(r"^# (.+)$", file.content_string, re.MULTILINE)
    return heading[1] if heading and file.src_uri.endswith(".md") else ""
