//! Nodes that an application embeds form a cluster by themselves: three in this one process, on sockets of loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use futures_lite::StreamExt;
use futures_lite::future::block_on;
use gridkv::cluster::{ClusterEvent, ClusterView};
use gridkv::config::ClusterConfig;
use gridkv::{Builder, Config, CoreHandle, Error, GridKv, Level, SetOptions};

const PATIENCE: Duration = Duration::from_secs(60);

fn builder() -> Builder {
    let any = "127.0.0.1:0".parse().unwrap();
    GridKv::builder().cores("1").unwrap().shards(32).unwrap().listen(any).peer_listen(any).http(any)
}

/// The lines of a node's metrics page that are about the cluster.
fn cluster_metrics(db: &GridKv) -> Vec<String> {
    let mut stream = TcpStream::connect(db.http_addr().expect("it has a page")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.contains("gridkv_uptime_seconds "), "{page}");
    page.lines().filter(|line| line.contains("gridkv_cluster_")).map(str::to_owned).collect()
}

/// The number of a line of that page.
fn metric(lines: &[String], name: &str) -> u64 {
    let found = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("no {name} in {lines:#?}")).parse().unwrap()
}

fn status(db: &GridKv) -> ClusterView {
    block_on(db.cluster_status()).unwrap().expect("it is in a cluster")
}

/// Waits for a condition, and fails with what there is instead.
fn wait_for<T: std::fmt::Debug>(what: &str, mut look: impl FnMut() -> (bool, T)) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (done, seen) = look();
        if done {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {seen:?}");
        std::thread::yield_now();
    }
}

fn full(view: &ClusterView, copies: usize) -> bool {
    let placed = |p: &gridkv::cluster::Placement| {
        p.replicas.len() == copies
            && p.replicas.iter().all(|r| !r.filling)
            && p.joining.is_none()
            && p.leaving.is_none()
    };
    view.map.placements.iter().all(placed) && view.alive.len() >= copies
}

fn three() -> Vec<GridKv> {
    let first = builder().start().unwrap();
    let seed = first.peer_addr().unwrap().to_string();
    let others = (0..2).map(|_| builder().seeds([seed.clone()]).start().unwrap());
    let nodes: Vec<GridKv> = std::iter::once(first.clone()).chain(others).collect();
    for node in &nodes {
        wait_for("three copies everywhere", || {
            let view = status(node);
            (full(&view, 3), view.map.epoch)
        });
    }
    nodes
}

