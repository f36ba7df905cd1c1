"""The device mesh and the collectives: everything that knows there is more than one device."""
