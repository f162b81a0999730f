// SPDX-License-Identifier: MIT

package bpf

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// errNoTC: the kernel lacks a module that clsact needs.
var errNoTC = errors.New("it has neither tcx (Linux 6.6) nor tc's clsact and bpf (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF)")

// clsact is a filter for each direction, which stays until somebody removes it.
// The kernel knows none of their owners, so their name says it.
type clsact struct {
	nl      *netlink.Handle
	link    netlink.Link
	made    bool // the qdisc is ours
	in, out int  // the programs' ids
}

var clsactParents = []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS}

func attachClsact(nl *netlink.Handle, ifindex int, in, out *ebpf.Program) (attachment, error) {
	c := &clsact{nl: nl, link: &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}}
	owner, err := self()
	if err != nil {
		return nil, err
	}
	switch err := nl.QdiscAdd(c.qdisc()); {
	case err == nil:
		c.made = true
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("add qdisc clsact: %w (%w)", errNoTC, err)
	case !errors.Is(err, unix.EEXIST):
		return nil, fmt.Errorf("add qdisc clsact: %w", err)
	}
	for i, prog := range []*ebpf.Program{in, out} {
		if err = c.add(clsactParents[i], prog, owner); err != nil {
			_ = c.detach() // the reason for failing is the one to report
			return nil, err
		}
	}
	return c, nil
}

func (c *clsact) qdisc() netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: c.link.Attrs().Index,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_CLSACT,
	}}
}

// add adds a filter before those of others, as far as that can be had, and removes
// those of dead processes.
func (c *clsact) add(parent uint32, prog *ebpf.Program, owner process) error {
	info, err := prog.Info()
	if err != nil {
		return fmt.Errorf("read the program's id: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return errors.New("the kernel tells no program's id")
	}
	others, err := c.nl.FilterList(c.link, parent)
	if err != nil {
		return fmt.Errorf("list filters: %w", err)
	}
	// Filters of the same kind and protocol may share a priority, the new one being
	// the last of them. 0 would not do: the kernel begins at 49152.
	taken := make(map[uint16]bool)
	for _, f := range others {
		b, isBPF := f.(*netlink.BpfFilter)
		if isBPF && owner.outlived(b.Name) {
			if err := c.nl.FilterDel(f); err != nil && !isGone(err) {
				return fmt.Errorf("remove filter %s of a process that has ended: %w", b.Name, err)
			}
			continue
		}
		if !isBPF || f.Attrs().Protocol != unix.ETH_P_ALL {
			taken[f.Attrs().Priority] = true
		}
	}
	priority := uint16(1)
	for taken[priority] {
		priority++
	}
	err = c.nl.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: c.link.Attrs().Index, Parent: parent, Priority: priority, Protocol: unix.ETH_P_ALL,
		},
		Fd: prog.FD(), Name: owner.filter(), DirectAction: true,
	})
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("add filter: %w (%w)", errNoTC, err)
	}
	if err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	if parent == netlink.HANDLE_MIN_INGRESS {
		c.in = int(id)
	} else {
		c.out = int(id)
	}
	return nil
}

func (c *clsact) attached(int) (bool, error) {
	n := 0
	for _, parent := range clsactParents {
		filters, err := c.nl.FilterList(c.link, parent)
		if err != nil && !isGone(err) {
			return false, fmt.Errorf("list filters: %w", err)
		}
		for _, f := range filters {
			if c.owns(f) {
				n++
			}
		}
	}
	return n == len(clsactParents), nil
}

func (c *clsact) owns(f netlink.Filter) bool {
	b, ok := f.(*netlink.BpfFilter)
	return ok && b.Id != 0 && (b.Id == c.in || b.Id == c.out)
}

func (c *clsact) detach() error {
	var errs []error
	others := 0
	for _, parent := range clsactParents {
		filters, err := c.nl.FilterList(c.link, parent)
		if err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("list filters: %w", err))
			others++ // perhaps
		}
		for _, f := range filters {
			if !c.owns(f) {
				others++
			} else if err := c.nl.FilterDel(f); err != nil && !isGone(err) {
				errs = append(errs, fmt.Errorf("remove filter: %w", err))
			}
		}
	}
	// It stays for those who have come since, and who do not know whose it is.
	if c.made && others == 0 {
		if err := c.nl.QdiscDel(c.qdisc()); err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("remove qdisc clsact: %w", err))
		}
	}
	return errors.Join(errs...)
}

// isGone: the link, its qdisc or the filter is no more.
func isGone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

// process names a process for as long as the machine runs: numbers come again,
// and mean nothing in another PID namespace.
type process struct {
	namespace uint64 // inode number
	pid       int
	start     uint64 // clock ticks since boot
}

func self() (process, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return process{}, fmt.Errorf("find the PID namespace: %w", err)
	}
	start, err := startTime("self")
	return process{st.Ino, os.Getpid(), start}, err
}

// startTime reads when a process began. That of none is an error.
func startTime(pid string) (uint64, error) {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, err
	}
	// The name before it may hold anything, such as spaces and parentheses.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%s/stat: no start time", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

const filterName = "wgroam-uplink %d %d %d"

// filter is the name of this process's filters.
func (p process) filter() string {
	return fmt.Sprintf(filterName, p.namespace, p.pid, p.start)
}

// outlived reports whether a filter is of a process that has ended, as far as can
// be told from here.
func (p process) outlived(filter string) bool {
	var other process
	if n, _ := fmt.Sscanf(filter, filterName, &other.namespace, &other.pid, &other.start); n != 3 || other.namespace != p.namespace {
		return false
	}
	start, err := startTime(strconv.Itoa(other.pid))
	return errors.Is(err, os.ErrNotExist) || err == nil && start != other.start
}
