"""Average the weights of a model in training, and use the average in validations and checkpoints."""
