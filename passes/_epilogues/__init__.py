"""What `fuse-epilogues` fuses, one kind a file."""
