"""Values as terms in a normal form, and the semantics of operators."""
