"""For MkDocs: what pages and docstrings say to others than MkDocs reads well on the site, too.

A link to a file outside of docs/ leads to where the repository is published (`repo_url`), or becomes the file's path where that
is not known; a picture there is copied to the site. One
that is not there is a warning, and with that an error of `make docs`. A docstring names things as :class:`Name`, which the site
shows as code.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(<code>)~?")
log = logging.getLogger("mkdocs.hooks.outside")


def _outside(page: str, target: str) -> str | None:
    """The path from the root of what a page links to; None if that is a page of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def on_files(files: Any, config: Any) -> Any:
    """Copies the pictures that pages show from elsewhere."""
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for picture, _, target, _ in LINK.findall(Path(page.abs_src_path).read_text()):
            path = _outside(page.src_uri, target)
            if picture and path and files.get_file_from_path(f"pictures/{path}") is None and (ROOT / path).exists():
                files.append(File.generated(config, f"pictures/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites the links, those in blocks of code left as they are."""
    source = page.file.src_uri

    def rewritten(link: re.Match) -> str:
        picture, text, target, anchor = link.groups()
        path = _outside(source, target)
        if path is None:
            return link.group(0)
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which is not there", source, path)
        if picture:
            return f"![{text}]({posixpath.relpath(f'pictures/{path}', posixpath.dirname(source) or '.')})"
        if not config.repo_url:
            return f"{text} (`{path}`)" if path not in text else text
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{text}]({config.repo_url}/{kind}/main/{path}{anchor or ''})"

    blocks = CODE.findall(markdown)
    parts = [LINK.sub(rewritten, part) for part in CODE.split(markdown)]
    return "".join(part + block for part, block in zip(parts, [*blocks, ""], strict=True))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Leaves out what says of a name in a docstring whether it is a class or a function."""
    return ROLE.sub(r"\1", html)
