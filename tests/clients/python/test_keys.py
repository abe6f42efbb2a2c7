"""Commands about keys: expiry, renaming, walking over all of them."""

import time

import pytest
from redis.exceptions import ClusterCrossSlotError, ResponseError


def test_expiry_in_all_forms(r):
    r.set("k", "v")
    assert r.ttl("k") == -1 and r.pttl("k") == -1 and r.expiretime("k") == -1
    assert r.ttl("absent") == -2 and r.pttl("absent") == -2 and r.expiretime("absent") == -2
    assert r.expire("k", 100) is True
    assert 99 <= r.ttl("k") <= 100
    assert r.pexpire("k", 50_000) is True
    assert 49_000 <= r.pttl("k") <= 50_000
    at = int(time.time()) + 500
    assert r.expireat("k", at) is True
    assert r.expiretime("k") == at
    assert r.pexpireat("k", at * 1000 + 3) is True
    assert r.pexpiretime("k") == at * 1000 + 3
    assert r.persist("k") is True
    assert r.persist("k") is False
    assert r.expire("absent", 100) is False
    assert r.expire("k", -1) is True
    assert r.exists("k") == 0


def test_expiry_conditions(r):
    r.set("k", "v")
    assert r.expire("k", 100, xx=True) is False
    assert r.expire("k", 100, gt=True) is False
    assert r.expire("k", 100, nx=True) is True
    assert r.expire("k", 200, nx=True) is False
    assert r.expire("k", 50, gt=True) is False
    assert r.expire("k", 200, gt=True) is True
    assert r.expire("k", 300, lt=True) is False
    assert r.expire("k", 150, lt=True) is True
    assert r.expire("k", 400, xx=True) is True
    assert 399 <= r.ttl("k") <= 400
    with pytest.raises(ResponseError, match="NX and XX, GT or LT options at the same time are not compatible"):
        r.execute_command("EXPIRE", "k", 1, "NX", "XX")
    with pytest.raises(ResponseError, match="GT and LT options at the same time are not compatible"):
        r.execute_command("EXPIRE", "k", 1, "GT", "LT")
    with pytest.raises(ResponseError, match="^invalid expire time in 'expire' command$"):
        r.execute_command("EXPIRE", "k", 2**62)


def test_a_key_really_goes(r):
    r.set("k", "v", px=60)
    assert r.get("k") == b"v"
    deadline = time.monotonic() + 10
    while r.exists("k"):
        assert time.monotonic() < deadline
    assert r.get("k") is None
    assert r.ttl("k") == -2
    assert r.set("k", "again", nx=True) is True


def test_expired_keys_are_swept_without_being_touched(r):
    for n in range(500):
        r.set(f"k{n}", "v", px=50)
    r.set("stays", "v")
    deadline = time.monotonic() + 20
    while r.dbsize() > 1:
        assert time.monotonic() < deadline, f"{r.dbsize()} keys are still counted"
        time.sleep(0.02)


def test_type_and_object(r):
    r.set("k", "12345")
    assert r.type("k") in (b"string", "string")
    assert r.type("absent") in (b"none", "none")
    assert r.object("ENCODING", "k") in (b"int", b"raw", b"embstr", "int")
    assert r.object("ENCODING", "absent") is None
    assert r.object("REFCOUNT", "k") >= 1
    assert r.object("IDLETIME", "k") >= 0
    assert r.memory_usage("k") > 5
    assert r.memory_usage("absent") is None


def test_rename_within_a_shard(r):
    r.set("{t}a", "1", ex=100)
    assert r.rename("{t}a", "{t}b") is True
    assert r.get("{t}b") == b"1"
    assert 98 <= r.ttl("{t}b") <= 100
    r.set("{t}c", "2")
    assert r.renamenx("{t}b", "{t}c") is False
    assert r.renamenx("{t}b", "{t}d") is True
    with pytest.raises(ResponseError, match="^no such key$"):
        r.rename("{t}absent", "{t}x")


