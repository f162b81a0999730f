// SPDX-License-Identifier: MIT

package feed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nats.go"
)

// External says how to reach an existing NATS. Without URL and Context there is
// none.
type External struct {
	// URL is one or more URLs, separated by commas.
	URL string
	// Context is the name of a context of the NATS command line tool. What the
	// other fields give goes before what the context says.
	Context string
	// Creds and NKey are paths of a credentials file and of an NKey seed.
	Creds, NKey string
	// CA, Cert and Key are paths of PEM files: authorities, and a client
	// certificate with its key.
	CA, Cert, Key string
}

func (e External) empty() bool { return e.URL == "" && e.Context == "" }

// natsContext is the part of a context file that says how to connect. Its
// inbox_prefix has no use here: all subjects are below the group's.
type natsContext struct {
	URL      string `json:"url"`
	Creds    string `json:"creds"`
	NKey     string `json:"nkey"`
	Token    string `json:"token"`
	User     string `json:"user"`
	Password string `json:"password"`
	JWT      string `json:"user_jwt"`
	Seed     string `json:"user_seed"`
	CA       string `json:"ca"`
	Cert     string `json:"cert"`
	Key      string `json:"key"`
	TLSFirst bool   `json:"tls_first"`
	// Not for a daemon; refused.
	NSC   string `json:"nsc"`
	Proxy string `json:"socks_proxy"`
}

func readContext(name string) (natsContext, error) {
	var c natsContext
	if name != filepath.Base(name) {
		return c, fmt.Errorf("nats context %q: want the name of a context, not a path", name)
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return c, fmt.Errorf("nats context %q: %w: set HOME, or use url instead", name, err)
	}
	path := filepath.Join(dir, "nats", "context", name+".json")
	b, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("nats context %q: %w: `nats context ls` lists what there is, per user", name, err)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("nats context %q: %s: %w", name, path, err)
	}
	switch {
	case c.NSC != "":
		return c, fmt.Errorf("nats context %q: %s: nsc is not supported: write a file with nsc generate creds, and set creds to it", name, path)
	case c.Proxy != "":
		return c, fmt.Errorf("nats context %q: %s: socks_proxy is not supported: use a server that can be reached without", name, path)
	}
	// The tool expands these.
	for _, p := range []*string{&c.Creds, &c.NKey, &c.CA, &c.Cert, &c.Key} {
		if rest, ok := strings.CutPrefix(*p, "~/"); ok {
			home, err := os.UserHomeDir()
			if err != nil {
				return c, fmt.Errorf("nats context %q: %s: %w: set HOME, or write the path in full", name, *p, err)
			}
			*p = filepath.Join(home, rest)
		}
	}
	return c, nil
}

// Options returns the options for a connection of the node that is made again and
// again until ctx ends, and the URLs without secrets.
func (e External) Options(ctx context.Context, node string) (nats.Options, string, error) {
	o, urls, err := e.options()
	keepUp(&o, node)
	o.CustomDialer = dialer{dial: func(network, addr string) (net.Conn, error) {
		d := net.Dialer{Timeout: dialTimeout}
		return d.DialContext(ctx, network, addr)
	}}
	return o, urls, err
}

// options returns the options for a connection, and the URLs without secrets.
func (e External) options() (nats.Options, string, error) {
	o := nats.GetDefaultOptions()
	var c natsContext
	if e.Context != "" {
		var err error
		if c, err = readContext(e.Context); err != nil {
			return o, "", err
		}
	}
	first := func(own string, of *string) {
		if own != "" {
			*of = own
		}
	}
	first(e.URL, &c.URL)
	first(e.CA, &c.CA)
	first(e.Cert, &c.Cert)
	first(e.Key, &c.Key)
	if e.Creds != "" || e.NKey != "" {
		c.Creds, c.NKey, c.Token, c.User, c.Password, c.JWT, c.Seed = e.Creds, e.NKey, "", "", "", "", ""
	}
	if c.URL == "" {
		return o, "", fmt.Errorf("nats context %q has no url: set one", e.Context)
	}
	if c.Creds != "" && c.NKey != "" {
		return o, "", errors.New("nats: creds and nkey exclude each other: remove one")
	}
	if (c.JWT == "") != (c.Seed == "") {
		return o, "", fmt.Errorf("nats context %q: user_jwt and user_seed belong together: set both", e.Context)
	}
	if (c.Cert == "") != (c.Key == "") {
		return o, "", errors.New("nats: tls.cert and tls.key belong together: set both")
	}

	for u := range strings.SplitSeq(c.URL, ",") {
		u = strings.TrimSpace(u)
		if _, err := parseURL(u); err != nil {
			// The error has the password in it, and so has that of nats.go.
			return o, "", fmt.Errorf("nats url %s: not a URL: write other characters than letters and digits in user and password as %%XX, such as %%2C for a comma", redact(u))
		}
		o.Servers = append(o.Servers, u)
	}
	o.User, o.Password, o.Token = c.User, c.Password, c.Token
	var set []nats.Option
	if c.Creds != "" {
		if _, err := os.Stat(c.Creds); err != nil {
			return o, "", fmt.Errorf("nats creds: %w", err)
		}
		set = append(set, nats.UserCredentials(c.Creds))
	}
	if c.NKey != "" {
		opt, err := nats.NkeyOptionFromSeed(c.NKey)
		if err != nil {
			return o, "", fmt.Errorf("nats nkey %s: %w", c.NKey, err)
		}
		set = append(set, opt)
	}
	if c.JWT != "" {
		set = append(set, nats.UserJWTAndSeed(c.JWT, c.Seed))
	}
	if c.TLSFirst {
		set = append(set, nats.TLSHandshakeFirst())
	}
	if c.CA != "" {
		set = append(set, nats.RootCAs(c.CA))
	}
	if c.Cert != "" {
		set = append(set, nats.ClientCert(c.Cert, c.Key))
	}
	for _, opt := range set {
		if err := opt(&o); err != nil {
			return o, "", fmt.Errorf("nats tls: %w", err)
		}
	}
	return o, redact(c.URL), nil
}
