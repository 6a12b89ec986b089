"""A TCP proxy whose connections can be cut, stalled or refused while they are in use."""

import contextlib
import re
import socket
import struct
import threading
import time
from types import TracebackType

Mode = str | tuple[str, float]

_CHUNK = 1 << 14
_CONDITION = re.compile(rb"if-none-match:[^\r\n]*\r\n", re.IGNORECASE)


class FaultProxy:
    """Passes 127.0.0.1:`port` on to 127.0.0.1:`target_port`, and breaks what `mode` says.

    "pass": nothing. ("cut", n): each connection after n bytes of responses; ("cut_up", n): after n
    bytes of requests. "refuse": at once; ("refuse_for", seconds): at once, for so long. "stall":
    neither direction moves. "strip_if_none_match": the store never sees that header (one that
    checks signatures will say so). ("cut", 0) is a lost answer: the request has arrived.

    A mode set while connections are open holds for what they do next. `connections` counts those
    accepted, `faults` those that met with one.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.connections = 0
        self.faults = 0
        self._mode: Mode = "pass"
        self._until = 0.0
        self._heal_at: int | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]

    @property
    def mode(self) -> Mode:
        """What is done to connections; ("refuse_for", s) becomes "pass" once over."""
        if self._mode[0] == "refuse_for" and time.monotonic() >= self._until:
            self._mode = "pass"
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if isinstance(mode, tuple) and mode[0] == "refuse_for":
            self._until = time.monotonic() + mode[1]
        self._heal_at = None
        self._mode = mode
        if _kind(mode) in ("refuse", "refuse_for"):
            self.drop()

    def break_for(self, mode: Mode, faults: int) -> None:
        """Sets a mode that becomes "pass" once that many connections have met with it."""
        self.mode = mode
        with self._lock:
            self._heal_at = self.faults + faults

    def drop(self) -> None:
        """Cuts every open connection."""
        with self._lock:
            sockets = list(self._open)
        for one in sockets:
            _cut(one)

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._accept, name="fault-proxy", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        _cut(self._listener)
        self._listener.close()
        self.drop()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if _kind(self.mode) in ("refuse", "refuse_for"):
            self._fault()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # without lingering: a reset
            return
        try:
            server = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
        except OSError:  # the real one is down: refused, as it would be without us
            client.close()
            return
        server.settimeout(None)
        both = (client, server)
        with self._lock:
            self._open.update(both)
        for one in both:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        up = threading.Thread(target=self._pump, args=(client, server, "cut_up"), daemon=True)
        up.start()
        self._pump(server, client, "cut")
        up.join()
        with self._lock:
            self._open.difference_update(both)
        for one in both:
            one.close()

    def _pump(self, source: socket.socket, sink: socket.socket, cut: str) -> None:
        """One direction of a connection, until an end closes it or the mode breaks it."""
        passed = 0
        stalled = False
        try:
            while data := source.recv(_CHUNK):
                while self.mode == "stall" and not self._closing.is_set():
                    if not stalled and cut == "cut_up":
                        self._fault()
                    stalled = True
                    time.sleep(0.02)
                mode = self.mode
                if cut == "cut_up" and mode == "strip_if_none_match":
                    data, stripped = _CONDITION.subn(b"", data)
                    if stripped:
                        self._fault()
                if _kind(mode) == cut and passed + len(data) >= mode[1]:
                    sink.sendall(data[: max(0, int(mode[1]) - passed)])
                    self._fault()
                    break
                sink.sendall(data)
                passed += len(data)
            else:
                with contextlib.suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)
                return
        except OSError:
            pass
        _cut(source)
        _cut(sink)

    def _fault(self) -> None:
        with self._lock:
            self.faults += 1
            if self._heal_at is not None and self.faults >= self._heal_at:
                self._heal_at, self._mode = None, "pass"


def _kind(mode: Mode) -> str:
    return mode if isinstance(mode, str) else mode[0]


def _cut(one: socket.socket) -> None:
    """Ends a connection at once, also for a thread of ours that waits on it."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
