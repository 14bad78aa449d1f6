"""A monitor that somebody holds, or that stands still."""

import os
import signal

from rig.machines import Machine

CLIENT = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.recv(4096)
print("greeted", flush=True)
sys.stdin.read()
"""


def stop(vm: Machine) -> None:
    """Stop the process, and return when it stands still."""
    vm.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, vm.process.pid, os.WSTOPPED | os.WNOWAIT)
