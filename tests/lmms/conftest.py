"""The suite of the plug-in for lmms-eval, apart from the others: `make test-lmms` runs it. Nothing is downloaded."""

from __future__ import annotations

import os

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
