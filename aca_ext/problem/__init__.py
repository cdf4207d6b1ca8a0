"""Description of a solve: its validated arguments, and the state packed into one tensor."""
