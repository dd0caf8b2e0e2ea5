"""The page that a package index shows: README.md, with links that lead somewhere from there, too. All else is in pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https://)([^)\s]+)\)")


def page(text: str, home: str | None) -> str:
    """The page with absolute links to the repository at `home`.

    As long as nobody has said where that is, it has no links there, and no picture with what is said of it.
    """
    if home is None:
        text = re.sub(r"^!\[.*?\n\n", "", text, flags=re.DOTALL | re.MULTILINE)

    def led(link: re.Match) -> str:
        picture, text, target = link.groups()
        if home is None:
            return text
        place = home.replace("github.com", "raw.githubusercontent.com") if picture else f"{home}/blob"
        return f"{picture}[{text}]({place}/main/{target})"

    return LINK.sub(led, text)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    text = page((ROOT / "README.md").read_text(encoding="utf-8"), urls.get("Repository"))
    setup(long_description=text, long_description_content_type="text/markdown")
