package fsx

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

// ErrName: a name that leaves the tree or cannot be one.
var ErrName = errors.New("invalid file name")

// CheckName refuses what an FS must not open: the empty name, ".", "..",
// absolute names, empty elements, NUL, elements longer than 255 bytes.
func CheckName(name string) error {
	if name == "." {
		return fmt.Errorf("%w: %q is a directory", ErrName, name)
	}
	return CheckDir(name)
}

// CheckDir is CheckName for directories: "." is the root.
func CheckDir(name string) error {
	if !fs.ValidPath(name) || strings.ContainsRune(name, 0) {
		return fmt.Errorf("%w: %q", ErrName, name)
	}
	for _, part := range strings.Split(name, "/") {
		if len(part) > 255 {
			return fmt.Errorf("%w: element of %d bytes", ErrName, len(part))
		}
	}
	return nil
}
