"""A server announces an address that others can dial, and hands out peers that can be joined."""

from __future__ import annotations

from swarm.dht.addresses import joinable_at, own_host

PEER = "/p2p/QmPkJkuCUaLS52b7vcSV85HgPNqt9Tey5mkbGGwt5cnunN"
LOCAL = f"/ip4/127.0.0.1/tcp/4001{PEER}"
LAN = f"/ip4/192.168.1.5/tcp/4001{PEER}"


def test_a_host_that_says_where_it_is_is_announced() -> None:
    assert own_host("192.168.1.5", [LOCAL]) == "192.168.1.5"
    assert own_host("::1", []) == "::1"
    assert own_host("box.example.org", []) == "box.example.org"


def test_all_interfaces_mean_the_one_towards_the_first_peer() -> None:
    assert own_host("0.0.0.0", [LOCAL, LAN]) == "127.0.0.1"  # noqa: S104


def test_the_announced_address_comes_first_and_loopback_is_not_handed_out() -> None:
    assert joinable_at("192.168.1.5", [LAN, LOCAL]) == [LAN]
    public = f"/ip4/203.0.113.7/tcp/4001{PEER}"  # behind a router that forwards the port
    assert joinable_at("203.0.113.7", [LAN, LOCAL]) == [public, LAN]
    named = f"/dns/box.example.org/tcp/4001{PEER}"
    assert joinable_at("box.example.org", [LAN, LOCAL]) == [named, LAN]


def test_loopback_alone_is_better_than_nothing() -> None:
    assert joinable_at("127.0.0.1", [LOCAL]) == [LOCAL]
