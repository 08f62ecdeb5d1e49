"""The operators of the IR, one family a file: schema, fake kernel and reference kernel."""
