package dataplane_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/internal/boundtest"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/wire"
)

// FuzzConfigFile: what LoadConfig accepts is valid.
func FuzzConfigFile(f *testing.F) {
	f.Add([]byte(`{"vm":"11111111-2222-3333-4444-555555555555","name":"web","state_dir":"/s","shared_dir":"/m","run_dir":"/r",` +
		`"disks":[{"name":"vda","kind":"raw","path":"/i/a.raw","size":1048576},{"name":"vdb","kind":"nbd","uri":"nbd+unix:///x?socket=/s"}]}`))
	f.Add([]byte(`{"disks":null}`))
	path := filepath.Join(f.TempDir(), "config.json")
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := dataplane.LoadConfig(path); err == nil && c.Validate() != nil {
			t.Fatalf("accepted %+v: %v", c, c.Validate())
		}
	})
}

// FuzzControl: whatever the control socket is asked, the data plane answers
// with JSON, lives on, and its disk keeps what the guest wrote.
func FuzzControl(f *testing.F) {
	const pos = `{"Generation":"01000000000000000000000000000000","Epoch":1,"Digest":"0000000000000000000000000000000000000000000000000000000000000000"}`
	for path, body := range map[string]string{
		"create": `{"Generation":"01000000000000000000000000000000","DirtyAll":true}`, "export": `{"Disk":"vda","On":true}`,
		"freeze": `{"Parent":` + pos + `,"Force":true}`, "ack": pos, "ranges": `{"Disk":"vda","Offset":0,"Bytes":4096,"Max":4}`,
		"compare": `{"Pos":` + pos + `,"Disk":"vda","Ranges":[{"Off":0,"Len":4096}]}`, "compare/end": `{"Window":1,"Equal":[{"Off":0,"Len":4096}]}`,
		"clean": `{}`, "mark": `{"Disk":"vda","Ranges":[{"Off":0,"Len":9223372036854775807}],"Reason":"x"}`, "seal": `{"Pos":` + pos + `}`,
		"lock-qemu": `{"Disk":"vda"}`, "epoch/1/attach": `[{"Kind":1,"Data":"AAAA"}]`, "epoch/1/abandon": ``, "refuse": `{"Reason":"no"}`,
	} {
		f.Add(path, []byte(body))
	}
	cfg := dt.Config(f, 1<<20)
	dt.Serve(f, cfg).Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", cfg.ControlSocket())
	}}}
	plane := dataplane.NewClient(cfg.ControlSocket()) // one: each keeps its connection
	f.Fuzz(func(t *testing.T, path string, body []byte) {
		defer boundtest.Input(t)()
		if strings.Contains(path, "shutdown") || strings.ContainsAny(path, "?#%.\\ ") || strings.HasPrefix(path, "/") {
			return
		}
		q, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://plane/v1/"+path, bytes.NewReader(body))
		if err != nil {
			return
		}
		a, err := client.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		defer a.Body.Close()
		if _, err := io.Copy(io.Discard, a.Body); err != nil {
			t.Fatal(err)
		}
		if a.StatusCode == http.StatusInternalServerError {
			t.Fatalf("%s %s: internal error", path, body)
		}
		st, err := plane.Status(t.Context())
		if err != nil || st.VM != dt.ID || st.Disks[0].Name != wire.DiskName("vda") {
			t.Fatalf("afterwards: %+v, %v", st, err)
		}
	})
}
