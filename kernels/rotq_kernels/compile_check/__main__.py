"""``python -m rotq_kernels.compile_check``."""

import sys

from rotq_kernels.compile_check.check import main

sys.exit(main())
