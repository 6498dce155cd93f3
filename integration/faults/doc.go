// Package faults makes system calls of the real binaries fail, with strace, and
// judges what they say and what they leave behind.
package faults
