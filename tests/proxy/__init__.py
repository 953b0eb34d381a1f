"""Tests of the proxy, against real sockets: raw upstreams, a small daemon on a Unix socket, the command itself."""
