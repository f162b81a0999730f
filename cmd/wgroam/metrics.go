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

	"github.com/wgroam/wgroam/failover"
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
	reg.MustRegister(collector{d}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
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
// a peer, and never one for an endpoint: each roam would make a new series.
type collector struct{ d *daemon }

var metrics = []metric{
	counter("events_total", "Endpoint changes that the detector reported.", func(d control.DeviceStatus) float64 { return float64(d.Events) }),
	counter("events_lost_total", "Events that found the ring buffer full.", func(d control.DeviceStatus) float64 { return float64(d.Lost) }),
	counter("events_limited_total", "Events that were held back because a peer, or all together, changed too often.", func(d control.DeviceStatus) float64 { return float64(d.Limited) }),
	counter("resyncs_total", "Dumps of the device because events were missing.", func(d control.DeviceStatus) float64 { return float64(d.Resyncs) }),
	counter("sweep_repairs_total", "Changes that only the slow sweep found.", func(d control.DeviceStatus) float64 { return float64(d.SweepRepairs) }),
	counter("applied_total", "Endpoints written to the device.", func(d control.DeviceStatus) float64 { return float64(d.Applied) }),
	counter("apply_errors_total", "Endpoints that could not be written.", func(d control.DeviceStatus) float64 { return float64(d.ApplyErrors) }),
	counter("records_sent_total", "Records published.", func(d control.DeviceStatus) float64 { return float64(d.Feed.Sent) }),
	counter("records_received_total", "Records of other nodes received.", func(d control.DeviceStatus) float64 { return float64(d.Feed.Received) }),
	gauge("peers", "Peers in the device.", func(d control.DeviceStatus) float64 { return float64(d.Peers) }),
	gauge("records", "Records in the table.", func(d control.DeviceStatus) float64 { return float64(d.Records) }),
	gauge("records_waiting", "Records of peers that the device does not have.", func(d control.DeviceStatus) float64 { return float64(d.Waiting) }),
}

var (
	roleDesc  = prometheus.NewDesc("wgroam_role", "1 for the role that the node has for the device.", []string{"device", "netns", "role"}, nil)
	alarmDesc = prometheus.NewDesc("wgroam_role_alarm", "1 while something is wrong with the roles.", []string{"device", "netns", "alarm"}, nil)
)

var refusedDesc = prometheus.NewDesc("wgroam_refused_total", "Frames and records that were refused.", []string{"device", "netns", "reason"}, nil)

type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(control.DeviceStatus) float64
}

func counter(name, help string, value func(control.DeviceStatus) float64) metric {
	return metric{prometheus.NewDesc("wgroam_"+name, help, []string{"device", "netns"}, nil), prometheus.CounterValue, value}
}

func gauge(name, help string, value func(control.DeviceStatus) float64) metric {
	return metric{prometheus.NewDesc("wgroam_"+name, help, []string{"device", "netns"}, nil), prometheus.GaugeValue, value}
}

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range metrics {
		ch <- m.desc
	}
	ch <- roleDesc
	ch <- alarmDesc
	ch <- refusedDesc
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	for _, d := range c.d.status().Devices {
		for _, m := range metrics {
			ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(d), d.Name, d.Netns)
		}
		ch <- prometheus.MustNewConstMetric(roleDesc, prometheus.GaugeValue, 1, d.Name, d.Netns, d.Role)
		for _, a := range failover.Alarms {
			up := 0.0
			if slices.ContainsFunc(d.Alarms, func(r control.RoleAlarm) bool { return r.Alarm == string(a) }) {
				up = 1
			}
			ch <- prometheus.MustNewConstMetric(alarmDesc, prometheus.GaugeValue, up, d.Name, d.Netns, string(a))
		}
		for reason, n := range d.Feed.Refused {
			ch <- prometheus.MustNewConstMetric(refusedDesc, prometheus.CounterValue, float64(n), d.Name, d.Netns, reason)
		}
	}
}
