"""``rotq serve-kv``: an OpenAI-compatible server whose KV cache has a fixed number of bytes.

One thread, the engine's, owns the model and the pool of pages; the asyncio side checks requests,
turns text to tokens and events to JSON, and talks to the engine by a queue and callbacks. Read in
this order: in ``engine``, ``page_allocator`` (who holds which page), ``model_runner`` (forward
passes of fixed shape), ``generation`` (one sequence) and ``engine``; in ``http``, ``schemas`` and
``app``; then ``run``. The engine knows nothing of HTTP: ``bench`` drives it without a server.
"""
