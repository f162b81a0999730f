// SPDX-License-Identifier: MIT

package test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/wgroam/wgroam/internal/lab"
)

// TestMetrics: what the endpoint of two daemons serves after roams is what
// doc/metrics.md says, has counted each stage, and names no peer.
func TestMetrics(t *testing.T) {
	const listen = "127.0.0.1:9586"
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	var nodes []*node
	for _, gw := range l.Gateways {
		dir := t.TempDir()
		nodes = append(nodes, startNode(t, gw, dir, config(gw, dir, others(l, gw)...)+
			"[metrics]\nlisten = \""+listen+"\"\n[events]\nenabled = true\nurl = \"nats://127.0.0.1:1\"\n"))
		ping(t, c) // known when the second one joins
	}
	for _, n := range nodes {
		n.awaitNodes(1)
	}
	secret := []string{c.Key().String()}
	for i := range 3 {
		ep := roam(t, c, i)
		awaitEndpoint(t, h, c, ep)
		secret = append(secret, ep.Addr().String(), fmt.Sprintf("\"%d\"", ep.Port()))
	}

	counted := map[string]uint64{}
	for i, gw := range l.Gateways {
		text, families := scrape(t, gw, listen)
		for _, s := range secret {
			if strings.Contains(text, s) {
				t.Errorf("%s: metrics tell %s", gw.Name, s)
			}
		}
		problems, err := promlint.New(strings.NewReader(text)).Lint()
		if err != nil {
			t.Error(err)
		}
		for _, p := range problems {
			if strings.HasPrefix(p.Metric, "wgroam_") {
				t.Errorf("%s: %s", p.Metric, p.Text)
			}
		}
		if !lab.InVM() { // which has no documents
			if diff := cmp.Diff(documented(t), describe(families)); diff != "" {
				t.Errorf("%s: doc/metrics.md is not what is served (-doc +served):\n%s", gw.Name, diff)
			}
		}
		for _, m := range families["wgroam_lag_seconds"].GetMetric() {
			counted[gw.Name+" "+label(m, "stage")] = m.GetHistogram().GetSampleCount()
		}
		other := "gw-" + l.Gateways[1-i].Name
		for _, m := range families["wgroam_node_state"].GetMetric() {
			if label(m, "node") != other || (m.GetGauge().GetValue() == 1) != (label(m, "state") == "synced") {
				t.Errorf("%s: node %v", gw.Name, m)
			}
		}
		for _, name := range []string{"wgroam_frames_sent_total", "wgroam_received_bytes_total", "wgroam_syncs_total"} {
			if gw == a && name == "wgroam_syncs_total" {
				continue // it lacks nothing
			}
			if v := families[name].GetMetric()[0].GetCounter().GetValue(); v == 0 {
				t.Errorf("%s: %s is 0", gw.Name, name)
			}
		}
	}
	for _, stage := range []string{a.Name + " kernel_to_user", a.Name + " user_to_sent", h.Name + " received_to_merged", h.Name + " merged_to_applied"} {
		if n := counted[stage]; n < 3 {
			t.Errorf("%s has counted %d of 3 roams: %v", stage, n, counted)
		}
	}
}

// describe returns the type and the labels of every metric of ours.
func describe(families map[string]*dto.MetricFamily) map[string]string {
	out := map[string]string{}
	for name, f := range families {
		if !strings.HasPrefix(name, "wgroam_") {
			continue
		}
		labels := map[string]bool{}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = true
			}
		}
		delete(labels, "device")
		delete(labels, "netns")
		out[name] = strings.Join(append([]string{strings.ToLower(f.GetType().String())}, slices.Sorted(maps.Keys(labels))...), " ")
	}
	return out
}

// documented returns the same from doc/metrics.md.
func documented(t testing.TB) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "doc", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(wgroam_[a-z_]+)` \\| ([a-z]+) \\|([^|]*)\\|").FindAllStringSubmatch(string(text), -1) {
		labels := strings.FieldsFunc(row[3], func(r rune) bool { return strings.ContainsRune("`, ", r) })
		slices.Sort(labels)
		out[row[1]] = strings.Join(append([]string{row[2]}, labels...), " ")
	}
	return out
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

// scrape gets what a daemon on gw serves there.
func scrape(t testing.TB, gw *lab.Gateway, listen string) (string, map[string]*dto.MetricFamily) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, addr string) (conn net.Conn, err error) {
			err = gw.Do(func() error { conn, err = net.Dial(network, addr); return err })
			return conn, err
		},
	}}
	resp, err := client.Get("http://" + listen + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(body)))
	if err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return string(body), families
}
