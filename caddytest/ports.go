package caddytest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
)

// Ports come from below the ranges that operating systems use for outgoing
// connections: a port from there could be taken by a client while a server that
// the test restarts is down. Each process claims a block of them by listening on
// its first, so that test packages that run at the same time don't meet.
const (
	firstPort = 10_000
	lastPort  = 32_000
	blockSize = 200
)

var ports struct {
	mu    sync.Mutex
	claim net.Listener
	block int // the block's first port, which stays claimed
	next  int
}

// FreePort returns a TCP and UDP port that nobody uses on loopback and that no
// other call returns soon.
func FreePort(t TB) int {
	t.Helper()
	ports.mu.Lock()
	defer ports.mu.Unlock()
	if ports.claim == nil && !claimBlock() {
		t.Fatalf("no free block of %d ports between %d and %d on 127.0.0.1: "+
			"end some of the processes that listen there", blockSize, firstPort, lastPort)
	}
	for range blockSize {
		ports.next = ports.next%(blockSize-1) + 1
		if port := ports.block + ports.next; isFree(port) {
			return port
		}
	}
	t.Fatalf("all of the ports %d to %d on 127.0.0.1, which this process has claimed, are in use",
		ports.block+1, ports.block+blockSize-1)
	return 0
}

// FreeAddress returns 127.0.0.1 with a free port.
func FreeAddress(t TB) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", FreePort(t))
}

// FreeSocket returns the path of a Unix socket that does not exist yet.
func FreeSocket(t TB) string {
	t.Helper()
	return filepath.Join(shortTempDir(t), "socket")
}

func claimBlock() bool {
	blocks := (lastPort - firstPort) / blockSize
	start := rand.IntN(blocks)
	for i := range blocks {
		block := firstPort + (start+i)%blocks*blockSize
		claim, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", block))
		if err != nil {
			continue
		}
		ports.claim, ports.block = claim, block
		return true
	}
	return false
}

func isFree(port int) bool {
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		address := fmt.Sprintf("%s:%d", host, port)
		tcp, err := net.Listen("tcp", address)
		if err != nil {
			if host == "[::1]" {
				continue // a machine without IPv6
			}
			return false
		}
		tcp.Close()
	}
	udp, err := net.ListenPacket("udp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return false
	}
	udp.Close()
	return true
}