def test_copy_within_a_shard(r):
    r.set("{t}a", "1", ex=100)
    assert r.copy("{t}a", "{t}b") is True
    assert r.get("{t}a") == r.get("{t}b") == b"1"
    assert 98 <= r.ttl("{t}b") <= 100
    r.set("{t}c", "2")
    assert r.copy("{t}a", "{t}c") is False
    assert r.copy("{t}a", "{t}c", replace=True) is True
    assert r.get("{t}c") == b"1"
    assert r.copy("{t}absent", "{t}x") is False


@pytest.mark.gridkv
def test_rename_over_shards_is_refused_with_a_hint(r):
    r.set("k0", "v")
    refused = 0
    for n in range(1, 20):
        try:
            r.renamenx("k0", f"k{n}")
            r.renamenx(f"k{n}", "k0")
        except ClusterCrossSlotError as error:  # redis-py's name for -CROSSSLOT; it takes the code off the text
            assert "{" in str(error), "the hint speaks of hash tags"
            refused += 1
    assert refused > 10
    assert r.get("k0") == b"v"


def test_keys_and_patterns(r):
    r.mset({"foo": 1, "far": 2, "bar": 3, "f[x]": 4})
    assert sorted(r.keys()) == [b"bar", b"f[x]", b"far", b"foo"]
    assert sorted(r.keys("f*")) == [b"f[x]", b"far", b"foo"]
    assert sorted(r.keys("?a?")) == [b"bar", b"far"]
    assert sorted(r.keys("[^f]*")) == [b"bar"]
    assert sorted(r.keys("f\\[x\\]")) == [b"f[x]"]
    assert r.keys("nothing*") == []


def test_randomkey(r):
    assert r.randomkey() is None
    r.mset({f"k{n}": n for n in range(50)})
    seen = {r.randomkey() for _ in range(500)}
    assert len(seen) > 20
    assert all(key.startswith(b"k") for key in seen)


@pytest.mark.parametrize("count", [None, 1, 7, 1000, 100_000])
def test_scan_finds_each_of_ten_thousand_keys(r, count):
    if count == 1:
        names = [b"key:%d" % n for n in range(500)]
    else:
        names = [b"key:%d" % n for n in range(10_000)]
    with r.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.set(name, name)
        pipe.execute()
    assert sorted(r.scan_iter(count=count)) == sorted(names)


def test_scan_with_a_pattern_and_a_type(r):
    r.mset({f"user:{n}": n for n in range(100)} | {f"item:{n}": n for n in range(100)})
    assert len(list(r.scan_iter(match="user:*"))) == 100
    assert len(list(r.scan_iter(match="user:1?", count=50))) == 10
    assert len(list(r.scan_iter(_type="string"))) == 200
    assert list(r.scan_iter(_type="list")) == []
    with pytest.raises(ResponseError, match="^invalid cursor$"):
        r.execute_command("SCAN", "abc")
    with pytest.raises(ResponseError, match="^syntax error$"):
        r.execute_command("SCAN", "0", "COUNT", "0")


def test_scan_tolerates_growth_and_removal(r):
    """Keys that exist from the first to the last call are seen, whatever comes and goes between the calls."""
    with r.pipeline(transaction=False) as pipe:
        for n in range(2000):
            pipe.set(f"stays:{n}", n)
            pipe.set(f"goes:{n}", n)
        pipe.execute()
    seen, cursor, calls = set(), 0, 0
    while True:
        cursor, names = r.scan(cursor, count=50)
        seen.update(names)
        calls += 1
        with r.pipeline(transaction=False) as pipe:
            for n in range(100):
                pipe.set(f"new:{calls}:{n}", n)
                pipe.delete(f"goes:{(calls * 100 + n) % 2000}")
            pipe.execute()
        if cursor == 0 or calls > 5000:
            break
    assert cursor == 0
    assert {b"stays:%d" % n for n in range(2000)} <= seen


def test_flush(r):
    r.mset({f"k{n}": n for n in range(100)})
    assert r.flushdb() is True
    assert r.dbsize() == 0
    r.mset({f"k{n}": n for n in range(100)})
    assert r.flushall(asynchronous=True) is True
    assert r.dbsize() == 0
    assert list(r.scan_iter()) == []
