"""The engine of the server: pages, batches and forward passes in one thread."""
