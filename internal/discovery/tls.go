package discovery

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"

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
