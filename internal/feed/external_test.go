// SPDX-License-Identifier: MIT

package feed_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

func writeFile(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func confOptions(t testing.TB, file, conf string, port int) *server.Options {
	t.Helper()
	if err := os.WriteFile(file, fmt.Appendf(nil, "listen: \"127.0.0.1:%d\"\n%s", port, conf), 0o600); err != nil {
		t.Fatal(err)
	}
	opts, err := server.ProcessConfigFile(file)
	if err != nil {
		t.Fatal(err)
	}
	opts.NoLog, opts.NoSigs = true, true
	return opts
}

// confServer starts a NATS server with a configuration file, on a port that is
// free if port is -1.
func confServer(t testing.TB, conf string, port int) *server.Server {
	t.Helper()
	return runNATS(t, confOptions(t, writeFile(t, "nats.conf", ""), conf, port))
}

func portOf(s *server.Server) int { return s.Addr().(*net.TCPAddr).Port }

// natsContext makes a context of the NATS command line tool.
func natsContext(t testing.TB, name, content string) feed.External {
	t.Helper()
	config, err := os.UserConfigDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(config, "nats", "context")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".json"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return feed.External{Context: name}
}

// talk has two nodes say and ask all there is to.
func talk(t *testing.T, a, b *node) {
	t.Helper()
	a.ups(t)
	b.ups(t)
	if err := a.Publish([]wgroam.Record{record(1, a.Self())}); err != nil {
		t.Fatal(err)
	}
	next(t, "update", b.updates)
	a.beatTo(t, b, 1)
	k := groupKeys(t, 1)
	table := wgroam.NewTable(k.DigestKey())
	fill(table, 3, a.Self())
	a.serve(t, table)
	if got, err := b.sync(t.Context(), a.Self(), wgroam.NewTable(k.DigestKey())); err != nil || got != 3 {
		t.Errorf("ask: %d records, %v", got, err)
	}
	for _, n := range []*node{a, b} {
		if st := n.Status()[0]; st.Denied != "" {
			t.Errorf("%s: %s", n.Name(), st.Denied)
		}
	}
}

// pair is a node each for two ways to log in.
func pair(t *testing.T, one, other feed.External) (a, b *node) {
	t.Helper()
	k := groupKeys(t, 1)
	return startNode(t, feed.Config{Name: "gw-a", Keys: k, External: one}),
		startNode(t, feed.Config{Name: "gw-b", Keys: k, External: other})
}

// pki is an authority and what it has signed for a server and a client.
type pki struct{ ca, cert, key, clientCert, clientKey string }

func newPKI(t testing.TB) pki {
	t.Helper()
	dir := t.TempDir()
	var caKey *ecdsa.PrivateKey
	var ca *x509.Certificate
	sign := func(name string, template *x509.Certificate) (certFile, keyFile string) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template.SerialNumber = big.NewInt(time.Now().UnixNano())
		template.Subject = pkix.Name{CommonName: name}
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		template.BasicConstraintsValid = true
		if ca == nil {
			ca, caKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, caKey)
		if err != nil {
			t.Fatal(err)
		}
		secret, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
		for path, b := range map[string]*pem.Block{
			certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: secret},
		} {
			if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return certFile, keyFile
	}
	var p pki
	p.ca, _ = sign("ca", &x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign})
	p.cert, p.key = sign("server", &x509.Certificate{IPAddresses: []net.IP{{127, 0, 0, 1}}})
	p.clientCert, p.clientKey = sign("client", &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return p
}

func keyPair(t testing.TB, create func() (nkeys.KeyPair, error)) (kp nkeys.KeyPair, public, seed string) {
	t.Helper()
	kp, err := create()
	if err != nil {
		t.Fatal(err)
	}
	public, err = kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	s, err := kp.Seed()
	if err != nil {
		t.Fatal(err)
	}
	return kp, public, string(s)
}

// operator is one with two accounts, and issues users of them.
type operator struct {
	t        testing.TB
	conf     string
	accounts map[string]nkeys.KeyPair
}

func newOperator(t testing.TB) *operator {
	t.Helper()
	kp, public, _ := keyPair(t, nkeys.CreateOperator)
	self, err := jwt.NewOperatorClaims(public).Encode(kp)
	if err != nil {
		t.Fatal(err)
	}
	o := &operator{t: t, accounts: make(map[string]nkeys.KeyPair)}
	var preload strings.Builder
	for _, name := range []string{"VPN", "OTHER"} {
		account, public, _ := keyPair(t, nkeys.CreateAccount)
		o.accounts[name] = account
		claims, err := jwt.NewAccountClaims(public).Encode(kp)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&preload, "%s: %q\n", public, claims)
	}
	o.conf = fmt.Sprintf("operator: %q\nresolver: MEMORY\nresolver_preload: {\n%s}\n", writeFile(t, "operator.jwt", self), &preload)
	return o
}

