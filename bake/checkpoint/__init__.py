"""What is on disk, read and written."""
