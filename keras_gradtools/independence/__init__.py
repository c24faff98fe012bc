"""Whether the examples of a batch are independent, without which a batch Jacobian is meaningless."""
