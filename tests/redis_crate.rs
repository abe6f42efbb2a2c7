//! The `redis` crate, Rust's client of Redis, against a node, as an application would use it.

mod support;

use redis::cluster::{ClusterClient, cluster_pipe};
use redis::{Commands, ExistenceCheck, ProtocolVersion, RedisResult, SetExpiry, SetOptions};
use support::{Cluster, Node};

fn client(node: &Node, protocol: ProtocolVersion) -> redis::Client {
    let version = match protocol {
        ProtocolVersion::RESP3 => "?protocol=resp3",
        _ => "",
    };
    redis::Client::open(format!("redis://{}/{version}", node.resp)).expect("an address that the client understands")
}

/// Both protocol versions see the same node the same way.
#[test]
fn strings_numbers_and_expiry() -> RedisResult<()> {
    let node = Node::with_cores(2);
    for protocol in [ProtocolVersion::RESP2, ProtocolVersion::RESP3] {
        let mut c = client(&node, protocol).get_connection()?;
        redis::cmd("FLUSHALL").exec(&mut c)?;

        let () = c.set("k", "v")?;
        assert_eq!(c.get::<_, String>("k")?, "v");
        assert_eq!(c.get::<_, Option<String>>("absent")?, None);
        assert!(!c.set_nx::<_, _, bool>("k", "w")?);

        let options =
            SetOptions::default().conditional_set(ExistenceCheck::XX).with_expiration(SetExpiry::EX(100)).get(true);
        assert_eq!(c.set_options::<_, _, Option<String>>("k", "x", options)?, Some("v".into()));
        assert!((98..=100).contains(&c.ttl::<_, i64>("k")?));
        assert!(c.persist::<_, bool>("k")?);

        assert_eq!(c.incr::<_, _, i64>("n", 41)?, 41);
        assert_eq!(c.incr::<_, _, i64>("n", 1)?, 42);
        assert_eq!(c.decr::<_, _, i64>("n", 2)?, 40);
        assert_eq!(c.append::<_, _, usize>("k", "yz")?, 3);
        assert_eq!(c.getrange::<_, String>("k", 1, -1)?, "yz");

        let value = vec![0x5a_u8; 3 << 20];
        let () = c.set("big", &value)?;
        assert_eq!(c.get::<_, Vec<u8>>("big")?, value);
    }
    Ok(())
}

/// A command over many keys reaches all cores and comes back in the order of its keys.
#[test]
fn many_keys_at_once() -> RedisResult<()> {
    let node = Node::with_cores(2);
    let mut c = client(&node, ProtocolVersion::RESP2).get_connection()?;
    let pairs: Vec<(String, u32)> = (0..2000).map(|n| (format!("key:{n}"), n)).collect();
    let names: Vec<&str> = pairs.iter().map(|(name, _)| name.as_str()).collect();
    let () = c.mset(&pairs)?;
    assert_eq!(c.mget::<_, Vec<u32>>(&names)?, (0..2000).collect::<Vec<u32>>());
    assert_eq!(c.exists::<_, usize>(&names)?, 2000);

    let mut seen: Vec<String> = c.scan_match("key:*")?.collect::<RedisResult<_>>()?;
    seen.sort();
    let mut expected: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    expected.sort();
    assert_eq!(seen, expected);
    assert_eq!(c.del::<_, usize>(&names)?, 2000);
    Ok(())
}

/// Plain pipelines and atomic ones.
#[test]
fn pipelines_and_transactions() -> RedisResult<()> {
    let node = Node::with_cores(2);
    let mut c = client(&node, ProtocolVersion::RESP3).get_connection()?;

    let mut pipeline = redis::pipe();
    for n in 0..1000 {
        pipeline.set(format!("k{n}"), n).ignore().get(format!("k{n}"));
    }
    assert_eq!(pipeline.query::<Vec<i64>>(&mut c)?, (0..1000).collect::<Vec<i64>>());

    let answer: (i64, i64, String) =
        redis::pipe().atomic().incr("{t}a", 5).incr("{t}a", 5).get("{t}a").query(&mut c)?;
    assert_eq!(answer, (5, 10, "10".into()));
    Ok(())
}

