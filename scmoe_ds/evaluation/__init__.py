"""Evaluates a trained model. `perplexity` computes loss and perplexity of `documents`: `windows` says which tokens are
read and scored, `scoring` runs the model. `tasks` runs benchmarks of EleutherAI's lm_eval, and `harness` answers it."""
