"""Several hosts on one machine, each with its own network, address, name, processes and sshd; files are shared.

    python tests/lab/hosts.py run 2 -- CMD ...     the hosts are up while CMD runs; $LAB_SSH_CONFIG reaches them by name

A host is a process that is the first one of its own PID namespace: when it is killed, everything on the host is gone at
once, as when a machine loses power. Needs root, iproute2, iptables and OpenSSH's server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "ip": "iproute2", "iptables": "iptables"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START_SECONDS = 20


class CannotRun(Exception):
    """This machine cannot have hosts of its own; the message says what is missing."""


class Hosts:
    """Hosts h1, h2, ... while entered; `ssh_config` lets this machine reach each by its name."""

    def __init__(self, count: int, folder: Path, *, environ: dict[str, str] | None = None) -> None:
        self.names = [f"h{number}" for number in range(1, count + 1)]
        self.folder = folder
        self.ssh_config = folder / "ssh_config"
        self._environ = environ or {}  # of everything that is started on a host by ssh
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._bridge = ""

    def __enter__(self) -> Hosts:
        require()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lay_cables()
            self._write_keys()
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def address(self, name: str) -> str:
        """The host's own address."""
        return f"{self._subnet}.{10 + int(name[1:])}"

    @property
    def gateway(self) -> str:
        """This machine's address, as hosts see it."""
        return f"{self._subnet}.254"

    def boot(self, name: str) -> None:
        """Start a host, or start it again after `crash`; returns when its sshd answers."""
        command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        mine = [sys.executable, __file__, "init", name, str(self.folder), self.address(name)]
        environ = {**os.environ, "PATH": PATH}
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            process = subprocess.Popen(
                [*command, *mine], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environ, start_new_session=True
            )
        self._inits[name] = process
        first = self._first_process(name)
        cable = f"{self._bridge}.{name[1:]}"
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(first))
        _ip("link", "set", cable, "master", self._bridge, "up")
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection((self.address(name), 22), timeout=1):
                return
            if process.poll() is not None or time.monotonic() > deadline:
                raise CannotRun(f"host {name} does not come up: {(self.folder / f'{name}.log').read_text()[-500:]}")
            time.sleep(0.02)

    def crash(self, name: str) -> None:
        """Power off: every process of the host is gone, and its peers are told nothing."""
        self.cut(name)  # first, or the kernel would still close its connections politely
        self._kill(name)

    def cut(self, name: str) -> None:
        """Pull the host's cable."""
        _ip("link", "set", f"{self._bridge}.{name[1:]}", "down")

    def join(self, name: str) -> None:
        """Plug it in again."""
        _ip("link", "set", f"{self._bridge}.{name[1:]}", "up")

    def part(self, one: str, other: str) -> None:
        """Let two hosts lose what they send to each other; others still reach both. `other`: "" for this machine."""
        self._drop("-A", one, other)

    def heal(self, one: str, other: str) -> None:
        """Undo `part`."""
        self._drop("-D", one, other)

    def _drop(self, action: str, one: str, other: str) -> None:
        there = self.address(other) if other else self.gateway
        self.run(one, "iptables", "-w", action, "INPUT", "-s", there, "-j", "DROP")
        self.run(one, "iptables", "-w", action, "OUTPUT", "-d", there, "-j", "DROP")

    def on(self, name: str, *command: str) -> list[str]:
        """The command line that runs a command on a host, without ssh."""
        return ["nsenter", "-t", str(self._first_process(name)), "--net", "--uts", "--mount", "--pid", *command]

    def run(self, name: str, *command: str) -> str:
        """Run a command on a host; its output."""
        done = subprocess.run(self.on(name, *command), capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{command} on {name}: exit code {done.returncode}: {done.stderr}")
        return done.stdout

    def processes(self, name: str) -> dict[int, str]:
        """Command lines of what runs on a host beside its sshd, by the numbers that they have there."""
        found = {}
        for line in self.run(name, "ps", "-eo", "pid=,args=").splitlines():
            number, _, words = line.strip().partition(" ")
            if int(number) != 1 and not words.startswith(("sshd:", "/usr/sbin/sshd", "ps -eo")):
                found[int(number)] = words
        return found

    def down(self) -> None:
        """Power everything off and take the cables away."""
        for name in list(self._inits):
            self._kill(name)
        if self._bridge:
            _ip("link", "del", self._bridge, check=False)
            _firewall("-D", self._bridge)
        self._bridge = ""

    def _kill(self, name: str) -> None:
        process = self._inits.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        _ip("link", "del", f"{self._bridge}.{name[1:]}", check=False)

    def _lay_cables(self) -> None:
        """A bridge with a network that no other lab has."""
        for number in range(1, 250):
            if _ip("link", "add", f"utlab{number}", "type", "bridge", check=False) == 0:
                break
        else:
            raise CannotRun("no bridge can be made: a kernel without bridges, or 249 labs at once")
        self._bridge, self._subnet = f"utlab{number}", f"10.88.{number}"
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        _firewall("-I", self._bridge)

    def _write_keys(self) -> None:
        """A key for users and one for hosts, names for addresses, and the settings of both ends."""
        folder = self.folder
        for name in ("user_key", "host_key"):
            if not (folder / name).exists():
                make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
                subprocess.run(make, check=True, stdin=subprocess.DEVNULL)
        (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
        (folder / "authorized_keys").chmod(0o600)
        host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        known = [f"{name},{self.address(name)} {host_key}" for name in self.names]
        (folder / "known_hosts").write_text("\n".join(known) + "\n")
        names = [f"{self.address(name)} {name}" for name in self.names]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *names]) + "\n")
        reach = [f"Host {name}\n  HostName {self.address(name)}" for name in self.names]
        all_hosts = [
            "Host *",
            f"  IdentityFile {folder / 'user_key'}",
            "  IdentitiesOnly yes",
            f"  UserKnownHostsFile {folder / 'known_hosts'}",
            "  StrictHostKeyChecking yes",
        ]
        self.ssh_config.write_text("\n".join([*reach, *all_hosts]) + "\n")
        pairs = " ".join(f'"{name}={value}"' for name, value in self._environ.items())
        settings = [
            f"HostKey {folder / 'host_key'}",
            f"AuthorizedKeysFile {folder / 'authorized_keys'}",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            "StrictModes no",
            "UsePAM no",
            "PidFile none",
            *([f"SetEnv {pairs}"] if pairs else []),
        ]
        (folder / "sshd_config").write_text("\n".join(settings) + "\n")

    def _first_process(self, name: str) -> int:
        """Its number on this machine."""
        unshare = self._inits[name].pid
        children = Path(f"/proc/{unshare}/task/{unshare}/children")
        deadline = time.monotonic() + START_SECONDS
        while not (found := children.read_text().split()):
            if self._inits[name].poll() is not None or time.monotonic() > deadline:
                raise CannotRun(f"host {name} cannot be started: {(self.folder / f'{name}.log').read_text()[-500:]}")
            time.sleep(0.01)
        return int(found[0])


