"""Running a graph or an artifact: sessions, verification, benchmark."""
