"""Makes the benchmarks importable. Last on the path: `espresso_ds` is the installed one, which has its native code."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
