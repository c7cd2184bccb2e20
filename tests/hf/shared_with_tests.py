"""Makes modules of the folder above importable, behind those of this folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
