// Two Node.js clients of Redis, node-redis and ioredis, as a program would use them: no special options.
//
// GRIDKV_PORT names the node; tests/clients.rs starts one and sets it. The same file passes against a
// redis-server. The redis-py tests go through every command; here we look at what differs from client to
// client: how it connects, pipelines without being asked, decodes replies, and walks over all keys.

import assert from "node:assert/strict";
import { after, before, beforeEach, describe, test } from "node:test";
import Redis from "ioredis";
import { createClient, RESP_TYPES } from "redis";

const port = Number(process.env.GRIDKV_PORT);
assert.ok(port > 0, "GRIDKV_PORT must name a port");

for (const RESP of [2, 3]) {
  describe(`node-redis, RESP${RESP}`, () => {
    let client;

    before(async () => {
      client = createClient({ socket: { host: "127.0.0.1", port }, RESP });
      client.on("error", (error) => assert.fail(error));
      await client.connect();
    });
    after(() => client.close());
    beforeEach(() => client.flushAll());

    test("strings", async () => {
      assert.equal(await client.ping(), "PONG");
      assert.equal(await client.set("k", "v"), "OK");
      assert.equal(await client.get("k"), "v");
      assert.equal(await client.get("absent"), null);
      assert.equal(await client.set("k", "w", { NX: true }), null);
      assert.equal(await client.set("k", "w", { EX: 100, GET: true }), "v");
      const ttl = await client.ttl("k");
      assert.ok(ttl > 98 && ttl <= 100, `ttl is ${ttl}`);
      assert.equal(await client.incr("n"), 1);
      assert.equal(await client.incrBy("n", 9), 10);
      assert.equal(Number(await client.incrByFloat("n", 0.5)), 10.5);
      assert.equal(await client.append("k", "!"), 2);
      assert.equal(await client.getRange("k", 0, -1), "w!");
    });

    test("many keys over all cores", async () => {
      const entries = Object.fromEntries(Array.from({ length: 500 }, (_, n) => [`key:${n}`, `value:${n}`]));
      assert.equal(await client.mSet(entries), "OK");
      assert.deepEqual(await client.mGet(Object.keys(entries)), Object.values(entries));
      assert.equal(await client.exists(Object.keys(entries)), 500);
      assert.equal(await client.del(Object.keys(entries).slice(0, 200)), 200);
      assert.equal(await client.dbSize(), 300);
    });

    test("commands issued in one tick are pipelined and answered in order", async () => {
      const answers = await Promise.all(
        Array.from({ length: 2000 }, (_, n) => [client.set(`k${n}`, `${n}`), client.get(`k${n}`)]).flat(),
      );
      for (let n = 0; n < 2000; n++) {
        assert.equal(answers[2 * n], "OK");
        assert.equal(answers[2 * n + 1], `${n}`);
      }
    });

    test("transactions", async () => {
      assert.deepEqual(await client.multi().set("{t}a", "1").incr("{t}a").get("{t}a").exec(), ["OK", 2, "2"]);
    });

    test("scanIterator finds each of ten thousand keys", async () => {
      await Promise.all(Array.from({ length: 10_000 }, (_, n) => client.set(`key:${n}`, "v")));
      const seen = new Set();
      for await (const keys of client.scanIterator({ COUNT: 200 })) {
        for (const key of keys) seen.add(key);
      }
      assert.equal(seen.size, 10_000);
    });

    test("bytes and big values", async () => {
      const raw = client.withTypeMapping({ [RESP_TYPES.BLOB_STRING]: Buffer });
      const value = Buffer.alloc(4 << 20, 0);
      for (let n = 0; n < value.length; n += 997) value[n] = n % 256;
      assert.equal(await client.set("big", value), "OK");
      assert.ok(value.equals(await raw.get("big")));
    });

    test("errors carry Redis's texts", async () => {
      await client.set("word", "abc");
      await assert.rejects(client.incr("word"), /ERR value is not an integer or out of range/);
      await assert.rejects(client.sendCommand(["NOSUCH", "a"]), /ERR unknown command 'NOSUCH'/);
    });
  });
}

describe("ioredis", () => {
  let client;

  before(() => {
    client = new Redis(port, "127.0.0.1");
  });
  after(() => client.quit());
  beforeEach(() => client.flushall());

  test("its ready check passes", async () => {
    assert.equal(await client.ping(), "PONG");
    assert.equal(client.status, "ready");
  });

  test("strings and expiry", async () => {
    assert.equal(await client.set("k", "v", "EX", 100), "OK");
    assert.equal(await client.get("k"), "v");
    const ttl = await client.ttl("k");
    assert.ok(ttl > 98 && ttl <= 100, `ttl is ${ttl}`);
    assert.deepEqual(await client.mget("k", "absent"), ["v", null]);
    assert.equal(await client.del("k", "absent"), 1);
  });

  test("a pipeline of thousands keeps its order", async () => {
    const pipeline = client.pipeline();
    for (let n = 0; n < 5000; n++) pipeline.set(`k${n}`, n).get(`k${n}`);
    const answers = await pipeline.exec();
    for (let n = 0; n < 5000; n++) assert.deepEqual(answers[2 * n + 1], [null, `${n}`]);
  });

  test("multi", async () => {
    const answers = await client.multi().set("{t}a", "1").incr("{t}a").exec();
    assert.deepEqual(answers, [[null, "OK"], [null, 2]]);
  });

  test("watch aborts when another connection writes", async () => {
    const other = client.duplicate();
    await client.set("{t}k", "1");
    await client.watch("{t}k");
    await other.set("{t}k", "2");
    assert.equal(await client.multi().set("{t}k", "3").exec(), null);
    assert.equal(await client.get("{t}k"), "2");
    await other.quit();
  });

  test("scanStream", async () => {
    const pipeline = client.pipeline();
    for (let n = 0; n < 3000; n++) pipeline.set(`key:${n}`, n);
    await pipeline.exec();
    const seen = new Set();
    for await (const keys of client.scanStream({ match: "key:*", count: 100 })) {
      for (const key of keys) seen.add(key);
    }
    assert.equal(seen.size, 3000);
  });

  test("it comes back after its connection was killed", async () => {
    const victim = new Redis(port, "127.0.0.1", { retryStrategy: () => 10 });
    victim.on("error", () => {});
    const id = await victim.client("ID");
    assert.equal(await client.client("KILL", "ID", id), 1);
    assert.equal(await victim.set("after", "1"), "OK");
    await victim.quit();
  });
});
