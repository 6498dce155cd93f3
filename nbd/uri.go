package nbd

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// URI names an export of a server.
type URI struct {
	Network string // unix or tcp
	Address string // path of the socket, or host:port
	Export  string
}

// DefaultPort is NBD's port.
const DefaultPort = "10809"

// IsURI reports whether s is meant as an NBD address rather than a file.
func IsURI(s string) bool {
	return strings.HasPrefix(s, "nbd://") || strings.HasPrefix(s, "nbd+unix://") ||
		strings.HasPrefix(s, "nbds://") || strings.HasPrefix(s, "nbds+unix://")
}

// ParseURI reads nbd://host[:port]/export and nbd+unix:///export?socket=path.
func ParseURI(s string) (URI, error) {
	u, err := url.Parse(s)
	if err != nil {
		return URI{}, fmt.Errorf("nbd address: %w", err)
	}
	bad := func(why string) (URI, error) {
		return URI{}, fmt.Errorf("nbd address %q: %s; write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH", s, why)
	}
	export := strings.TrimPrefix(u.Path, "/")
	socket := u.Query().Get("socket")
	switch u.Scheme {
	case "nbd":
		switch {
		case u.Hostname() == "":
			return bad("host is missing")
		case socket != "":
			return bad("a socket needs nbd+unix")
		}
		port := u.Port()
		if port == "" {
			port = DefaultPort
		}
		return URI{Network: "tcp", Address: net.JoinHostPort(u.Hostname(), port), Export: export}, nil
	case "nbd+unix":
		switch {
		case socket == "":
			return bad("socket is missing")
		case u.Host != "":
			return bad("host and socket exclude each other")
		}
		return URI{Network: "unix", Address: socket, Export: export}, nil
	case "nbds", "nbds+unix":
		return bad("TLS is not supported")
	}
	return bad("unknown scheme")
}