def require(*, install: bool = True) -> None:
    """Raise CannotRun unless this machine can have hosts; packages that are missing are installed by apt."""
    if os.geteuid() != 0:
        raise CannotRun("needs root, to make network namespaces")
    missing = [package for program, package in PACKAGES.items() if shutil.which(program, path=PATH) is None]
    if not missing:
        return
    if not install or shutil.which("apt-get") is None:
        raise CannotRun(f"needs {', '.join(missing)}")
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False, timeout=180)
    except subprocess.TimeoutExpired as error:
        raise CannotRun(f"needs {', '.join(missing)}, and apt-get does not come to an end") from error
    if done.returncode:
        raise CannotRun(f"needs {', '.join(missing)}, and apt-get fails: {done.stderr.strip()[-200:]}")


def init(name: str, folder: Path, address: str) -> None:
    """Be the first process of a host: name it, connect it, start its sshd, and bury the dead."""
    socket.sethostname(name)
    # Not of the machine: what is mounted here is seen here alone.
    _run("mount", "--make-rprivate", "/")
    _run("mount", "-t", "proc", "proc", "/proc")
    _run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    _run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
    sys.stdin.readline()  # the cable is there
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    _run("ip", "link", "set", "eth0", "up")
    Path("/run/sshd").mkdir(exist_ok=True)
    # An empty environment: what runs on a host has what a login there gives, and not what these tests were given.
    subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")], env={"PATH": PATH})
    signal.signal(signal.SIGCHLD, lambda number, frame: _bury())
    sys.stdin.read()  # until whoever started this host is gone, however it went


@contextlib.contextmanager
def hosts(count: int, *, environ: dict[str, str] | None = None) -> Iterator[Hosts]:
    """Hosts in a folder of their own, which goes with them."""
    folder = Path(tempfile.mkdtemp(prefix="unitrain-hosts-"))
    try:
        with Hosts(count, folder, environ=environ) as up:
            yield up
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leave() -> None:
    """Take everything down first, also where `timeout` says it twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def _bury() -> None:
    """Orphans become children of the first process."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _firewall(action: str, bridge: str) -> None:
    """Docker may have, or get, the machine's firewall look at what a bridge passes on, and refuse it."""
    subprocess.run(["iptables", "-w", action, "FORWARD", "-i", bridge, "-o", bridge, "-j", "ACCEPT"], check=False)


def _ip(*words: str, check: bool = True) -> int:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise CannotRun(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.returncode


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


def main(words: Sequence[str]) -> int:
    """See the head of this file."""
    if words[:1] == ["init"]:
        init(words[1], Path(words[2]), words[3])
        return 0
    if len(words) < 4 or words[0] != "run" or words[2] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: _leave())
    passed = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    try:
        with hosts(int(words[1]), environ=passed) as up:
            environ = {**os.environ, "LAB_SSH_CONFIG": str(up.ssh_config), "LAB_HOSTS": ",".join(up.names)}
            with subprocess.Popen(words[3:], env=environ) as process:
                try:
                    return process.wait()
                finally:
                    process.kill()
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 77


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
