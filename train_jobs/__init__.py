"""Ray Train and Ray Data commands: train, evaluate, predict, similarity."""
