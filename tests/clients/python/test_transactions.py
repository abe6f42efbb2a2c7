"""Pipelines, MULTI/EXEC and WATCH."""

import pytest
import redis
from redis.exceptions import ResponseError, WatchError


def test_pipeline_keeps_the_order_of_replies(r):
    """Keys of all cores in one batch: the replies come back in the order of the requests."""
    with r.pipeline(transaction=False) as pipe:
        for n in range(3000):
            pipe.set(f"k{n}", n)
            pipe.get(f"k{n}")
            pipe.incrby(f"k{n}", 1)
        answers = pipe.execute()
    for n in range(3000):
        assert answers[3 * n:3 * n + 3] == [True, str(n).encode(), n + 1]


def test_pipeline_with_commands_of_every_route(r):
    with r.pipeline(transaction=False) as pipe:
        pipe.ping()
        pipe.mset({"a": 1, "b": 2, "c": 3})
        pipe.dbsize()
        pipe.mget("c", "absent", "a")
        pipe.delete("a", "b", "absent")
        pipe.exists("a", "b", "c")
        pipe.echo("x")
        pipe.get("c")
        assert pipe.execute() == [True, True, 3, [b"3", None, b"1"], 2, 1, b"x", b"3"]


def test_an_error_in_a_pipeline_stays_at_its_place(r):
    with r.pipeline(transaction=False) as pipe:
        pipe.set("word", "abc")
        pipe.incr("word")
        pipe.get("word")
        answers = pipe.execute(raise_on_error=False)
    assert answers[0] is True
    assert isinstance(answers[1], ResponseError)
    assert answers[2] == b"abc"


def test_a_transaction_in_one_shard(r):
    with r.pipeline(transaction=True) as pipe:
        pipe.set("{t}a", 1).incr("{t}a").get("{t}a").exists("{t}a", "{t}b").append("{t}b", "x").strlen("{t}b")
        assert pipe.execute() == [True, 2, b"2", 1, 1, 1]


def test_a_transaction_that_fails_inside_runs_the_rest(r):
    r.set("{t}word", "abc")
    with r.pipeline(transaction=True) as pipe:
        pipe.set("{t}a", 1)
        pipe.incr("{t}word")
        pipe.set("{t}b", 2)
        answers = pipe.execute(raise_on_error=False)
    assert answers[0] is True and answers[2] is True
    assert isinstance(answers[1], ResponseError)
    assert r.mget("{t}a", "{t}b") == [b"1", b"2"]


def test_a_transaction_with_a_command_that_does_not_exist_is_aborted(another):
    c = another(single_connection_client=True)
    c.flushall()
    assert c.execute_command("MULTI") in (True, b"OK")
    c.execute_command("SET", "{t}a", "1")
    with pytest.raises(ResponseError, match="^unknown command"):
        c.execute_command("NOSUCH")
    with pytest.raises(redis.exceptions.ExecAbortError, match="Transaction discarded because of previous errors"):
        c.execute_command("EXEC")
    assert c.exists("{t}a") == 0


def test_texts_of_misplaced_transaction_commands(another):
    c = another(single_connection_client=True)
    with pytest.raises(ResponseError, match="^EXEC without MULTI$"):
        c.execute_command("EXEC")
    with pytest.raises(ResponseError, match="^DISCARD without MULTI$"):
        c.execute_command("DISCARD")
    c.execute_command("MULTI")
    with pytest.raises(ResponseError, match="^MULTI calls can not be nested$"):
        c.execute_command("MULTI")
    c.execute_command("DISCARD")
    c.execute_command("MULTI")
    with pytest.raises(ResponseError, match="^WATCH inside MULTI is not allowed$"):
        c.execute_command("WATCH", "k")
    c.execute_command("DISCARD")
    assert c.ping() is True


def test_discard(another):
    c = another(single_connection_client=True)
    c.set("{t}a", "before")
    c.execute_command("MULTI")
    c.execute_command("SET", "{t}a", "after")
    c.execute_command("DISCARD")
    assert c.get("{t}a") == b"before"


def test_watch_notices_a_change(r, another):
    other = another()
    r.set("{t}k", 1)
    with r.pipeline() as pipe:
        pipe.watch("{t}k")
        assert pipe.get("{t}k") == b"1"
        other.set("{t}k", 5)
        pipe.multi()
        pipe.set("{t}k", 2)
        with pytest.raises(WatchError):
            pipe.execute()
    assert r.get("{t}k") == b"5"


@pytest.mark.parametrize("change", [
    lambda c: c.set("{t}k", 1),
    lambda c: c.delete("{t}k"),
    lambda c: c.expire("{t}k", 100),
    lambda c: c.rename("{t}k", "{t}z"),
    lambda c: c.flushall(),
], ids=["same-value", "delete", "expire", "rename", "flushall"])
def test_watch_notices_every_kind_of_change(r, another, change):
    r.set("{t}k", 1)
    with r.pipeline() as pipe:
        pipe.watch("{t}k")
        change(another())
        pipe.multi()
        pipe.ping()
        with pytest.raises(WatchError):
            pipe.execute()


def test_watch_of_an_absent_key(r, another):
    with r.pipeline() as pipe:
        pipe.watch("{t}k")
        pipe.multi()
        pipe.set("{t}k", 1)
        assert pipe.execute() == [True]
    r.delete("{t}k")
    with r.pipeline() as pipe:
        pipe.watch("{t}k")
        another().set("{t}k", 9)
        pipe.multi()
        pipe.set("{t}k", 1)
        with pytest.raises(WatchError):
            pipe.execute()
    assert r.get("{t}k") == b"9"


def test_unwatch(r, another):
    r.set("{t}k", 1)
    with r.pipeline() as pipe:
        pipe.watch("{t}k")
        another().set("{t}k", 5)
        pipe.unwatch()
        pipe.multi()
        pipe.set("{t}k", 2)
        assert pipe.execute() == [True]


def test_an_optimistic_loop_loses_no_increment(r, another):
    """The classic use of WATCH: several clients add to one counter by reading and writing it."""
    import threading

    r.set("{t}n", 0)

    def add():
        client = another()
        for _ in range(50):
            def once(pipe):
                value = int(pipe.get("{t}n"))
                pipe.multi()
                pipe.set("{t}n", value + 1)
            client.transaction(once, "{t}n")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert r.get("{t}n") == b"200"


def test_a_transaction_is_not_interleaved(r, another):
    """Two keys of one shard are always moved together: no reader sees one without the other."""
    import threading

    r.mset({"{t}left": 100, "{t}right": 0})
    stop = threading.Event()
    wrong = []

    def watch_sum():
        client = another()
        while not stop.is_set():
            with client.pipeline(transaction=True) as pipe:
                left, right = pipe.get("{t}left").get("{t}right").execute()
            if int(left) + int(right) != 100:
                wrong.append((left, right))

    reader = threading.Thread(target=watch_sum)
    reader.start()
    for _ in range(300):
        with r.pipeline(transaction=True) as pipe:
            pipe.decr("{t}left").incr("{t}right").execute()
    stop.set()
    reader.join()
    assert wrong == []
    assert r.mget("{t}left", "{t}right") == [b"-200", b"300"]


def test_a_large_transaction(r):
    with r.pipeline(transaction=True) as pipe:
        for n in range(1000):
            pipe.incr("{t}n")
        assert pipe.execute() == list(range(1, 1001))
