"""Pictures of arrays and matrices, which the plots of all subjects share."""
