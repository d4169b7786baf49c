"""Arrays in, arrays out: the numerics of compression, with no knowledge of graphs."""
