"""What the wrappers and callbacks of all subjects share within `fit`."""
