// Package kernel shows the product to a Linux kernel of its own, in a throw-away
// machine: the kernel's NBD client on our exports, attached by generic netlink,
// nbd-server as the image of our data plane, and a database whose every recovery
// point must pass its own check.
package kernel
