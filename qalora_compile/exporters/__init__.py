"""Writers of deployable files. Each states what it keeps exactly and what it rounds."""
