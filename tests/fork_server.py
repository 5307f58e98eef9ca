"""Runs `deadhead` and Python programs in forks of one process that has imported what takes seconds to import.

As a program it is the server: `python -m tests.fork_server SOCKET`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Without the site packages it starts in milliseconds.
_CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
message = {{"kind": {kind!r}, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(server, [json.dumps(message).encode()], [0, 1, 2])
code = server.recv(1)
sys.exit(code[0] if code else 1)
"""


@contextmanager
def fork_server(folder: Path) -> Iterator[Path]:
    """Start a server, and yield a folder of the programs that go to it.

    These are `deadhead`, and `run-python`, whose argument is a Python program.
    """
    address = str(folder / "socket")
    programs = folder / "programs"
    programs.mkdir()
    for name in ("deadhead", "run-python"):
        text = _CLIENT.format(python=sys.executable, address=address, kind=name)
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    server = subprocess.Popen([sys.executable, "-m", "tests.fork_server", address], cwd=ROOT)
    try:
        while not os.path.exists(address):
            assert server.poll() is None
            time.sleep(0.05)
        yield programs
    finally:
        server.terminate()
        server.wait()


def _serve(address: str) -> None:
    import transformers

    import deadhead
    from deadhead.cli import main

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "GPT2LMHeadModel", "Trainer"):
        getattr(transformers, name)
    for name in ("attach", "cut", "cut_checkpoint", "load", "save", "prune", "prune_checkpoint"):
        getattr(deadhead, name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Under another name until it listens, as whoever waits looks for the file.
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(_handle(client, main))
        client.close()
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def _handle(client: socket.socket, main: object) -> int:
    text, descriptors, *_ = socket.recv_fds(client, 1 << 20, 3)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    message = json.loads(text)
    os.chdir(message["folder"])
    os.environ.clear()
    os.environ.update(message["environment"])
    sys.path.insert(0, "")
    sys.argv = [message["kind"], *message["arguments"]]
    try:
        if message["kind"] == "deadhead":
            main()  # type: ignore[operator]
        else:
            exec(compile(message["arguments"][0], "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    client.send(bytes([code]))
    return code


if __name__ == "__main__":
    _serve(sys.argv[1])
