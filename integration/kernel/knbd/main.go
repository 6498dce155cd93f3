// Command knbd makes a block device of one of our exports with the Linux
// kernel's own NBD client, by generic netlink, and loads it:
//
//	knbd hold N SOCKET EXPORT CONNECTIONS   /dev/nbdN lives until SIGTERM; a lost
//	                                        connection is replaced (NBD_CMD_RECONFIGURE)
//	knbd load DEVICE WORKERS OPERATIONS SEED  stamped, verified direct I/O; prints the digest of the content
//	knbd files DIR WORKERS OPERATIONS SEED    files written, cut, renamed, removed, synced, verified
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "knbd:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 5 {
		return errors.New("usage: knbd hold N SOCKET EXPORT CONNECTIONS | knbd load|files DEVICE|DIR WORKERS OPERATIONS SEED")
	}
	number := func(i int) int {
		n, err := strconv.Atoi(args[i])
		if err != nil {
			fmt.Fprintln(os.Stderr, "knbd:", err)
			os.Exit(2)
		}
		return n
	}
	switch args[0] {
	case "load":
		return load(args[1], number(2), number(3), uint64(number(4)))
	case "files":
		return files(args[1], number(2), number(3), uint64(number(4)))
	}
	return hold(uint32(number(1)), args[2], args[3], number(4))
}

// deadSeconds is how long the kernel lets requests wait for a new connection.
const deadSeconds = 120

// hold keeps a device until it is told to end.
func hold(index uint32, socket, name string, conns int) error {
	f, err := family()
	if err != nil {
		return err
	}
	files, x, err := dial(socket, name, conns)
	if err != nil {
		return err
	}
	err = connect(f, index, files, x, deadSeconds)
	shut(files)
	if err != nil {
		return err
	}
	var given atomic.Int64
	broken := make(chan error, 1)
	go func() {
		broken <- watch(f, index, func() error {
			files, _, err := dial(socket, name, 1)
			if err != nil {
				return err
			}
			defer shut(files)
			// The kernel tells of a loss before it takes a replacement, and of
			// some losses twice.
			for range 50 {
				if err = reconfigure(f, index, files); err == nil {
					given.Add(1)
					return nil
				}
				if !errors.Is(err, syscall.ENOSPC) {
					return err
				}
				time.Sleep(20 * time.Millisecond)
			}
			fmt.Println("no connection is missing")
			return nil
		})
	}()
	fmt.Println("attached")
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	select {
	case <-stop:
		fmt.Println("connections given back:", given.Load())
		return disconnect(f, index)
	case err := <-broken:
		return err
	}
}

func shut(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // the kernel has them
	}
}

// export is what a server says of the disk.
type export struct {
	size  uint64
	flags uint16
}

// dial makes connections and negotiates on each; a server that is being
// started again is waited for.
func dial(socket, name string, conns int) (files []*os.File, x export, err error) {
	for range conns {
		end := time.Now().Add(deadSeconds * time.Second)
		for {
			var f *os.File
			if f, x, err = dialOne(socket, name); err == nil {
				files = append(files, f)
				break
			}
			if time.Now().After(end) {
				shut(files)
				return nil, x, err
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return files, x, nil
}

func dialOne(socket, name string) (*os.File, export, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, export{}, err
	}
	defer c.Close()
	x, err := handshake(c, name)
	if err != nil {
		return nil, x, err
	}
	f, err := c.(*net.UnixConn).File() // a duplicate
	return f, x, err
}

// handshake asks for an export with NBD_OPT_GO. Structured replies are not
// asked for: the kernel's client knows only simple ones.
func handshake(c net.Conn, name string) (x export, err error) {
	var hello struct {
		Magic, Option uint64
		Flags         uint16
	}
	if err := binary.Read(c, binary.BigEndian, &hello); err != nil {
		return x, err
	}
	q := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	q = binary.BigEndian.AppendUint64(q, 0x49484156454f5054)
	q = binary.BigEndian.AppendUint32(q, 7)
	q = binary.BigEndian.AppendUint32(q, uint32(len(name)+6))
	q = binary.BigEndian.AppendUint32(q, uint32(len(name)))
	q = append(append(q, name...), 0, 0)
	if _, err := c.Write(q); err != nil {
		return x, err
	}
	for {
		var a struct {
			Magic        uint64
			Option, Type uint32
			Len          uint32
		}
		if err := binary.Read(c, binary.BigEndian, &a); err != nil {
			return x, err
		}
		if a.Len > 64<<10 {
			return x, fmt.Errorf("a reply of %d bytes", a.Len)
		}
		b := make([]byte, a.Len)
		if _, err := io.ReadFull(c, b); err != nil {
			return x, err
		}
		switch {
		case a.Type == 1:
			return x, nil
		case a.Type == 3 && len(b) >= 12 && binary.BigEndian.Uint16(b) == 0:
			x = export{binary.BigEndian.Uint64(b[2:]), binary.BigEndian.Uint16(b[10:])}
		case a.Type>>31 == 1:
			return x, fmt.Errorf("export %q is refused (%#x): %s", name, a.Type, b)
		}
	}
}
