"""String commands: every option of SET, ranges, numbers, bits, many keys at once."""

import random
import time

import pytest
from redis.exceptions import ClusterCrossSlotError, ResponseError


def test_set_and_get(r):
    assert r.get("k") is None
    assert r.set("k", "v") is True
    assert r.get("k") == b"v"
    assert r.set("k", b"\x00\r\n\xff") is True
    assert r.get("k") == b"\x00\r\n\xff"
    assert r.set("empty", "") is True
    assert r.get("empty") == b""


def test_set_options(r):
    assert r.set("k", "1", nx=True) is True
    assert r.set("k", "2", nx=True) is None
    assert r.set("k", "3", xx=True) is True
    assert r.set("other", "3", xx=True) is None
    assert r.set("k", "4", get=True) == b"3"
    assert r.set("fresh", "4", get=True) is None
    assert r.set("k", "5", ex=100) is True
    assert 99 <= r.ttl("k") <= 100
    assert r.set("k", "6", keepttl=True) is True
    assert 99 <= r.ttl("k") <= 100
    assert r.set("k", "7") is True
    assert r.ttl("k") == -1
    assert r.set("k", "8", px=100_000) is True
    assert 99_000 <= r.pttl("k") <= 100_000
    at = int(time.time()) + 1000
    assert r.set("k", "9", exat=at) is True
    assert r.expiretime("k") == at
    assert r.set("k", "10", pxat=at * 1000 + 7) is True
    assert r.pexpiretime("k") == at * 1000 + 7
    for wrong in (["SET", "k", "v", "NX", "XX"], ["SET", "k", "v", "EX", "1", "PX", "1"], ["SET", "k", "v", "WHAT"]):
        with pytest.raises(ResponseError, match="^syntax error$"):
            r.execute_command(*wrong)
    with pytest.raises(ResponseError, match="^invalid expire time in 'set' command$"):
        r.execute_command("SET", "k", "v", "EX", "0")
    with pytest.raises(ResponseError, match="^value is not an integer or out of range$"):
        r.execute_command("SET", "k", "v", "EX", "soon")


def test_older_forms_of_set(r):
    assert r.setnx("k", "1") is True
    assert r.setnx("k", "2") is False
    assert r.setex("k", 50, "3") is True
    assert 49 <= r.ttl("k") <= 50
    assert r.psetex("k", 50_000, "4") is True
    assert 49_000 <= r.pttl("k") <= 50_000
    assert r.getset("k", "5") == b"4"
    assert r.ttl("k") == -1
    with pytest.raises(ResponseError, match="^invalid expire time in 'setex' command$"):
        r.setex("k", 0, "v")


def test_getdel_and_getex(r):
    r.set("k", "v")
    assert r.getex("k", ex=100) == b"v"
    assert 99 <= r.ttl("k") <= 100
    assert r.getex("k", persist=True) == b"v"
    assert r.ttl("k") == -1
    assert r.getdel("k") == b"v"
    assert r.getdel("k") is None
    assert r.getex("k") is None


def test_many_keys(r):
    """More keys than any one shard or core holds, in one command."""
    keys = {f"key:{n}": f"value:{n}" for n in range(1000)}
    assert r.mset(keys) is True
    assert r.mget(list(keys)) == [value.encode() for value in keys.values()]
    assert r.mget("key:1", "absent", "key:2") == [b"value:1", None, b"value:2"]
    assert r.exists(*keys, "absent") == 1000
    assert r.exists("key:1", "key:1") == 2
    assert r.touch("key:1", "key:2", "absent") == 2
    assert r.delete(*list(keys)[:400]) == 400
    assert r.unlink(*list(keys)) == 600
    assert r.dbsize() == 0
    with pytest.raises(ResponseError, match="^wrong number of arguments for 'mset' command$"):
        r.execute_command("MSET", "a", "1", "b")


def test_msetnx_within_a_shard(r):
    assert r.msetnx({"{t}a": 1, "{t}b": 2}) is True
    assert r.msetnx({"{t}b": 3, "{t}c": 4}) is False
    assert r.get("{t}c") is None
    assert r.get("{t}b") == b"2"


@pytest.mark.gridkv
def test_atomic_commands_over_several_shards_are_refused(r):
    with pytest.raises(ClusterCrossSlotError):  # redis-py's name for -CROSSSLOT
        r.execute_command("MSETNX", *[word for n in range(64) for word in (f"k{n}", "v")])
    assert r.dbsize() == 0


def test_ranges(r):
    assert r.append("k", "Hello") == 5
    assert r.append("k", " World") == 11
    assert r.strlen("k") == 11
    assert r.strlen("absent") == 0
    assert r.getrange("k", 0, 4) == b"Hello"
    assert r.getrange("k", -5, -1) == b"World"
    assert r.getrange("k", 5, 1) == b""
    assert r.getrange("k", 0, 1000) == b"Hello World"
    assert r.substr("k", 0, 4) == b"Hello"
    assert r.setrange("k", 6, "Redis") == 11
    assert r.get("k") == b"Hello Redis"
    assert r.setrange("far", 5, "x") == 6
    assert r.get("far") == b"\x00\x00\x00\x00\x00x"
    assert r.setrange("absent", 3, "") == 0
    assert r.exists("absent") == 0
    with pytest.raises(ResponseError, match="^offset is out of range$"):
        r.setrange("k", -1, "x")
    with pytest.raises(ResponseError, match="^string exceeds maximum allowed size"):
        r.setrange("k", 512 * 1024 * 1024, "x")