#[test]
fn what_one_node_writes_the_others_read() {
    let nodes = three();
    block_on(async {
        for i in 0..200 {
            nodes[i % 3].set(format!("key:{i}"), format!("value {i}")).await.unwrap();
        }
        for (i, node) in (0..200).flat_map(|i| nodes.iter().map(move |node| (i, node))) {
            assert_eq!(node.get(format!("key:{i}")).await.unwrap().unwrap(), format!("value {i}"));
        }
        // Each node walks its own copies.
        for node in &nodes {
            assert_eq!(node.scan_keys("key:").count().await, 200);
        }
        // Conditional commands agree, wherever they are given.
        for i in 0..30 {
            nodes[i % 3].incr("counter", 1).await.unwrap();
        }
        assert_eq!(nodes[1].get("counter").await.unwrap().unwrap(), "30");
        let taken = nodes[2].set_with("counter", "0", SetOptions::new().nx()).await.unwrap();
        assert!(!taken.applied);
        assert!(nodes[2].delete("key:7").await.unwrap());
        assert!(!nodes[0].delete("key:7").await.unwrap());
        let many = nodes[1].get_many(&["key:7", "key:8"]).await.unwrap();
        assert_eq!((many.get(0), many.get(1)), (None, Some(&b"value 8"[..])));
        // A batch may be larger than what a core has under way at once.
        let keys: Vec<String> = (0..17_000).map(|key| format!("many:{key}")).collect();
        let pairs: Vec<_> = keys.iter().map(|key| (key, key)).collect();
        assert!(nodes[0].set_many(&pairs).await.unwrap().iter().all(Result::is_ok));
        let many = nodes[1].get_many(&keys).await.unwrap();
        assert!(keys.iter().enumerate().all(|(at, key)| many.get(at) == Some(key.as_bytes())));
        let wanted = keys.clone();
        let many = nodes[2].on_core(0, |handle| async move { handle.get_many(&wanted).await }).await.unwrap().unwrap();
        assert!(keys.iter().enumerate().all(|(at, key)| many.get(at) == Some(key.as_bytes())));
        assert!(nodes[2].delete_many(&keys).await.unwrap().iter().all(|said| matches!(said, Ok(true))));
        // Levels.
        nodes[0].set_with("all", "three", SetOptions::new().level(Level::All)).await.unwrap();
        for node in &nodes {
            assert_eq!(node.get_with("all", Level::One).await.unwrap().unwrap(), "three");
        }
        assert!(matches!(nodes[0].clear().await, Err(Error::Reply(_))), "one node cannot empty the others");
        // An expiry that is past deletes, as in Redis, and nobody reads the key to write it.
        nodes[0].set("past", "v").await.unwrap();
        says(&mut client(&nodes[1]), &[("SET past w PXAT 1", "+OK"), ("GET past", "$-1")]);
        assert_eq!(nodes[2].get("past").await.unwrap(), None);
        let many = (0..5000).map(|key| format!(" many:{key}")).collect::<String>();
        says(
            &mut client(&nodes[1]),
            &[(&format!("MGET{many}"), "-ERR a command in a cluster may name 4096 keys of one core")],
        );
        // Who is answered at once would be answered 0 after a minute.
        let mut client = client(&nodes[1]);
        says(&mut client, &[("SET k v", "+OK"), ("WAIT 1 0", ":1"), ("WAIT 2 1", ":1")]);
        says(&mut client, &[("CLIENT CONSISTENCY all", "+OK"), ("WAIT 2 0", ":2")]);
        says(&mut client, &[("CLIENT CONSISTENCY one", "+OK"), ("WAIT 1 1", ":0")]);
        for node in nodes {
            node.close().await.unwrap();
        }
    });
}

