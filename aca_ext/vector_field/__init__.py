"""The user's func: called and checked, looked into for what it holds, and replayed."""
