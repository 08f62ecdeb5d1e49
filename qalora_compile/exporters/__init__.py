"""Writers of deployable files; each declares what it keeps exactly and what it rounds."""