/// A client of a node: where it writes commands and where it reads replies.
fn client(db: &GridKv) -> (TcpStream, BufReader<TcpStream>) {
    let client = TcpStream::connect(db.resp_addr().expect("it listens")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let replies = BufReader::new(client.try_clone().unwrap());
    (client, replies)
}

/// Gives a client's commands and checks how each reply's first line begins.
fn says((client, replies): &mut (TcpStream, BufReader<TcpStream>), dialogue: &[(&str, &str)]) {
    for (command, wanted) in dialogue {
        client.write_all(format!("{command}\r\n").as_bytes()).unwrap();
        let said = line(replies);
        assert!(said.starts_with(wanted), "{command}: {said}");
    }
}

/// The next line of a stream of replies.
fn line(replies: &mut impl BufRead) -> String {
    let mut line = String::new();
    replies.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[test]
fn a_node_is_emptied_as_a_whole_or_not_at_all() {
    const ROUNDS: usize = 50;
    const REFUSED: &str = "ERR FLUSHALL and FLUSHDB do not run on replicated data";
    let first = builder().cores("2").unwrap().start().unwrap();
    let seed = first.peer_addr().unwrap().to_string();
    let (mut client, mut replies) = client(&first);
    wait_for("a founder can be emptied", || {
        let said = block_on(first.clear());
        (said.is_ok(), said)
    });
    let joining = std::thread::spawn(move || builder().seeds([seed]).start().unwrap());
    // Keys of both cores are written and emptied while the shards come to be shared.
    let pairs: String = (0..16).map(|key| format!(" key:{key} v")).collect();
    let round = format!("MSET{pairs}\r\nFLUSHALL\r\nDBSIZE\r\n");
    let deadline = Instant::now() + PATIENCE;
    let (mut refused, mut kept) = (false, false);
    while !refused {
        client.write_all(round.repeat(ROUNDS).as_bytes()).unwrap();
        for _ in 0..ROUNDS {
            let (written, flushed, left) = (line(&mut replies), line(&mut replies), line(&mut replies));
            if flushed == "+OK" {
                assert!(!refused && left == ":0", "{written} {flushed} {left}");
                continue;
            }
            refused = true;
            // Had one core done its part, the reply would begin with UNKNOWN.
            assert!(flushed.starts_with(&format!("-{REFUSED}")), "{flushed}");
            kept |= written == "+OK";
        }
        assert!(Instant::now() < deadline, "the second node never held a copy");
    }
    // A write that waits for the second node is not in the numbers above, which are of this node; it is when it is answered.
    client.write_all(b"DBSIZE\r\n").unwrap();
    let left = line(&mut replies);
    assert!(!kept || left == ":16", "{left}");
    for node in [&first, &joining.join().unwrap()] {
        let said = block_on(node.clear());
        assert!(matches!(&said, Err(Error::Reply(text)) if text.starts_with(REFUSED)), "{said:?}");
    }
}

#[test]
fn the_metrics_page_shows_the_cluster() {
    let nodes = three();
    block_on(async {
        for i in 0..30 {
            nodes[0].set(format!("key:{i}"), "v").await.unwrap();
        }
        let page = cluster_metrics(&nodes[0]);
        assert!(metric(&page, "gridkv_cluster_operations_total") >= 30, "{page:#?}");
        assert_eq!(metric(&page, "gridkv_cluster_shards"), 32);
        assert_eq!(metric(&page, "gridkv_cluster_shards_normal"), 32);
        assert_eq!(metric(&page, "gridkv_cluster_members_alive"), 3);
        assert_eq!(metric(&page, "gridkv_cluster_isolated"), 0);
        assert!(metric(&page, "gridkv_cluster_links_up_total") >= 2, "{page:#?}");
        assert!(metric(&page, "gridkv_cluster_gossip_received_total") > 0, "{page:#?}");
        let stored = |node| metric(&cluster_metrics(node), "gridkv_cluster_replica_writes_total");
        assert!(stored(&nodes[1]) + stored(&nodes[2]) >= 30, "a write is acknowledged by one of the others");
        let leaders: u64 = nodes.iter().map(|node| metric(&cluster_metrics(node), "gridkv_cluster_leader")).sum();
        assert_eq!(leaders, 1);
        let alone = GridKv::builder().cores("1").unwrap().http("127.0.0.1:0".parse().unwrap()).start().unwrap();
        assert_eq!(cluster_metrics(&alone), Vec::<String>::new());
    });
}

#[test]
fn a_node_that_leaves_is_noticed_and_quorums_go_on_without_it() {
    let mut nodes = three();
    let mut events = nodes[0].cluster_events();
    block_on(async {
        nodes[0].set("kept", "yes").await.unwrap();
        nodes.pop().unwrap().close().await.unwrap();
        loop {
            match events.next().await.expect("the node runs") {
                ClusterEvent::Left(_) | ClusterEvent::Down(_) => break,
                _ => {}
            }
        }
        for node in &nodes {
            assert_eq!(node.get("kept").await.unwrap().unwrap(), "yes");
        }
        nodes[1].set("kept", "still").await.unwrap();
        let refused = nodes[0].get_with("kept", Level::All).await.unwrap_err();
        assert!(refused.to_string().starts_with("CLUSTERDOWN"), "{refused}");
        let mut client = client(&nodes[0]);
        says(&mut client, &[("STRLEN kept", ":5"), ("CLIENT CONSISTENCY all", "+OK"), ("MULTI", "+OK")]);
        says(&mut client, &[("GET kept", "+QUEUED"), ("EXEC", "-CLUSTERDOWN")]);
        for command in ["GET", "MGET", "EXISTS", "STRLEN", "TTL"] {
            says(&mut client, &[(&format!("{command} kept"), "-CLUSTERDOWN")]);
        }
        // Application code on a core has its levels too.
        let all = |handle: CoreHandle| async move {
            handle.set_with("kept", "by all", SetOptions::new().level(Level::All)).await
        };
        let refused = nodes[0].on_core(0, all).await.unwrap().unwrap_err();
        assert!(refused.to_string().starts_with("CLUSTERDOWN"), "{refused}");
        // Two of three are gone: what is left says so, and answers nothing that it cannot vouch for.
        nodes.pop().unwrap().close().await.unwrap();
        loop {
            match nodes[0].get("kept").await {
                Err(error) if error.to_string().starts_with("CLUSTERDOWN") => break,
                Ok(Some(value)) => assert_eq!(value, "still"),
                Ok(None) => panic!("an acknowledged write is gone"),
                Err(_) => {}
            }
        }
        let write = nodes[0].set("kept", "never").await.unwrap_err();
        assert!(write.to_string().starts_with("CLUSTERDOWN"), "{write}");
    });
}

#[test]
fn copies_that_move_and_data_at_risk_are_told_until_it_is_over() {
    // Two copies on three nodes: who loses one of them has the last one, until a third node has another.
    let start = |seeds: Vec<String>| {
        let cluster = ClusterConfig {
            peer_listen: "127.0.0.1:0".parse().unwrap(),
            seeds,
            replicas: 2,
            write_quorum: 2,
            read_quorum: 1,
            replace_after: Duration::from_secs(1),
            ..ClusterConfig::default()
        };
        let http = Some("127.0.0.1:0".parse().unwrap());
        let config = Config { cluster: Some(cluster), listen: None, http, ..Config::default() };
        Builder::from_config(config).cores("1").unwrap().shards(32).unwrap().start().unwrap()
    };
    let first = start(Vec::new());
    // A seed that has no address is no reason to end: another one has.
    let seeds = || vec!["no-such-host.invalid:7380".to_owned(), first.peer_addr().unwrap().to_string()];
    let mut events = first.cluster_events();
    let (second, third) = (start(seeds()), start(seeds()));
    let held = |view: &ClusterView, no| {
        view.map.placements.iter().filter(|placement| placement.replicas.iter().any(|r| r.node == no)).count()
    };
    for node in [&first, &second, &third] {
        wait_for("two copies everywhere, a third of them on the third node", || {
            let (view, third) = (status(node), status(&third).me);
            (full(&view, 2) && view.alive.len() == 3 && held(&view, third) >= 16, view.map.epoch)
        });
    }
    let at_risk = |node: &GridKv| metric(&cluster_metrics(node), "gridkv_cluster_shards_at_risk");
    assert_eq!(at_risk(&first), 0);
    let third_no = status(&third).me;
    block_on(async {
        first.set("kept", "yes").await.unwrap();
        third.close().await.unwrap();
        // What was told while the cluster grew comes first: copies were added, and moved to the third node.
        let (mut added, mut to_third) = (0, 0);
        let worst = loop {
            match events.next().await.expect("the node runs") {
                ClusterEvent::Moved { copies, .. } => {
                    added += copies.iter().filter(|copy| copy.from.is_none()).count();
                    to_third += copies.iter().filter(|copy| copy.to == Some(third_no)).count();
                }
                ClusterEvent::AtRisk(shards) => break shards,
                _ => {}
            }
        };
        assert_eq!(added, 32, "one more copy of each shard");
        assert!(
            worst >= 16 && to_third >= worst,
            "{worst} shards had their other copy on the third, {to_third} went there"
        );
        let mut back = 0;
        loop {
            match events.next().await.expect("the node runs") {
                ClusterEvent::Moved { copies, .. } => back += copies.iter().filter(|copy| copy.to.is_some()).count(),
                ClusterEvent::AtRisk(shards) => {
                    assert_eq!(shards, 0, "it only gets better");
                    break;
                }
                _ => {}
            }
        }
        assert!(back >= worst, "{back} of {worst}");
        assert_eq!(at_risk(&first), 0);
        assert_eq!(first.get("kept").await.unwrap().unwrap(), "yes");
    });
}

/// What no link can carry would be at one node only, or nowhere.
#[test]
fn a_value_that_is_too_long_for_other_nodes_is_refused_before_it_is_stored() {
    const LONGEST: usize = 64 << 20;
    let founder = builder().start().unwrap();
    let other = builder().seeds([founder.peer_addr().unwrap().to_string()]).start().unwrap();
    wait_for("two copies everywhere", || {
        let view = status(&founder);
        (full(&view, 2), view.map.epoch)
    });
    block_on(async {
        for node in [&founder, &other] {
            let said = node.set("plain", vec![0; LONGEST + 1]).await.map_err(|error| error.to_string());
            assert!(said.as_ref().is_err_and(|text| text.contains("string exceeds maximum allowed size")), "{said:?}");
            assert_eq!(node.get("plain").await.unwrap(), None);
        }
    });
    let (mut client, mut replies) = client(&founder);
    // Some are ordered here, some there.
    for key in 0..4 {
        client.write_all(format!("SETRANGE {key} {LONGEST} x\r\nEXISTS {key}\r\n").as_bytes()).unwrap();
        for wanted in ["-ERR string exceeds maximum allowed size", ":0"] {
            let said = line(&mut replies);
            assert!(said.starts_with(wanted), "{said}");
        }
    }
    block_on(async {
        founder.close().await.unwrap();
        other.close().await.unwrap();
    });
}

/// Commands on replicated data are counted and timed where their client is, and an error of theirs once.
#[test]
fn commands_on_replicated_data_are_counted_timed_and_remembered_when_slow() {
    let nodes = three();
    let mut c = client(&nodes[0]);
    says(
        &mut c,
        &[("CLIENT SETNAME me", "+OK"), ("CONFIG RESETSTAT", "+OK"), ("CONFIG SET slowlog-log-slower-than 0", "+OK")],
    );
    // In an array, as clients of libraries send them, the two take the short way.
    let (set, get) = ("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv", "*2\r\n$3\r\nGET\r\n$4\r\nnone");
    says(&mut c, &[(set, "+OK"), ("SET n 1", "+OK"), (get, "$-1")]);
    for key in 0..8 {
        let (set, incr) = (format!("SET key:{key} v"), format!("INCR key:{key}"));
        says(&mut c, &[(&set, "+OK"), (&incr, "-ERR value is not an integer")]);
    }
    let ask = |c: &mut (TcpStream, BufReader<TcpStream>), command: &str| {
        c.0.write_all(format!("{command}\r\nPING\r\n").as_bytes()).unwrap();
        let mut lines = Vec::new();
        while lines.last().is_none_or(|line| line != "+PONG") {
            lines.push(line(&mut c.1));
        }
        lines
    };
    let stat = |lines: &[String], command: &str, field: &str| -> u64 {
        let found = lines.iter().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:")));
        let found = found.unwrap_or_else(|| panic!("no {command} in {lines:#?}"));
        let number = found.split(',').find_map(|part| part.strip_prefix(field)?.strip_prefix('='));
        number.expect("the field is there").parse().unwrap()
    };
    let info = ask(&mut c, "INFO commandstats");
    assert_eq!((stat(&info, "set", "calls"), stat(&info, "incr", "calls")), (10, 8), "{info:#?}");
    assert_eq!((stat(&info, "set", "failed_calls"), stat(&info, "incr", "failed_calls")), (0, 8));
    assert!(stat(&info, "set", "usec") >= 10, "two of three replicas had to answer: {info:#?}");
    let errors = ask(&mut c, "INFO errorstats");
    assert!(errors.iter().any(|line| line == "errorstat_ERR:count=8"), "{errors:#?}");
    // From here on nothing more is remembered, so that asking pushes nothing out.
    says(&mut c, &[("CONFIG SET slowlog-log-slower-than -1", "+OK")]);
    // What was is, by a task that asks whose it was.
    wait_for("the slow log has them", || {
        let log = ask(&mut c, "SLOWLOG GET -1");
        let address = c.0.local_addr().unwrap().to_string();
        let shown = |words: &[&str]| {
            let words: Vec<String> =
                words.iter().flat_map(|word| [format!("${}", word.len()), (*word).into()]).collect();
            log.windows(words.len()).any(|window| window == words)
        };
        let all = [&["set", "k", "v"][..], &["SET", "n", "1"], &["get", "none"], &["INCR", "key:7"]];
        (all.iter().all(|words| shown(&[words, &[&*address, "me"][..]].concat())), log.clone())
    });
    says(&mut c, &[("CONFIG RESETSTAT", "+OK")]);
    assert!(!ask(&mut c, "INFO commandstats").iter().any(|line| line.starts_with("cmdstat_set:")));
}
