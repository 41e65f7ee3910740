# SPDX-License-Identifier: Apache-2.0
"""Run every `benchmarks/*.py` (or those named), print one table and write `results/bench.json`.

A benchmark script writes a list of rows to `--json PATH`; each row is one claim, measured together with its peer:
    {"claim": str, "ours": number, "peer": number, "unit": str, "peer_name": str, "peak_memory": bytes, "limit": number or null}
`limit` is the physical limit in the same unit (copy bandwidth, raw tokenizer, matmul rate). The ratio ours / peer is
computed here. Scripts find a model and data by MODELLINK_TEST_MODEL and MODELLINK_TEST_DATA. Default: the model of the
quickstart, created if necessary, and ../shared/data if it exists. Not here: a verdict. A benchmark that fails is
reported, the others still run, and the exit status is 1.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """Return the environment with the model and the data for the scripts."""
    found = dict(os.environ)
    weights, data = ROOT / "quickstart" / "SmolLM2-135M-Instruct", ROOT.parent / "shared" / "data"
    if "MODELLINK_TEST_MODEL" not in found:
        if not weights.exists():
            print(f"== the weights of the quickstart, into {weights.relative_to(ROOT)}", flush=True)
            subprocess.run([sys.executable, str(ROOT / "examples" / "quickstart" / "weights.py"), str(weights)], cwd=ROOT)
        if weights.exists():
            found["MODELLINK_TEST_MODEL"] = str(weights)
    if data.is_dir():
        found.setdefault("MODELLINK_TEST_DATA", str(data))
    return found


def measure(script: Path, environment: dict[str, str]) -> list[dict[str, Any]] | None:
    """Run one script and return its rows, or None if it failed."""
    print(f"== {script.relative_to(ROOT)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        rows = Path(temporary) / "rows.json"
        done = subprocess.run([sys.executable, str(script), "--json", str(rows)], cwd=ROOT, env=environment)
        if done.returncode or not rows.exists():
            print(f"   failed with exit status {done.returncode}{'' if rows.exists() else ', no rows written'}")
            return None
        found: list[dict[str, Any]] = json.loads(rows.read_text("utf-8"))
    return [{"script": script.stem, **row, "ratio": row["ours"] / row["peer"] if row["peer"] else None} for row in found]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'claim':<48}{'ours':>12}{'peer':>12} {'unit':<12}{'ratio':>7}{'peak MB':>9}{'of limit':>9}"]
    for row in rows:
        limit = f"{row['ours'] / row['limit']:.0%}" if row.get("limit") else "-"
        ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else "-"
        peak = row.get("peak_memory", 0) / 1e6
        numbers = f"{row['ours']:>12.4g}{row['peer']:>12.4g} {row['unit']:<12}{ratio:>7}{peak:>9.0f}{limit:>9}"
        lines.append(f"{row['claim']:<48}{numbers}")
    return "\n".join(lines)


def main(names: list[str]) -> int:
    scripts = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if not names or path.stem in names]
    if unknown := set(names) - {path.stem for path in scripts}:
        print(f"no such benchmark: {', '.join(sorted(unknown))}")
        return 2
    known = environment()
    results = {script.stem: measure(script, known) for script in scripts}
    rows = [row for found in results.values() for row in found or ()]
    print(table(rows))
    target = ROOT / "results" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()}
    target.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n", "utf-8")
    print(f"{len(rows)} rows in {target.relative_to(ROOT)}")
    return 1 if None in results.values() else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
