"""What the kits of several operators share."""
