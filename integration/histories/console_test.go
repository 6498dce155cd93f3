package histories_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// console follows one file that a guest of this VM writes to. Files outlive
// guests and hosts.
type console struct {
	path string
	host string
	off  int64
	rest []byte         // of a line that is not complete
	scan map[int]record // nil outside of a boot
	life uint32         // that runs, or ran last
	fail bool           // its guest was answered with an error
}

// boot is a guest that has looked at its disk.
type boot struct {
	host  string
	life  uint32
	found map[int]record
	says  uint32 // the number it goes on from
}

// read takes what is new and returns the boots in it. The lives are in the book
// afterwards, what they found is not.
func (c *console) read(b *book) (boots []boot, err error) {
	f, err := os.Open(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	n, err := f.ReadAt(buf, c.off)
	if n == 0 {
		return nil, nil // the end
	}
	c.off += int64(n)
	text := append(c.rest, buf[:n]...)
	for {
		line, rest, ok := bytes.Cut(text, []byte("\n"))
		if !ok {
			c.rest = bytes.Clone(text)
			return boots, nil
		}
		text = rest
		nb, err := c.line(b, string(line))
		if err != nil {
			return boots, fmt.Errorf("console of %s: %w", c.host, err)
		}
		if nb != nil {
			boots = append(boots, *nb)
		}
	}
}

// line takes one line. One that a power cut has cut off is passed over.
func (c *console) line(b *book, line string) (*boot, error) {
	if line == "B" {
		c.end(b)
		c.scan = map[int]record{}
		return nil, nil
	}
	if line == "" {
		return nil, nil
	}
	var id, n uint32
	switch line[0] {
	case 'S':
		var r record
		var slot int
		k, _ := fmt.Sscanf(line[1:], "%x %x %x %x %x %x %x", &slot, &r.head[0], &r.head[1], &r.head[2], &r.tail[0], &r.tail[1], &r.tail[2])
		if k == 7 && c.scan != nil {
			c.scan[slot] = r
		}
		return nil, nil
	case 'R', 'W', 'E', 'P':
		if k, _ := fmt.Sscanf(line[1:], "%x %x", &id, &n); k != 2 || len(line) < 19 {
			return nil, nil
		}
	default:
		return nil, nil
	}
	if line[0] == 'R' {
		if c.scan == nil || b.lives[id] != nil {
			return nil, fmt.Errorf("life %08x begins twice", id)
		}
		b.lives[id] = &life{host: c.host, high: n}
		c.life = id
		nb := &boot{host: c.host, life: id, found: c.scan, says: n}
		c.scan = nil
		return nb, nil
	}
	l := b.lives[id]
	if l == nil || id != c.life {
		return nil, fmt.Errorf("life %08x writes, it has not begun", id)
	}
	switch line[0] {
	case 'W':
		if n != l.high+1 {
			return nil, fmt.Errorf("life %08x writes %d after %d", id, n, l.high)
		}
		l.high = n
	case 'E':
		c.fail = true
	case 'P':
		c.end(b)
	}
	return nil, nil
}

func (c *console) end(b *book) {
	if l := b.lives[c.life]; l != nil {
		l.over = true
	}
}
