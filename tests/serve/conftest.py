"""Set-up of the server's tests: one thread, and a server that the tests of one file share."""

from collections.abc import Iterator

import pytest
import torch
from asking import http
from tiny_served import Running, byte_tokenizer, running_server, served_model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With two, products of tiny models may depend on the row; the engine then takes one row."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def server(one_thread: None) -> Iterator[Running]:
    with running_server(served_model(), byte_tokenizer(), max_body=200_000) as running:
        yield running
        assert running.errors == []
    http().close()
    http.cache_clear()
