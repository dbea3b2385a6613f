"""A server that the tests of one file share."""

from collections.abc import Iterator

import pytest
from asking import http
from tiny_served import Running, byte_tokenizer, running_server, served_model


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(served_model(), byte_tokenizer(), max_body=200_000) as running:
        yield running
        assert running.errors == []
    http().close()
    http.cache_clear()
