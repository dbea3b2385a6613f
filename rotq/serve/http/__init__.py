"""The HTTP side of the server: schemas, checks, text and JSON."""
