// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
)

// serveMetrics serves /metrics until ctx ends. A port that is taken is reported,
// and does not end the daemon.
func (d *daemon) serveMetrics(ctx context.Context, listen string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", listen)
	if err != nil {
		d.log.Error("no metrics: free the address or change metrics.listen", "listen", listen, "err", err)
		return nil
	}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(collector{d}, d.lag, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { srv.Close() })
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics on %s: %w", listen, err)
	}
	return nil
}

// collector makes metrics of the status. The label netns is empty for devices of
// the daemon's network namespace, which is as good as none. There is no label for
// a peer, and never one for an endpoint: each roam would make a new series. The
// label node has the nodes that have been heard. See doc/metrics.md.
type collector struct{ d *daemon }

var metrics = []metric{
	counter("events_total", "Endpoint changes that the detector reported.", func(d control.DeviceStatus) uint64 { return d.Events }),
	counter("events_lost_total", "Events that found the ring buffer full.", func(d control.DeviceStatus) uint64 { return d.Lost }),
	counter("events_limited_total", "Events that were held back because a peer, or all together, changed too often.", func(d control.DeviceStatus) uint64 { return d.Limited }),
	counter("resyncs_total", "Dumps of the device that were asked for, because events or peers were missing.", func(d control.DeviceStatus) uint64 { return d.Resyncs }),
	counter("sweep_repairs_total", "Changes that only the slow sweep found.", func(d control.DeviceStatus) uint64 { return d.SweepRepairs }),
	counter("applied_total", "Endpoints written to the device.", func(d control.DeviceStatus) uint64 { return d.Applied }),
	counter("undone_total", "Endpoints taken back because no session confirmed them.", func(d control.DeviceStatus) uint64 { return d.Undone }),
	counter("apply_errors_total", "Endpoints that could not be written.", func(d control.DeviceStatus) uint64 { return d.ApplyErrors }),
	counter("records_sent_total", "Records published.", func(d control.DeviceStatus) uint64 { return d.Feed.Sent }),
	counter("records_received_total", "Records of other nodes received.", func(d control.DeviceStatus) uint64 { return d.Feed.Received }),
	counter("records_synced_total", "Records in the answers of other nodes to sync requests.", func(d control.DeviceStatus) uint64 { return d.Feed.Synced }),
	counter("frames_sent_total", "Frames sent, once for each connection.", func(d control.DeviceStatus) uint64 { return d.Feed.FramesSent }),
	counter("frames_received_total", "Frames received, those that are refused included.", func(d control.DeviceStatus) uint64 { return d.Feed.FramesReceived }),
	counter("sent_bytes_total", "Bytes in frames sent.", func(d control.DeviceStatus) uint64 { return d.Feed.BytesSent }),
	counter("received_bytes_total", "Bytes in frames received.", func(d control.DeviceStatus) uint64 { return d.Feed.BytesReceived }),
	counter("drops_total", "Times that frames were lost because this node was too slow to read them.", func(d control.DeviceStatus) uint64 { return d.Feed.Dropped }),
	counter("gaps_total", "Updates of other nodes that were missing, as their numbers show.", func(d control.DeviceStatus) uint64 { return d.Feed.Gaps }),
	counter("syncs_total", "Comparisons of tables that another node answered in full.", func(d control.DeviceStatus) uint64 { return d.Feed.Syncs }),
	counter("sync_errors_total", "Comparisons of tables that no node answered in full.", func(d control.DeviceStatus) uint64 { return d.Feed.SyncErrors }),
	counter("snapshot_writes_total", "Times that the snapshot was written.", func(d control.DeviceStatus) uint64 { return d.Snapshot.Writes }),
	counter("snapshot_errors_total", "Times that the snapshot could not be written.", func(d control.DeviceStatus) uint64 { return d.Snapshot.Errors }),
	gauge("peers", "Peers in the device.", func(d control.DeviceStatus) int { return d.Peers }),
	gauge("records", "Records in the table.", func(d control.DeviceStatus) int { return d.Records }),
	gauge("records_waiting", "Records of peers that the device does not have.", func(d control.DeviceStatus) int { return d.Waiting }),
	gauge("connections", "Connections of the feed that the configuration asks for.", func(d control.DeviceStatus) (n int) {
		for _, c := range d.Feed.Connections {
			if !c.Former {
				n++
			}
		}
		return n
	}),
	gauge("connections_up", "Those that are up.", func(d control.DeviceStatus) (up int) {
		for _, c := range d.Feed.Connections {
			if c.Connected && !c.Former {
				up++
			}
		}
		return up
	}),
}

