package dataplane

import "context"

// RunPlane is the verb "dataplane": it needs the two listening sockets as file
// descriptors 3 (NBD) and 4 (control).
func RunPlane(ctx context.Context, configFile string) error { return nil }
