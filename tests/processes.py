"""Programs as processes that cannot hang a test.

A process with threads must not be forked: a lock that another thread holds is never released in
the child. So the tests fork none of their own. A server process, which has imported torch and our
programs but never called anything, has one thread and forks a fresh child for each program: as
clean as a new interpreter, without the seconds that importing torch takes (and torch._dynamo, which
the first optimiser imports: half of them). Every wait has a limit.
"""
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[1]
LIMIT = int(os.environ.get("TEST_LIMIT", 300))  # seconds for any program, on a busy machine too
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LOADED = ["torch._dynamo", "train", "eval_gsm8k", "sample"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes", *LOADED])


def start_server() -> None:
    before = dict(os.environ)
    os.environ.update(ONE_THREAD, PYTHONPATH=f"{ROOT}{os.pathsep}{Path(__file__).parent}")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def child(argv: list[str], folder: str, env: dict, stdout: str, stderr: str) -> None:
    """In the child: what an interpreter does with `python argv[0] ...`, and with its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)   # the server ignores it
    code = 70                                          # the child itself went wrong
    try:
        for path, stream in ((stdout, 1), (stderr, 2)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, stream)
        encoding = env.get("PYTHONIOENCODING", "utf-8")
        sys.stdout = open(1, "w", encoding=encoding, closefd=False)
        sys.stderr = open(2, "w", encoding=encoding, closefd=False, errors="backslashreplace",
                          buffering=1)
        # What these tests stand on: torch is there already, and nobody held a lock at the fork.
        assert set(LOADED) <= sys.modules.keys()
        if sys.platform == "linux":
            assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1  # threads of the server
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = argv
        code = run_as_main(argv[0])
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            code = 120                                 # as the interpreter does
        os._exit(code)


def run_as_main(program: str) -> int:
    """A program of ours by its name, or one that a test wrote by its path."""
    try:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    return 0


class Program:
    """A program that was started; its output grows in the file stdout and, unless another is named
    for it, its errors in the same."""

    def __init__(self, *argv: object, folder: Path, stdout: Path | None = None,
                 stderr: Path | None = None, **env: str):
        start_server()
        self.output = stdout or folder / f"output.{time.monotonic_ns()}.txt"
        args = (list(map(str, argv)), str(folder), {**os.environ, **ONE_THREAD, **env},
                str(self.output), str(stderr or self.output))
        # daemon: whatever becomes of a test, its programs end with the tests
        self.process = CONTEXT.Process(target=child, args=args, daemon=True)
        self.process.start()

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait(self) -> int:
        """The exit status, -9 after kill -9."""
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(LIMIT)
            raise AssertionError(f"not done after {LIMIT} s: {self.text()}")
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Until the condition holds or the program has ended."""
        end = time.monotonic() + LIMIT
        while self.process.exitcode is None and not condition():
            if time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"waited {LIMIT} s in vain: {self.text()}")
            time.sleep(0.0005)


def run(*argv: object, folder: Path, **more) -> tuple[int, str]:
    """Exit status and output of a program."""
    program = Program(*argv, folder=folder, **more)
    return program.wait(), program.text()


def run_two(*argv: object, folder: Path) -> tuple[list[int], list[str]]:
    """Exit statuses and outputs of two processes that work together as under torchrun."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [Program(*argv, folder=folder, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            for rank in range(2)]
    codes = [program.wait() for program in both]
    return codes, [program.text() for program in both]
