"""A graph for people: an outline, a drawing, and groups for a graph viewer."""
