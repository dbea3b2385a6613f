"""Constants of the packed KV cache, from statistics of keys, values and queries."""
