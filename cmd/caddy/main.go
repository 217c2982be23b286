// Command caddy is Caddy with its standard modules and caddy-consul: what
// xcaddy would generate for this plugin.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-consul/caddy-consul"
)

func main() {
	caddycmd.Main()
}
