"""redis-py's RedisCluster against three nodes, as a program would use it: any of them to start with, and no other option.

GRIDKV_PORTS names the nodes. Such a client sends each key to the node that has its slot; every node serves every key, so
what one client wrote through the right node is read here through the wrong ones too.
"""

import os
import threading

import pytest
from redis.cluster import ClusterNode, RedisCluster

from conftest import HOST, connect

PORTS = [int(port) for port in os.environ["GRIDKV_PORTS"].split(",")]


def cluster(port, protocol=2, **options):
    return RedisCluster(host=HOST, port=port, protocol=protocol, socket_timeout=30, **options)


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def c(request):
    with cluster(PORTS[0], request.param) as client:
        yield client


def through_each_node(names):
    """The values of keys as each node gives them to a client that knows nothing of clusters."""
    for port in PORTS:
        with connect(3, port) as client:
            yield [client.get(name) for name in names]


@pytest.mark.parametrize("port", PORTS)
def test_any_node_tells_of_all(port):
    with cluster(port) as client:
        assert sorted(node.port for node in client.get_primaries()) == sorted(PORTS)
        assert client.get_replicas() == []
        assert client.ping(target_nodes=RedisCluster.ALL_NODES) is True
        slots = {client.keyslot(f"key:{n}") for n in range(500)}
        owners = {client.nodes_manager.get_node_from_slot(slot).port for slot in slots}
        assert owners == set(PORTS), "keys are spread over all nodes"


def test_a_node_that_cannot_be_reached_does_not_matter_at_the_start():
    with RedisCluster(startup_nodes=[ClusterNode(HOST, 1), ClusterNode(HOST, PORTS[1])]) as client:
        assert client.set("start", "v") is True


def test_what_is_written_is_read_through_every_node(c):
    names = [f"key:{n}" for n in range(500)]
    for n, name in enumerate(names):
        assert c.set(name, f"value:{n}") is True
    expected = [b"value:%d" % n for n in range(500)]
    assert [c.get(name) for name in names] == expected
    for values in through_each_node(names):
        assert values == expected
    assert c.delete(*names[:100]) == 100
    assert c.exists(*names) == 400
    for values in through_each_node(names[:100]):
        assert values == [None] * 100


def test_many_keys_at_once(c):
    entries = {f"{{tag}}:{n}": f"v{n}" for n in range(50)}
    assert c.mset(entries) is True
    assert c.mget(list(entries)) == [value.encode() for value in entries.values()]
    apart = {f"apart:{n}": f"v{n}" for n in range(50)}
    c.mset_nonatomic(apart)
    assert c.mget_nonatomic(list(apart)) == [value.encode() for value in apart.values()]


def test_a_pipeline_goes_to_several_nodes_and_answers_in_order(c):
    with c.pipeline() as pipe:
        for n in range(500):
            pipe.set(f"pipe:{n}", n).get(f"pipe:{n}")
        answers = pipe.execute()
    assert answers[1::2] == [b"%d" % n for n in range(500)]
    assert answers[::2] == [True] * 500


@pytest.mark.parametrize("port", PORTS)
def test_a_pipeline_sees_what_it_did_before(port):
    # Of 40 keys a node orders some and not others, and holds all: each command must find what the ones before it left.
    with connect(3, port) as client, client.pipeline(transaction=False) as pipe:
        for n in range(40):
            key = f"chain:{port}:{n}"
            pipe.set(key, 1).incr(key).get(key).set(key, 100).incrby(key, 5).expire(key, 1000).ttl(key).append(key, "!")
            pipe.get(key).delete(key).get(key).mset({key: 7}).mget(key, "absent").getset(key, 8).strlen(key)
        expected = [True, 2, b"2", True, 105, True, 1000, 4, b"105!", 1, None, True, [b"7", None], b"7", 1]
        assert pipe.execute() == expected * 40


def test_a_transaction_of_one_slot(c):
    with c.pipeline(transaction=True) as pipe:
        # In a cluster, redis-py leaves the answers of a transaction as they came.
        assert pipe.set("{t}a", 1).incr("{t}a").get("{t}a").execute() == [b"OK", 2, b"2"]


def test_increments_of_several_clients_are_all_counted(c):
    c.delete("counter")
    failed = []

    def count(port):
        try:
            with cluster(port) as client:
                for _ in range(100):
                    client.incr("counter")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=count, args=(port,)) for port in PORTS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert c.get("counter") == b"600"
    for values in through_each_node(["counter"]):
        assert values == [b"600"]


def test_scan_over_all_nodes_finds_every_key(c):
    names = {f"scan:{n}" for n in range(300)}
    with c.pipeline() as pipe:
        for name in names:
            pipe.set(name, "v")
        pipe.execute()
    assert {name.decode() for name in c.scan_iter("scan:*", count=100)} == names


def test_commands_about_the_cluster(c):
    info = c.cluster_info(target_nodes=c.get_random_node())
    assert info["cluster_state"] == "ok" and info["cluster_slots_ok"] == "16384"
    nodes = c.cluster_nodes()
    assert sorted(int(name.rsplit(":", 1)[1]) for name in nodes) == sorted(PORTS)
    assert all(node["connected"] for node in nodes.values())
    assert c.cluster_keyslot("{tag}x") == c.keyslot("{tag}y")


def test_hello_and_info_say_that_it_is_a_cluster(c):
    answer = c.execute_command("HELLO", target_nodes=c.get_random_node())
    assert b"cluster" in (answer if isinstance(answer, list) else answer.values())
    info = c.info(target_nodes=c.get_random_node())
    assert info["cluster_enabled"] == 1 and info["redis_mode"] == "cluster"