/// WATCH in the crate's own loop: two clients, no lost update.
#[test]
fn optimistic_locking_loses_no_update() -> RedisResult<()> {
    const KEY: &str = "{t}n";
    let node = Node::with_cores(2);
    let client = client(&node, ProtocolVersion::RESP2);
    let () = client.get_connection()?.set(KEY, 0)?;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut c = client.get_connection().expect("a connection");
                for _ in 0..50 {
                    let (_,): (i64,) = redis::transaction(&mut c, &[KEY], |c, pipeline| {
                        let old: i64 = c.get(KEY)?;
                        pipeline.set(KEY, old + 1).ignore().get(KEY).query(c)
                    })
                    .expect("a transaction that ends");
                }
            });
        }
    });
    assert_eq!(client.get_connection()?.get::<_, i64>(KEY)?, 200);
    Ok(())
}

/// The crate's client for Redis Cluster: it asks one node for the slots and speaks to all three.
#[test]
fn a_cluster_serves_clients_that_know_clusters() -> RedisResult<()> {
    let cluster = Cluster::of_three();
    let urls: Vec<String> = cluster.nodes.iter().map(|node| format!("redis://{}", node.resp)).collect();
    for url in &urls {
        let mut c = ClusterClient::new(vec![url.as_str()])?.get_connection()?;
        for n in 0..500 {
            let () = c.set(format!("key:{n}"), format!("{n} from {url}"))?;
        }
        // Every node serves every key, whomever its slot belongs to.
        for other in &urls {
            let mut plain = redis::Client::open(other.as_str())?.get_connection()?;
            for n in 0..500 {
                assert_eq!(plain.get::<_, String>(format!("key:{n}"))?, format!("{n} from {url}"), "through {other}");
            }
        }
        let () = c.mset(&[("{tag}a", 1), ("{tag}b", 2)])?;
        assert_eq!(c.mget::<_, Vec<i64>>(&["{tag}a", "{tag}b"])?, [1, 2]);
        let mut pipe = cluster_pipe();
        (0..100).for_each(|n| {
            pipe.set(format!("pipe:{n}"), n).ignore().get(format!("pipe:{n}"));
        });
        assert_eq!(pipe.query::<Vec<i64>>(&mut c)?, (0..100).collect::<Vec<i64>>());
    }
    std::thread::scope(|scope| {
        for url in &urls {
            scope.spawn(move || {
                let mut c = ClusterClient::new(vec![url.as_str()]).and_then(|client| client.get_connection()).unwrap();
                for _ in 0..100 {
                    c.incr::<_, _, i64>("counter", 1).unwrap();
                }
            });
        }
    });
    let mut c = ClusterClient::new(urls)?.get_connection()?;
    assert_eq!(c.get::<_, i64>("counter")?, 300);
    Ok(())
}

/// Clients match on the first word of an error.
#[test]
fn errors_keep_their_kind() -> RedisResult<()> {
    let node = Node::with_cores(1);
    let mut c = client(&node, ProtocolVersion::RESP2).get_connection()?;
    let () = c.set("word", "abc")?;
    let error = c.incr::<_, _, i64>("word", 1).expect_err("abc is no number");
    assert_eq!(error.code(), Some("ERR"));
    assert_eq!(error.detail(), Some("value is not an integer or out of range"));
    let error = redis::cmd("MSETNX")
        .arg(&["a", "1", "b", "2", "c", "3", "d", "4"])
        .query::<i64>(&mut c)
        .expect_err("four shards");
    assert_eq!(error.code(), Some("CROSSSLOT"));
    Ok(())
}
