"""
Faults: merges that are killed, cut off from power and lied to by their storage, at every single operation.

    log        one ordered log of all operations on all files, and the fault that is injected into it
    gate       sees the operations of real processes on real files (seccomp)
    nbdserver  sees the operations on images that come over the network
    stage      the images, what their guest must see, and a merge under observation
    oracle     is the disk right, and was it called what it is?
    sweeps     kills, power cuts and errors at every operation; cuts: what a power cut leaves
    tools      qmpmerge itself killed, at every command and file operation
    tidying    tidy of many disks killed, and run again
    cases      the matrix of named cases
    table      what came of it

Two ways to see the storage, since each shows what the other cannot. The gate holds every writing system call of QEMU, of
a storage daemon and of qmpmerge itself until the bench has done it in their place: so paths, locks, headers and the
comparison by qemu-img are the real ones, and qmpmerge's own files stand in the same log. The NBD server needs nothing of
the kernel, and is how images on a network look.
"""
