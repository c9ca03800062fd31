"""The site that is made of the pages: whole, on its own, and as a forge shows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from pages import DOCS, PAGES
from test_page import Elements


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: a warning fails, which --quiet would hide from --strict."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages_of(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_the_site_has_every_page_and_the_files_they_link_to(site: Path) -> None:
    made = {page.relative_to(site).with_suffix(".md").as_posix() for page in pages_of(site)}
    assert made == {"404.md", *(page.relative_to(DOCS).as_posix() for page in PAGES[1:])}
    assert (site / "repository" / "benchmarks" / "results" / "export-cpu.json").is_file()


def test_the_site_asks_nothing_of_another_server(site: Path) -> None:
    fetched = []
    for page in pages_of(site):
        for tag, attributes in Elements(page.read_text(encoding="utf-8")).found:
            if tag in {"script", "img", "source", "iframe"} or (tag == "link" and attributes.get("rel") != "canonical"):
                fetched += [value for name in ("src", "href", "srcset") if (value := attributes.get(name))]
    assert len(fetched) > 100
    assert [address for address in fetched if "//" in address] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert [found for text in styles for found in re.findall(r"@import|url\(['\"]?https?:", text)] == []


def test_no_list_or_table_came_out_as_a_paragraph(site: Path) -> None:
    """The site's Markdown wants an empty line before them, a forge's does not."""
    for page in pages_of(site):
        paragraphs = re.findall(r"<p>(.*?)</p>", page.read_text(encoding="utf-8"), re.DOTALL)
        assert [text for text in paragraphs if re.search(r"^(?:[-*|] |\d+\. )", text, re.MULTILINE)] == [], page.name


def test_a_cell_shows_a_bar_in_code(site: Path) -> None:
    assert "<code>&lt;|im_end|&gt;</code>" in (site / "data.html").read_text(encoding="utf-8")
