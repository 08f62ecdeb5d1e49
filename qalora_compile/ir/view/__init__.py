"""A graph for people to look at: an outline, a drawing, and a file for Netron."""
