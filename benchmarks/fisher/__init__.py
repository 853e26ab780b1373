"""What the experiments on the Fisher matrix share."""
