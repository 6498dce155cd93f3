package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"kvmreplica/internal/block"
)

// The floor is the least that shipping can cost: the changed blocks are known,
// read, sent in one stream with a checksum, checked and written; no tracking,
// no cut, no undo, no digest, nothing durable.

// floorHead is in front of each block: offset, length, crc32c.
const floorHead = 16

// receiveFloor is the receiving process: it writes into image what one
// connection after the other brings, and answers a byte when all is written.
func receiveFloor(image, mode string) error {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	if mode == "tls" {
		cert, err := floorCertificate()
		if err != nil {
			return err
		}
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})
	}
	if err := writeAddress(filepath.Dir(image), l); err != nil {
		return err
	}
	buf := make([]byte, block1M)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if err := receiveOne(f, c, buf); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
}

const block1M = 1 << 20

func receiveOne(f *os.File, c net.Conn, buf []byte) error {
	defer c.Close()
	in := bufio.NewReaderSize(c, 256<<10)
	table := crc32.MakeTable(crc32.Castagnoli)
	var head [floorHead]byte
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		off, n := int64(binary.LittleEndian.Uint64(head[:])), int(binary.LittleEndian.Uint32(head[8:]))
		if n == 0 {
			if _, err := c.Write(head[:1]); err != nil {
				return err
			}
			continue
		}
		if n > len(buf) {
			return fmt.Errorf("block of %d bytes", n)
		}
		if _, err := io.ReadFull(in, buf[:n]); err != nil {
			return err
		}
		if crc32.Checksum(buf[:n], table) != binary.LittleEndian.Uint32(head[12:]) {
			return errors.New("checksum is wrong")
		}
		if _, err := f.WriteAt(buf[:n], off); err != nil {
			return err
		}
	}
}

func floorCertificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// floor is the sending side and its receiver.
type floor struct {
	mode  string
	image *os.File
	cmd   *exec.Cmd
	conn  net.Conn
	out   *bufio.Writer
	buf   []byte
}

// startFloor sends from image to a receiver of its own.
func startFloor(ctx context.Context, dir, image, mode string) (f *floor, err error) {
	dir = filepath.Join(dir, "floor-"+mode)
	target := filepath.Join(dir, "disk.img")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(target, nil, 0o600), os.Truncate(target, shipSize)); err != nil {
		return nil, err
	}
	f = &floor{mode: mode, buf: make([]byte, block1M)}
	if f.cmd, err = startChild("floor", target, mode); err != nil {
		return nil, err
	}
	if f.image, err = os.Open(image); err != nil {
		return f, err
	}
	address, err := readAddress(ctx, dir)
	if err != nil {
		return f, err
	}
	if mode == "tls" {
		// The peer is our own child; what is measured is the cipher.
		f.conn, err = tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}) //nolint:gosec // see above
	} else {
		f.conn, err = net.Dial("tcp", address)
	}
	if err != nil {
		return f, err
	}
	f.out = bufio.NewWriterSize(f.conn, 256<<10)
	return f, nil
}

// ship sends the ranges and waits until all is written.
func (f *floor) ship(ranges []block.Range) error {
	table := crc32.MakeTable(crc32.Castagnoli)
	var head [floorHead]byte
	for _, r := range ranges {
		p := f.buf[:r.Len]
		if _, err := f.image.ReadAt(p, r.Off); err != nil {
			return err
		}
		binary.LittleEndian.PutUint64(head[:], uint64(r.Off))
		binary.LittleEndian.PutUint32(head[8:], uint32(len(p)))
		binary.LittleEndian.PutUint32(head[12:], crc32.Checksum(p, table))
		if _, err := f.out.Write(head[:]); err != nil {
			return err
		}
		if _, err := f.out.Write(p); err != nil {
			return err
		}
	}
	if _, err := f.out.Write(make([]byte, floorHead)); err != nil {
		return err
	}
	if err := f.out.Flush(); err != nil {
		return err
	}
	_, err := io.ReadFull(f.conn, head[:1])
	return err
}

// Close ends both sides.
func (f *floor) Close() error {
	if f.conn != nil {
		_ = f.conn.Close()
	}
	if f.image != nil {
		_ = f.image.Close()
	}
	_ = f.cmd.Process.Kill()
	_ = f.cmd.Wait()
	return nil
}

// startChild starts this program as the other end of something.
func startChild(args ...string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd, cmd.Start()
}

// cpuOf is the CPU time a process has used.
func cpuOf(pid int) time.Duration { return (&server{clock: cpuClock(pid)}).cpu() }
