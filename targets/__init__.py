"""What models are compiled for: one family of targets to a file."""
