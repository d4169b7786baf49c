"""A pass and a target for qgraph that live in a distribution of their own."""
