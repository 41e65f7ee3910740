# SPDX-License-Identifier: Apache-2.0
"""The recorded public configurations: their form, and the table of them in the README.

Not here: whether a family accepts them. Run as a program, it writes the table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "public"
README = FOLDER / "README.md"
TABLE = re.compile(r"(<!-- records -->\n).*?(<!-- end of records -->)", re.DOTALL)
RECORDS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
LAYERS = {"num_hidden_layers", "num_layers", "n_layer"}  # every release has one of them
WIDTH = {"hidden_size", "n_embed"}


def filled(text: str) -> str:
    """Return the README with its table generated from the records."""
    rows = [f"| {name} | {'yes' if record['verified'] else 'no'} | {record['source']} |\n" for name, record in RECORDS.items()]
    table = "| release | verified | source |\n|---|---|---|\n" + "".join(rows)
    return TABLE.sub(lambda match: match[1] + table + match[2], text)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_has_its_fields(name: str) -> None:
    record: dict[str, Any] = RECORDS[name]
    assert set(record) - {"notes"} == {"source", "verified", "config"}
    assert record["source"] and isinstance(record["verified"], bool)
    assert record["verified"] or record["notes"], "an unverified record says what is missing"
    config = record["config"]
    assert len(LAYERS & set(config)) >= 1 and len(WIDTH & set(config)) == 1
    assert not {"_name_or_path", "_from_model_config", "quantization_config"} & set(config)
    assert not any(isinstance(value, str) and value.startswith(("/", ".")) for value in config.values())


def test_the_table_is_that_of_the_records() -> None:
    text = README.read_text(encoding="utf-8")
    assert filled(text) == text, "run this file as a program to write the table"


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
