"""The packed KV cache: how keys and values are coded, calibrated, stored and attended to."""
