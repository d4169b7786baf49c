"""Read-only facts of a graph that passes share."""
