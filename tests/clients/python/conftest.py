"""What every test here starts from: a client on an empty node, once with RESP2 and once with RESP3.

GRIDKV_PORT names the node; tests/clients.rs starts one and sets it. The same tests pass against a
redis-server, apart from those marked `gridkv`, which are about what differs: they are left out when the
server's INFO does not mention GridKV. That keeps our idea of Redis honest.
"""

import os

import pytest
import redis

HOST = os.environ.get("GRIDKV_HOST", "127.0.0.1")
PORT = int(os.environ["GRIDKV_PORT"])


def connect(protocol=2, port=PORT, **options):
    options.setdefault("socket_timeout", 30)
    return redis.Redis(HOST, port, protocol=protocol, **options)


def pytest_configure(config):
    config.addinivalue_line("markers", "gridkv: about what a GridKV node does and redis-server does not")


def pytest_collection_modifyitems(items):
    with connect() as client:
        ours = "gridkv" in str(client.info("everything")).lower()
    for item in items:
        if not ours and item.get_closest_marker("gridkv"):
            item.add_marker(pytest.mark.skip(reason="the server is not GridKV"))


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def r(request):
    with connect(request.param) as client:
        client.flushall()
        yield client


@pytest.fixture
def text(request):
    """A client that gives strings instead of bytes."""
    with connect(3, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def another():
    """More connections of the same kind, closed at the end."""
    opened = []

    def open_one(protocol=2, **options):
        opened.append(connect(protocol, **options))
        return opened[-1]

    yield open_one
    for client in opened:
        client.close()
