"""Writes selftest/known_logits.json of the runtime: the synthetic model's logits by the torch reference.

python bench/known_logits.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the torch reference

from made_up_reference import reference_logits

N_KEPT = 12


def main() -> None:
    """Keeps the greatest logits and some evenly spread ones."""
    logits = reference_logits()
    order = (-logits).argsort()
    tokens = sorted({*map(int, order[: N_KEPT // 2]), *range(0, len(logits), 2 * len(logits) // N_KEPT)})
    data = {
        "best": int(order[0]),
        "spread": round(float(logits.std()), 4),
        "logits": {str(token): round(float(logits[token]), 4) for token in tokens},
    }
    path = ROOT / "runtime" / "step35" / "selftest" / "known_logits.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
