"""The HTML and terminal reports."""
