"""The connection itself: greetings, names, protocol versions, errors, commands about commands."""

import threading

import pytest
import redis
from redis.exceptions import ResponseError

from conftest import HOST, PORT, connect


def test_a_new_client_needs_no_special_flags():
    with redis.Redis(HOST, PORT) as client:
        assert client.ping() is True
        assert client.set("k", "v") is True
        assert client.get("k") == b"v"


def test_url_with_database_zero():
    with redis.from_url(f"redis://{HOST}:{PORT}/0") as client:
        assert client.ping() is True


def test_ping_echo(r):
    assert r.ping() is True
    assert r.echo("hello") == b"hello"
    assert r.execute_command("ECHO", "") == b""


@pytest.mark.parametrize("protocol", [2, 3])
def test_hello_tells_the_protocol(another, protocol):
    client = another(protocol)
    answer = client.execute_command("HELLO")
    if isinstance(answer, list):
        answer = dict(zip(answer[::2], answer[1::2]))
    answer = {(k.decode() if isinstance(k, bytes) else k): v for k, v in answer.items()}
    assert answer["proto"] == protocol
    assert answer["mode"] in (b"standalone", "standalone"), "it listens for no peers"
    assert {"server", "version", "id", "role", "modules"} <= set(answer)


def test_hello_refuses_other_versions(r):
    with pytest.raises(ResponseError, match="^(NOPROTO )?unsupported protocol version"):
        r.execute_command("HELLO", "4")


def test_client_names_and_ids(r, another):
    assert r.client_getname() in (None, "")
    assert r.client_setname("walter") is True
    assert r.client_getname() in (b"walter", "walter")
    with pytest.raises(ResponseError, match="Client names cannot contain spaces"):
        r.client_setname("two words")
    other = another()
    assert r.client_id() != other.client_id()
    names = [client["name"] for client in r.client_list()]
    assert "walter" in names
    assert r.client_info()["name"] == "walter"


@pytest.mark.gridkv
def test_client_library_is_recorded(another):
    client = another(single_connection_client=True)
    assert client.client_setinfo("LIB-NAME", "judge") is True
    assert client.client_setinfo("LIB-VER", "1.2") is True
    assert client.client_info()["lib-name"] == "judge"
    assert client.client_info()["lib-ver"] == "1.2"


def test_client_kill_ends_another_connection(r, another):
    victim = another(single_connection_client=True, retry_on_error=None, retry=None)
    ident = victim.client_id()
    assert r.client_kill_filter(_id=ident) == 1
    assert ident not in [int(entry["id"]) for entry in r.client_list()]


def test_select_zero_only(another):
    client = another()
    assert client.execute_command("SELECT", 0) in (True, b"OK")
    with pytest.raises(ResponseError, match="DB index is out of range|invalid DB index|value is not an integer"):
        client.execute_command("SELECT", 10000)


def test_unknown_commands_and_wrong_arity_have_redis_texts(r):
    with pytest.raises(ResponseError, match="^unknown command 'NOSUCH', with args beginning with: 'a' 'b' ?$"):
        r.execute_command("NOSUCH", "a", "b")
    with pytest.raises(ResponseError, match="^wrong number of arguments for 'get' command$"):
        r.execute_command("GET")
    with pytest.raises(ResponseError, match="^wrong number of arguments for 'set' command$"):
        r.execute_command("SET", "only-a-key")


@pytest.mark.gridkv
@pytest.mark.parametrize("command", [["LPUSH", "k", "v"], ["HSET", "k", "f", "v"], ["SADD", "k", "v"], ["ZADD", "k", "1", "v"]])
def test_commands_of_other_types_say_so(r, command):
    with pytest.raises(ResponseError, match="(?i)GridKV holds byte strings only.*not supported"):
        r.execute_command(*command)


def test_commands_describe_themselves(r):
    commands = r.command()
    assert "get" in commands and "set" in commands
    assert commands["get"]["arity"] == 2
    assert commands["get"]["first_key_pos"] == 1
    assert commands["mset"]["step_count"] == 2
    assert "write" in [str(flag) if not isinstance(flag, bytes) else flag.decode() for flag in commands["set"]["flags"]]
    assert r.command_count() == len(commands)
    assert r.command_getkeys("MSET", "a", 1, "b", 2) in ([b"a", b"b"], ["a", "b"])


def test_info_and_config(r):
    info = r.info()
    assert info["redis_version"].count(".") == 2
    assert info["connected_clients"] >= 1
    assert info["uptime_in_seconds"] >= 0
    assert info["role"] == "master"
    assert "maxmemory" in r.config_get("maxmemory*")
    assert r.config_resetstat() is True


def test_time_role_dbsize_wait(r):
    seconds, micros = r.time()
    assert seconds > 1_600_000_000 and 0 <= micros < 1_000_000
    assert r.role()[0] in (b"master", "master")
    assert r.dbsize() == 0
    r.set("k", "v")
    assert r.dbsize() == 1
    assert r.wait(0, 10) == 0


def test_reset_gives_back_a_fresh_connection(another):
    client = another(single_connection_client=True)
    client.client_setname("before")
    assert client.execute_command("RESET") in (b"RESET", "RESET")
    assert client.client_getname() in (None, "")


def test_many_threads_share_a_pool(r):
    """A connection pool under threads is how most programs use redis-py."""
    r.set("counter", 0)

    def add():
        for _ in range(200):
            r.incr("counter")

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int(r.get("counter")) == 1600


def test_a_client_that_goes_away_mid_command_hurts_nobody(r):
    import socket

    for cut in (b"*", b"*3\r\n$3\r\nSET\r\n", b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$100\r\nabc", b"GET"):
        with socket.create_connection((HOST, PORT)) as raw:
            raw.sendall(cut)
    assert r.ping() is True


def test_inline_commands():
    import socket

    with socket.create_connection((HOST, PORT)) as raw:
        raw.settimeout(10)
        raw.sendall(b'PING\r\nSET inline "a b"\r\nGET inline\r\n')
        got = b""
        while not got.endswith(b"a b\r\n"):
            more = raw.recv(4096)
            assert more, got
            got += more
    assert got == b"+PONG\r\n+OK\r\n$3\r\na b\r\n"


def test_quit_answers_and_closes():
    import socket

    with socket.create_connection((HOST, PORT)) as raw:
        raw.settimeout(10)
        raw.sendall(b"*1\r\n$4\r\nQUIT\r\n")
        got = b""
        while more := raw.recv(100):
            got += more
    assert got == b"+OK\r\n"


def test_decoded_responses(text):
    assert text.set("grüße", "äöü") is True
    assert text.get("grüße") == "äöü"
    assert text.keys("grü*") == ["grüße"]


def test_protocol_can_change_on_a_living_connection():
    with connect(2, single_connection_client=True) as client:
        assert client.execute_command("GET", "absent") is None
        client.execute_command("HELLO", "2")
        assert client.ping() is True
