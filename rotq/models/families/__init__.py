"""One module per model family: its adapter, which is data."""
