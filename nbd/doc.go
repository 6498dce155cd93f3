// Package nbd speaks the Network Block Device protocol: a server that carries
// a guest's disk, and a client for other people's servers.
//
// The server speaks fixed newstyle with structured replies and the
// base:allocation context. Each connection is one loop that parses many
// requests per receive, executes what cannot block inline, and parks the rest
// (trim, zeroing, cold reads, writes that would wait, and flushes unless the
// device's take microseconds) with a bounded set of workers, so replies come out
// of order.
//
// It guarantees:
//
//   - a request is validated whole before any memory is taken for it, and an
//     error of the device is answered on the wire, never by hanging up;
//   - a FLUSH covers every write answered before it on any connection of that
//     export, which is what multi-conn promises;
//   - when a connection ends, its requests not yet started are dropped and the
//     started ones awaited before a new connection of that export executes
//     anything: a client that resends never sees an old write land late;
//   - memory per connection is bounded: beyond the budget it stops reading.
//
// The caller must
//
//  1. keep the Device open until Remove or Shutdown returned;
//  2. treat Remove and Shutdown errors as "requests still run in the device";
//  3. call Shutdown (connections end unanswered, a reconnecting client
//     resends) for a restart, and Remove (answered ESHUTDOWN) to withdraw an
//     export for good;
//  4. after Hold call Resume or Leave: meanwhile nobody is served. Hold, Leave
//     and another process's Adopt hand connected clients on without a word to
//     them.
//
// Not implemented, and refused as the protocol asks: TLS, extended headers (64
// bit lengths), the old handshake, metadata contexts but base:allocation.
//
// Export.SingleClient is for disks of a guest: the image lock QEMU would take
// on a file does not exist on a socket, so the server replaces it.
package nbd
