"""The pass framework: base class, pipelines, registry, pattern matching and rewriting."""
