"""What lies on disk: headers, the walk, qemu-img, dependents, space, comparison."""
