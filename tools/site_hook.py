"""A hook of MkDocs for what a forge shows and the site would not.

A link to a file beside docs/, as `[results](../benchmarks/results/train-cpu.json)`, leads to a copy of it in the site,
which has no address of the repository to lead to. A folder can't be shown there: --strict reports a link to one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

COPIES = "repository"


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    docs = Path(config.docs_dir)
    here = (docs / page.file.src_uri).parent

    def in_the_site(link: re.Match[str]) -> str:
        target = (here / link[1]).resolve()
        if target.is_relative_to(docs) or not target.is_file():
            return link[0]
        uri = f"{COPIES}/{target.relative_to(docs.parent).as_posix()}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        return f"]({os.path.relpath(docs / uri, here)})"

    linked = re.sub(r"\]\((\.\./[^)#\s]+)\)", in_the_site, markdown)
    # a forge takes the \ away that keeps a | from ending a table's cell; in code the site would show it
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), linked)