var (
	detectorDesc = desc("detector", "1 for the source of endpoint changes that is used.", "rung")
	roleDesc     = desc("role", "1 for the role that the node has for the device.", "role")
	alarmDesc    = desc("role_alarm", "1 while something is wrong with the roles.", "alarm")
	refusedDesc  = desc("refused_total", "Frames and records that were refused.", "reason")
	stateDesc    = desc("node_state", "1 for the state of another node's table, 0 for the other states.", "node", "state")
	ageDesc      = desc("node_age_seconds", "Time since another node was heard.", "node")
	skewDesc     = desc("node_skew_seconds", "Clock of another node minus ours, less the least time that its heartbeats took.", "node")

	// Of the node, where roams are published for other programs.
	roamsDesc   = prometheus.NewDesc("wgroam_roams_published_total", "Roams published for other programs.", nil, nil)
	droppedDesc = prometheus.NewDesc("wgroam_roams_dropped_total", "Roams that could not be published for other programs.", nil, nil)
	waitingDesc = prometheus.NewDesc("wgroam_roams_waiting", "Roams that wait for the connection to be published on.", nil, nil)
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("wgroam_"+name, help, append([]string{"device", "netns"}, labels...), nil)
}

type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(control.DeviceStatus) float64
}

func counter(name, help string, value func(control.DeviceStatus) uint64) metric {
	return metric{desc(name, help), prometheus.CounterValue, func(d control.DeviceStatus) float64 { return float64(value(d)) }}
}

func gauge(name, help string, value func(control.DeviceStatus) int) metric {
	return metric{desc(name, help), prometheus.GaugeValue, func(d control.DeviceStatus) float64 { return float64(value(d)) }}
}

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range metrics {
		ch <- m.desc
	}
	for _, d := range []*prometheus.Desc{
		detectorDesc, roleDesc, alarmDesc, refusedDesc, stateDesc, ageDesc, skewDesc, roamsDesc, droppedDesc, waitingDesc,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	status := c.d.status()
	if e := status.Events; e != nil {
		ch <- prometheus.MustNewConstMetric(roamsDesc, prometheus.CounterValue, float64(e.Sent))
		ch <- prometheus.MustNewConstMetric(droppedDesc, prometheus.CounterValue, float64(e.Dropped))
		ch <- prometheus.MustNewConstMetric(waitingDesc, prometheus.GaugeValue, float64(e.Waiting))
	}
	for _, d := range status.Devices {
		send := func(desc *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, kind, v, append([]string{d.Name, d.Netns}, labels...)...)
		}
		for _, m := range metrics {
			send(m.desc, m.kind, m.value(d))
		}
		send(detectorDesc, prometheus.GaugeValue, 1, d.Detector.Rung)
		send(roleDesc, prometheus.GaugeValue, 1, d.Role)
		for _, a := range failover.Alarms {
			up := slices.ContainsFunc(d.Alarms, func(r control.RoleAlarm) bool { return r.Alarm == string(a) })
			send(alarmDesc, prometheus.GaugeValue, bit(up), string(a))
		}
		for reason, n := range d.Feed.Refused {
			send(refusedDesc, prometheus.CounterValue, float64(n), reason)
		}
		for _, n := range d.Feed.Nodes {
			name := n.Name
			if wgroam.NodeIDOf(name).String() != n.ID {
				name = n.ID // a name that is not its own, or none yet
			}
			for _, state := range []string{control.NodeSynced, control.NodeSyncing, control.NodeStale} {
				send(stateDesc, prometheus.GaugeValue, bit(n.State == state), name, state)
			}
			send(ageDesc, prometheus.GaugeValue, float64(n.AgeMS)/1000, name)
			send(skewDesc, prometheus.GaugeValue, float64(n.SkewMS)/1000, name)
		}
	}
}

func bit(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// lag has a histogram for each stage of a record's way from the kernel of one node
// into the device of another. The stages are measured on the node where they
// happen, so that no two clocks are compared.
type lag struct{ *prometheus.HistogramVec }

func newLag() lag {
	return lag{prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "wgroam_lag_seconds",
		Help:    "How long each stage of an endpoint's way takes.",
		Buckets: []float64{10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, .1, .25, .5, 1, 2.5, 5, 10},
	}, []string{"device", "netns", "stage"})}
}

// The values of the label stage.
const (
	stageUser    = "kernel_to_user"
	stageSent    = "user_to_sent"
	stageMerged  = "received_to_merged"
	stageApplied = "merged_to_applied"
)

// stage returns what takes the times of a stage of a device.
func (l lag) stage(d config.Device, name string) func(time.Duration) {
	h := l.WithLabelValues(d.Name, d.Netns, name)
	return func(took time.Duration) { h.Observe(max(0, took.Seconds())) }
}
