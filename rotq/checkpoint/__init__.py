"""Reading and writing checkpoints: sources, shards, export formats, loading, reload check."""
