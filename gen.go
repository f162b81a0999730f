// SPDX-License-Identifier: MIT

package wgroam

// The generated files are committed, so that building needs no clang; "make
// drift" proves that they match their sources. BTF's little-endian objects
// serve amd64 and arm64 alike: a fentry program sees no registers, a kprobe
// program does.
//
//go:generate env GOPACKAGE=bpf go tool bpf2go -output-dir bpf -go-package bpf -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -type peer_event -type peer_state -type peer_endpoint -type device_id peer bpf/peer.bpf.c -- -O2 -g -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -I/usr/include/x86_64-linux-gnu
//go:generate env GOPACKAGE=bpf go tool bpf2go -output-dir bpf -go-package bpf -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types kprobe bpf/peer.bpf.c -- -DKPROBE -O2 -g -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -I/usr/include/x86_64-linux-gnu
//go:generate env GOPACKAGE=bpf go tool bpf2go -output-dir bpf -go-package bpf -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -type uplink_event -type uplink_address -type uplink_key -type uplink_local -type uplink_remote -type uplink_late uplink bpf/uplink.bpf.c -- -O2 -g -mcpu=v3 -Wall -Wextra -Werror -I/usr/include/x86_64-linux-gnu
