"""What makes up one step of an optimizer: blocks of the model, schedule, curvature, update, state."""
