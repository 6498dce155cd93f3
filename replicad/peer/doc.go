// Package peer lets two hosts talk: who they are (Identity), whom they trust
// with what (Store), how they met (Pairing, Join), and the HTTPS that carries
// wire.Service between them (Server, Client).
//
// It guarantees that nothing but TLS 1.3 with certificates on both sides is
// spoken; that a caller's identity comes from its certificate and the pinned
// key of the authority that signed it, never from an address; that a peer
// which is not, or no longer, in the Store reaches no method, and loses its
// live connections at once; that a call about a VM is refused unless that VM's
// relationship belongs to the caller; and that sizes, counts, times and rates
// are bounded before anything is allocated. Pairing aside, the Store starts
// empty and an entry allows nothing that was not written into it.
//
// Callers must run Server.Serve with a context that ends it, answer Ownership
// truthfully and without blocking, call Identity.Renew once a day, and close
// every Client.
package peer
