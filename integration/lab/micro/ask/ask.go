// Package ask holds the messages between package micro on the host and
// microinit in the guest: one JSON line each way per connection, after which a
// joined connection carries bytes.
package ask

// Request is what the host asks for; exactly one of Exec, Put, Dial and Load.
type Request struct {
	// Exec is a program with its arguments.
	Exec []string `json:",omitempty"`
	// Put is a file to write, with Data and Mode.
	Put  string `json:",omitempty"`
	Data []byte `json:",omitempty"`
	Mode uint32 `json:",omitempty"`
	// Dial is a unix socket in the guest to be joined to this connection.
	Dial string `json:",omitempty"`
	// Load is a kernel module to insert.
	Load string `json:",omitempty"`
}

// Reply answers it.
type Reply struct {
	// Output is what the program wrote, both streams.
	Output string `json:",omitempty"`
	// Error is empty when all went well.
	Error string `json:",omitempty"`
}
