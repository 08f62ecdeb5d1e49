"""What every pass is made of: the base class, pipelines, the registry, matching and rewriting."""
