// go-redis against one node, as a program would use it: an address and no other option.
//
// GRIDKV_PORT names the node. The redis-py tests go through every command; here we look at what differs from client to
// client: how it connects, pipelines, decodes replies, and walks over all keys.
package clients

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

func TestOneNode(t *testing.T) {
	port := os.Getenv("GRIDKV_PORT")
	if port == "" {
		t.Skip("GRIDKV_PORT names no node")
	}
	for _, protocol := range []int{2, 3} {
		client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + port, Protocol: protocol})
		t.Cleanup(func() { client.Close() })
		t.Run(fmt.Sprintf("RESP%d", protocol), func(t *testing.T) { commands(t, client) })
	}
}

func commands(t *testing.T, client *redis.Client) {
	check(t, client.FlushAll(ctx).Err())

	t.Run("strings", func(t *testing.T) {
		equal(t, client.Ping(ctx).Val(), "PONG")
		check(t, client.Set(ctx, "k", "v", 100*time.Second).Err())
		equal(t, client.Get(ctx, "k").Val(), "v")
		equal(t, client.SetNX(ctx, "k", "w", 0).Val(), false)
		if left := client.TTL(ctx, "k").Val(); left <= 98*time.Second || left > 100*time.Second {
			t.Fatalf("ttl is %v", left)
		}
		if _, err := client.Get(ctx, "absent").Result(); !errors.Is(err, redis.Nil) {
			t.Fatalf("an absent key gives %v", err)
		}
		equal(t, client.IncrBy(ctx, "n", 9).Val(), 9)
		equal(t, client.IncrByFloat(ctx, "n", 0.5).Val(), 9.5)
	})

	t.Run("many keys over all cores", func(t *testing.T) {
		keys, values := numbered("key:", 500)
		manyAtOnce(t, client, keys, values)
		equal(t, client.Del(ctx, keys[:200]...).Val(), 200)
		equal(t, client.Exists(ctx, keys...).Val(), 300)
	})

	t.Run("a pipeline of thousands keeps its order", func(t *testing.T) {
		keys, values := numbered("pipe:", 5000)
		pipelined(t, client, keys, values)
	})

	t.Run("the iterator finds each of them", func(t *testing.T) {
		seen := map[string]bool{}
		walk := client.Scan(ctx, 0, "pipe:*", 200).Iterator()
		for walk.Next(ctx) {
			seen[walk.Val()] = true
		}
		check(t, walk.Err())
		equal(t, len(seen), 5000)
	})

	t.Run("bytes and big values", func(t *testing.T) {
		value := make([]byte, 4<<20)
		for i := 0; i < len(value); i += 997 {
			value[i] = byte(i)
		}
		check(t, client.Set(ctx, "big", value, 0).Err())
		got, err := client.Get(ctx, "big").Bytes()
		check(t, err)
		if !bytes.Equal(got, value) {
			t.Fatal("the value came back changed")
		}
	})

	t.Run("errors carry Redis's texts", func(t *testing.T) {
		check(t, client.Set(ctx, "word", "abc", 0).Err())
		equal(t, client.Incr(ctx, "word").Err(), "ERR value is not an integer or out of range")
		if err := client.Do(ctx, "NOSUCH", "a").Err(); err == nil || !strings.HasPrefix(err.Error(), "ERR unknown command 'NOSUCH'") {
			t.Fatalf("an unknown command gives %v", err)
		}
	})

	t.Run("a deadline of the caller ends the call and not the client", func(t *testing.T) {
		late, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
		defer cancel()
		if err := client.Get(late, "k").Err(); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a call that is late gives %v", err)
		}
		equal(t, client.Get(ctx, "k").Val(), "v")
	})
}
