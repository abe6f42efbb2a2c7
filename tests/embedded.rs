//! The facade as an application uses it: any runtime, any thread, and no thread left behind.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_lite::{StreamExt, future};
use gridkv::{Error, GridKv, SetOptions};

fn node(cores: &str) -> GridKv {
    GridKv::builder().cores(cores).unwrap().start().unwrap()
}

/// What every runtime must be able to do with a handle.
async fn exercise(db: GridKv) -> Result<(), Error> {
    assert_eq!(db.get("absent").await?, None);
    db.set("k", "v").await?;
    assert_eq!(db.get("k").await?.as_deref(), Some(&b"v"[..]));
    assert!(db.exists("k").await?);
    assert!(db.delete("k").await?);
    assert!(!db.delete("k").await?);
    assert_eq!(db.incr("n", 5).await?, 5);
    assert_eq!(db.decr("n", 7).await?, -2);
    let pairs: Vec<_> = (0..500).map(|i| (format!("many:{i}"), i.to_string())).collect();
    assert!(db.set_many(&pairs).await?.into_iter().all(|r| r.is_ok()));
    let keys: Vec<_> = (0..600).map(|i| format!("many:{i}")).collect();
    let values = db.get_many(&keys).await?;
    assert_eq!(values.found(), 500);
    for (i, value) in values.iter().enumerate() {
        assert_eq!(value?.is_some(), i < 500);
    }
    assert_eq!(values.get(7), Some(&b"7"[..]));
    let deleted = db.delete_many(&keys).await?;
    assert_eq!(deleted.into_iter().filter(|r| matches!(r, Ok(true))).count(), 500);
    Ok(())
}

#[test]
fn works_under_tokio() {
    let db = node("2");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let tasks: Vec<_> = (0..8).map(|_| tokio::spawn(solo(db.clone()))).collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        exercise(db.clone()).await.unwrap();
        db.close().await.unwrap();
    });
}

/// Concurrent users keep to keys of their own.
async fn solo(db: GridKv) -> Result<(), Error> {
    for i in 0..200 {
        db.set(format!("solo:{i}"), "x").await?;
        assert!(db.get(format!("solo:{i}")).await?.is_some());
    }
    Ok(())
}

#[test]
fn works_under_smol() {
    smol::block_on(async {
        let db = node("2");
        exercise(db.clone()).await.unwrap();
        db.close().await.unwrap();
    });
}

#[test]
fn works_under_a_plain_block_on_and_blocking() {
    let db = node("1");
    future::block_on(exercise(db.clone())).unwrap();
    let blocking = db.blocking();
    blocking.set("a", "1").unwrap();
    assert_eq!(blocking.get("a").unwrap().unwrap(), "1");
    blocking.close().unwrap();
    assert!(matches!(blocking.get("a"), Err(Error::Closed)));
}

#[test]
fn conditional_writes_say_what_they_did() {
    let db = node("2");
    let blocking = db.blocking();
    for key in ["one", "two", "three", "four"] {
        let nx = SetOptions::new().nx();
        assert!(blocking.set_with(key, "first", nx).unwrap().applied);
        assert!(!blocking.set_with(key, "second", nx).unwrap().applied);
        let swapped = blocking.set_with(key, "third", SetOptions::new().get()).unwrap();
        assert_eq!(swapped.previous.unwrap(), "first");
        assert!(!blocking.set_with(format!("{key}?"), "x", SetOptions::new().xx()).unwrap().applied);
        let kept = blocking.set_with(key, "fourth", nx.get()).unwrap();
        assert!(!kept.applied && kept.previous.unwrap() == "third");
    }
}

#[test]
fn an_entry_expires_and_keep_ttl_keeps_its_end() {
    let db = node("1");
    let blocking = db.blocking();
    blocking.set_with("gone", "x", SetOptions::new().ttl(Duration::from_millis(20))).unwrap();
    blocking.set_with("gone", "y", SetOptions::new().keep_ttl()).unwrap();
    blocking.set("stays", "x").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while blocking.get("gone").unwrap().is_some() {
        assert!(Instant::now() < deadline, "the entry outlived its TTL");
        std::thread::yield_now();
    }
    assert!(blocking.exists("stays").unwrap());
}

