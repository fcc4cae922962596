"""What is found, written out: a plan, its form, and where its every second and byte goes."""
