package consulupstreams

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
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
	// A PEM file of the certificate authorities to trust, or a folder of such
	// files. Default: `$CONSUL_CACERT`, else `$CONSUL_CAPATH`, else those of the
	// system.
	CA string `json:"ca,omitempty"`

	// A PEM file of the certificate to show to the agent, which needs `key`.
	// Default: `$CONSUL_CLIENT_CERT`.
	Cert string `json:"cert,omitempty"`

	// A PEM file of the key of `cert`. Default: `$CONSUL_CLIENT_KEY`.
	Key string `json:"key,omitempty"`

	// The name that the agent's certificate must carry. Default:
	// `$CONSUL_TLS_SERVER_NAME`, else the host of `address`.
	ServerName string `json:"server_name,omitempty"`

	// The oldest version of TLS to speak: `tls1.2` or `tls1.3`. Default:
	// `tls1.2`.
	MinVersion string `json:"min_version,omitempty"`

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
	if err := c.check(); err != nil {
		return nil, err
	}
	set := func(field *string, value string) {
		if value != "" {
			*field, _ = expand(value) // has been checked
		}
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
		if c.TLS.CA != "" {
			ca, _ := expand(c.TLS.CA) // has been checked
			discovery.TrustIn(&config.TLSConfig, ca)
		}
		discovery.RequireTLS(config, tlsVersions[c.TLS.MinVersion])
		set(&config.TLSConfig.CertFile, c.TLS.Cert)
		set(&config.TLSConfig.KeyFile, c.TLS.Key)
		set(&config.TLSConfig.Address, c.TLS.ServerName)
		if c.TLS.InsecureSkipVerify {
			config.TLSConfig.InsecureSkipVerify = true
		}
	}
	return config, nil
}

// expand replaces the placeholders that are known while a config is loaded. An
// unset environment variable is empty; a placeholder of requests is an error.
func expand(value string) (string, error) {
	return caddy.NewReplacer().ReplaceOrErr(value, false, true)
}

// expandToSomething is expand for what can't be empty.
func expandToSomething(value string) (string, error) {
	expanded, err := expand(value)
	if err == nil && expanded == "" {
		err = fmt.Errorf("'%s' is empty", value)
	}
	return expanded, err
}

// check reports what is wrong with c as far as it can be told without Consul.
// What c leaves out, and so comes from elsewhere, is not looked at.
func (c Connection) check() error {
	if c.Token != "" && c.TokenFile != "" {
		return errTwoTokens
	}
	return errors.Join(
		checkAddress(c.Address), checkPlaceholders("token", c.Token), checkFile("token_file", c.TokenFile),
		checkPlaceholders("datacenter", c.Datacenter), c.TLS.check(),
	)
}

var errTwoTokens = errors.New("token and token_file can't be used together: remove one")

// optionError is what is wrong with an option's value.
type optionError struct {
	option string
	err    error
}

func (e *optionError) Error() string { return e.option + ": " + e.err.Error() }
func (e *optionError) Unwrap() error { return e.err }

func checkPlaceholders(option, value string) error {
	if _, err := expand(value); err != nil {
		return &optionError{option, err}
	}
	return nil
}

func checkAddress(address string) error {
	if address == "" {
		return nil
	}
	expanded, err := expandToSomething(address)
	if err != nil {
		return &optionError{"address", err}
	}
	return discovery.CheckConnection(&api.Config{Address: expanded}) // names the option itself
}

// checkFile reports why a file that an option names, if any, can't be read.
func checkFile(option, name string) error {
	if name == "" {
		return nil
	}
	expanded, err := expandToSomething(name)
	if err != nil {
		return &optionError{option, err}
	}
	if _, err := os.ReadFile(expanded); err != nil {
		return &optionError{option, fmt.Errorf("can't read the file: %w", err)}
	}
	return nil
}

func checkFileOrFolder(option, name string) error {
	if expanded, err := expand(name); err == nil && discovery.IsFolder(expanded) {
		return nil
	}
	return checkFile(option, name)
}

// check reports what is wrong with the files of t. The environment may have the
// other half of a certificate and key.
func (t *TLS) check() error {
	if t == nil {
		return nil
	}
	err := cmp.Or(
		checkFileOrFolder("ca", t.CA), checkFile("cert", t.Cert), checkFile("key", t.Key),
		checkPlaceholders("server_name", t.ServerName), t.checkMinVersion(), t.checkAuthorities(), t.checkPair(),
	)
	if err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	return nil
}

