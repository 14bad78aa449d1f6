"""What runs on this machine: VMs, command lines, who holds what, permissions."""