#[test]
fn a_group_of_large_values_comes_in_pieces_and_whole() {
    let db = node("2");
    let value = |i: usize| vec![i as u8; 1000 * (i % 60)];
    let pairs: Vec<_> = (0..400).map(|i| (format!("large:{i}"), value(i))).collect();
    assert!(db.blocking().set_many(&pairs).unwrap().into_iter().all(|written| written.is_ok()));
    // Some twice, some that are not there.
    let keys: Vec<String> = (0..900).map(|i| format!("large:{}", i * 7 % 450)).collect();
    let check = |values: gridkv::Values| {
        for i in 0..900 {
            let number = i * 7 % 450;
            assert_eq!(values.get(i), (number < 400).then(|| value(number)).as_deref(), "{i}");
        }
    };
    check(db.blocking().get_many(&keys).unwrap());
    check(db.blocking().on_core(0, |core| async move { core.get_many(&keys).await.unwrap() }).unwrap());
}

#[test]
fn a_scan_sees_every_key_once() {
    for cores in ["1", "2"] {
        let db = node(cores);
        let mut expected = BTreeMap::new();
        for i in 0..3000 {
            let key = format!("{}:{i}", if i % 3 == 0 { "fizz" } else { "plain" });
            db.blocking().set(&key, i.to_string()).unwrap();
            if i % 3 == 0 {
                expected.insert(key, i.to_string());
            }
        }
        let mut seen = BTreeMap::new();
        future::block_on(async {
            let mut scan = db.scan("fizz:");
            while let Some(pair) = scan.next().await {
                let (key, value) = pair.unwrap();
                let key = String::from_utf8(key.to_vec()).unwrap();
                let twice = seen.insert(key, String::from_utf8(value.to_vec()).unwrap());
                assert_eq!(twice, None, "a key came twice");
            }
        });
        assert_eq!(seen, expected);
        assert_eq!(db.blocking().scan_keys("fizz:").count(), expected.len());
        db.blocking().clear().unwrap();
        assert_eq!(db.blocking().scan_keys("").count(), 0);
    }
}

#[test]
fn code_on_a_core_reads_its_keys_in_place_and_any_key_by_a_hop() {
    let db = node("2");
    for i in 0..1000 {
        db.blocking().set(format!("k{i}"), format!("v{i}")).unwrap();
    }
    let owned = db.blocking().on_each_core(|core| async move {
        let mut owned = 0;
        let keys: Vec<_> = (0..1000).map(|i| format!("k{i}")).collect();
        for (i, key) in keys.iter().enumerate() {
            if core.owns(key) {
                owned += 1;
                assert_eq!(core.read(key, |v| v.to_vec()).unwrap().unwrap(), format!("v{i}").as_bytes());
            } else {
                assert!(matches!(core.read(key, |_| ()), Err(Error::NotOwned { .. })));
            }
            assert_eq!(core.get(key).await.unwrap().unwrap(), format!("v{i}"));
        }
        let values = core.get_many(&keys).await.unwrap();
        assert!((0..1000).all(|i| values.get(i) == Some(format!("v{i}").as_bytes())));
        core.set(format!("from:{}", core.id()), "x").await.unwrap();
        core.incr("counter", 10).await.unwrap();
        owned
    });
    assert_eq!(owned.unwrap().iter().sum::<usize>(), 1000);
    assert_eq!(db.blocking().incr("counter", 0).unwrap(), 20);
}

#[test]
fn a_task_that_panics_on_a_core_hurts_nobody_else() {
    let db = node("1");
    let panicked = db.blocking().on_core(0, |_| async { panic!("a bug in application code") });
    assert!(matches!(panicked, Err::<(), _>(Error::Panicked)));
    db.blocking().set("still", "here").unwrap();
    assert!(db.blocking().exists("still").unwrap());
    assert!(matches!(db.blocking().on_core(9, |_| async {}), Err(Error::NoSuchCore { core: 9, cores: 1 })));
}

