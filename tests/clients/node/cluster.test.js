// The same two clients in their form for Redis Cluster, against three nodes.
//
// GRIDKV_PORTS names the nodes. Such a client sends each key to the node that has its slot; every node serves every key, so
// what it wrote there is read here through the others too.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import Redis from "ioredis";
import { createCluster } from "redis";

const ports = (process.env.GRIDKV_PORTS ?? "").split(",").map(Number);
assert.equal(ports.length, 3, "GRIDKV_PORTS must name three ports");
const names = Array.from({ length: 500 }, (_, n) => `node:${n}`);
const sorted = (numbers) => [...numbers].sort((a, b) => a - b);

// The values of keys as each node gives them to a client that knows nothing of clusters.
async function readEverywhere(keys, expected) {
  for (const port of ports) {
    const client = new Redis(port, "127.0.0.1");
    assert.deepEqual(await Promise.all(keys.map((key) => client.get(key))), expected, `through port ${port}`);
    await client.quit();
  }
}

for (const RESP of [2, 3]) {
  describe(`node-redis createCluster, RESP${RESP}`, () => {
    let cluster;

    before(async () => {
      cluster = createCluster({ rootNodes: [{ url: `redis://127.0.0.1:${ports[0]}` }], defaults: { RESP } });
      cluster.on("error", (error) => assert.fail(error));
      await cluster.connect();
    });
    after(() => cluster.close());

    test("one node tells of all", () => {
      assert.deepEqual(sorted(cluster.masters.map((master) => master.port)), sorted(ports));
      assert.equal(cluster.replicas.length, 0);
    });

    test("what is written is read through every node", async () => {
      const values = names.map((_, n) => `${RESP}:${n}`);
      await Promise.all(names.map((name, n) => cluster.set(name, values[n])));
      assert.deepEqual(await Promise.all(names.map((name) => cluster.get(name))), values);
      await readEverywhere(names, values);
    });

    test("many keys of one tag, and a transaction", async () => {
      const entries = Object.fromEntries(Array.from({ length: 50 }, (_, n) => [`{many}${n}`, `v${n}`]));
      assert.equal(await cluster.mSet(entries), "OK");
      assert.deepEqual(await cluster.mGet(Object.keys(entries)), Object.values(entries));
      assert.deepEqual(await cluster.multi().set("{t}a", "1").incr("{t}a").get("{t}a").exec(), ["OK", 2, "2"]);
    });

    test("increments of several clients are all counted", async () => {
      await cluster.set("counter", "0");
      const others = await Promise.all(
        ports.map((port) => createCluster({ rootNodes: [{ url: `redis://127.0.0.1:${port}` }] }).connect()),
      );
      await Promise.all(others.flatMap((other) => Array.from({ length: 100 }, () => other.incr("counter"))));
      assert.equal(await cluster.get("counter"), "300");
      await Promise.all(others.map((other) => other.close()));
    });
  });
}

describe("ioredis Cluster", () => {
  let cluster;

  before(async () => {
    cluster = new Redis.Cluster([{ host: "127.0.0.1", port: ports[2] }]);
    await new Promise((resolve, reject) => cluster.once("ready", resolve).once("error", reject));
  });
  after(() => cluster.quit());

  test("one node tells of all", () => {
    assert.deepEqual(sorted(cluster.nodes("master").map((node) => node.options.port)), sorted(ports));
    assert.equal(cluster.nodes("slave").length, 0);
  });

  test("what is written is read through every node", async () => {
    const values = names.map((_, n) => `io:${n}`);
    await Promise.all(names.map((name, n) => cluster.set(name, values[n])));
    assert.deepEqual(await Promise.all(names.map((name) => cluster.get(name))), values);
    await readEverywhere(names, values);
    assert.equal(await cluster.del(names[0]), 1);
    await readEverywhere([names[0]], [null]);
  });

  test("many keys of one tag, a pipeline, a transaction", async () => {
    const entries = Array.from({ length: 50 }, (_, n) => [`{io}${n}`, `v${n}`]);
    assert.equal(await cluster.mset(...entries.flat()), "OK");
    assert.deepEqual(await cluster.mget(...entries.map(([key]) => key)), entries.map(([, value]) => value));
    const pipeline = cluster.pipeline();
    for (const [key, value] of entries) pipeline.get(key).set(key, `${value}!`);
    const answers = await pipeline.exec();
    assert.deepEqual(answers, entries.flatMap(([, value]) => [[null, value], [null, "OK"]]));
    const done = await cluster.multi().set("{io}t", "1").incr("{io}t").exec();
    assert.deepEqual(done, [[null, "OK"], [null, 2]]);
  });

  test("increments of several clients are all counted", async () => {
    await cluster.set("counter", "0");
    const others = ports.map((port) => new Redis.Cluster([{ host: "127.0.0.1", port }]));
    await Promise.all(others.flatMap((other) => Array.from({ length: 100 }, () => other.incr("counter"))));
    await readEverywhere(["counter"], ["300"]);
    await Promise.all(others.map((other) => other.quit()));
  });
});
