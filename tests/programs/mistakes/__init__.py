"""What newcomers do wrong, a row for each mistake: what is done, and the one sentence that it ends with.

tests/programs/test_bad_input.py has the rows of settings that a training run refuses, tests/config those of DeepSpeed's
JSON, tests/programs/test_flags.py those of flags.
"""