#[test]
fn futures_that_are_dropped_early_leave_nothing_behind() {
    let db = node("2");
    db.blocking().set("k", "v").unwrap();
    for _ in 0..2000 {
        let mut pending = Box::pin(db.get("k"));
        let _ = future::block_on(future::poll_once(&mut pending));
        drop(pending);
    }
    db.blocking()
        .on_each_core(|core| async move {
            let keys: Vec<_> = (0..64).map(|i| format!("k{i}")).collect();
            for _ in 0..2000 {
                let _ = future::poll_once(Box::pin(core.get_many(&keys))).await;
            }
        })
        .unwrap();
    assert_eq!(db.blocking().get("k").unwrap().unwrap(), "v");
}

fn threads_named_gridkv() -> usize {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("gridkv-lone"))
        .count()
}

#[test]
fn dropping_the_last_handle_ends_every_thread() {
    let db = GridKv::builder().cores("2").unwrap().thread_name("gridkv-lone").start().unwrap();
    let clone = db.clone();
    // Each core's executor has a helper thread for blocking calls, which inherits its name.
    assert!(threads_named_gridkv() >= 2);
    drop(db);
    clone.blocking().set("a", "b").unwrap();
    drop(clone);
    // The threads were joined by the drop; the kernel may need a moment to forget the last one.
    let deadline = Instant::now() + Duration::from_secs(10);
    while threads_named_gridkv() > 0 {
        assert!(Instant::now() < deadline, "threads outlived the last handle");
        std::thread::yield_now();
    }
}

#[test]
fn writes_beyond_the_memory_limit_fail_and_reads_go_on() {
    let db = GridKv::builder().cores("1").unwrap().max_memory(4 << 20).start().unwrap();
    let blocking = db.blocking();
    blocking.set("kept", "value").unwrap();
    let large = vec![7; 64 << 10];
    let refused = (0..200).find_map(|i| blocking.set(format!("big:{i}"), &large).err());
    assert!(matches!(refused, Some(Error::OutOfMemory)), "{refused:?}");
    assert_eq!(blocking.get("kept").unwrap().unwrap(), "value");
    assert!(blocking.delete("big:0").unwrap());
}

#[test]
fn keys_of_a_core_are_read_in_place_in_groups() {
    let db = node("2");
    let blocking = db.blocking();
    let keys: Vec<String> = (0..200).map(|n| format!("key:{n}")).collect();
    for key in keys.iter().filter(|key| !key.ends_with('7')) {
        blocking.set(key, key).unwrap();
    }
    let (own, others): (Vec<_>, Vec<_>) = keys.iter().cloned().partition(|key| db.core_of(key) == 0);
    let expected: Vec<_> = own.iter().map(|key| (!key.ends_with('7')).then(|| key.clone())).collect();
    let (read, refused) = blocking
        .on_core(0, move |core| async move {
            let mut read = Vec::new();
            let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
            core.read_many(&own, |at, value| {
                assert_eq!(at, read.len());
                read.push(value.map(text));
            })
            .unwrap();
            let mut looked = 0;
            let mixed = [own[0].as_str(), others[0].as_str(), own[1].as_str()];
            let refused = core.read_many(&mixed, |_, _| looked += 1);
            (read, (looked, matches!(refused, Err(Error::NotOwned { core: 0, owner: 1 }))))
        })
        .unwrap();
    assert_eq!(read, expected);
    assert_eq!(refused, (1, true));
    blocking.close().unwrap();
}

#[test]
fn an_embedder_brings_its_own_backend() {
    use gridkv::engine::backend::Registry;
    // One that stands for any other: made by the embedder, known under the embedder's name.
    let db = GridKv::builder()
        .cores("2")
        .unwrap()
        .custom_backend("mine", |config| Registry::default().make("memory", config))
        .start()
        .unwrap();
    let blocking = db.blocking();
    for n in 0..100 {
        blocking.set(format!("key:{n}"), n.to_string()).unwrap();
    }
    assert_eq!(blocking.get("key:42").unwrap().as_deref(), Some(&b"42"[..]));
    assert_eq!(future::block_on(db.stats()).unwrap().keys(), 100);
    blocking.close().unwrap();
    let refused = GridKv::builder().backend("abacus").start();
    assert!(matches!(refused, Err(Error::Config(_))));
}
