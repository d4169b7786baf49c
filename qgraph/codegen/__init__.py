"""Source code from integer graphs: standard integer operators and the functions of domain "qgraph"."""
