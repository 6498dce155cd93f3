package replicad

import (
	"bytes"
	"log/slog"
	"net"
	"strings"
	"testing"

	"kvmreplica/replicad/config"
)

// At boot the network may not be there yet: guests must start all the same.
func TestAnAddressTheHostDoesNotHaveYetIsListenedOn(t *testing.T) {
	for listen, warned := range map[string]bool{"192.0.2.1:0": true, "[2001:db8::1]:0": true, "127.0.0.1:0": false, ":0": false} {
		var log bytes.Buffer
		d := &Daemon{cfg: config.Config{Listen: listen}, log: slog.New(slog.NewTextHandler(&log, nil))}
		l, err := d.listenPeers(t.Context())
		if err != nil {
			t.Errorf("%s: %v", listen, err)
			continue
		}
		_ = l.Close()
		if got := strings.Contains(log.String(), "cannot reach this host"); got != warned {
			t.Errorf("%s: %s", listen, log.String())
		}
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	d := &Daemon{cfg: config.Config{Listen: taken.Addr().String()}, log: slog.New(slog.DiscardHandler)}
	if l, err := d.listenPeers(t.Context()); err == nil {
		_ = l.Close()
		t.Error("an address that is taken was listened on")
	}
}
