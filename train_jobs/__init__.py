"""Commands on Ray Train, Tune and Data: train, tune, evaluate, predict, similarity."""
