// Package sim runs two hosts, one protected VM and everything that can go wrong
// between them in one goroutine, from one number.
//
// What is the product's own: the data plane (tracker, cuts, capture, encoding,
// comparison, its control calls), the session (machine and operations), the
// delta stream, the replica store, lineage (table and transitions) and the
// plan runner with its journal. They stand on storage that crashes
// (blocktest.Host), a link that fails (link) and a clock that jumps. What is
// not: the glue that package vm puts between them, and libvirt. It is written
// here once more, after the same design and as small as it can be (agent.go,
// plans.go, serve.go), so that the simulation judges the parts and their
// protocol; package vm itself is driven by `make pairs` and `make histories`.
//
// A run is a script: a list of Ops made from a seed, each with a number of its
// own from which all its choices follow, so that leaving one out changes no
// other. After every Op the checkers of package oracle look at both hosts;
// at its end the faults stop and the pair must settle. A script that finds
// something is shrunk by leaving Ops out as long as it still finds something.
//
// What is deterministic: the script, every fault, crash point and survivor, the
// order of everything both hosts do, and all content. What is not: nonces,
// generations, digest keys and the file ids of the tracker (random, of fixed
// length), and the moment at which the data plane's encoder, which works ahead
// of its writer, is overtaken by a guest's write (both orders are legal and
// judged). A seed that fails fails again but for the latter.
package sim
