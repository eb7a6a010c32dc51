"""How good a trained model is: `windows` says what is read and scored, `scoring` runs the model, `text` holds what is
evaluated, `perplexity` sums it up; `harness` and `tasks` run the benchmarks of EleutherAI's lm_eval."""
