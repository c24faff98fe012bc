"""What the model wrappers and callbacks of all subjects share: base classes, schedules, logging."""
