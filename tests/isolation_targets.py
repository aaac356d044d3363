"""Objects that misbehave in a worker, each in its own way."""

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from suanli.base.errors import BadInputError, CaptureError, MissingBackendError
from suanli.measure.isolation import report_progress
from suanli.measure.timing import timed_calls


class Plain:
    """Behaves."""

    def __init__(self, start: int = 0) -> None:
        self.total = start

    def add(self, amount: int) -> int:
        self.total += amount
        return self.total

    def echo(self, value: object) -> object:
        return value

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def path(self) -> list[str]:
        return sys.path

    def pid(self) -> int:
        return os.getpid()

    def _hidden(self) -> int:
        return 1

    def count(self, steps: int, delay_s: float = 0.0) -> int:
        for step in range(steps):
            report_progress(step=step)
            time.sleep(delay_s)
        return steps

    def write_at_exit(self, path: str) -> None:
        atexit.register(Path(path).write_text, "left")

    def timed(self, n: int) -> list[float]:
        return timed_calls(lambda: sum(range(2000)), n)


class Noisy:
    """Prints in every way a library can."""

    def __init__(self) -> None:
        print("hello from __init__")

    def talk(self) -> str:
        print('{"result": "forged"}')
        os.write(1, b'{"result": "forged"}\n')
        os.write(2, b"warning: noise\n")
        subprocess.run([sys.executable, "-c", "print('{\"result\": 1}')"], check=True)
        return "truth"


class Broken:
    """Fails while it is built."""

    def __init__(self, how: str) -> None:
        if how == "raise":
            raise ValueError("no such weights\nsecond line")
        if how == "suanli":
            raise BadInputError("unknown workload", next_step="see the list")
        if how == "hang":
            time.sleep(600)
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)


class Misbehaving:
    """One method per way to fail."""

    def segfault(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def abort(self) -> None:
        os.write(2, b"first line\nOMP: Error #15: two runtimes\n")
        os.abort()

    def kill_self(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        time.sleep(600)

    def hang_deaf(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(1)

    def flood(self) -> None:
        while True:
            report_progress(text="x" * 1000)

    def leave(self, code: int) -> None:
        sys.exit(code)

    def leave_at_once(self) -> None:
        os._exit(0)

    def eat(self, megabytes: int, seconds: float = 0.0) -> int:
        held = []
        for _ in range(megabytes // 8):
            held.append(bytearray(os.urandom(1024) * 8 * 1024))
            time.sleep(0.001)
        time.sleep(seconds)
        return len(held)

    def eat_in_grandchild(self, megabytes: int) -> None:
        code = f"import time; x = bytearray(b'1') * ({megabytes} << 20); time.sleep(60)"
        subprocess.run([sys.executable, "-c", code], check=True)

    def raise_plain(self) -> None:
        raise RuntimeError("bad\nthing")

    def raise_empty(self) -> None:
        raise KeyError

    def raise_memory(self) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    def raise_capture(self) -> None:
        raise CaptureError("stopped", operator="aten.nonzero", next_step="use eager")

    def raise_missing(self) -> None:
        raise MissingBackendError("openvino", "pip install openvino")

    def unjson(self) -> object:
        return {1, 2}

    def nan(self) -> float:
        return float("nan")

    def garbage(self) -> None:
        """Write to every descriptor above standard error, as a stray native library might."""
        for fd in range(3, 64):
            try:
                os.write(fd, b"\x00\xffgarbage\n")
            except OSError:
                continue
        time.sleep(600)

    def fork_and_leave(self, path: str) -> None:
        """A child that inherits all pipes outlives the worker."""
        if os.fork() == 0:
            Path(path).write_text(str(os.getpid()))
            time.sleep(600)
        while not Path(path).exists() or not Path(path).read_text():
            time.sleep(0.01)
        os._exit(0)

    def grandchild(self, path: str, *, own_session: bool) -> int:
        """Start a process that outlives a plain kill of the worker; give its id."""
        code = f"import os,time; open({path!r}, 'w').write(str(os.getpid())); time.sleep(600)"
        if own_session:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.execv(sys.executable, [sys.executable, "-c", code])
                os._exit(0)
        else:
            subprocess.Popen([sys.executable, "-c", code])
        while not Path(path).exists() or not Path(path).read_text():
            time.sleep(0.01)
        return int(Path(path).read_text())
