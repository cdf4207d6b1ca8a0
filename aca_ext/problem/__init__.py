"""Description of a solve: its arguments, checked, and the state packed into one tensor."""
