"""`full-qdq`: golden graphs, what the numbers lose, widths, masks, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from integer_compilation import check_golden

GOLDEN = Path(__file__).parent.parent / "golden" / "full-qdq"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.onnxtxt")), ids=lambda path: path.stem)
def test_golden(path: Path):
    _, report = check_golden(path, "full-qdq")
    (part,) = report.parts
    assert (part.changed > 0) == (not path.stem.startswith("not-")), "cases that stay are called not-..."
