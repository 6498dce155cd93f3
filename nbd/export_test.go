package nbd

// EndingConnections counts the connections of an export that have ended and
// still have requests running.
func EndingConnections(s *Server, name string) int { return int(s.lookup(name).ending.Load()) }
