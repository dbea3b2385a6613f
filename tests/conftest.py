"""Shared test set-up."""

import os
import signal
import sys
from pathlib import Path

import torch

# tests have no packages (--import-mode=importlib); this lets them import what lies in support/
sys.path.insert(0, str(Path(__file__).parent / "support"))

# Triton decides when a kernel is defined, that is when a launcher first imports it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# a shell without job control starts background jobs with SIGINT ignored, which their children
# inherit; the tests that interrupt jobs need what a terminal would give them
signal.signal(signal.SIGINT, signal.default_int_handler)
