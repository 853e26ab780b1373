"""What the experiments share: configuration, data, models, training, results, figures, pages."""
