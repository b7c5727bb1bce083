"""The rewrites that make up `canonicalize`, one kind a file."""
