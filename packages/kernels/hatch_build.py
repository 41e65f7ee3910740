# SPDX-License-Identifier: Apache-2.0
"""Completes the metadata of a package when it is built: its README as a package index shows it, and its project URLs.

A package index knows nothing of the repository, so the README's relative links and anchors become absolute. The address of
the repository is MODELLINK_REPOSITORY, or `repository` under `[tool.modellink]` in the root pyproject.toml. Without an
address a link keeps only its text. All packages have the same copy of this file, since a build sees one folder only; an
unpacked source archive has the finished metadata in PKG-INFO, and hatchling takes it from there.
"""

from __future__ import annotations

import os
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)|\[(?P<text>[^\[\]]+)\]\((?P<target>[^()\s]+)\)", re.DOTALL | re.MULTILINE)


def repository(root: Path) -> str:
    """Return the address of the repository that the folder `root` is in, without a final slash; empty if it is unknown."""
    settings = root / "pyproject.toml"
    known = tomllib.loads(settings.read_text("utf-8")).get("tool", {}).get("modellink", {}) if settings.is_file() else {}
    return str(os.environ.get("MODELLINK_REPOSITORY") or known.get("repository", "")).rstrip("/")


def absolute(text: str, readme: str, address: str) -> str:
    """Return a Markdown text with absolute links only; code is left alone.

    Args:
        readme: path of the text in the repository.
        address: of the repository; empty: links that are not absolute become plain text.
    """
    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] or re.match(r"[a-z]+:", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(readme), path)) if path else readme
        url = f"{address}/blob/HEAD/{path}{'#' if anchor else ''}{anchor}"
        return f"[{match['text']}]({url})" if address else match["text"]
    return CODE_OR_LINK.sub(link, text)


class Metadata(MetadataHookInterface):
    """Sets `readme` and `urls`, which pyproject.toml declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        folder = Path(self.root)
        address, place = repository(folder.parent.parent), f"packages/{folder.name}"
        text = absolute((folder / "README.md").read_text("utf-8"), f"{place}/README.md", address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {"Repository": address, "Issues": f"{address}/issues",
                            "Changelog": f"{address}/blob/HEAD/{place}/CHANGELOG.md"} if address else {}
