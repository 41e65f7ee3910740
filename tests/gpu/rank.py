# SPDX-License-Identifier: Apache-2.0
"""A process of the GPU check, for `ranks.Ranks`: `rank.py KIND` runs functions on a device of this kind."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

if __name__ == "__main__":
    from ranks import serve

    from modellink.core.determinism import set_variables

    kind = sys.argv[1]
    set_variables("cuda" if kind == "auto" else kind)  # before a library of the device reads them
    serve(kind)  # type: ignore[arg-type]
