package consulupstreams

import (
	"errors"
	"fmt"
	"os"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/internal/discovery"
)

// Connection says how to reach a Consul agent. What is left out comes from the
// global `consul` options, then from the environment variables that Consul's
// own command line reads (`CONSUL_HTTP_ADDR`, `CONSUL_HTTP_TOKEN`,
// `CONSUL_HTTP_TOKEN_FILE`, `CONSUL_HTTP_SSL`, `CONSUL_CACERT`, …), then from
// Consul's defaults.
//
// The placeholders `{env.*}` and `{file.*}` may be used in every field; they are
// resolved when the config is loaded.
type Connection struct {
	// The address of the agent's HTTP API: `host:port`, `http://host:port`,
	// `https://host:port` or `unix:///path/to/socket`. An agent on the same
	// machine is best. Default: `$CONSUL_HTTP_ADDR`, else `localhost:8500`.
	Address string `json:"address,omitempty"`

	// The ACL token to send, which needs `service:read` on the service and
	// `node:read` on its nodes. It is visible in Caddy's config; prefer
	// `token_file` or a placeholder. Default: `$CONSUL_HTTP_TOKEN`.
	Token string `json:"token,omitempty"`

	// A file that holds the ACL token. It is read again when it changes, without
	// a reload of the config. It can't be combined with `token`. Default:
	// `$CONSUL_HTTP_TOKEN_FILE`.
	TokenFile string `json:"token_file,omitempty"`

	// How to talk TLS with the agent. If present, HTTPS is used.
	TLS *TLS `json:"tls,omitempty"`

	// The datacenter to look for the service in. Default: the agent's own.
	Datacenter string `json:"datacenter,omitempty"`
}

// TLS says how to talk TLS with a Consul agent. Its files are read again when
// they change, without a reload of the config.
type TLS struct {
	// A PEM file of the certificate authorities to trust. Default:
	// `$CONSUL_CACERT`, else those of the system.
	CA string `json:"ca,omitempty"`

	// A PEM file of the certificate to show to the agent, which needs `key`.
	// Default: `$CONSUL_CLIENT_CERT`.
	Cert string `json:"cert,omitempty"`

	// A PEM file of the key of `cert`. Default: `$CONSUL_CLIENT_KEY`.
	Key string `json:"key,omitempty"`

	// The name that the agent's certificate must carry. Default:
	// `$CONSUL_TLS_SERVER_NAME`, else the host of `address`.
	ServerName string `json:"server_name,omitempty"`

	// Don't verify the agent's certificate. Insecure: whoever answers at the
	// address gets the token and says where requests go.
	InsecureSkipVerify bool `json:"insecure_skip_verify,omitempty"`
}

// orElse returns c with what it leaves out taken from defaults.
func (c Connection) orElse(defaults Connection) Connection {
	if c.Address == "" {
		c.Address = defaults.Address
	}
	if c.Token == "" && c.TokenFile == "" {
		c.Token, c.TokenFile = defaults.Token, defaults.TokenFile
	}
	if c.TLS == nil {
		c.TLS = defaults.TLS
	}
	if c.Datacenter == "" {
		c.Datacenter = defaults.Datacenter
	}
	return c
}

// resolve expands the placeholders of c and fills in the environment's
// defaults.
func (c Connection) resolve() (*api.Config, error) {
	repl := caddy.NewReplacer()
	set := func(field *string, value string) {
		if value != "" {
			*field = repl.ReplaceAll(value, "")
		}
	}
	if c.Token != "" && c.TokenFile != "" {
		return nil, errTwoTokens
	}
	config := api.DefaultConfig()
	set(&config.Address, c.Address)
	if c.Token != "" || c.TokenFile != "" {
		config.Token, config.TokenFile = "", ""
	}
	set(&config.Token, c.Token)
	set(&config.TokenFile, c.TokenFile)
	if c.TLS != nil {
		config.Scheme = "https"
		set(&config.TLSConfig.CAFile, c.TLS.CA)
		set(&config.TLSConfig.CertFile, c.TLS.Cert)
		set(&config.TLSConfig.KeyFile, c.TLS.Key)
		set(&config.TLSConfig.Address, c.TLS.ServerName)
		if c.TLS.InsecureSkipVerify {
			config.TLSConfig.InsecureSkipVerify = true
		}
	}
	return config, nil
}

var errTwoTokens = errors.New("token and token_file can't be used together: remove one")

// check reports what is wrong with c as far as it can be told without Consul.
func (c Connection) check() error {
	config, err := c.resolve()
	if err != nil {
		return err
	}
	return discovery.CheckConnection(config)
}

// unmarshalOption reads the option that d stands on, if it is one of a
// connection:
//
//	address    <address>
//	token      <token>
//	token_file <path>
//	datacenter <name>
//	tls {
//	    ca          <path>
//	    cert        <path>
//	    key         <path>
//	    server_name <name>
//	    insecure_skip_verify
//	}
func (c *Connection) unmarshalOption(d *caddyfile.Dispenser) (known bool, err error) {
	switch d.Val() {
	case "address":
		if err := oneArg(d, &c.Address); err != nil {
			return true, err
		}
		return true, locate(d, Connection{Address: c.Address}.check())
	case "token":
		if c.TokenFile != "" {
			return true, d.Err(errTwoTokens.Error())
		}
		return true, oneArg(d, &c.Token)
	case "token_file":
		if c.Token != "" {
			return true, d.Err(errTwoTokens.Error())
		}
		if err := oneArg(d, &c.TokenFile); err != nil {
			return true, err
		}
		return true, locate(d, Connection{TokenFile: c.TokenFile}.check())
	case "datacenter":
		return true, oneArg(d, &c.Datacenter)
	case "tls":
		if d.NextArg() {
			return true, d.ArgErr()
		}
		c.TLS = new(TLS)
		return true, c.TLS.unmarshal(d)
	}
	return false, nil
}

func (t *TLS) unmarshal(d *caddyfile.Dispenser) error {
	once := make(options)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := once.take(d); err != nil {
			return err
		}
		var field *string
		switch d.Val() {
		case "ca":
			field = &t.CA
		case "cert":
			field = &t.Cert
		case "key":
			field = &t.Key
		case "server_name":
			if err := oneArg(d, &t.ServerName); err != nil {
				return err
			}
			continue
		case "insecure_skip_verify":
			if d.NextArg() {
				return d.ArgErr()
			}
			t.InsecureSkipVerify = true
			continue
		default:
			return d.Errf("unrecognized option '%s' of tls: want ca, cert, key, server_name or insecure_skip_verify", d.Val())
		}
		if err := oneArg(d, field); err != nil {
			return err
		}
		if _, err := os.ReadFile(caddy.NewReplacer().ReplaceAll(*field, "")); err != nil {
			return d.Errf("can't read the file: %v", err)
		}
	}
	return locate(d, Connection{TLS: t}.check())
}

// options remembers which options a block has had.
type options map[string]int

// take notes the option that d stands on. It fails if the block has had it.
func (o options) take(d *caddyfile.Dispenser) error {
	name := d.Val()
	if line, taken := o[name]; taken {
		return d.Errf("option '%s' is already given on line %d", name, line)
	}
	o[name] = d.Line()
	return nil
}

// oneArg reads the only argument of an option.
func oneArg(d *caddyfile.Dispenser, field *string) error {
	if !d.AllArgs(field) || *field == "" {
		return d.ArgErr()
	}
	return nil
}

// locate gives an error the file and line that d stands on.
func locate(d *caddyfile.Dispenser, err error) error {
	if err == nil {
		return nil
	}
	return d.WrapErr(fmt.Errorf("%w", err))
}
