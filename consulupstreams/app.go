package consulupstreams

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

func init() {
	caddy.RegisterModule(App{})
	httpcaddyfile.RegisterGlobalOption("consul", parseGlobalOption)
}

// App holds the defaults of every `consul` upstream source: how to reach the
// Consul agent. In a Caddyfile it is the global option `consul`.
//
// It does nothing by itself, and is not needed if Consul's defaults or its
// environment variables say enough.
type App struct {
	Connection
}

// CaddyModule returns the Caddy module information.
func (App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "consul",
		New: func() caddy.Module { return new(App) },
	}
}

// Validate refuses a connection that can't work, whatever Consul does.
func (a *App) Validate() error { return a.check() }

// Start does nothing: the sources follow Consul by themselves.
func (*App) Start() error { return nil }

// Stop does nothing.
func (*App) Stop() error { return nil }

// UnmarshalCaddyfile sets up the app from Caddyfile tokens. Syntax:
//
//	consul {
//	    address    <address>
//	    token      <token>
//	    token_file <path>
//	    datacenter <name>
//	    tls {
//	        ca          <path>
//	        cert        <path>
//	        key         <path>
//	        server_name <name>
//	        min_version tls1.2|tls1.3
//	        insecure_skip_verify
//	    }
//	}
func (a *App) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the option's name
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(options)
	for d.NextBlock(0) {
		if err := once.take(d); err != nil {
			return err
		}
		known, err := a.unmarshalOption(d)
		if err != nil {
			return err
		}
		if !known {
			return d.Errf("unrecognized consul option '%s': want address, token, token_file, datacenter or tls", d.Val())
		}
	}
	return nil
}

func parseGlobalOption(d *caddyfile.Dispenser, existing any) (any, error) {
	if existing != nil {
		d.Next() // to say where
		return nil, d.Err("the global option consul is already given")
	}
	app := new(App)
	if err := app.UnmarshalCaddyfile(d); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{Name: "consul", Value: caddyconfig.JSON(app, nil)}, nil
}

// Interface guards
var (
	_ caddy.App             = (*App)(nil)
	_ caddy.Validator       = (*App)(nil)
	_ caddyfile.Unmarshaler = (*App)(nil)
)
