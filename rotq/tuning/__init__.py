"""After the last block: scales and gains of all blocks trained together."""
