"""From a checkpoint and options to the type, size and offset of every tensor. Pure: no disk, no library."""
