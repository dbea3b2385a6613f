"""A job and its folder: what is to be done, and what of it is finished on the disk."""
