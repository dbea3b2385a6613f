"""The job of ``rotq quantize``: calibrate, rotate, weigh, round, tune, pack, check."""