// user returns the token, the seed and the credentials file of a user who may
// use subjects for so long.
func (o *operator) user(account, subjects string, life time.Duration) (token, seed, creds string) {
	o.t.Helper()
	_, public, seed := keyPair(o.t, nkeys.CreateUser)
	claims := jwt.NewUserClaims(public)
	claims.Expires = time.Now().Add(life).Unix()
	claims.Pub.Allow.Add(subjects)
	claims.Sub.Allow.Add(subjects)
	token, err := claims.Encode(o.accounts[account])
	if err != nil {
		o.t.Fatal(err)
	}
	b, err := jwt.FormatUserConfig(token, []byte(seed))
	if err != nil {
		o.t.Fatal(err)
	}
	return token, seed, string(b)
}

// TestLogins logs in to real servers in all the ways that a configuration and a
// context can name.
func TestLogins(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	home := t.TempDir()
	t.Setenv("HOME", home)

	t.Run("user and password", func(t *testing.T) {
		addr := confServer(t, `authorization { user: u, password: "p w" }`, -1).Addr().String()
		a, b := pair(t, feed.External{URL: "nats://u:p%20w@" + addr},
			natsContext(t, "user", `{"url": "nats://`+addr+`", "user": "u", "password": "p w", "inbox_prefix": "_X", "description": ""}`))
		talk(t, a, b)
		if st := a.Status()[0]; st.URL != "nats://"+addr {
			t.Errorf("the URL shows %q", st.URL)
		}
	})
	t.Run("token", func(t *testing.T) {
		addr := confServer(t, `authorization { token: "sesame" }`, -1).Addr().String()
		a, b := pair(t, feed.External{URL: "nats://sesame@" + addr}, natsContext(t, "token", `{"url": "nats://`+addr+`", "token": "sesame"}`))
		talk(t, a, b)
	})
	t.Run("nkey", func(t *testing.T) {
		_, public, seed := keyPair(t, nkeys.CreateUser)
		url := confServer(t, `authorization { users: [ { nkey: `+public+` } ] }`, -1).ClientURL()
		if err := os.WriteFile(filepath.Join(home, "user.nk"), []byte(seed+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		a, b := pair(t, feed.External{URL: url, NKey: filepath.Join(home, "user.nk")},
			natsContext(t, "nkey", `{"url": "`+url+`", "nkey": "~/user.nk"}`))
		talk(t, a, b)
	})
	t.Run("operator", func(t *testing.T) {
		o := newOperator(t)
		url := confServer(t, o.conf, -1).ClientURL()
		subjects := groupKeys(t, 1).Subjects()
		_, _, creds := o.user("VPN", subjects, time.Hour)
		token, seed, _ := o.user("VPN", subjects, time.Hour)
		_, _, foreign := o.user("OTHER", subjects, time.Hour)
		a, b := pair(t, feed.External{URL: url, Creds: writeFile(t, "a.creds", creds)},
			natsContext(t, "jwt", fmt.Sprintf(`{"url": %q, "user_jwt": %q, "user_seed": %q}`, url, token, seed)))
		// Another account hears nothing.
		x := startNode(t, feed.Config{Name: "gw-x", Keys: groupKeys(t, 1), External: natsContext(t, "creds",
			fmt.Sprintf(`{"url": %q, "creds": %q}`, url, writeFile(t, "x.creds", foreign)))})
		x.ups(t)
		talk(t, a, b)
		if n := len(x.updates) + len(x.beats); n != 0 {
			t.Errorf("%d messages reached another account", n)
		}
	})
	t.Run("TLS", func(t *testing.T) {
		p := newPKI(t)
		addr := confServer(t, fmt.Sprintf("tls { cert_file: %q, key_file: %q }", p.cert, p.key), -1).Addr().String()
		a, b := pair(t, feed.External{URL: "tls://" + addr, CA: p.ca}, natsContext(t, "tls", fmt.Sprintf(`{"url": "nats://%s", "ca": %q}`, addr, p.ca)))
		talk(t, a, b)
	})
	t.Run("mTLS", func(t *testing.T) {
		p := newPKI(t)
		addr := confServer(t, fmt.Sprintf("tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true }", p.cert, p.key, p.ca), -1).Addr().String()
		a, b := pair(t, feed.External{URL: "nats://" + addr, CA: p.ca, Cert: p.clientCert, Key: p.clientKey},
			natsContext(t, "mtls", fmt.Sprintf(`{"url": "tls://%s", "ca": %q, "cert": %q, "key": %q}`, addr, p.ca, p.clientCert, p.clientKey)))
		talk(t, a, b)
	})
	t.Run("TLS first", func(t *testing.T) {
		p := newPKI(t)
		addr := confServer(t, fmt.Sprintf("tls { cert_file: %q, key_file: %q, handshake_first: true }", p.cert, p.key), -1).Addr().String()
		e := natsContext(t, "first", fmt.Sprintf(`{"url": "nats://%s", "ca": %q, "tls_first": true}`, addr, p.ca))
		a, b := pair(t, e, e)
		talk(t, a, b)
	})
	t.Run("several servers", func(t *testing.T) {
		first := confServer(t, `cluster { name: c, listen: "127.0.0.1:-1" }`, -1)
		route := first.ClusterAddr().String()
		second := confServer(t, `cluster { name: c, listen: "127.0.0.1:-1", routes: ["nats://`+route+`"] }`, -1)
		until(t, "joined", func() bool { return first.NumRoutes() > 0 && second.NumRoutes() > 0 })
		e := feed.External{URL: first.ClientURL() + ", " + second.ClientURL()}
		a, b := pair(t, e, e)
		talk(t, a, b)
		first.Shutdown()
		until(t, "all at the second", func() bool { return second.NumClients() == 2 })
		a.ups(t)
		b.ups(t)
		a.beatTo(t, b, 1)
	})

	for name, tc := range map[string]struct{ context, want string }{
		"nsc":      {`{"url": "nats://127.0.0.1", "nsc": "nsc://o/a/u"}`, "nsc generate creds"},
		"proxy":    {`{"url": "nats://127.0.0.1", "socks_proxy": "socks5://x"}`, "without"},
		"jwt only": {`{"url": "nats://127.0.0.1", "user_jwt": "x"}`, "set both"},
	} {
		if _, err := feed.New(feed.Config{Name: "gw-x", Keys: groupKeys(t, 1), External: natsContext(t, "bad", tc.context)}); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q in it", name, err, tc.want)
		}
	}
}

// TestRefusedLogins is refused, says what to do about it, and is let in as soon as
// that is done.
func TestRefusedLogins(t *testing.T) {
	k := groupKeys(t, 1)
	p, other := newPKI(t), newPKI(t)
	serverTLS := fmt.Sprintf("cert_file: %q, key_file: %q", p.cert, p.key)
	o := newOperator(t)
	_, _, expired := o.user("VPN", ">", -time.Minute)
	_, _, renewed := o.user("VPN", ">", time.Hour)
	creds := writeFile(t, "user.creds", expired)
	const open = ""

	for name, tc := range map[string]struct {
		conf string
		ext  feed.External
		url  string // %s: host:port
		want string
		mend func() (conf string) // returns the configuration of the server from then on
	}{
		"wrong password": {
			`authorization { user: u, password: p }`, feed.External{}, "nats://u:wrong@%s",
			"correct user and password in url", func() string { return `authorization { user: u, password: wrong }` },
		},
		"expired credentials": {
			o.conf, feed.External{Creds: creds}, "nats://%s", "or they have expired",
			func() string {
				if err := os.WriteFile(creds, []byte(renewed), 0o600); err != nil {
					t.Fatal(err)
				}
				return o.conf
			},
		},
		"unknown authority": {
			"tls { " + serverTLS + " }", feed.External{CA: other.ca}, "nats://%s", "set tls.ca",
			func() string { return fmt.Sprintf("tls { cert_file: %q, key_file: %q }", other.cert, other.key) },
		},
		"no client certificate": {
			fmt.Sprintf("tls { %s, ca_file: %q, verify: true }", serverTLS, p.ca), feed.External{CA: p.ca}, "nats://%s", "set tls.cert and tls.key",
			func() string { return "tls { " + serverTLS + " }" },
		},
		"foreign client certificate": {
			fmt.Sprintf("tls { %s, ca_file: %q, verify: true }", serverTLS, p.ca),
			feed.External{CA: p.ca, Cert: other.clientCert, Key: other.clientKey}, "nats://%s", "set tls.cert and tls.key",
			func() string { return "tls { " + serverTLS + " }" },
		},
		"no TLS": {
			open, feed.External{CA: p.ca}, "tls://%s", "the server has no TLS",
			func() string { return "tls { " + serverTLS + " }" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := confServer(t, tc.conf, -1)
			ext := tc.ext
			ext.URL = fmt.Sprintf(tc.url, s.Addr())
			n := startNode(t, feed.Config{Name: "gw-a", Keys: k, External: ext})
			until(t, "refused, with "+tc.want, func() bool { return strings.Contains(n.Status()[0].LastError, tc.want) || t.Failed() })
			until(t, "logged", func() bool { return len(n.log.with(tc.want)) == 1 })
			if n.Status()[0].Connected {
				t.Error("connected")
			}
			port := portOf(s)
			conf := tc.mend()
			s.Shutdown()
			s.WaitForShutdown()
			confServer(t, conf, port)
			n.ups(t)
			t.Log(n.log.with(tc.want))
		})
	}
}

// documented returns the authorization block of doc/nats.md, for a group.
func documented(t testing.TB, k feed.Keys) string {
	t.Helper()
	doc, err := os.ReadFile("../../doc/nats.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(doc), "```\nauthorization")
	conf, _, end := strings.Cut(rest, "\n```")
	if !ok || !end {
		t.Fatal("doc/nats.md has no block that begins with authorization")
	}
	return "authorization" + strings.ReplaceAll(conf, "GROUP", k.Group())
}

// TestLeastPermissions has a server that grants what doc/nats.md says and
// nothing else, and one that grants a part of that.
func TestLeastPermissions(t *testing.T) {
	k := groupKeys(t, 1)
	conf := documented(t, k)
	user := func(s *server.Server) feed.External {
		return feed.External{URL: "nats://wgroam:change%20me@" + s.Addr().String()}
	}
	all := confServer(t, conf, -1)
	a, b := pair(t, user(all), user(all))
	talk(t, a, b)
	for _, n := range []*node{a, b} {
		if got := n.log.with("ERROR"); len(got) != 0 {
			t.Errorf("%s: %v", n.Name(), got)
		}
	}
	// Nothing below it is granted to another group.
	x := startNode(t, feed.Config{Name: "gw-x", Keys: groupKeys(t, 2), External: user(all)})
	until(t, "forbidden", func() bool { return strings.Contains(x.Status()[0].Denied, groupKeys(t, 2).Subjects()) })

	const pub, sub = "publish: [", "subscribe: ["
	for name, part := range map[string]string{
		"publish":         strings.Replace(conf, pub, `publish: ["none" ] #`, 1),
		"subscribe":       strings.Replace(conf, sub, `subscribe: ["none" ] #`, 1),
		"publish updates": strings.Replace(conf, pub+`"wgroam.v1.`+k.Group()+`.>"]`, `publish: ["wgroam.v1.`+k.Group()+`.b.*"]`, 1),
		"hear requests":   strings.Replace(conf, sub+`"wgroam.v1.`+k.Group()+`.>"]`, `subscribe: ["wgroam.v1.`+k.Group()+`.*.*"]`, 1),
	} {
		t.Run("without "+name, func(t *testing.T) {
			if part == conf {
				t.Fatal("nothing was taken away")
			}
			s := confServer(t, part, -1)
			n := startNode(t, feed.Config{Name: "gw-a", Keys: k, External: user(s)})
			n.ups(t)
			if err := n.Publish([]wgroam.Record{record(1, n.Self())}); err != nil {
				t.Fatal(err)
			}
			until(t, "forbidden", func() bool { return n.Status()[0].Denied != "" })
			st := n.Status()[0]
			if !st.Connected || !strings.Contains(st.Denied, "allow publish and subscribe on "+k.Subjects()) {
				t.Errorf("status %+v", st)
			}
			until(t, "logged", func() bool { return len(n.log.with("ERROR")) == 1 })
			t.Log(n.log.with("ERROR"))
		})
	}
}

// TestPermissionGranted forbids the subscriptions, and then permits them on
// the connection that there is.
func TestPermissionGranted(t *testing.T) {
	k := groupKeys(t, 1)
	conf := documented(t, k)
	file := writeFile(t, "nats.conf", "")
	s := runNATS(t, confOptions(t, file, strings.Replace(conf, "subscribe: [", `subscribe: ["none" ] #`, 1), -1))
	url := "nats://wgroam:change%20me@" + s.Addr().String()
	a, b := pair(t, feed.External{URL: url}, feed.External{URL: url})
	for _, n := range []*node{a, b} {
		until(t, "forbidden", func() bool { return n.Status()[0].Denied != "" })
	}
	if err := s.ReloadOptions(confOptions(t, file, conf, portOf(s))); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{a, b} {
		longUntil(t, "permitted", func() bool { st := n.Status()[0]; return st.Connected && st.Denied == "" })
		// It is no loss of the connection, and is not told as one.
		if got := n.log.with("connection lost"); len(got) != 0 {
			t.Error(got)
		}
	}
	talk(t, a, b)
}

// longUntil is until for what takes as long as a few attempts.
func longUntil(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(3 * patience); !cond() && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	until(t, what, cond)
}
