package config

import "reflect"

// Change is a key whose value differs between two configurations.
type Change struct {
	// Key is as in the file; a table stands for all that is in it.
	Key string
	// Live: a running daemon takes it over; else it takes a restart.
	Live bool
}

// keys says of every field of Config how the file calls it, and which ones a
// running daemon takes over: what is asked for anew each time it is used.
var keys = map[string]Change{
	"StateDir": {Key: "state_dir"}, "RunDir": {Key: "run_dir"}, "HostName": {Key: "host_name"}, "Listen": {Key: "listen"},
	"Advertise": {"advertise", true}, "Receiving": {"receiving", true}, "StorageRoots": {"storage_roots", true},
	"LibvirtSocket": {Key: "libvirt_socket"}, "LogLevel": {"log_level", true}, "LogFormat": {Key: "log_format"},
	"OnSilentPeer": {"on_silent_peer", true}, "SilentPeerAfter": {Key: "silent_peer_after"}, "ShippingSlots": {Key: "shipping_slots"},
	"AnyClient": {Key: "any_client"}, "StatisticsStart": {Key: "statistics.start"}, "StatisticsWindow": {Key: "statistics.window"},
	"TLS": {Key: "tls"}, "Access": {"access", true}, "Limits": {Key: "limits"}, "Domain": {Key: "domain"}, "Bandwidth": {"bandwidth", true}, "Tests": {Key: "test"},
	"Networks": {"network", true}, "Drills": {Key: "drill"}, "Policies": {"policy", true},
}

// Changes lists what differs from c to next, in the order of the fields.
func (c Config) Changes(next Config) []Change {
	var out []Change
	a, b := reflect.ValueOf(c), reflect.ValueOf(next)
	for i := range a.NumField() {
		if !same(a.Field(i), b.Field(i)) {
			out = append(out, keys[a.Type().Field(i).Name])
		}
	}
	return out
}

// same compares two fields; an empty list is as good as none.
func same(a, b reflect.Value) bool {
	if a.Kind() == reflect.Slice && a.Len() == 0 && b.Len() == 0 {
		return true
	}
	return reflect.DeepEqual(a.Interface(), b.Interface())
}

// WithLive is c with what a running daemon takes over of next.
func (c Config) WithLive(next Config) Config {
	a, b := reflect.ValueOf(&c).Elem(), reflect.ValueOf(next)
	for i := range a.NumField() {
		if keys[a.Type().Field(i).Name].Live {
			a.Field(i).Set(b.Field(i))
		}
	}
	return c
}
