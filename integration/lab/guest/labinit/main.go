// Command labinit is process 1 of the lab's guest. It stands in for an
// operating system with a database: it mounts the guest's disks (making an
// ext4 file system on blank ones), checks the log found there, and appends
// records that it announces as safe only when they are durable, until the
// power button is pressed. See package record for the log, package console
// for what it says.
//
// Kernel command line, all optional:
//
//	lab.mode=write|verify|idle  append records; only check; only mount (write)
//	lab.disks=N                 number of disks, /dev/vda onwards (1)
//	lab.dev=vd|sd               the disks are virtio or SCSI disks (vd)
//	lab.interval=MS             pause between records (100)
//	lab.announce=MS             at most one SYNCED line in this time (250)
//	lab.max=N                   power off after record N
//	lab.fsck=1                  full check of every file system first
//	lab.ga=1                    run the QEMU guest agent
//	lab.net=1                   ask for an address by DHCP on eth0
//	lab.tcp=PORT                answer connections to this port once the disks are verified
//	lab.load=KIB                random writes in the background, KiB a second
//	lab.loadsize=MIB            size of the file they go to, per disk (16)
//	lab.header=PATH             write image headers that refer to a file of the host
//	                            to the start of every disk
//	lab.sql=1                   commit to a SQLite database on the first disk as fast
//	                            as it goes; needs an initramfs with sqlite3
//	lab.mount=OPTIONS           ext4 mount options
//	lab.root=1                  the first disk is the root file system
package main

import (
	"os"
	"runtime/debug"
)

func main() {
	debug.SetMemoryLimit(48 << 20) // the guest has 128 MiB, most of them initramfs
	g := newGuest()
	if os.Getenv(stageVar) == "" {
		if err := g.earlyMounts(); err != nil {
			g.die("mount", err)
		}
	}
	if err := g.openConsole(); err != nil {
		g.die("console", err)
	}
	g.knobs = readKnobs()
	if os.Getenv(stageVar) == "" {
		g.say("INIT")
		g.loadModules()
		if g.knobs.root {
			g.die("switch root", g.switchRoot())
		}
	}
	g.run()
}

// run is the guest's life from mounted disks to power off.
func (g *guest) run() {
	g.watchPowerKey()
	if g.knobs.net {
		go g.dhcp() // takes seconds; the disks do not wait for it
	}
	if g.knobs.agent {
		g.startAgent()
	}
	if err := g.openDisks(); err != nil {
		g.die("disks", err)
	}
	v, err := g.verify()
	if err != nil {
		g.die("verify", err)
	}
	g.say("BOOT %v", v)
	if g.knobs.tcp > 0 {
		go g.listen(v.Highest)
	}
	switch g.knobs.mode {
	case "verify":
	case "idle":
		<-g.powerKey
		g.say("LAST n=%d powerkey=true", v.Highest)
	default:
		g.write(v)
	}
	g.powerOff()
}
