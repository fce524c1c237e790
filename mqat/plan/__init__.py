"""What can be decided, and refused, about a run before it is queued."""
