# SPDX-License-Identifier: Apache-2.0
"""A process of the GPU check, for `ranks.Ranks`: `rank.py KIND` runs functions on a device of this kind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

if __name__ == "__main__":
    from ranks import serve

    from modellink.core.determinism import set_variables

    kind = sys.argv[1]
    set_variables("cuda" if kind == "auto" else kind)  # before a library of the device reads them
    # without a network a machine may not resolve its own name
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    serve(kind)  # type: ignore[arg-type]
