"""Values as terms in a normal form, and what operators mean."""
