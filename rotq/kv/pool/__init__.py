"""KV memory of a server: one pool of pages for all sequences, packed or dense."""
