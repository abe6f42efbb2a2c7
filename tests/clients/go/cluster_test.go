// go-redis's cluster client against three nodes, as a program would use it: one address to start with.
//
// GRIDKV_PORTS names the nodes. Such a client sends each key to the node that has its slot; every node serves every key, so
// what it wrote there is read here through the others too.
package clients

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"
)

var ctx = context.Background()

// nodes is the addresses of the cluster; without one, the test is skipped.
func nodes(t *testing.T) []string {
	t.Helper()
	ports := os.Getenv("GRIDKV_PORTS")
	if ports == "" {
		t.Skip("GRIDKV_PORTS names no cluster")
	}
	var addresses []string
	for _, port := range strings.Split(ports, ",") {
		addresses = append(addresses, "127.0.0.1:"+port)
	}
	sort.Strings(addresses)
	return addresses
}

// cluster is a client that knows one node and finds the others.
func cluster(t *testing.T, options redis.ClusterOptions, first string) *redis.ClusterClient {
	t.Helper()
	options.Addrs = []string{first}
	client := redis.NewClusterClient(&options)
	t.Cleanup(func() { client.Close() })
	return client
}

// check ends the test at an error.
func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// equal ends the test when got, printed, is not want, printed.
func equal(t *testing.T, got, want any) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("got %v, want %v", got, want)
	}
}

// readEverywhere asks each node for the keys, with a client that knows nothing of clusters.
func readEverywhere(t *testing.T, addresses, keys []string, want []any) {
	t.Helper()
	for _, address := range addresses {
		client := redis.NewClient(&redis.Options{Addr: address})
		got, err := client.MGet(ctx, keys...).Result()
		check(t, err)
		equal(t, got, want)
		check(t, client.Close())
	}
}

// numbered is n keys that differ in a number, and a value for each.
func numbered(prefix string, n int) (keys []string, values []any) {
	for i := 0; i < n; i++ {
		keys = append(keys, fmt.Sprintf("%s%d", prefix, i))
		values = append(values, fmt.Sprintf("v%d", i))
	}
	return keys, values
}

// manyAtOnce writes all keys in one command and reads them in another.
func manyAtOnce(t *testing.T, client redis.Cmdable, keys []string, values []any) {
	t.Helper()
	var pairs []any
	for i, key := range keys {
		pairs = append(pairs, key, values[i])
	}
	check(t, client.MSet(ctx, pairs...).Err())
	equal(t, client.MGet(ctx, keys...).Val(), values)
}

// pipelined writes each key and reads it, all without waiting for an answer.
func pipelined(t *testing.T, client redis.Cmdable, keys []string, values []any) {
	t.Helper()
	answers, err := client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i, key := range keys {
			pipe.Set(ctx, key, values[i], 0)
			pipe.Get(ctx, key)
		}
		return nil
	})
	check(t, err)
	for i := range keys {
		equal(t, answers[2*i+1].(*redis.StringCmd).Val(), values[i])
	}
}

func TestCluster(t *testing.T) {
	addresses := nodes(t)
	kinds := map[string]redis.ClusterOptions{
		"RESP2": {Protocol: 2},
		"RESP3": {Protocol: 3},
		// These two send READONLY first, and reads to whichever node is near or comes up.
		"by latency": {RouteByLatency: true},
		"at random":  {RouteRandomly: true},
	}
	for name, options := range kinds {
		t.Run(name, func(t *testing.T) { uses(t, cluster(t, options, addresses[0]), addresses) })
	}
}

// uses is what a program does with a cluster client.
func uses(t *testing.T, client *redis.ClusterClient, addresses []string) {
	t.Run("one node tells of all", func(t *testing.T) {
		var mutex sync.Mutex
		var found []string
		check(t, client.ForEachMaster(ctx, func(ctx context.Context, master *redis.Client) error {
			mutex.Lock()
			defer mutex.Unlock()
			found = append(found, master.Options().Addr)
			return master.Ping(ctx).Err()
		}))
		sort.Strings(found)
		equal(t, found, addresses)
		check(t, client.ForEachSlave(ctx, func(ctx context.Context, slave *redis.Client) error {
			return fmt.Errorf("%s is no replica of somebody", slave.Options().Addr)
		}))
	})

	t.Run("what is written is read through every node", func(t *testing.T) {
		keys, values := numbered("go:", 500)
		for i, key := range keys {
			check(t, client.Set(ctx, key, values[i], 0).Err())
		}
		for i, key := range keys {
			got, err := client.Get(ctx, key).Result()
			check(t, err)
			equal(t, got, values[i])
		}
		readEverywhere(t, addresses, keys, values)
		equal(t, client.Del(ctx, keys[0]).Val(), 1)
		readEverywhere(t, addresses, keys[:1], []any{nil})
		if _, err := client.Get(ctx, keys[0]).Result(); !errors.Is(err, redis.Nil) {
			t.Fatalf("a deleted key gives %v", err)
		}
	})

	t.Run("a pipeline goes to several nodes and answers in order", func(t *testing.T) {
		keys, values := numbered("pipe:", 500)
		pipelined(t, client, keys, values)
	})

	t.Run("many keys of one tag, and a transaction", func(t *testing.T) {
		keys, values := numbered("{go}", 50)
		manyAtOnce(t, client, keys, values)
		answers, err := client.TxPipelined(ctx, func(pipe redis.Pipeliner) error {
			pipe.Set(ctx, "{go}t", "1", 0)
			pipe.Incr(ctx, "{go}t")
			return nil
		})
		check(t, err)
		equal(t, answers[1].(*redis.IntCmd).Val(), 2)
	})

	t.Run("a watched key that changed ends the transaction", func(t *testing.T) {
		check(t, client.Set(ctx, "{go}w", "1", 0).Err())
		err := client.Watch(ctx, func(tx *redis.Tx) error {
			check(t, client.Set(ctx, "{go}w", "2", 0).Err())
			_, err := tx.TxPipelined(ctx, func(pipe redis.Pipeliner) error {
				return pipe.Set(ctx, "{go}w", "3", 0).Err()
			})
			return err
		}, "{go}w")
		if !errors.Is(err, redis.TxFailedErr) {
			t.Fatalf("the transaction gives %v", err)
		}
		readEverywhere(t, addresses, []string{"{go}w"}, []any{"2"})
	})

	t.Run("increments of several clients are all counted", func(t *testing.T) {
		check(t, client.Set(ctx, "counter", "0", 0).Err())
		var group sync.WaitGroup
		failures := make(chan error, len(addresses))
		for _, address := range addresses {
			other := cluster(t, redis.ClusterOptions{}, address)
			group.Add(1)
			go func() {
				defer group.Done()
				for i := 0; i < 100; i++ {
					if err := other.Incr(ctx, "counter").Err(); err != nil {
						failures <- err
						return
					}
				}
			}()
		}
		group.Wait()
		close(failures)
		for err := range failures {
			t.Fatal(err)
		}
		readEverywhere(t, addresses, []string{"counter"}, []any{"300"})
	})
}
