package guest

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// cpio writes the tree in the "newc" form that the kernel unpacks: a header of
// 110 ASCII characters, the name, the content, each padded to 4 bytes.
func (t *tree) cpio(w io.Writer) error {
	out := bufio.NewWriter(w)
	for i, n := range t.names() {
		e := t.entries[n]
		if err := cpioEntry(out, i+1, strings.TrimPrefix(n, "/"), e.mode, e.content); err != nil {
			return err
		}
	}
	if err := cpioEntry(out, 0, "TRAILER!!!", 0, nil); err != nil {
		return err
	}
	return out.Flush()
}

func cpioEntry(w *bufio.Writer, inode int, name string, mode uint32, content []byte) error {
	links := 1
	if mode&^0o7777 == typeDir {
		links = 2
	}
	head := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	if err := padded(w, head+name+"\x00"); err != nil {
		return err
	}
	return padded(w, string(content))
}

func padded(w *bufio.Writer, s string) error {
	if _, err := w.WriteString(s); err != nil {
		return err
	}
	_, err := w.WriteString("\x00\x00\x00"[:(4-len(s)%4)%4])
	return err
}
