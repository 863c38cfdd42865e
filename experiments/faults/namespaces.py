"""Several hosts on one machine: Linux network namespaces on a bridge. Needs root."""

import os
import pathlib
import shutil
import socket
import subprocess


class Namespaces:
    """So many hosts, each a network namespace with its own address and interface.

    As a context: made at the start, removed at the end. JAX's CPU collectives listen at the address
    of the machine's name, so that each namespace has its own `/etc/hosts`.

    Args:
      number: how many hosts.
      name: part of the names of what is made; at most 6 letters.

    Attributes:
      names: of the namespaces; `ip netns exec NAME command` runs a command there.
      addresses: of the hosts.
      interface: name of the interface inside each.
    """

    interface = "eth0"

    def __init__(self, number: int, name: str = "psjax"):
        self.bridge = f"{name}-br"
        self.names = [f"{name}-{i}" for i in range(number)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(number)]
        self.outside = [f"{name}-v{i}" for i in range(number)]

    def __enter__(self):
        reason = unavailable()
        if reason:
            raise OSError(reason)
        self.remove()
        self._ip("link", "add", self.bridge, "type", "bridge")
        self._ip("link", "set", self.bridge, "up")
        for name, address, outside in zip(self.names, self.addresses, self.outside):
            self._ip("netns", "add", name)
            peer = ("type", "veth", "peer", "name", self.interface, "netns", name)
            self._ip("link", "add", outside, *peer)
            self._ip("link", "set", outside, "master", self.bridge, "up")
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", self.interface)
            for device in ("lo", self.interface):
                self._ip("-n", name, "link", "set", device, "up")
            hosts = pathlib.Path("/etc/netns", name, "hosts")
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        return self

    def __exit__(self, *_):
        self.remove()

    def remove(self) -> None:
        """Remove what is there, also of an earlier run that did not end."""
        for name, outside in zip(self.names, self.outside):
            self._ip("netns", "del", name, check=False)
            self._ip("link", "del", outside, check=False)
            shutil.rmtree(pathlib.Path("/etc/netns", name), ignore_errors=True)
        self._ip("link", "del", self.bridge, check=False)

    def up(self) -> None:
        """Every interface up again."""
        for name in self.names:
            self._ip("-n", name, "link", "set", self.interface, "up")

    @staticmethod
    def _ip(*words, check=True):
        subprocess.run(["ip", *words], check=check, capture_output=True)


def unavailable() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.name != "posix" or shutil.which("ip") is None:
        return "network namespaces need Linux and the command ip (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"psjax-try{os.getpid() % 1000}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not permitted here ({made.stderr.strip()[:80]})"
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None
