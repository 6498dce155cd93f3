package nbd

import "fmt"

// Resized shows the present size of an export's device. NBD has no word for it:
// the export's connections end after the requests that run, others are left
// unanswered, and a client that reconnects learns the size and sends them again.
// The device must have the size already when it grew, and must refuse what lies
// behind its end when it shrank.
func (s *Server) Resized(name string) error {
	e := s.lookup(name)
	if e == nil {
		return fmt.Errorf("resize export %q: %w", name, ErrUnknownExport)
	}
	e.size.Store(e.Device.Size())
	for _, c := range e.connections() {
		c.drain(drainSilent)
	}
	return nil
}
