"""Keys and values into codes."""
