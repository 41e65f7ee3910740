# SPDX-License-Identifier: Apache-2.0
"""SVG pictures are well-formed, whatever a title says."""

from __future__ import annotations

from xml.etree import ElementTree

from modellink.kernels.svg import picture, text


def test_a_title_is_escaped_and_the_document_parses() -> None:
    root = ElementTree.fromstring(picture(40, 30, [text(1.5, 2, "a < b & c", anchor="end", size=15)]))
    assert root.attrib["viewBox"] == "0 0 40 30"
    (found,) = root.iter("{http://www.w3.org/2000/svg}text")
    assert (found.text, found.attrib["x"], found.attrib["text-anchor"]) == ("a < b & c", "1.5", "end")
