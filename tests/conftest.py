"""Shared test set-up."""

import signal
import sys
from pathlib import Path

# tests have no packages (--import-mode=importlib); this lets them import tiny_models
sys.path.insert(0, str(Path(__file__).parent))

# a shell without job control starts background jobs with SIGINT ignored, which their children
# inherit; the tests that interrupt jobs need what a terminal would give them
signal.signal(signal.SIGINT, signal.default_int_handler)
