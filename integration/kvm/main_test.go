package kvm_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
)

// forwardVar makes this binary a forwarder between two unix sockets.
const forwardVar = "KVMREPLICA_FORWARD"

func TestMain(m *testing.M) {
	if from, to, ok := strings.Cut(os.Getenv(forwardVar), ","); ok {
		if err := forward(from, to); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// forward passes connections on until it is killed. A data plane serves one
// client process, which it must be able to name: one inside its own host.
func forward(from, to string) error {
	l, err := net.Listen("unix", from)
	if err != nil {
		return err
	}
	for {
		in, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer in.Close()
			out, err := net.Dial("unix", to)
			if err != nil {
				return // the client sees its connection end, and comes again
			}
			go func() {
				_, _ = io.Copy(out, in)
				_ = out.Close()
			}()
			_, _ = io.Copy(in, out)
			_ = out.Close()
		}()
	}
}
