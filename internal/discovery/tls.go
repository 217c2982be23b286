package discovery

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
)

// RequireTLS sets the oldest version of TLS that config speaks. The default is
// TLS 1.2.
func RequireTLS(config *api.Config, version uint16) {
	config.Transport.TLSClientConfig = &tls.Config{MinVersion: version} //nolint:gosec // chosen by the operator
}

// oldestTLS returns what RequireTLS has set.
func oldestTLS(config *api.Config) uint16 {
	version := uint16(tls.VersionTLS12)
	if config.Transport != nil && config.Transport.TLSClientConfig != nil {
		version = cmp.Or(config.Transport.TLSClientConfig.MinVersion, version)
	}
	return version
}

// newTLSConfig reads the certificates and keys of config.
func newTLSConfig(config *api.Config) (*tls.Config, error) {
	settings := config.TLSConfig
	folder := ""
	if settings.CAFile == "" { // which goes before, with the official client as well
		folder, settings.CAPath = settings.CAPath, ""
	}
	tlsConfig, err := api.SetupTLSConfig(&settings)
	if err != nil {
		return nil, err
	}
	tlsConfig.MinVersion = oldestTLS(config)
	if folder != "" {
		tlsConfig.RootCAs, err = authoritiesIn(folder)
	}
	return tlsConfig, err
}

// authoritiesIn reads the certificates in the files of a folder. The official
// client stumbles over the links to folders, with a dot in front, that
// Kubernetes keeps beside the files that it mounts.
func authoritiesIn(folder string) (*x509.CertPool, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	pool, found := x509.NewCertPool(), false
	for _, entry := range entries {
		name := filepath.Join(folder, entry.Name())
		if info, err := os.Stat(name); strings.HasPrefix(entry.Name(), ".") || err == nil && info.IsDir() {
			continue
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		if !pool.AppendCertsFromPEM(content) {
			return nil, fmt.Errorf("no certificate in %s", name)
		}
		found = true
	}
	if !found {
		return nil, fmt.Errorf("no certificate in the folder %s", folder)
	}
	return pool, nil
}

// opRemote is the operation of a net.OpError that holds what the other end of a
// TLS connection says before it breaks it off.
const opRemote = "remote error"

// refusalTimeout bounds the time to ask for a refusal.
const refusalTimeout = time.Second

// refusal returns why the agent doesn't want our certificate, if that's what is
// behind err, or nil. With TLS 1.3 it looks at it after the handshake, when we
// are sending a query already, and often Go tells that this broke off, and not
// why. So the refusal is asked for on a connection on which we send nothing.
func (c *client) refusal(ctx context.Context, err error) error {
	transport, ok := c.http.Transport.(*http.Transport)
	address, isTLS := strings.CutPrefix(c.base, "https://")
	if kind := kindOf(err); !ok || !isTLS || ctx.Err() != nil || kind != kindReset && kind != kindOther {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, refusalTimeout)
	defer cancel()
	address, _, _ = strings.Cut(address, "/")
	if _, _, err := net.SplitHostPort(address); err != nil {
		address = net.JoinHostPort(strings.Trim(address, "[]"), "443")
	}
	dialer := tls.Dialer{Config: transport.TLSClientConfig.Clone()}
	dialer.Config.NextProtos = nil // an agent that speaks HTTP/2 would begin to talk
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err == nil {
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()
		_, err = conn.Read(make([]byte, 1))
	}
	var said *net.OpError
	if errors.As(err, &said) && said.Op == opRemote {
		return said
	}
	return nil
}

// CheckTLS reports why certificates and keys can't be used.
func CheckTLS(settings api.TLSConfig) error {
	_, err := newTLSConfig(&api.Config{TLSConfig: settings})
	return err
}

// TrustIn sets what to trust: the certificates in a file, or in a folder.
func TrustIn(settings *api.TLSConfig, name string) {
	if IsFolder(name) {
		settings.CAFile, settings.CAPath = "", name
	} else {
		settings.CAFile, settings.CAPath = name, ""
	}
}

// IsFolder reports whether a path names a folder, through links if need be.
func IsFolder(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}
