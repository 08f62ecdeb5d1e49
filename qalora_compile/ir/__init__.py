"""The intermediate representation: programs, operators, plans. Facts, no policy."""
