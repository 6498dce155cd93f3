// Package campaign keeps what a long test has lived through so far in a file,
// one JSON line per entry, so that the totals of many runs add up.
package campaign

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// File is a campaign's file and what it holds. One goroutine uses it.
type File[E any] struct {
	Entries []E
	path    string
}

// Open reads a campaign; one without a path is kept in memory only, one whose
// file does not exist is empty.
func Open[E any](path string) (*File[E], error) {
	c := &File[E]{path: path}
	if path == "" {
		return c, nil
	}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for d := json.NewDecoder(f); d.More(); {
		var e E
		if err := d.Decode(&e); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		c.Entries = append(c.Entries, e)
	}
	return c, nil
}

// Add appends an entry, durably enough for a test that is killed.
func (c *File[E]) Add(e E) error {
	c.Entries = append(c.Entries, e)
	if c.path == "" {
		return nil
	}
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(c.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	return errors.Join(err, f.Close())
}
