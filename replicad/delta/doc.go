// Package delta is the format in which changes travel, lie in the spool and leave on external disks.
package delta
