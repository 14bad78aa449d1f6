"""What the tests stand on: real QEMUs, disks, guests, faults. Nothing here is a test."""
