"""Model families: where their modules are, and how one block at a time is run."""
