"""From the word TARGET to a session with its disks."""
