package nbd

import (
	"context"
	"net"
)

// EndingConnections counts the connections of an export that have ended and
// still have requests running.
func EndingConnections(s *Server, name string) int { return int(s.lookup(name).ending.Load()) }

// ServeConn serves one connection and returns when it is over.
func (s *Server) ServeConn(nc net.Conn) { newConn(s, nc, nil).run(context.Background()) }

// ErrnoOf is the table of error numbers.
func ErrnoOf(err error, cmd uint16) Errno { return errnoOf(err, cmd) }
