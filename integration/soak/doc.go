// Package soak lets three VMs replicate for a long time over a bad line and
// watches that nothing grows: memory, goroutines, descriptors.
package soak
