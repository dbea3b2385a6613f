"""Shared test set-up."""

import sys
from pathlib import Path

# tests have no packages (--import-mode=importlib); this lets them import tiny_models
sys.path.insert(0, str(Path(__file__).parent))
