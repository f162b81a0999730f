// SPDX-License-Identifier: MIT

package feed

import (
	"strings"
	"testing"
)

func TestRedact(t *testing.T) {
	for _, tc := range []struct {
		urls, want string
		good       bool
	}{
		{"nats://host:4222", "nats://host:4222", true},
		{"host:4222", "host:4222", true},
		{"nats://alice:sesame@host:4222", "nats://host:4222", true},
		{"sesame@host:4222", "nats://host:4222", true},
		{"alice:sesame@host:4222", "nats://host:4222", true},
		{"tls://alice:sesame@one, alice:sesame@two:1 ,three", "tls://one,nats://two:1,three", true},
		{"nats://alice:ses%zzame@host:4222", "host:4222", false},
		{"nats://alice:sesame/%@host", "host", false},
		{"alice:sesame#@host:4222", "host:4222", false},
		{"nats://alice:sesame,42@host:4222", "(no URL),nats://host:4222", false},
	} {
		if got := redact(tc.urls); got != tc.want {
			t.Errorf("%q: got %q, want %q", tc.urls, got, tc.want)
		}
		_, _, err := External{URL: tc.urls}.options()
		if (err == nil) != tc.good {
			t.Errorf("%q: %v", tc.urls, err)
		}
		if err != nil && (strings.Contains(err.Error(), "alice") || strings.Contains(err.Error(), "ses")) {
			t.Errorf("%q: the error has it: %v", tc.urls, err)
		}
	}
}