def test_numbers(r):
    assert r.incr("n") == 1
    assert r.incrby("n", 41) == 42
    assert r.decr("n") == 41
    assert r.decrby("n", 50) == -9
    assert r.get("n") == b"-9"
    r.set("n", 2**63 - 1)
    with pytest.raises(ResponseError, match="^increment or decrement would overflow$"):
        r.incr("n")
    r.set("word", "ten")
    with pytest.raises(ResponseError, match="^value is not an integer or out of range$"):
        r.incr("word")
    r.set("spaces", " 11")
    with pytest.raises(ResponseError, match="^value is not an integer or out of range$"):
        r.incr("spaces")
    with pytest.raises(ResponseError, match="^decrement would overflow$"):
        r.execute_command("DECRBY", "n", -(2**63))


def test_floats(r):
    assert r.incrbyfloat("f", 10.5) == 10.5
    assert r.incrbyfloat("f", 0.1) == pytest.approx(10.6)
    assert r.get("f") == b"10.6"
    r.set("f", "5.0e3")
    assert r.incrbyfloat("f", 2.0e2) == 5200
    assert r.get("f") == b"5200"
    r.set("f", "3")
    assert r.incrbyfloat("f", 1) == 4
    assert r.get("f") == b"4"
    with pytest.raises(ResponseError, match="^value is not a valid float$"):
        r.execute_command("INCRBYFLOAT", "f", "abc")
    with pytest.raises(ResponseError, match="^increment would produce NaN or Infinity$"):
        r.execute_command("INCRBYFLOAT", "f", "+inf")


def test_an_increment_keeps_the_expiry(r):
    r.set("n", 1, ex=100)
    r.incr("n")
    r.append("n", "0")
    r.setrange("n", 0, "7")
    assert 98 <= r.ttl("n") <= 100
    assert r.get("n") == b"70"


def test_bits(r):
    assert r.setbit("b", 7, 1) == 0
    assert r.setbit("b", 7, 0) == 1
    assert r.get("b") == b"\x00"
    assert r.setbit("b", 100, 1) == 0
    assert r.strlen("b") == 13
    assert r.getbit("b", 100) == 1
    assert r.getbit("b", 101) == 0
    assert r.getbit("b", 10_000) == 0
    r.set("b", "foobar")
    assert r.bitcount("b") == 26
    assert r.bitcount("b", 0, 0) == 4
    assert r.bitcount("b", 1, 1) == 6
    assert r.bitcount("b", 5, 30, "BIT") == 17
    r.set("b", b"\xff\xf0\x00")
    assert r.bitpos("b", 0) == 12
    r.set("b", b"\x00\xff\xf0")
    assert r.bitpos("b", 1, 0) == 8
    assert r.bitpos("b", 1, 2) == 16
    r.set("b", b"\xff\xff")
    assert r.bitpos("b", 0) == 16
    assert r.bitpos("b", 0, 0, -1) == -1
    with pytest.raises(ResponseError, match="^bit is not an integer or out of range$"):
        r.execute_command("SETBIT", "b", 1, 2)
    with pytest.raises(ResponseError, match="^bit offset is not an integer or out of range$"):
        r.execute_command("SETBIT", "b", -1, 1)


def test_big_values(r):
    """Values that cross every buffer size on the way in and out."""
    for size in (1, 100, 4095, 4096, 16 * 1024 - 1, 16 * 1024, 32 * 1024 + 1, 1 << 20, 8 << 20):
        value = random.Random(size).randbytes(size)
        assert r.set("big", value) is True
        assert r.strlen("big") == size
        assert r.get("big") == value
    many = {f"big:{n}": random.Random(n).randbytes(1 << 20) for n in range(8)}
    r.mset(many)
    assert r.mget(list(many)) == list(many.values())


def test_binary_and_long_keys(r):
    for key in (b"", b"\x00", b"\r\n", bytes(range(256)), b"k" * 10_000, b"k" * 65_535):
        assert r.set(key, b"v") is True
        assert r.get(key) == b"v"
        assert r.delete(key) == 1


@pytest.mark.gridkv
def test_a_key_beyond_the_limit_is_refused_and_the_connection_lives(r):
    with pytest.raises(ResponseError):
        r.set(b"k" * 70_000, "v")
    assert r.ping() is True
    assert r.dbsize() == 0


def test_many_random_strings(r):
    """What is read is what was written, over a few thousand keys of all sizes."""
    chance = random.Random(7)
    model = {}
    for _ in range(3000):
        key = b"key:%d" % chance.randrange(1500)
        if chance.random() < 0.2:
            assert r.delete(key) == (1 if model.pop(key, None) is not None else 0)
        else:
            model[key] = chance.randbytes(chance.choice((0, 1, 8, 64, 300, 5000)))
            r.set(key, model[key])
    keys = list(model)
    assert r.mget(keys) == [model[key] for key in keys]
    assert r.dbsize() == len(model)
