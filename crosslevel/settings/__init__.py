"""Settings: from a command line or a file to a call, and back to a file."""
