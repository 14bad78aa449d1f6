"""Film strips: recordings of what real QEMUs say of their disks, in fixtures/."""
