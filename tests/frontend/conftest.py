"""A fake core for each test, and a virtual machine that does not wait long between attempts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parrot import P

from .fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def vm(server: FakeServer) -> P.VirtualMachine:
    return P.VirtualMachine(server.address, retry=P.RetryPolicy(busy_retries=4, first_wait_s=0.001))
