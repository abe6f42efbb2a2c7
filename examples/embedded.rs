//! A node inside an application: no server, no port, three ways to reach the data.
//!
//! ```text
//! cargo run --release --example embedded
//! ```

use std::time::Duration;

use futures_lite::{StreamExt, future};
use gridkv::{Error, GridKv, SetOptions};

fn main() -> Result<(), Error> {
    // All cores this process may use, 256 shards, no memory limit.
    let db = GridKv::builder().start()?;
    println!("started on {} core(s)", db.cores());

    // 1. From any thread that may block.
    let blocking = db.blocking();
    blocking.set("user:1001", "Alice")?;
    println!("user:1001 = {:?}", blocking.get("user:1001")?);

    // 2. From any async runtime; here a plain block_on.
    future::block_on(async {
        let session = SetOptions::new().ttl(Duration::from_secs(60)).nx();
        let first = db.set_with("session:7", "token", session).await?;
        let second = db.set_with("session:7", "other", session).await?;
        println!("session:7 written: {}, written again: {}", first.applied, second.applied);

        // Grouped by core, one message each, all cores at work at once.
        let pairs: Vec<_> = (0..1000).map(|i| (format!("item:{i}"), format!("value {i}"))).collect();
        for result in db.set_many(&pairs).await? {
            result?;
        }
        let keys: Vec<_> = pairs.iter().map(|(key, _)| key).collect();
        println!("found {} of {}", db.get_many(&keys).await?.found(), keys.len());

        let mut items = db.scan_keys("item:99");
        let mut count = 0;
        while let Some(key) = items.next().await {
            key?;
            count += 1;
        }
        println!("{count} keys begin with item:99");
        println!("counter = {}", db.incr("visits", 41).await? + db.incr("visits", 1).await? - 41);
        Ok::<_, Error>(())
    })?;

    // 3. Beside the data: your code on the core that owns it, where a read is a function call.
    let lengths = blocking.on_each_core(|core| async move {
        let mut bytes = 0;
        for i in 0..1000 {
            let key = format!("item:{i}");
            if core.owns(&key) {
                bytes += core.read(&key, |value| value.len())?.unwrap_or(0);
            }
        }
        Ok::<usize, Error>(bytes)
    })?;
    for (core, bytes) in lengths.into_iter().enumerate() {
        println!("core {core} holds {} bytes of the items", bytes?);
    }

    db.blocking().close()
}
