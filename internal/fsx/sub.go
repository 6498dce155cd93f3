package fsx

import "fmt"

// Sub is the part of fsys below dir, as a tree of its own. dir need not exist
// yet; MkdirAll of the result makes it.
func Sub(fsys FS, dir string) FS { return &subFS{fsys: fsys, dir: dir} }

type subFS struct {
	fsys FS
	dir  string
}

var _ FS = (*subFS)(nil)

func (s *subFS) file(name string) (string, error) {
	if err := CheckName(name); err != nil {
		return "", err
	}
	return s.dir + "/" + name, nil
}

func (s *subFS) folder(name string) (string, error) {
	if err := CheckDir(name); err != nil {
		return "", err
	}
	if name == "." {
		return s.dir, nil
	}
	return s.dir + "/" + name, nil
}

func (s *subFS) Open(name string, flag int) (File, error) {
	p, err := s.file(name)
	if err != nil {
		return nil, err
	}
	return s.fsys.Open(p, flag)
}

func (s *subFS) Rename(old, name string) error {
	a, err := s.file(old)
	if err != nil {
		return err
	}
	b, err := s.file(name)
	if err != nil {
		return fmt.Errorf("rename %s: %w", old, err)
	}
	return s.fsys.Rename(a, b)
}

func (s *subFS) Remove(name string) error {
	p, err := s.file(name)
	if err != nil {
		return err
	}
	return s.fsys.Remove(p)
}

func (s *subFS) List(dir string) ([]string, error) {
	p, err := s.folder(dir)
	if err != nil {
		return nil, err
	}
	return s.fsys.List(p)
}

func (s *subFS) MkdirAll(dir string) error {
	p, err := s.folder(dir)
	if err != nil {
		return err
	}
	return s.fsys.MkdirAll(p)
}

func (s *subFS) SyncDir(dir string) error {
	p, err := s.folder(dir)
	if err != nil {
		return err
	}
	return s.fsys.SyncDir(p)
}
