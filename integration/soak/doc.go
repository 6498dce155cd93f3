// Package soak lets three VMs replicate for a long time over a bad line and
// watches that nothing grows: memory, goroutines, descriptors. Once with both
// daemons' sessions and stores in the test's own process, as fast as they go;
// once with the real daemons and guests.
package soak
