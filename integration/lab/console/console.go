// Package console reads what the lab's guest says on its serial console, which
// QEMU writes to a file.
//
// It guarantees that no line is seen twice and none is skipped: every Console
// has its own place in the file, and a wait starts where the last one ended.
// The file may be absent at first, and may grow over several boots.
//
// The caller bounds each wait with its context; the error of a wait that ends
// early quotes the last lines of the console.
package console

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	poll     = 20 * time.Millisecond // how often a wait looks at the file
	tailSize = 15                    // lines quoted in errors
)

// Line is one announcement of the guest: "LAB[uptime] WORD key=value ...".
type Line struct {
	// Uptime of the guest's kernel.
	Uptime time.Duration
	// Word is what happened: INIT, BOOT, SYNCED, LAST, POWEROFF, ERROR, ...
	Word string
	// Args are the key=value pairs; Text is the whole of the rest.
	Args map[string]string
	Text string
	// Raw is the line as it stands in the file.
	Raw string
}

// Uint returns a numeric argument, 0 when it is absent or no number.
func (l Line) Uint(key string) uint64 {
	n, err := strconv.ParseUint(l.Args[key], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// Int returns a numeric argument, 0 when it is absent or no number.
func (l Line) Int(key string) int64 {
	n, err := strconv.ParseInt(l.Args[key], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// Parse reads one line; ok is false when it is not the guest program's.
func Parse(raw string) (l Line, ok bool) {
	raw = strings.TrimRight(raw, "\r\n")
	at := strings.Index(raw, "LAB[")
	if at < 0 {
		return Line{}, false
	}
	up, rest, ok := strings.Cut(raw[at+len("LAB["):], "] ")
	if !ok {
		return Line{}, false
	}
	secs, err := strconv.ParseFloat(up, 64)
	if err != nil {
		return Line{}, false
	}
	l = Line{Uptime: time.Duration(secs * float64(time.Second)), Args: map[string]string{}, Raw: raw}
	l.Word, l.Text, _ = strings.Cut(rest, " ")
	for _, w := range strings.Fields(l.Text) {
		if k, v, ok := strings.Cut(w, "="); ok {
			l.Args[k] = v
		}
	}
	return l, true
}

// Console follows one console file. Use from one goroutine.
type Console struct {
	path string
	off  int64
	part []byte // bytes of a line that has no end yet
	tail []string
}

// Open follows the file from its beginning; it may not exist yet.
func Open(path string) *Console { return &Console{path: path} }

// OpenAtEnd follows the file from its present end.
func OpenAtEnd(path string) (*Console, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Open(path), nil
	}
	if err != nil {
		return nil, err
	}
	return &Console{path: path, off: st.Size()}, nil
}

// Next returns the next line of the file, waiting for it.
func (c *Console) next(ctx context.Context, tick *time.Ticker) (string, error) {
	for {
		if i := bytes.IndexByte(c.part, '\n'); i >= 0 {
			line := strings.TrimRight(string(c.part[:i]), "\r")
			c.part = c.part[i+1:]
			c.tail = append(c.tail, line)
			if len(c.tail) > tailSize {
				c.tail = c.tail[1:]
			}
			return line, nil
		}
		grown, err := c.read()
		if err != nil {
			return "", err
		}
		if grown {
			continue
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-tick.C:
		}
	}
}

// read takes in what the file has grown by.
func (c *Console) read() (bool, error) {
	f, err := os.Open(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return false, err
	}
	if st.Size() < c.off { // written anew by another start of the guest
		c.off, c.part = 0, nil
	}
	b, err := io.ReadAll(io.NewSectionReader(f, c.off, st.Size()-c.off))
	if err != nil {
		return false, err
	}
	c.off += int64(len(b))
	c.part = append(c.part, b...)
	return len(b) > 0, nil
}

// Wait returns the first line from here on that matches the regular
// expression, parsed if it is the guest program's.
func (c *Console) Wait(ctx context.Context, pattern string) (Line, error) {
	re, err := regexp.Compile(pattern)
	if err != nil {
		return Line{}, err
	}
	return c.wait(ctx, pattern, func(l Line) bool { return re.MatchString(l.Raw) })
}

// WaitWord returns the next announcement that starts with word.
func (c *Console) WaitWord(ctx context.Context, word string) (Line, error) {
	return c.wait(ctx, word, func(l Line) bool { return l.Word == word })
}

// WaitSynced waits until the guest has announced record n or a later one as
// durable, and returns the number announced. 0 means the next announcement.
func (c *Console) WaitSynced(ctx context.Context, n uint64) (uint64, error) {
	l, err := c.wait(ctx, fmt.Sprintf("SYNCED %d or more", n), func(l Line) bool {
		return l.Word == "SYNCED" && l.Uint("n") >= n
	})
	return l.Uint("n"), err
}

// WaitBoot waits for the guest's verdict on what its disks held at this boot.
func (c *Console) WaitBoot(ctx context.Context) (Line, error) { return c.WaitWord(ctx, "BOOT") }

func (c *Console) wait(ctx context.Context, what string, match func(Line) bool) (Line, error) {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		raw, err := c.next(ctx, tick)
		if err != nil {
			return Line{}, fmt.Errorf("console %s: wait for %s: %w; last lines:\n%s",
				c.path, what, err, strings.Join(c.tail, "\n"))
		}
		l, ok := Parse(raw)
		if !ok {
			l = Line{Raw: raw}
		}
		if match(l) {
			return l, nil
		}
	}
}

// Last returns the latest announcement in the file that starts with word,
// without moving the place of a wait.
func (c *Console) Last(word string) (Line, bool) {
	text, err := os.ReadFile(c.path)
	if err != nil {
		return Line{}, false
	}
	var last Line
	var found bool
	for raw := range strings.Lines(string(text)) {
		if l, ok := Parse(raw); ok && l.Word == word && strings.HasSuffix(raw, "\n") {
			last, found = l, true
		}
	}
	return last, found
}

// Synced is the highest record number announced as durable so far.
func (c *Console) Synced() uint64 {
	l, _ := c.Last("SYNCED")
	return l.Uint("n")
}