func (t *TLS) checkAuthorities() error {
	var settings api.TLSConfig
	ca, err := expand(t.CA)
	if err == nil && ca != "" {
		discovery.TrustIn(&settings, ca)
		err = discovery.CheckTLS(settings)
	}
	if err != nil {
		return &optionError{"ca", err}
	}
	return nil
}

// tlsVersions are the versions that min_version may name.
var tlsVersions = map[string]uint16{
	"":       tls.VersionTLS12,
	"tls1.2": tls.VersionTLS12,
	"tls1.3": tls.VersionTLS13,
}

func (t *TLS) checkMinVersion() error {
	if _, known := tlsVersions[t.MinVersion]; !known {
		return &optionError{"min_version", fmt.Errorf("'%s' is not known: want tls1.2 or tls1.3", t.MinVersion)}
	}
	return nil
}

// checkPair reports what is wrong with the certificate to show and its key.
func (t *TLS) checkPair() error {
	fromEnv := api.DefaultConfig().TLSConfig
	cert, _ := expand(cmp.Or(t.Cert, fromEnv.CertFile))
	key, _ := expand(cmp.Or(t.Key, fromEnv.KeyFile))
	switch {
	case t.Cert == "" && t.Key == "":
		return nil
	case key == "":
		return &optionError{"cert", errors.New("needs key as well")}
	case cert == "":
		return &optionError{"key", errors.New("needs cert as well")}
	}
	_, err := tls.LoadX509KeyPair(cert, key)
	switch {
	case err == nil:
		return nil
	case t.Key == "" || !holdsCertificate(cert):
		return &optionError{"cert", err}
	default:
		return &optionError{"key", err}
	}
}

// holdsCertificate reports whether a PEM file starts with a certificate.
func holdsCertificate(name string) bool {
	content, _ := os.ReadFile(name)
	block, _ := pem.Decode(content)
	if block == nil {
		return false
	}
	_, err := x509.ParseCertificate(block.Bytes)
	return err == nil
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
//	    min_version tls1.2|tls1.3
//	    insecure_skip_verify
//	}
func (c *Connection) unmarshalOption(d *caddyfile.Dispenser) (known bool, err error) {
	switch d.Val() {
	case "address":
		err = oneArg(d, &c.Address)
	case "token":
		err = oneArg(d, &c.Token)
	case "token_file":
		err = oneArg(d, &c.TokenFile)
	case "datacenter":
		err = oneArg(d, &c.Datacenter)
	case "tls":
		if d.NextArg() {
			return true, d.ArgErr()
		}
		c.TLS = new(TLS)
		return true, c.TLS.unmarshal(d)
	default:
		return false, nil
	}
	if err != nil {
		return true, err
	}
	return true, locate(d, Connection{
		Address: c.Address, Token: c.Token, TokenFile: c.TokenFile, Datacenter: c.Datacenter,
	}.check())
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
			field = &t.ServerName
		case "min_version":
			field = &t.MinVersion
		case "insecure_skip_verify":
			if d.NextArg() {
				return d.ArgErr()
			}
			t.InsecureSkipVerify = true
			continue
		default:
			return d.Errf("unrecognized option '%s' of tls: want ca, cert, key, server_name, min_version or insecure_skip_verify", d.Val())
		}
		if err := oneArg(d, field); err != nil {
			return err
		}
	}
	err := t.check()
	if wrong := (*optionError)(nil); errors.As(err, &wrong) {
		at := once[wrong.option]
		return locate(&at, err)
	}
	return locate(d, err)
}

// options remembers where a block has had which options.
type options map[string]caddyfile.Dispenser

// rivals are options that say the same thing in two ways.
var rivals = map[string]string{
	"token": "token_file", "token_file": "token",
	"serve_stale": "grace_period", "grace_period": "serve_stale",
}

// take notes the option that d stands on. It fails if the block has had it, or
// its rival.
func (o options) take(d *caddyfile.Dispenser) error {
	name := d.Val()
	if name == "{" {
		return d.Err("the option takes no block")
	}
	if at, taken := o[name]; taken {
		return d.Errf("option '%s' is already given on line %d", name, at.Line())
	}
	rival := rivals[name]
	if at, taken := o[rival]; taken {
		return d.Errf("%s and %s (on line %d) can't be used together: remove one", name, rival, at.Line())
	}
	o[name] = *d
	return nil
}

// oneArg reads the only argument of an option.
func oneArg(d *caddyfile.Dispenser, field *string) error {
	name := d.Val()
	if !d.NextArg() {
		return d.ArgErr()
	}
	if *field = d.Val(); *field == "" {
		return d.Errf("option '%s' is empty", name)
	}
	if d.NextArg() {
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
